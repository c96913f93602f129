"""The gateway's side of the process that reads mails: one at a time, with a time limit; a process that fails is replaced.

Shared by all email sessions. Never raises for a mail: `Unreadable` says why it could not be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import orjson

from core import log
from gateway.email.worker import ATTACHMENT, LENGTH, PARSE

logger = log.get(part="email")

PARSE_SECONDS = 5.0
START_SECONDS = 20.0
ATTACHMENT_SECONDS = 20.0
IDLE_SECONDS = 60.0
AFTER = 2000
"""Mails: then a new process, against whatever the libraries leak."""


class Unreadable(Exception):
    """This mail cannot be read; the text says why, in a few words."""


@dataclass(slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    done: int = 0


class MailParser:
    """`await parse(raw)`, `await attachment(raw, index)`. Starts by itself, ends by itself after a minute without work."""

    def __init__(self, *, seconds: float = PARSE_SECONDS, idle: float = IDLE_SECONDS) -> None:
        self._seconds = seconds
        self._idle = idle
        self._worker: _Worker | None = None
        self._turn = asyncio.Lock()
        self._end: asyncio.TimerHandle | None = None
        self._holders = 0

    def hold(self) -> None:
        """Somebody may need it."""
        self._holders += 1

    def let_go(self) -> None:
        """Nobody left: the process ends now."""
        self._holders -= 1
        if self._holders <= 0:
            self._kill()

    async def parse(self, raw: bytes) -> dict[str, Any]:
        """Raises Unreadable."""
        answer = await self._ask(PARSE + raw, self._seconds)
        found: dict[str, Any] = orjson.loads(answer)
        return found

    async def attachment(self, raw: bytes, index: int) -> bytes:
        """Raises Unreadable."""
        return await self._ask(ATTACHMENT + LENGTH.pack(index) + raw, ATTACHMENT_SECONDS)

    async def close(self) -> None:
        async with self._turn:
            self._kill()

    async def _ask(self, request: bytes, seconds: float) -> bytes:
        async with self._turn:
            if self._end is not None:
                self._end.cancel()
            try:
                worker = await self._started()
                answer = await self._exchange(worker, request, seconds)
            except BaseException:
                self._kill()  # out of step, or somebody gave up on it
                raise
            self._end = asyncio.get_running_loop().call_later(self._idle, self._retire)
        if answer[:1] == b"E":
            raise Unreadable(answer[1:].decode("utf-8", "replace"))
        return answer[1:]

    async def _exchange(self, worker: _Worker, request: bytes, seconds: float) -> bytes:
        stdin, stdout = worker.process.stdin, worker.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            async with asyncio.timeout(seconds):
                stdin.write(LENGTH.pack(len(request)))
                stdin.write(request)
                await stdin.drain()
                (size,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
                answer = await stdout.readexactly(size)
        except TimeoutError:
            logger.warning("mail.parser_hung", bytes=len(request), duration_ms=round(seconds * 1000))
            raise Unreadable(f"reading it took more than {seconds:g} s") from None
        except (EOFError, OSError):
            logger.warning("mail.parser_crashed", bytes=len(request))
            raise Unreadable("the process that read it ended") from None
        worker.done += 1
        return answer

    async def _started(self) -> _Worker:
        if self._worker is not None and self._worker.done >= AFTER:
            self._kill()
        if self._worker is None or self._worker.process.returncode is not None:
            async with asyncio.timeout(START_SECONDS):
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "gateway.email.worker",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    env=_environment(),
                    limit=1 << 20,
                )
                self._worker = _Worker(process)
                # The first answer says that everything is imported; that time is not a mail's.
                await self._exchange(self._worker, PARSE + b"Subject: hello\r\n\r\nhello\r\n", START_SECONDS)
        return self._worker

    def _retire(self) -> None:
        if not self._turn.locked():
            self._kill()

    def _kill(self) -> None:
        worker, self._worker = self._worker, None
        if self._end is not None:
            self._end.cancel()
            self._end = None
        if worker is None:
            return
        if worker.process.stdin is not None:
            worker.process.stdin.close()
        if worker.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()


def _environment() -> dict[str, str]:
    """No secret of ours goes to a process that reads what strangers send."""
    kept = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "TZ")
    roots = os.pathsep.join(path for path in (os.environ.get("PYTHONPATH", ""), _root()) if path)
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONPATH": roots}


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
