"""P6: a database outage loses nothing. Its server is killed, stopped, frozen, cut off, blackholed and slowed down.

Messages go on coming in through three kinds of door and messages go on being queued; after each outage the time until
everything is stored and sent again is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.ledger import Entry
from tests.faults.poster import PosterProcess
from tests.faults.promises.p3 import webhooks
from tests.faults.promises.p4 import tell
from tests.faults.proxy import Proxy
from tests.faults.run import Plan
from tests.faults.world import LOST, Node, Shop, World

SHORT = (("killed", 2.0), ("half open, then cut", 1.0), ("blackholed", 1.5))
LONG = (
    ("killed", 5.0), ("cut", 0.0), ("refused", 20.0), ("half open, then cut", 5.0), ("blackholed", 20.0),
    ("frozen", 20.0), ("slow", 30.0), ("stopped", 60.0), ("blackholed", 90.0), ("killed", 600.0),
)  # fmt: skip
SENDERS = 40
CUSTOMERS = 12


async def run(plan: Plan) -> Report:
    """Always on a server of its own: it is killed."""
    report = plan.report("P6")
    outages = [(name, seconds) for name, seconds in (SHORT if plan.short else LONG)]
    if plan.minutes is not None:
        # As long as asked for: the last outage takes what the others leave.
        rest = plan.minutes * 60 - sum(seconds + 15 for _, seconds in outages[:-1])
        outages[-1] = (outages[-1][0], max(5.0, rest))
    async with World(plan, quick=True) as world:
        shops = await world.shops("scripted", "journaled", "mute", "whatsapp")
        node = await world.node(proxied=True)
        await world.open_for_business(shops[:3])
        proxy = node.proxy
        assert proxy is not None
        live = [shop.session for shop in shops[:3]]
        rate = 15.0
        await world.peer.traffic(live, rate=rate, senders=SENDERS, seed=f"{plan.seed}/p6")
        total = sum(seconds + 10 for _, seconds in outages)
        job = webhooks(plan, node, shops[3], int((total + 60) * rate * 3), every=1 / rate)
        drains: dict[str, float] = {}
        answers: set[tuple[int, str, str]] = set()
        async with PosterProcess(plan.folder, "poster", job) as poster:
            await poster.has_received(1)
            async with world.meanwhile(feed(world, shops[:3])), world.meanwhile(watch(node, answers)):
                for name, seconds in outages:
                    await asyncio.sleep(1)
                    await break_it(world, proxy, name, seconds)
                    drains[f"{name} {seconds:g} s"] = round(await drain(world, node, time.monotonic()), 1)
            await world.peer.hush()
            poster.hush()
            await poster.finished(120)
        await world.taken_in(120)
        await drain(world, node, time.monotonic())
        await world.settled(120)
        ledger = world.ledger(poster.ledger)
        report.figures["seconds until everything was stored and sent"] = drains
        report.figures["what /health said"] = [
            f"{code} {status} {db}" for code, status, db in sorted(answers)
        ]
        report.add("messages", checker.inbound(still_offered(ledger), await world.stored()))
        report.zero("inversions", await world.inversions_in())
        report.figures["spooled webhooks"] = sum('"spool.appended"' in line for line in node.lines)
        report.zero("answers of /health that were errors", sum(code != 200 for code, _, _ in answers))
        report.check(
            "/health told of the database", any(db == "disconnected" for _, _, db in answers), str(answers)
        )
        await tell(report, world, shops[:3])
        await node.stop()
    return report


def still_offered(ledger: list[Entry]) -> list[Entry]:
    return [entry for entry in ledger if entry.kind in ("offered", "acknowledged")]


async def break_it(world: World, proxy: Proxy, name: str, seconds: float) -> None:
    """One outage, from its begin to its end."""
    faults: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "killed": (world.server.kill, world.server.restart),
        "stopped": (world.server.stop, world.server.restart),
        "frozen": (world.server.freeze, world.server.thaw),
        "cut": (proxy.cut, proxy.heal),
        "refused": (proxy.refuse, proxy.heal),
        "blackholed": (proxy.blackhole, proxy.heal),
        "half open, then cut": (proxy.half_open, proxy.break_off),
        "slow": (lambda: proxy.slow(delay=0.1, bytes_per_second=200_000), proxy.heal),
    }
    begin, end = faults[name]
    # Starting a server waits for it with sleeps; in this thread all the same, which must outlive the server.
    begin()
    await asyncio.sleep(seconds)
    end()


async def drain(world: World, node: Node, began: float) -> float:
    """Seconds until what had come in by now is stored and what was queued by now is done with."""
    known = {e.item for e in world.ledger() if e.kind == "offered"}
    newest: list[int] = []

    async def check() -> bool:
        if not newest:
            newest.append(await world.value("SELECT coalesce(max(id), 0) FROM et_outbound_queue"))
        waiting = await world.value(
            "SELECT count(*) FROM et_outbound_queue WHERE id <= $1 AND status IN ('queued', 'dispatching')",
            newest[0],
        )
        if waiting:
            return False
        _, health = await node.api("GET", "/health")
        if health.get("database") != "connected" or health.get("journal", {}).get("spool", 1):
            return False
        return known <= set(await world.stored())

    await world.until(check, 600, "everything stored and sent after the outage", every=0.2)
    return time.monotonic() - began


async def feed(world: World, shops: list[Shop]) -> None:
    """A tenant's backend that queues whenever the database takes it."""
    place = 0
    while True:
        place += 1
        for shop in shops:
            with contextlib.suppress(*LOST):
                # A commit that was not answered may have happened all the same: its place is not used again.
                await world.enqueue_many(
                    shop, [(f"c{(place + c) % CUSTOMERS}", str(place)) for c in range(2)]
                )
        await asyncio.sleep(0.5)


async def watch(node: Node, answers: set[tuple[int, str, str]]) -> None:
    """What a load balancer sees."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                code, health = await node.api("GET", "/health", key=None)
                answers.add((code, health["status"], health["database"]))
        await asyncio.sleep(0.3)
