"""P1 through the real WhatsApp client: acknowledged only when durable, stored exactly once, however it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable

import orjson

from tests.faults.checker import Report, percentiles
from tests.faults.run import Plan
from tests.faults.whatsapp.killing import Kill, Killer, database
from tests.faults.whatsapp.rig import SHORT_WAITS, Line, Rig
from tests.faults.whatsapp.verdict import judge_inbound, settle

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
PLACEHOLDER_SECONDS = 3.0
"""Until an unreadable message is given up; ten minutes in earnest."""
GIVING_UP = {
    "FAULTS_TIMINGS": orjson.dumps(
        SHORT_WAITS | {"inbound": {"placeholder_seconds": PLACEHOLDER_SECONDS}}
    ).decode(),
    "INBOUND_POLL_SECONDS": "1",
}
SLOW = 0.03
"""Seconds that an fsync takes on the slow disk."""


class Killing(Killer):
    """Kills around the taking of a message."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        super().__init__(rig, rng)
        self.recoveries: list[Kill] = []
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
        self.recoveries.append(kill)

    async def _random(self, line: Line, how: str) -> Kill | None:
        """At any moment of ordinary traffic."""
        writing = asyncio.create_task(self.rig.burst(line, self.rng.randint(5, 20), 0.02))
        await asyncio.sleep(self.rng.uniform(0.0, 0.4))
        kill = self.strike(line, how)
        await writing
        return kill

    async def _aimed(self, line: Line, how: str) -> Kill | None:
        """Some milliseconds after a message has been put on the wire: around its callback and its fsync."""
        ids = await self.rig.burst(line, self.rng.randint(1, 12))
        await self.rig.written(self.rng.choice(ids))
        await asyncio.sleep(self.rng.uniform(0.0, 0.015))
        return self.strike(line, how)

    async def _acked(self, line: Line, how: str) -> Kill | None:
        """In the moment in which an acknowledgement arrives."""
        pid, struck = line.pid, asyncio.get_running_loop().create_future()
        if pid is None:
            return None

        def strike(msg_id: str) -> None:
            if not struck.done() and self.rig.witness.said[msg_id].session == line.session:
                struck.set_result(self.strike(line, how, pid))

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
        pid = await self.armed(line, f"{point}=kill:{self.rng.randint(1, 5)}")
        # It may die of what waits for it before it is even seen online.
        await self.rig.burst(line, self.rng.randint(6, 12), 0.01)
        if pid is None or not await self.rig.child_gone(pid, within=30):
            return None
        return Kill(how, line.session, self.rig.logins(line))

    async def _slow(self, line: Line, how: str) -> Kill | None:
        """Every fsync takes long: many messages are decrypted and wait for the disk when the child dies."""
        logins = self.rig.logins(line)
        if await self.armed(line, f"journal.before_fsync=sleep:{SLOW}") is None:
            return None
        await self.rig.online(line, logins)
        await self.rig.burst(line, self.rng.randint(20, 60))
        await asyncio.sleep(self.rng.uniform(0.05, 0.8))
        return self.strike(line, how)

    # ---- the gateway ----

    async def gateway(self, point: str | None) -> None:
        """The whole gateway: at a fault point, or at random while every session is written to."""
        rig = self.rig
        before = set(rig.witness.asked_again)
        writing = self._write_to_all(self.rng.randint(5, 15))
        if point is None:
            await asyncio.sleep(self.rng.uniform(0.0, 0.4))
        else:
            await self.armed_gateway(point, self.rng.randint(1, 4))
            await asyncio.gather(*writing)
            writing = self._write_to_all(8)
            if not await self.gateway_died():
                self.missed[f"gateway:{point}"] += 1
        kills = await self.end_gateway(f"gateway:{point or 'random'}")
        await asyncio.gather(*writing)
        await rig.restart_gateway()
        for line, kill in zip(rig.lines, kills, strict=True):
            await self._recovered(line, kill, before)

    def _write_to_all(self, count: int) -> list[asyncio.Task[list[str]]]:
        return [asyncio.create_task(self.rig.burst(line, count, 0.03)) for line in self.rig.lines]


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
    points_in_turn = itertools.cycle(GATEWAY_POINTS)
    at = [None if n % 3 == 0 else next(points_in_turn) for n in range(max(1, gateways * 2 // 3))]
    return kinds, at


async def run(plan: Plan, *, url: str | None = None) -> Report:
    report, count = plan.report("P1"), plan.times(6, 300)
    rng = plan.rng("p1")
    async with (
        database(url) as (_, address),
        Rig(plan.folder, address, lines=2 if plan.short else 3, rng=rng) as rig,
    ):
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
        await beyond_recovery(rig, killing, report)
    return report


async def _lane(killing: Killing, line: Line, kinds: list[str]) -> None:
    for how in kinds:
        await killing.child(line, how)


async def _rest(killing: Killing, count: int) -> None:
    """What struck nobody is made up for."""
    for line in itertools.cycle(killing.rig.lines):
        if len(killing.kills) >= count:
            return
        await killing.child(line, "aimed")


async def judge(rig: Rig, killing: Killing, report: Report) -> None:
    report.figures |= killing.told()
    await judge_inbound(rig, report)
    healed = [seconds for kill in killing.recoveries for seconds in kill.healed]
    report.figures["healed after, s"] = percentiles(healed)
    report.figures["all acknowledged after a kill, s"] = percentiles(k.back for k in killing.recoveries)


async def beyond_recovery(rig: Rig, killing: Killing, report: Report) -> None:
    """Decrypted, never stored, and the sender's phone is off for good: that must be said, in a row and in a metric."""
    rig.gateway.environ |= GIVING_UP
    await killing.end_gateway("gateway:random")
    line = rig.lines[0]
    rig.arm_next(line, "whatsapp.callback=kill")
    await rig.restart_gateway()
    author = line.people[0]
    author.answers_retries = False
    sent = await author.send_text(line.shop, "nobody will ever read this")

    async def reported() -> bool:
        return await rig.metric("gateway_possible_loss_total") >= 1

    with contextlib.suppress(AssertionError):
        await rig.until(reported, "the message is reported as possible loss", 120)
    row = await rig.db.fetchrow(
        """
        SELECT m.placeholder, d.reason, d.action
        FROM et_messages m
        LEFT JOIN et_decisions d ON d.message_id = m.id
        WHERE m.channel_message_id = $1
        """,
        sent,
    )
    report.figures["beyond recovery"] = dict(row) if row else "no row"
    report.check("beyond recovery is a row that says so", row is not None and bool(row["placeholder"]))
    report.check("beyond recovery counts as possible loss", await reported())
    author.answers_retries = True
