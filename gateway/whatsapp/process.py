"""The supervisor's handle on one child process: spawn, ask, listen, end. Knows lines and exit codes, not what they mean.

The child is spawned from the main thread: its parent-death signal fires when the creating thread ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gateway
from gateway.whatsapp.protocol import LINE_LIMIT, decode, encode

_NOT_FOR_THE_CHILD = frozenset(
    {"SPHINX", "DATABASE_URL", "SECRET_KEYS", "ADMIN_API_KEY", "METRICS_TOKEN", "LLM_API_KEY"}
)
"""Secrets it has no use for. SPHINX would make neonize load without its Go library."""
_ROOT = str(Path(gateway.__file__).resolve().parents[1])
"""Where the packages are, for a gateway that runs from its source tree."""
_TAIL_LINES = 40
_DIGITS = re.compile(rb"[0-9]{6,}")


class ChildGone(Exception):
    """The child ended before it answered."""


class ChildTimeout(Exception):
    """No answer within the limit; the child may still be at it."""


class ChildRefused(Exception):
    """The child answered with an error: whatsmeow's own text."""


class ChildProcess:
    def __init__(
        self, process: asyncio.subprocess.Process, on_line: Callable[[dict[str, Any]], None]
    ) -> None:
        self._process = process
        self._on_line = on_line
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._lock = asyncio.Lock()
        self.ended: asyncio.Task[int] = asyncio.create_task(
            self._live(), name=f"whatsapp-child-{process.pid}"
        )

    @classmethod
    async def start(
        cls, command: Sequence[str], folder: Path, on_line: Callable[[dict[str, Any]], None]
    ) -> ChildProcess:
        """Raises OSError when the program cannot be started."""
        env = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_CHILD}
        env["NEONIZE_BOT_TAG"] = "off"  # only read when the Go library starts
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, env.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            *command,
            "--folder",
            str(folder),
            "--parent",
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            limit=LINE_LIMIT,
        )
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self.ended.done()

    async def ask(self, op: str, *, seconds: float, **fields: Any) -> Any:
        """One command and its answer. Raises ChildGone, ChildTimeout, ChildRefused."""
        if not self.alive:
            raise ChildGone("the WhatsApp child is not running")
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        try:
            async with asyncio.timeout(seconds):
                await self._write({"id": number, "op": op, **fields})
                return await future
        except TimeoutError:
            raise ChildTimeout(f"no answer to {op} within {seconds:g} s") from None
        except OSError:
            raise ChildGone("the WhatsApp child ended") from None
        finally:
            self._replies.pop(number, None)

    async def stop(self, seconds: float) -> int:
        """Politely, then not. Returns the exit code; within about `seconds` and a second."""
        with contextlib.suppress(ChildGone, ChildTimeout, ChildRefused):
            await self.ask("stop", seconds=seconds / 2)
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()  # the child leaves at the end of its input
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                return await asyncio.shield(self.ended)
        return await self.kill()

    async def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        return await asyncio.shield(self.ended)

    def tail(self) -> str:
        """The last lines of its stderr, without anything that could be a phone number."""
        return b"\n".join(_DIGITS.sub(b"#", line[:400]) for line in self._tail).decode(errors="replace")

    async def _write(self, line: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        async with self._lock:
            # A child that is just dying has closed its end already; uvloop calls writing there a RuntimeError.
            if stdin.is_closing():
                raise ChildGone("the WhatsApp child ended")
            stdin.write(encode(line))
            await stdin.drain()

    async def _live(self) -> int:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        errors = asyncio.create_task(self._keep_tail(self._process.stderr))
        try:
            while line := await self._process.stdout.readline():
                self._take(line)
            code = await self._process.wait()
            # A Go panic prints its reason last; the pipe's end may be held by nobody else.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(errors), 1)
            return code
        finally:
            errors.cancel()
            for future in self._replies.values():
                if not future.done():
                    future.set_exception(ChildGone("the WhatsApp child ended"))

    def _take(self, raw: bytes) -> None:
        try:
            line = decode(raw)
        except ValueError:
            self._tail.append(raw)
            return
        if line.get("ev") != "reply":
            self._on_line(line)
            return
        future = self._replies.get(line.get("id", 0))
        if future is None or future.done():
            return
        if "error" in line:
            future.set_exception(ChildRefused(str(line["error"])))
        else:
            future.set_result(line.get("result"))

    async def _keep_tail(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit
                continue
            if not line:
                return
            self._tail.append(line.rstrip())
