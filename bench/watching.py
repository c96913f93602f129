"""Starts the process that sees commits (`bench.watch`) and asks it what it saw."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson


@dataclass(slots=True)
class Watcher:
    process: asyncio.subprocess.Process

    async def seen(self) -> dict[str, float]:
        """Channel message id → monotonic seconds at which another connection had read the row. Once, at the end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        async with asyncio.timeout(20):
            found: dict[str, float] = orjson.loads(await self.process.stdout.readline())
            await self.process.wait()
        return found


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Watcher]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.watch",
        url,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            await process.stdout.readline()
        yield Watcher(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
