"""P5: nothing hangs. A gateway that is stopped in its tracks, or a call that never returns, is got over in two lease times.

One of two gateways is paused (SIGSTOP) for longer than its leases and woken again (SIGCONT); the other one must have taken
its sessions over, nothing may go out twice, and what is still written under an old claim or lease must be refused.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from core.store import dispatching, leases
from core.store.dispatching import Mark
from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.promises.p4 import tell
from tests.faults.run import Plan
from tests.faults.world import QUICK_TIMINGS, Node, Shop, World

TTL = 30.0
WATCHDOG = 2.0


async def run(plan: Plan, **server: Any) -> Report:
    report = plan.report("P5")
    rounds = plan.times(0, 3)
    await never_returns(plan, report, server)
    if not plan.short:  # in the short form a pause is one of promise 8's faults
        await paused(plan, report, TTL, rounds, server)
    return report


async def paused(plan: Plan, report: Report, ttl: float, rounds: int, server: dict[str, Any]) -> None:
    """SIGSTOP for two lease times in the middle of sending and receiving."""
    takeovers, revivals = [], []
    async with World(plan, **server) as world:
        shops = await world.shops("scripted", "mute", "scripted", "mute")
        nodes = [await world.node(name, data=f"data-{name}", start=False) for name in ("a", "b")]
        await nodes[0].start()
        await world.open_for_business(shops)
        await nodes[1].start()
        live = [shop.session for shop in shops]
        await world.peer.behave(delay=(0.0, 0.05 if plan.short else 1.0))
        await world.peer.traffic(live, rate=20, senders=10, seed=f"{plan.seed}/p5")
        async with world.meanwhile(feed_steadily(world, shops)):
            for number in range(rounds):
                frozen, other = nodes[number % 2], nodes[(number + 1) % 2]
                await owned_by(world, shops, frozen, 60 + 2 * ttl)
                frozen.pause()
                takeovers.append(await owned_by(world, shops, other, 2 * ttl + 60))
                # Long enough for the other one to have sent and stored in its place.
                await asyncio.sleep(min(2 * ttl, 60))
                frozen.wake()
                revivals.append(await heard_again(world, frozen))
                if number + 1 < rounds:
                    # So that the woken one gets its sessions back, with all that it remembers.
                    other.pause()
                    takeovers.append(await owned_by(world, shops, frozen, 2 * ttl + 60))
                    other.wake()
                    nodes.reverse()
        await world.peer.hush()
        await world.taken_in(300)
        await world.settled(300)
        report.figures["rounds of SIGSTOP"] = rounds
        report.figures["seconds to take over"] = checker.percentiles(takeovers)
        report.at_most("most seconds to take over", max(takeovers), 2 * ttl)
        report.figures["seconds until the woken one answers"] = checker.percentiles(revivals)
        report.add("messages", checker.inbound(world.ledger(), await world.stored()))
        report.zero("inversions", await world.inversions_in())
        await tell(report, world, shops)
        calls = [e for e in world.ledger() if e.kind == "called"]
        report.zero(
            "seconds in which two gateways sent on one session", checker.overlap(checker.stints(calls))
        )
        await stale_writes(world, report)
        for node in nodes:
            await node.stop()


async def stale_writes(world: World, report: Report, name: str = "") -> None:
    """What a gateway that lost a session would still write: outcomes under an older claim, renewals of an older lease."""
    async with world.looking() as conn, conn.transaction():
        rows = await conn.fetch(
            "SELECT id, claim_epoch FROM et_outbound_queue WHERE claim_epoch > 0 LIMIT 500"
        )
        marks = [
            Mark(row["id"], row["claim_epoch"] - 1, status)
            for row in rows
            for status in ("sent", "queued", "failed")
        ]
        moved = sum([len(await dispatching.mark(conn, [mark])) for mark in marks])
        held = await conn.fetch("SELECT session_id, owner, epoch FROM et_session_leases")
        renewed = [
            await leases.renew(conn, lease["owner"], {lease["session_id"]: lease["epoch"] - 1}, ttl=30)
            for lease in held
        ]
    report.figures[f"{name}stale writes tried"] = len(marks) + len(held)
    report.zero(f"{name}stale writes that got through", moved + sum(len(found) for found in renewed))


async def feed_steadily(world: World, shops: list[Shop]) -> None:
    place = 0
    while True:
        place += 1
        for shop in shops:
            await world.enqueue_many(shop, [(f"c{n}", str(place)) for n in range(3)])
        await asyncio.sleep(2)


async def owned_by(world: World, shops: list[Shop], node: Node, within: float) -> float:
    """Seconds until this gateway holds all of them and each is active."""
    return await world.until(
        lambda: world.value(
            """
            SELECT count(*) = $1
            FROM et_session_leases l
            JOIN et_channel_sessions s ON s.id = l.session_id
            WHERE l.owner LIKE '%-' || $2 || '-%' AND l.expires_at > clock_timestamp() AND s.status = 'active'
            """,
            len(shops),
            str(node.pid),
        ),
        within,
        f"every session with {node.name}",
    )


async def heard_again(world: World, node: Node) -> float:
    async def check() -> bool:
        status, _ = await node.api("GET", "/health", key=None)
        return status == 200

    return await world.until(check, 30, f"{node.name} answers again")


async def never_returns(plan: Plan, report: Report, server: dict[str, Any]) -> None:
    """Calls that are taken and never answered: the watchdog gives them up, and the thread goes on."""
    folder = plan.folder / "hang"
    folder.mkdir()
    async with World(plan.within(folder), quick=True, **server) as world:
        shops = await world.shops("scripted", "mute")
        timings = QUICK_TIMINGS | {"watchdog": WATCHDOG}
        node = await world.node(start=False, FAULTS_TIMINGS=orjson.dumps(timings).decode())
        await world.peer.behave(hang=0.3)
        for shop in shops:
            await world.enqueue_many(
                shop, [(f"c{n % 4}", str(n // 4 + 1)) for n in range(12 if plan.short else 60)]
            )
        await world.want(shops)
        await node.start()
        taken = await world.settled(WATCHDOG * 60)
        await world.peer.behave()
        late = [await world.enqueue(shop, "c0", "9999") for shop in shops]
        await world.settled(60)
        classes = checker.outbound(world.ledger(), await world.queue_rows())
        report.add("calls that never return", classes)
        report.figures["calls that never returned"] = (await world.peer.calls()).get("hang", 0)
        report.figures["seconds to get over all of them"] = round(taken, 1)
        report.zero("second sends after a watchdog", checker.second_sends(world.ledger()))
        gone = await world.value(
            "SELECT count(*) FROM et_outbound_queue WHERE id = ANY ($1::BIGINT[]) AND status = 'sent'", late
        )
        report.check("the threads go on", gone == len(late), f"{gone} of {len(late)} later messages went out")
        await node.stop()
