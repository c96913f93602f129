"""Runs `whatsapp_child.py` through the sandbox's launcher and speaks its JSON lines."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from sandbox.whatsapp.ledger import Ledger
from sandbox.whatsapp.sandbox import WhatsAppSandbox

_SCRIPT = Path(__file__).with_name("whatsapp_child.py")
Json = dict[str, Any]


class ClientError(Exception):
    """The library refused an operation."""


class RealClient:
    """One process with the unmodified library in it."""

    def __init__(self, wa: WhatsAppSandbox) -> None:
        self._wa = wa
        self._numbers = itertools.count(1)
        self.events: Ledger[Json] = Ledger()
        self._replies: dict[int, asyncio.Future[Json]] = {}
        self.process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]

    @classmethod
    async def start(cls, wa: WhatsAppSandbox, *, script: Path = _SCRIPT, **env: str) -> Self:
        """`script`: another one that speaks these lines."""
        client = cls(wa)
        argv, environment = wa.child_command(str(script))
        client.process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment | env,
            limit=1 << 26,
        )
        client._reading = asyncio.create_task(client._read())
        await client.wait("loaded")
        return client

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            event = json.loads(line)
            self.events.add(event)
            if event["ev"] == "reply" and (reply := self._replies.get(event["id"])) and not reply.done():
                reply.set_result(event)

    async def wait(
        self,
        kind: str,
        match: Callable[[Json], bool] = lambda _: True,
        *,
        start: int = 0,
        timeout: float = 15,
    ) -> Json:
        return await self.events.wait_for(
            lambda event: event["ev"] == kind and match(event), start=start, timeout=timeout
        )

    def count(self, kind: str) -> int:
        return sum(event["ev"] == kind for event in self.events)

    async def do(self, operation: str, timeout: float = 15, **fields: Any) -> Any:
        number = next(self._numbers)
        assert self.process.stdin is not None
        command = {"id": number, "op": operation, **fields}
        self._replies[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        try:
            reply = await asyncio.wait_for(self._replies[number], timeout)
        finally:
            del self._replies[number]
        if "error" in reply:
            raise ClientError(reply["error"])
        return reply["result"]

    async def message(self, msg_id: str, *, start: int = 0, timeout: float = 15) -> Json:
        return await self.wait("MessageEv", lambda event: event["id"] == msg_id, start=start, timeout=timeout)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading
        transport = getattr(self.process, "_transport", None)
        if transport is not None:
            transport.close()
