"""P8 through the real WhatsApp client: of two gateways that share DATA_DIR, the owner is killed, drained or stopped.

WhatsApp allows one connection per device: the sandbox sees each login, and whether another connection was still open.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from sandbox.whatsapp.connection import Connection
from sandbox.whatsapp.nodes import JID
from tests.faults.checker import Report, percentiles
from tests.faults.run import Plan
from tests.faults.whatsapp.killing import database
from tests.faults.whatsapp.orders import Orders
from tests.faults.whatsapp.rig import Gateway, Line, Rig
from tests.faults.whatsapp.verdict import judge_inbound, settle
from tests.support.gateway import GatewayProcess

LIMIT = 45.0
"""Seconds in which a dead gateway's sessions must be active elsewhere."""
STOPPED_LIMIT = 60.0
"""A gateway that hangs keeps its leases until they run out: two lease times."""


class Online(dict[JID, Connection]):
    """Who is connected, as the sandbox keeps it; notes a login beside a connection that is still there."""

    def __init__(self, found: dict[JID, Connection]) -> None:
        super().__init__(found)
        self.doubles: list[str] = []

    def __setitem__(self, device: JID, connection: Connection) -> None:
        if device in self and self[device] is not connection:
            self.doubles.append(str(device))
        super().__setitem__(device, connection)


class TakeOver:
    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self.rig, self.rng = rig, rng
        self.orders = Orders(rig, rng)
        self.orders.watch()
        self.online = Online(rig.sandbox._hub.post.online)
        rig.sandbox._hub.post.online = self.online
        self.gateways: list[GatewayProcess] = [rig.gateway]
        self.seconds: dict[str, list[float]] = {"killed": [], "drained": [], "stopped": []}
        self.exits: list[int] = []

    async def second(self) -> None:
        """Another gateway on the same database and DATA_DIR."""
        gateway = Gateway(self.rig.folder / "data", **self.rig.gateway.environ)
        self.gateways.append(gateway)
        await gateway.start()

    async def owners(self) -> dict[int, str]:
        rows = await self.rig.db.fetch(
            "SELECT session_id, owner FROM et_session_leases WHERE expires_at > now()"
        )
        return {row["session_id"]: row["owner"] for row in rows}

    async def owner(self) -> int:
        """Which of the two has the sessions."""
        [name] = set((await self.owners()).values())
        return next(n for n, gateway in enumerate(self.gateways) if name_of(gateway) == name)

    # ---- traffic ----

    async def traffic(self, line: Line) -> None:
        while True:
            await self.rig.burst(line, self.rng.choice((1, 1, 2, 4)))
            if self.rng.random() < 0.6:
                await self.orders.place(line)
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))

    # ---- taking over ----

    async def round(self, how: str, *, last: bool) -> None:
        first = await self.owner()
        old, new = self.gateways[first], self.gateways[1 - first]
        await asyncio.sleep(self.rng.uniform(0.3, 1.0))
        logins = {line.session: self.rig.logins(line) for line in self.rig.lines}
        began = time.monotonic()
        end: dict[str, Callable[[Any], Awaitable[None]]] = {
            "killed": self._kill,
            "drained": self._drain,
            "stopped": self._stop,
        }
        await end[how](old)
        limit = STOPPED_LIMIT if how == "stopped" else LIMIT

        async def taken() -> bool:
            owners = await self.owners()
            active = await self.rig.db.fetchval(
                "SELECT count(*) FROM et_channel_sessions WHERE status = 'active'"
            )
            return (
                active == len(self.rig.lines)
                and set(owners.values()) == {name_of(new)}
                and len(owners) == active
                and all(
                    self.rig.logins(line) > logins[line.session] and self.rig.sandbox.is_online(line.device)
                    for line in self.rig.lines
                )
            )

        await self.rig.until(taken, f"the other gateway has every session after one was {how}", limit + 60)
        self.seconds[how].append(time.monotonic() - began)
        if how == "stopped":
            await self._go_on(old)
        elif not last:
            await old.start()

    async def _kill(self, gateway: GatewayProcess) -> None:
        await gateway.kill()

    async def _drain(self, gateway: GatewayProcess) -> None:
        self.exits.append(await gateway.stop(within=90))

    async def _stop(self, gateway: GatewayProcess) -> None:
        """It hangs, its children do not: they stay connected until somebody takes the folder."""
        assert gateway.process is not None
        os.kill(gateway.process.pid, signal.SIGSTOP)

    async def _go_on(self, gateway: GatewayProcess) -> None:
        """It comes to itself and finds its sessions gone; it must let them be."""
        assert gateway.process is not None
        logins = len(self.rig.sandbox.logins)
        os.kill(gateway.process.pid, signal.SIGCONT)
        await asyncio.sleep(5)
        assert len(self.rig.sandbox.logins) == logins, "a gateway that hung has connected again"


def name_of(gateway: GatewayProcess) -> str:
    started = next(line for line in reversed(gateway.lines) if '"event":"gateway.started"' in line)
    return str(orjson.loads(started)["owner"])


async def run(plan: Plan, *, url: str | None = None) -> Report:
    report, rng = plan.report("P8 through WhatsApp"), plan.rng("p8")
    rounds = ["killed", "drained"] if plan.short else ["killed", "drained", "killed", "stopped"] * 2
    async with (
        database(url) as (_, address),
        Rig(plan.folder, address, lines=1 if plan.short else 2, rng=rng) as rig,
    ):
        await rig.greet()
        taking = TakeOver(rig, rng)
        try:
            await taking.second()
            tasks = [asyncio.create_task(taking.traffic(line)) for line in rig.lines]
            for n, how in enumerate(rounds, 1):
                await taking.round(how, last=n == len(rounds))
            for task in tasks:
                task.cancel()
            ended, _ = await asyncio.wait(tasks)
            for task in ended:
                if not task.cancelled():
                    task.result()
            await settle(rig)
            await taking.orders.finished(within=300)
            await judge(taking, report)
            await taking.orders.close()
        finally:
            for gateway in taking.gateways[1:]:
                await gateway.kill()
    return report


async def judge(taking: TakeOver, report: Report) -> None:
    for how, seconds in taking.seconds.items():
        if seconds:
            report.figures[f"{how}: seconds until active elsewhere"] = percentiles(seconds)
            limit = STOPPED_LIMIT if how == "stopped" else LIMIT
            report.at_most(f"{how}: the longest", max(seconds), limit)
    report.zero("two connections of one device", len(taking.online.doubles))
    report.check("SIGTERM ends with 0", not any(taking.exits), str(taking.exits))
    replaced = sum('"stream_replaced"' in line for gateway in taking.gateways for line in gateway.lines)
    report.zero("stream replaced", replaced)
    taking.rig.gateway = taking.gateways[await taking.owner()]  # whose figures are asked for
    await judge_inbound(taking.rig, report)
    rows = await taking.orders.rows()
    classes, second = taking.orders.judge(rows)
    report.add("sent", classes)
    report.zero("second sends", second)
