"""P3: order within a thread is the order of arrival, with a hundred senders and a gateway that is killed again and again.

In through a channel that acknowledges after the commit, one that acknowledges from its journal, and the webhook; nothing is
lost or doubled on the way. Kills come at random and at every fault point of ingest and journal.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.poster import Job, Post, PosterProcess, baileys
from tests.faults.run import Plan
from tests.faults.world import Node, Shop, World
from tests.support.gateway import ADMIN_KEY

SENDERS = 100
POINTS = (
    "journal.after_fsync",
    "random",
    "ingest.after_commit",
    "ingest.before_commit",
    "journal.before_release",
    "ingest.before_insert",
    "journal.before_fsync",
    "journal.after_release",
)


async def run(plan: Plan, **server: Any) -> Report:
    report = plan.report("P3")
    kills = plan.times(2, 60)
    rate = 40.0 if plan.short else 60.0
    async with World(plan, quick=True, **server) as world:
        shops = await world.shops("scripted", "journaled", "scripted", "whatsapp")
        await world.want(shops[:3])
        node = await world.node(start=False)
        chance = plan.rng("kills")
        arm(node, chance, 0)
        await node.start()
        live = [shop.session for shop in shops[:3]]
        await world.peer.traffic(live, rate=rate, senders=SENDERS, seed=f"{plan.seed}")
        job = webhooks(plan, node, shops[3], 200 + kills * 150)
        async with PosterProcess(plan.folder, "poster", job) as poster:
            died = await kill_again_and_again(node, chance, kills)
            report.figures["kills"] = {"planned": kills, "at a fault point": died}
            await world.peer.hush()
            poster.hush()
            report.figures["seconds until everything was acknowledged"] = round(await world.taken_in(120), 1)
            await poster.finished(120)
            await drained(world, shops[1])
            ledger = world.ledger(poster.ledger)
        report.add("messages", checker.inbound(ledger, await world.stored()))
        report.figures["threads"] = await world.value("SELECT count(*) FROM et_threads")
        report.zero("inversions", await world.inversions_in())
        await node.stop()
    return report


def webhooks(plan: Plan, node: Node, shop: Shop, count: int, *, every: float = 0.03) -> Job:
    chance = plan.rng("webhooks")
    address = f"http://127.0.0.1:{node.environ['PORT']}/webhook/{shop.tenant}/{shop.session}"
    places: dict[int, int] = {}
    posts = []
    for n in range(count):
        sender = chance.randrange(SENDERS)
        place = places[sender] = places.get(sender, 0) + 1
        item = f"{shop.session}.{sender}.{place}"
        posts.append(
            Post(item, f"{sender}", baileys(item, f"6011{3_000_000 + sender}", f"{place}"), at=n * every)
        )
    return Job([address], ADMIN_KEY, posts, seed=f"{plan.seed}", patience=1200, timeout=10)


async def kill_again_and_again(node: Node, chance: random.Random, kills: int) -> int:
    """How many of the deaths were brought by a fault point. The node is armed for the first of them."""
    died = 0
    for number in range(kills):
        point = POINTS[number % len(POINTS)]
        if point == "random":
            await asyncio.sleep(chance.uniform(0.3, 1.5))
        elif node.alive:
            try:
                await node.died(8)
                died += 1
            except TimeoutError:
                pass
        await node.kill()
        arm(node, chance, number + 1 if number + 1 < kills else None)
        try:
            await node.start()
        except AssertionError:
            if node.alive:
                raise
    if not node.alive:
        node.arm("")
        await node.start()
    return died


def arm(node: Node, chance: random.Random, number: int | None) -> None:
    """For the next life; None: it is to live."""
    point = "random" if number is None else POINTS[number % len(POINTS)]
    node.arm("" if point == "random" else f"{point}=kill:{chance.randint(1, 20)}")


async def drained(world: World, shop: Shop) -> None:
    """Until what the journal acknowledged is stored: its last message of each sender."""

    async def check() -> bool:
        wanted = {
            e.item
            for e in world.ledger()
            if e.kind == "acknowledged" and e.item.startswith(f"{shop.session}.")
        }
        return wanted <= set(await world.stored())

    await world.until(check, 60, "the journal in the database", every=0.3)
