"""How processes are killed: the child or the gateway, at a moment of ours or at a fault point of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.faults.whatsapp.rig import Line, Rig
from tests.support.postgres import PostgresServer


@asynccontextmanager
async def database(url: str | None = None) -> AsyncIterator[tuple[PostgresServer | None, str]]:
    """The one given, or an empty one on a server of the run's own; the gateway makes its schema."""
    if url is not None:
        yield None, url
        return
    server = PostgresServer()
    try:
        await asyncio.to_thread(server.start)
        yield server, await asyncio.to_thread(server.create_database)
    finally:
        await asyncio.to_thread(server.close)


@dataclass(slots=True)
class Kill:
    how: str
    session: int
    logins: int
    """How often the session had logged in by then."""
    at: float = field(default_factory=time.monotonic)
    back: float = 0.0
    """Seconds until everything that was not acknowledged then was."""
    healed: list[float] = field(default_factory=list)
    """Seconds until each message that the sender's phone had to encrypt anew was acknowledged."""


class Killer:
    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self.rig, self.rng = rig, rng
        self.kills: list[Kill] = []
        self.missed: Counter[str] = Counter()
        """Kills that found nobody, and fault points nobody came by."""

    # ---- the child ----

    def strike(self, line: Line, how: str, pid: int | None = None) -> Kill | None:
        """`kill -9` of the session's child (or of this one); None when there is none at this moment."""
        pid = pid or line.pid
        if pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return Kill(how, line.session, self.rig.logins(line))

    async def armed(self, line: Line, faults: str) -> int | None:
        """Kill the child, so that one with these armed takes its place; that one's process id."""
        self.rig.arm_next(line, faults)
        pid = line.pid
        kill = self.strike(line, "to start an armed child")
        if kill is None or pid is None:
            return None
        self.kills.append(kill)
        return await self.rig.new_child(line, pid)

    # ---- the gateway ----

    async def armed_gateway(self, point: str, passing: int) -> None:
        """Kill the gateway, so that one which kills itself there takes its place."""
        await self.end_gateway("to start an armed gateway")
        with contextlib.suppress(AssertionError):  # it may die of what waits for it while it starts
            await self.rig.restart_gateway(f"{point}=kill:{passing}")

    async def gateway_died(self, within: float = 30.0) -> bool:
        process = self.rig.gateway.process
        assert process is not None
        try:
            async with asyncio.timeout(within):
                await process.wait()
        except TimeoutError:
            return False
        return True

    async def end_gateway(self, how: str) -> list[Kill]:
        """`kill -9`, its children go with it. One kill, as each session sees it."""
        await self.rig.gateway.kill()
        kills = [Kill(how, line.session, self.rig.logins(line)) for line in self.rig.lines]
        self.kills.append(kills[0])
        return kills

    def told(self) -> dict[str, object]:
        figures: dict[str, object] = {
            "kills": len(self.kills),
            "of which": dict(Counter(kill.how for kill in self.kills).most_common()),
        }
        return figures | ({"struck nobody": dict(self.missed)} if self.missed else {})
