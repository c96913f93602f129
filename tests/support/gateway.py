"""A gateway as its own process, the way a user runs it: started, asked over HTTP, killed, started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any

import aiohttp
import orjson

ADMIN_KEY = "cg_tests_" + "k" * 40
ROOT = Path(__file__).resolve().parents[2]


class GatewayProcess:
    """`async with GatewayProcess(data_dir, DATABASE_URL=…) as gateway:`; `gateway.api("GET", "/health")`.

    Every stdout line must be JSON (checked); the last ones are kept for the message of a failing test.
    """

    module = "gateway"
    """What is run; a fault harness runs it with shortened waits."""

    def __init__(self, data_dir: Path, **environ: str) -> None:
        self.environ = {
            **{k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "SPHINX")},
            "DATA_DIR": str(data_dir),
            "PORT": "0",
            "ADMIN_API_KEY": ADMIN_KEY,
            **environ,
        }
        self.lines: deque[str] = deque(maxlen=20_000)
        self.not_json: list[str] = []
        self.url = ""
        self.process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._http: aiohttp.ClientSession | None = None

    async def start(self, within: float = 40) -> None:
        self._started = asyncio.Event()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            "serve",
            cwd=ROOT,
            env=self.environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 22,
        )
        self._readers = [
            asyncio.create_task(self._read(self.process.stdout, json=True)),
            asyncio.create_task(self._read(self.process.stderr, json=False)),
        ]
        waiting = {asyncio.create_task(self._started.wait()), asyncio.create_task(self.process.wait())}
        done, pending = await asyncio.wait(waiting, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if not self._started.is_set():
            await self.kill()
            raise AssertionError(f"the gateway did not start ({bool(done)=}):\n{self.tail()}")

    async def _read(self, stream: Any, *, json: bool) -> None:
        while line := (await stream.readline()).decode(errors="replace").rstrip():
            self.lines.append(line)
            if not json:
                continue
            try:
                entry = orjson.loads(line)
            except ValueError:
                self.not_json.append(line)
                continue
            if entry.get("event") == "gateway.started":
                self.url = entry["action"]
                self._started.set()

    def tail(self, count: int = 60) -> str:
        return "\n".join(list(self.lines)[-count:])

    def story(self) -> str:
        """What happened to sessions, children and the database, and every warning: what a failed wait needs to show."""
        telling = (
            '"event":"session.',
            '"event":"child.',
            '"event":"database.',
            '"level":"error"',
            '"level":"warning"',
        )
        return "\n".join(
            line for line in list(self.lines)[-3000:] if any(word in line for word in telling)
        ) + ("\n…\n" + self.tail(15))

    async def api(
        self, method: str, path: str, body: Any = None, *, key: str | None = ADMIN_KEY, **headers: str
    ) -> tuple[int, Any]:
        """Status and parsed JSON (or text) of one request."""
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        async with self._http.request(
            method, self.url + path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
        ) as response:
            raw = await response.read()
            if "json" in response.headers.get("Content-Type", ""):
                return response.status, orjson.loads(raw)
            return response.status, raw.decode()

    async def ok(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """The answer of a request that must succeed."""
        status, answer = await self.api(method, path, body, **options)
        assert status < 300, f"{method} {path}: {status} {answer}\n{self.tail()}"
        return answer

    async def kill(self) -> None:
        """`kill -9`, as a power cut would."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
        await self._ended()

    async def stop(self, within: float = 12) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(within):
                await self.process.wait()
        await self._ended()
        return self.process.returncode or 0

    async def _ended(self) -> None:
        if self.process is not None:
            await self.process.wait()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def __aenter__(self) -> GatewayProcess:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
