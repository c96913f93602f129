"""The gateway's handle on the process that reads history files (`history_reader.py`): one for an import."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import orjson

import gateway
from core.channel import SessionContext
from gateway.whatsapp import settings
from gateway.whatsapp.protocol import store_path
from gateway.whatsapp.values import Json

SILENT_SECONDS = 60.0
"""Without a line from the reader."""
LINE = 16 << 20
"""Bytes; also how far it may read ahead, about."""
_ROOT = str(Path(gateway.__file__).resolve().parents[1])
_NOT_FOR_IT = frozenset({"DATABASE_URL", "SECRET_KEYS", "ADMIN_API_KEY", "METRICS_TOKEN", "LLM_API_KEY"})


class HistoryProcess:
    """`async with HistoryProcess(context, own) as reader: async for line in reader.lines(blob)`."""

    def __init__(self, context: SessionContext, own: str) -> None:
        self._context, self._own = context, own
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> HistoryProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def lines(self, blob: Path) -> AsyncIterator[Json]:
        """Everything in one file. Raises OSError and ValueError when it cannot be read to its end."""
        process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        whole = False
        try:
            process.stdin.write(os.fsencode(blob) + b"\n")
            await process.stdin.drain()
            while not whole:
                async with asyncio.timeout(SILENT_SECONDS):
                    raw = await process.stdout.readline()
                if not raw:
                    raise OSError(f"the reader of {blob.name} ended early")
                line = orjson.loads(raw)
                whole = "end" in line
                yield line
        finally:
            if not whole:  # whatever it says next is about this file
                await self._end()

    async def _start(self) -> asyncio.subprocess.Process:
        env = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
        env["SPHINX"] = "1"  # neonize's protobuf modules without its Go library
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, env.get("PYTHONPATH"))))
        context = self._context
        words = ["--tenant", str(context.tenant_id), "--session", str(context.session_id), "--own", self._own]
        words += ["--folder", str(context.folder), "--store", str(store_path(context.folder))]
        if not settings.wants_groups(context.metadata):
            words.append("--no-groups")
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway.whatsapp.history_reader",
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=env,
            limit=LINE,
        )
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        transport = getattr(process, "_transport", None)
        if transport is not None:
            transport.close()
