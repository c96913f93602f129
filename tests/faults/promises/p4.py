"""P4: one queue item is sent at most once, or says `unknown`, wherever the gateway is killed and whatever answers are lost.

Every fault point of the outbound side kills the process in turn, and between them it is killed at random; meanwhile the
platform drops answers, breaks the line, refuses and declines. `scripted` sessions can be asked about a send, `mute` cannot.
"""

from __future__ import annotations

import asyncio

from tests.faults import checker
from tests.faults.checker import Class, Report
from tests.faults.ledger import ANSWERED
from tests.faults.run import Plan
from tests.faults.world import Node, Shop, World

POINTS = (
    "outbound.claim.before_commit",
    "outbound.claim.after_commit",
    "outbound.call.before",
    "outbound.call.after",
    "outbound.mark.before_commit",
    "outbound.mark.after_commit",
    "outbound.resolve.before",
    "random",
)
SHORT = ("outbound.claim.after_commit", "outbound.call.after", "outbound.mark.before_commit")
"""For CI, where tests/integration/test_outbound_faults.py has every point once, with the worker alone."""
TROUBLE = {"dropped": 0.03, "lost": 0.03, "not_sent": 0.05, "refused": 0.03}
CUSTOMERS = 12


async def run(plan: Plan, **server: object) -> Report:
    report = plan.report("P4")
    chance = plan.rng("p4")
    points = SHORT if plan.short else POINTS
    kills = plan.times(len(points), 150)
    each = 8 if plan.short else 20
    async with World(plan, quick=True, **server) as world:  # type: ignore[arg-type]
        shops = await world.shops("scripted", "mute", "scripted", "mute")
        await world.want(shops)
        await world.peer.behave(delay=(0.0, 0.02), **TROUBLE)
        node = await world.node(start=False)
        places: dict[tuple[int, str], int] = {}
        died = 0
        for round_number in range(kills):
            point = points[round_number % len(points)]
            await feed(world, shops, chance, places, each)
            passing = chance.randint(1, 4) if point != "outbound.resolve.before" else 1
            node.arm("" if point == "random" else f"{point}=kill:{passing}")
            died += await life(node, chance.uniform(0.05, 0.6), point, patience=8 if plan.short else 15)
        node.arm("")
        await world.peer.behave()
        await node.start()
        await world.settled(60)
        await tell(report, world, shops)
        report.figures["kills"] = {"planned": kills, "at a fault point": died}
        await node.stop()
    return report


async def feed(
    world: World, shops: list[Shop], chance: object, places: dict[tuple[int, str], int], each: int
) -> None:
    """Some messages for each session, the text of each its place in the thread."""
    for shop in shops:
        messages = []
        for _ in range(each):
            customer = f"c{chance.randrange(CUSTOMERS)}"  # type: ignore[attr-defined]
            place = places[shop.session, customer] = places.get((shop.session, customer), 0) + 1
            messages.append((customer, str(place)))
        await world.enqueue_many(shop, messages)


async def life(node: Node, seconds: float, point: str, *, patience: float) -> bool:
    """One life of the gateway; whether the fault point ended it. One that is never passed ends by `kill -9` all the same."""
    try:
        await node.start()
    except AssertionError:
        if node.alive:
            raise
        return True  # before it had said that it had started
    if point != "random":
        try:
            await node.died(patience)
            return True
        except TimeoutError:
            pass
    else:
        await asyncio.sleep(seconds)
    await node.kill()
    return False


async def tell(report: Report, world: World, shops: list[Shop], name: str = "") -> None:
    """Classes for each kind of session, and what must be zero."""
    ledger = world.ledger()
    refused = [
        e.item for e in ledger if e.kind == ANSWERED and e.fields["outcome"] in ("refused", "not_sent")
    ]
    queue = {row.item: row for row in await world.queue_rows()}
    owners = await world.rows("SELECT id, channel FROM et_outbound_queue")
    for channel in sorted({shop.channel for shop in shops}):
        mine = {str(row["id"]) for row in owners if row["channel"] == channel}
        classes = checker.outbound(
            [e for e in ledger if e.item in mine], [queue[i] for i in sorted(mine)], refused=refused
        )
        report.add(f"{name}sends, {channel}", classes)
        unknown = classes.counts[Class.UNKNOWN]
        report.figures[f"{name}share unknown, {channel}"] = round(unknown / max(1, classes.expected), 4)
    report.zero(f"{name}second sends", checker.second_sends(ledger))
    report.zero(f"{name}inversions of calls", world.inversions_out())
    report.figures[f"{name}calls by outcome"] = dict(sorted((await world.peer.calls()).items()))
