"""P1, P4 and P6 over email, Telegram and the channel of the documentation: kills, lost answers, and a database that dies.

A channel that fetches acknowledges by moving its cursor in the message's own transaction, so every place around that commit
is where it may be killed; its sends are killed around the call, and cut off by the server before and after it took them.
"""

from __future__ import annotations

import asyncio

from tests.contract.deskchat_peer import DeskChatPeer
from tests.contract.email_peer import EmailPeer
from tests.contract.peer import Can, Peer
from tests.contract.telegram_peer import TelegramPeer
from tests.faults.channels.rig import Rig, points
from tests.faults.checker import Report
from tests.faults.run import Plan

PEERS: tuple[type[Peer], ...] = (EmailPeer, TelegramPeer, DeskChatPeer)
SHORT = (
    "ingest.before_commit",
    "ingest.after_commit",
    "outbound.call.after",
)
LONG = (
    *SHORT,
    "ingest.before_insert",
    "outbound.call.before",
    "outbound.claim.before_commit",
    "outbound.claim.after_commit",
    "outbound.mark.before_commit",
    "outbound.mark.after_commit",
    "outbound.resolve.before",
    "random",
)
ACTIVE = "SELECT bool_and(status = 'active') FROM et_channel_sessions"
OUTAGES = {"short": (1.0,), "long": (5.0, 30.0, 120.0)}


async def run(plan: Plan) -> Report:
    report = plan.report("P1, P4 and P6 over channels that fetch")
    chance = plan.rng("channels")
    names = SHORT if plan.short else LONG
    kills = plan.times(len(names), 5 * len(names))
    each = 3 if plan.short else 8
    reached = 0
    async with Rig(plan, [peer() for peer in PEERS]) as rig:
        # What lay in a mailbox before its session first came is nobody's message.
        await rig.node.start()
        await rig.until(ACTIVE, "every session active")
        await offer(rig, plan, kills, each)
        await rig.node.kill()
        for number in range(kills):
            await offer(rig, plan, number, each)
            [point] = points(chance, [names[number % len(names)]])
            if point == "random":
                reached += await rig.life(point, patience=chance.uniform(0.2, 6))
            else:
                reached += await rig.life(point, patience=15)
        report.figures["kills"] = {"planned": kills, "at a fault point": reached}
        rig.node.arm("")
        await rig.node.start()
        for seconds in OUTAGES["short" if plan.short else "long"]:
            await rig.until(ACTIVE, "every session active")
            await outage(rig, plan, seconds, each)
        for line in rig.lines:
            await line.peer.come_back()
        await rig.quiet()
        await rig.tell(report)
        await rig.node.stop()
    return report


async def offer(rig: Rig, plan: Plan, number: int, each: int) -> None:
    """Messages in both directions, and a send of each channel that will be cut off."""
    chance = plan.rng(f"offer {number}")
    for line in rig.lines:
        await line.say(chance, each)
        await rig.enqueue(line, chance, each)
        if number % 2 and Can.CUT_AFTER not in line.peer.cannot:
            await line.peer.cut_after_acceptance()
        elif not number % 2 and Can.CUT_BEFORE not in line.peer.cannot:
            await line.peer.cut_before_acceptance()


async def outage(rig: Rig, plan: Plan, seconds: float, each: int) -> None:
    """The database is killed while messages come in and sends go out, and starts again."""
    chance = plan.rng(f"outage {seconds:g}")
    for line in rig.lines:
        await rig.enqueue(line, chance, each)
        await line.say(chance, each)
    rig.server.kill()
    for line in rig.lines:
        await line.say(chance, each)
    await asyncio.sleep(seconds)
    rig.server.restart()
    for line in rig.lines:
        await line.say(chance, each)
    await rig.quiet()
