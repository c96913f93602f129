"""P14, a day's run: mixed traffic in and out through the real WhatsApp client while everything breaks now and then.

`--minutes 1440` is a day. In the first third gateways die too; afterwards one gateway, and one of its children, go on to
the end through everything else, so that their memory and descriptors can be followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.run import Plan
from tests.faults.whatsapp.killing import Killer, database
from tests.faults.whatsapp.orders import Orders
from tests.faults.whatsapp.proc import Watched
from tests.faults.whatsapp.rig import Line, Rig
from tests.faults.whatsapp.verdict import judge_inbound, settle
from tests.support.postgres import PostgresServer

SHORT, LONG = 9.0, 1800.0
"""Seconds."""
SAMPLE_EVERY = 5.0
FEW = 50
"""Descriptors that a process may have more at the end than when it was warm: pools breathe."""


class Soak:
    def __init__(self, rig: Rig, server: PostgresServer, rng: random.Random, *, seconds: float) -> None:
        self.rig, self.server, self.rng = rig, server, rng
        self.orders = Orders(rig, rng)
        self.orders.watch()
        self.killer = Killer(rig, rng)
        self.faults: Counter[str] = Counter()
        self.over = asyncio.Event()
        """Nothing new is broken; what is broken is mended first."""
        self.began = time.monotonic()
        self.seconds = seconds
        self.gap = 12.0 if seconds > 120 else 1.5
        self.gateway, self.child, self.other = Watched(), Watched(), Watched()

    @property
    def passed(self) -> float:
        return time.monotonic() - self.began

    # ---- traffic ----

    async def write(self, line: Line) -> None:
        """People write at any moment, sometimes much at once."""
        while True:
            await self.rig.burst(line, self.rng.choice((1, 1, 1, 2, 5)))
            await asyncio.sleep(self.rng.expovariate(1.2))

    async def order(self, line: Line) -> None:
        while True:
            await self.orders.place(line)
            await asyncio.sleep(self.rng.expovariate(0.6))

    # ---- trouble ----

    async def trouble(self) -> None:
        """One thing breaks after the other, and each time everything has some seconds to come back."""
        every = [self._child, self._drop, self._outage, self._database]
        turn = 0
        while not await self._is_over(self.rng.uniform(0.5, 1.5) * self.gap):
            early = self.passed < self.seconds / 3
            await (self._gateway if early and turn % 3 == 2 else every[turn % len(every)])()
            turn += 1

    async def _is_over(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)
        return self.over.is_set()

    async def _child(self) -> None:
        # The last session's child is left alone once gateways are: its memory is followed. Unless it is the only one.
        lines = self.rig.lines if self.passed < self.seconds / 3 else self.rig.lines[:-1] or self.rig.lines
        if self.killer.strike(self.rng.choice(lines), "child"):
            self.faults["child killed"] += 1

    async def _gateway(self) -> None:
        await self.rig.gateway.kill()
        self.faults["gateway killed"] += 1
        await self.rig.restart_gateway()

    async def _database(self) -> None:
        self.faults["database killed"] += 1
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(self.rng.uniform(0.2, min(5.0, self.gap)))
        await asyncio.to_thread(self.server.restart)

    async def _drop(self) -> None:
        line = self.rng.choice(self.rig.lines)
        with contextlib.suppress(ValueError):  # it is not connected at this moment
            await self.rig.sandbox.drop(line.device, abort=True)
            self.faults["connection cut"] += 1

    async def _outage(self) -> None:
        self.faults["WhatsApp unreachable"] += 1
        await self.rig.sandbox.restart(down_for=self.rng.uniform(0.5, min(5.0, self.gap)))

    # ---- watching ----

    async def watch(self) -> None:
        told = 0
        while True:
            process = self.rig.gateway.process
            self.gateway.look(process.pid if process is not None and process.returncode is None else None)
            self.child.look(self.rig.lines[-1].pid)
            self.other.look(self.rig.lines[0].pid)
            if self.passed > (told + 1) * 60:
                told += 1
                print(
                    f"  {told} min: {len(self.rig.witness.said)} in, {len(self.orders.placed)} out, {dict(self.faults)}",
                    file=sys.stderr,
                    flush=True,
                )
            await asyncio.sleep(min(SAMPLE_EVERY, self.seconds / 20))


async def run(plan: Plan) -> Report:
    report, seconds, rng = plan.report("P14"), plan.seconds(SHORT, LONG), plan.rng("p14")
    async with (
        database() as (server, address),
        Rig(plan.folder, address, lines=1 if plan.short else 2, rng=rng) as rig,
    ):
        await rig.greet()
        assert server is not None
        soak = Soak(rig, server, rng, seconds=seconds)
        parts = [soak.trouble(), soak.watch()]
        parts += [work(line) for line in rig.lines for work in (soak.write, soak.order)]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            ended, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            soak.over.set()
            for task in ended:
                task.result()  # it should still be at it
            await _end(*tasks[2:])
            await asyncio.wait_for(tasks[0], 180)
            await settle(rig)
            await soak.orders.finished(within=300)
        finally:
            await _end(*tasks)
        await judge(soak, report)
        await soak.orders.close()
    return report


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def judge(soak: Soak, report: Report) -> None:
    rig = soak.rig
    report.figures["faults"] = dict(soak.faults)
    await judge_inbound(rig, report)
    rows = await soak.orders.rows()
    classes, second = soak.orders.judge(rows)
    report.add("sent", classes)
    report.zero("second sends", second)
    left = classes.counts[checker.Class.UNKNOWN]
    report.figures["left unknown"] = f"{left} of {len(rows)} ({left / max(1, len(rows)):.1%})"
    for name, part in (("gateway", soak.gateway), ("child", soak.child), ("the other child", soak.other)):
        report.figures[f"{name}: memory and descriptors"] = part.told()
    for name, part in (("gateway", soak.gateway), ("child", soak.child)):
        if life := part.longest():
            gained = life[-1].descriptors - life[0].descriptors
            report.at_most(f"descriptors gained by the {name}", max(0, gained), FEW)
