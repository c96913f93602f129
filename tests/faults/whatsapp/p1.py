"""P1 through the real WhatsApp client: acknowledged only when durable, stored exactly once, however it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults import checker
from tests.faults.checker import Report, percentiles
from tests.faults.ledger import OFFERED, Entry, read
from tests.faults.run import Plan
from tests.faults.whatsapp.rig import Line, Rig
from tests.support.postgres import PostgresServer

CHILD_POINTS = (
    "whatsapp.callback",
    "whatsapp.journal.before",
    "journal.before_append",
    "journal.before_fsync",
    "journal.after_fsync",
    "whatsapp.journal.after",
    "whatsapp.gate.opened",
)
GATEWAY_POINTS = (
    "ingest.before_insert",
    "ingest.before_commit",
    "ingest.after_commit",
    "whatsapp.release.before",
    "journal.before_release",
    "journal.after_release",
)
SLOW = 0.03
"""Seconds that an fsync takes on the slow disk."""


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


class Killing:
    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self.rig, self.rng = rig, rng
        self.kills: list[Kill] = []
        self.missed: Counter[str] = Counter()
        """Kills that found nobody, and fault points nobody came by."""
        self._strikes: list[Callable[[str], None]] = []
        rig.witness.on_ack = self._acknowledged

    # ---- the child ----

    async def child(self, line: Line, how: str) -> None:
        """One kill of one kind, and everything back afterwards."""
        action = getattr(self, f"_{how.partition(':')[0]}")
        before = set(self.rig.witness.asked_again)
        kill = await action(line, how)
        if kill is None:
            self.missed[how] += 1
            return
        self.kills.append(kill)
        await self._recovered(line, kill, before)

    def _strike(self, line: Line, how: str, pid: int | None = None) -> Kill | None:
        pid = pid or line.pid
        if pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return Kill(how, line.session, self.rig.logins(line))

    async def _recovered(self, line: Line, kill: Kill, before: set[str]) -> None:
        """New messages go on coming while the session recovers."""
        rig = self.rig
        await rig.burst(line, self.rng.randrange(3))
        await rig.online(line, kill.logins)
        await rig.drained(line)
        kill.back = max(kill.back, time.monotonic() - kill.at)
        witness = rig.witness
        healed = [i for i in witness.asked_again.keys() - before if witness.said[i].session == line.session]
        kill.healed += [witness.acked[i] - kill.at for i in healed if i in witness.acked]

    async def _random(self, line: Line, how: str) -> Kill | None:
        """At any moment of ordinary traffic."""
        writing = asyncio.create_task(self.rig.burst(line, self.rng.randint(5, 20), 0.02))
        await asyncio.sleep(self.rng.uniform(0.0, 0.4))
        kill = self._strike(line, how)
        await writing
        return kill

    async def _aimed(self, line: Line, how: str) -> Kill | None:
        """Some milliseconds after a message has been put on the wire: around its callback and its fsync."""
        ids = await self.rig.burst(line, self.rng.randint(1, 12))
        await self.rig.written(self.rng.choice(ids))
        await asyncio.sleep(self.rng.uniform(0.0, 0.015))
        return self._strike(line, how)

    async def _acked(self, line: Line, how: str) -> Kill | None:
        """In the moment in which an acknowledgement arrives."""
        pid, struck = line.pid, asyncio.get_running_loop().create_future()
        if pid is None:
            return None

        def strike(msg_id: str) -> None:
            if not struck.done() and self.rig.witness.said[msg_id].session == line.session:
                struck.set_result(self._strike(line, how, pid))

        self._strikes.append(strike)
        try:
            await self.rig.burst(line, self.rng.randint(2, 12))
            async with asyncio.timeout(20):
                found: Kill | None = await struck
                return found
        except TimeoutError:
            return None
        finally:
            self._strikes.remove(strike)

    def _acknowledged(self, msg_id: str) -> None:
        for strike in list(self._strikes):
            strike(msg_id)

    async def _point(self, line: Line, how: str) -> Kill | None:
        """The next child kills itself at this place; it is started by a kill at random."""
        point = how.partition(":")[2]
        pid = await self._armed(line, f"{point}=kill:{self.rng.randint(1, 5)}")
        # It may die of what waits for it before it is even seen online.
        await self.rig.burst(line, self.rng.randint(6, 12), 0.01)
        if pid is None or not await self.rig.child_gone(pid, within=30):
            return None
        return Kill(how, line.session, self.rig.logins(line))

    async def _slow(self, line: Line, how: str) -> Kill | None:
        """Every fsync takes long: many messages are decrypted and wait for the disk when the child dies."""
        logins = self.rig.logins(line)
        if await self._armed(line, f"journal.before_fsync=sleep:{SLOW}") is None:
            return None
        await self.rig.online(line, logins)
        await self.rig.burst(line, self.rng.randint(20, 60))
        await asyncio.sleep(self.rng.uniform(0.05, 0.8))
        return self._strike(line, how)

    async def _armed(self, line: Line, faults: str) -> int | None:
        """Kill the child, so that one with these armed takes its place; that one's process id."""
        self.rig.arm_next(line, faults)
        pid = line.pid
        kill = self._strike(line, "to start an armed child")
        if kill is None or pid is None:
            return None
        self.kills.append(kill)
        return await self.rig.new_child(line, pid)

    # ---- the gateway ----

    async def gateway(self, point: str | None) -> None:
        """The whole gateway: at a fault point, or at random while every session is written to."""
        rig = self.rig
        before = set(rig.witness.asked_again)
        writing = self._write_to_all(self.rng.randint(5, 15))
        if point is None:
            await asyncio.sleep(self.rng.uniform(0.0, 0.4))
        else:
            await self._end_gateway("to start an armed gateway")
            with contextlib.suppress(AssertionError):  # it may die of what waits for it while it starts
                await rig.restart_gateway(f"{point}=kill:{self.rng.randint(1, 4)}")
            await asyncio.gather(*writing)
            writing = self._write_to_all(8)
            if not await self._gateway_died(within=30):
                self.missed[f"gateway:{point}"] += 1
        kills = await self._end_gateway(f"gateway:{point or 'random'}")
        await asyncio.gather(*writing)
        await rig.restart_gateway()
        for line, kill in zip(rig.lines, kills, strict=True):
            await self._recovered(line, kill, before)

    def _write_to_all(self, count: int) -> list[asyncio.Task[list[str]]]:
        return [asyncio.create_task(self.rig.burst(line, count, 0.03)) for line in self.rig.lines]

    async def _gateway_died(self, within: float) -> bool:
        process = self.rig.gateway.process
        assert process is not None
        try:
            async with asyncio.timeout(within):
                await process.wait()
        except TimeoutError:
            return False
        return True

    async def _end_gateway(self, how: str) -> list[Kill]:
        """`kill -9`, its children go with it. One kill, seen by each session."""
        await self.rig.gateway.kill()
        kills = [Kill(how, line.session, self.rig.logins(line)) for line in self.rig.lines]
        self.kills.append(kills[0])
        return kills


def schedule(count: int, rng: random.Random) -> tuple[list[str], list[str | None]]:
    """(kills of children, kills of gateways). A fault point costs two kills: one to start the armed process."""
    gateways = max(1, count // 10)
    children = count - gateways
    points = max(len(CHILD_POINTS) if count >= 20 else 1, children // 5)
    slow = max(1, children // 12)
    acked = max(1, children // 6)
    rest = max(0, children - 2 * points - 2 * slow - acked)
    kinds = (
        [f"point:{CHILD_POINTS[n % len(CHILD_POINTS)]}" for n in range(points)]
        + ["slow"] * slow
        + ["acked"] * acked
        + ["aimed"] * (rest - rest // 3)
        + ["random"] * (rest // 3)
    )
    rng.shuffle(kinds)
    at: list[str | None] = [
        None if n % 3 == 0 else GATEWAY_POINTS[n % len(GATEWAY_POINTS)] for n in range(gateways)
    ]
    return kinds, at[: max(1, gateways * 2 // 3)]


async def run(plan: Plan) -> Report:
    report, count = plan.report("P1"), plan.times(8, 300)
    rng = plan.rng("p1")
    server, url = await asyncio.to_thread(database)
    try:
        async with Rig(plan.folder, url, lines=3, rng=rng) as rig:
            await rig.greet()
            killing = Killing(rig, rng)
            children, gateways = schedule(count, rng)
            await asyncio.gather(
                *(_lane(killing, line, children[n :: len(rig.lines)]) for n, line in enumerate(rig.lines))
            )
            for point in gateways:
                await killing.gateway(point)
            await _rest(killing, count)
            await settle(rig)
            await judge(rig, killing, report)
    finally:
        await asyncio.to_thread(server.close)
    return report


def database() -> tuple[PostgresServer, str]:
    """A server of the run's own, and an empty database on it; the gateway makes its schema."""
    server = PostgresServer()
    server.start()
    return server, server.create_database()


async def _lane(killing: Killing, line: Line, kinds: list[str]) -> None:
    for how in kinds:
        await killing.child(line, how)


async def _rest(killing: Killing, count: int) -> None:
    """What struck nobody is made up for."""
    for line in itertools.cycle(killing.rig.lines):
        if len(killing.kills) >= count:
            return
        await killing.child(line, "aimed")


async def settle(rig: Rig) -> None:
    """Until everything is acknowledged and nothing waits in a journal."""
    for line in rig.lines:
        await rig.drained(line)
    wanted = list(rig.witness.said)
    with contextlib.suppress(AssertionError):  # what is missing then is counted
        await rig.stored(wanted, within=60)


async def judge(rig: Rig, killing: Killing, report: Report) -> None:
    witness, rows = rig.witness, await rig.rows()
    ledger = read(rig.ledger.path)
    for msg_id in witness.said:  # what was put on the wire more than once
        ledger += [Entry(OFFERED, msg_id, w.monotonic, w.at) for w in rig.sandbox.written(msg_id)[1:]]
    report.figures["kills"] = len(killing.kills)
    report.figures["of which"] = dict(Counter(kill.how for kill in killing.kills).most_common())
    if killing.missed:
        report.figures["struck nobody"] = dict(killing.missed)
    ways = Counter(said.how for said in witness.said.values())
    report.figures["messages"] = dict(ways)
    report.add("stored", checker.inbound(ledger, (row["item"] for row in rows)))
    report.zero("acknowledged before durable", len(witness.early))
    report.problems += witness.early[:8]
    report.zero("never acknowledged", len(witness.said.keys() - witness.acked.keys()))
    wrong = [
        row["item"]
        for row in rows
        if not row["placeholder"] and row["content"] != witness.said[row["item"]].text
    ]
    report.zero("stored with another text", len(wrong))
    open_ = {row["item"] for row in rows if row["placeholder"]}
    report.zero("left unreadable", len(open_))
    reported = int(await rig.metric("gateway_possible_loss_total"))
    report.figures["reported as possible loss"] = reported
    healed = [
        seconds for kill in killing.kills for seconds in kill.healed
    ]  # of the first session when a gateway died
    report.figures["encrypted anew by the sender's phone"] = len(witness.asked_again)
    report.figures["healed after, s"] = percentiles(healed)
    report.figures["all acknowledged after a kill, s"] = percentiles(k.back for k in killing.kills if k.back)
    order = [
        (row["thread_id"], witness.said[row["item"]].number)
        for row in rows
        if row["item"] in witness.said and row["item"] not in witness.asked_again
    ]
    report.zero("inversions", checker.inversions(order))
    report.zero("gate alarms", await rig.metric("gateway_gate_alarms_total"))
