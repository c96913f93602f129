"""P8: one owner per session. Three gateways on one host and one database: one is killed, one paused, one cut off alone.

After each fault: seconds until every session of the broken one is active elsewhere (at most 45), seconds in which two of
them sent on one session (none), what was sent twice or lost (nothing). The long form does it once more with folders apart,
where nothing but the database says that a gateway is dead.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.promises.p4 import tell
from tests.faults.promises.p5 import heard_again, stale_writes
from tests.faults.run import Plan
from tests.faults.world import Node, Shop, World

FAULTS = ("cut off from the database", "pause", "kill -9", "SIGTERM")
LIMIT = 45.0


async def run(plan: Plan, **server: Any) -> Report:
    report = plan.report("P8")
    await three_gateways(plan, report, server, apart=False)
    if not plan.short:
        folder = plan.folder / "apart"
        folder.mkdir()
        await three_gateways(plan.within(folder), report, server, apart=True)
    return report


async def three_gateways(plan: Plan, report: Report, server: dict[str, Any], *, apart: bool) -> None:
    """`apart`: each with a DATA_DIR of its own, as on three hosts; then there are no sessions that live in files."""
    rounds = plan.times(len(FAULTS), 8)
    chance = plan.rng(f"p8/{apart}")
    takeovers: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    async with World(plan, **server) as world:
        kinds = ("scripted", "mute") if apart else ("scripted", "mute", "journaled")
        shops = await world.shops(*(kinds * (1 if plan.short else 4)))
        nodes = [
            await world.node(name, proxied=True, start=False, data=f"data-{name}" if apart else "data")
            for name in "abc"
        ]
        await nodes[0].start()
        await asyncio.gather(*(node.start() for node in nodes[1:]))
        await world.open_for_business(shops)
        await world.peer.behave(delay=(0.0, 0.05 if plan.short else 1.0))
        live = [shop.session for shop in shops]
        await world.peer.traffic(live, rate=20, senders=10, seed=f"{plan.seed}/p8")
        async with world.meanwhile(feed_steadily(world, shops)):
            for number in range(rounds):
                fault = FAULTS[number % len(FAULTS)]
                victim = await whoever_owns(world, nodes, chance.choice(shops))
                takeovers[fault].append(await break_one(world, victim, fault))
                if number + 1 < rounds or not plan.short:
                    await mend(world, victim, fault, restart=not plan.short)
        await world.peer.hush()
        await world.taken_in(180)
        await world.settled(180)
        await all_stored(world)
        name = "folders apart: " if apart else ""
        for fault, seconds in takeovers.items():
            if seconds:
                report.figures[f"{name}seconds to take over after {fault}"] = checker.percentiles(seconds)
        worst = max(s for found in takeovers.values() for s in found)
        report.at_most(f"{name}most seconds to take over", worst, LIMIT)
        report.figures[f"{name}faults"] = rounds
        calls = [e for e in world.ledger() if e.kind == "called"]
        report.zero(f"{name}seconds in which two sent on one session", checker.overlap(checker.stints(calls)))
        report.add(f"{name}messages", checker.inbound(world.ledger(), await world.stored()))
        report.zero(f"{name}inversions", await world.inversions_in())
        await tell(report, world, shops, name)
        await stale_writes(world, report, name)
        left = [node for node in nodes if node.alive]
        await says_who_owns_what(report, left[0], shops, name)
        for node in left:
            await node.stop()


async def feed_steadily(world: World, shops: list[Shop]) -> None:
    place = 0
    while True:
        place += 1
        for shop in shops:
            await world.enqueue_many(shop, [(f"c{n}", str(place)) for n in range(2)])
        await asyncio.sleep(0.5)


async def whoever_owns(world: World, nodes: list[Node], shop: Shop) -> Node:
    """The gateway that has this session now."""
    found: list[Node] = []

    async def check() -> bool:
        owner = await world.value(
            "SELECT owner FROM et_session_leases WHERE session_id = $1 AND expires_at > clock_timestamp()",
            shop.session,
        )
        found[:] = [node for node in nodes if owner and f"-{node.pid}-" in owner]
        return bool(found)

    await world.until(check, 90, "somebody has the session")
    return found[0]


async def break_one(world: World, victim: Node, fault: str) -> float:
    """Seconds until everything it had is active with somebody else."""
    pid = victim.pid
    had = [
        row["session_id"]
        for row in await world.rows(
            "SELECT session_id FROM et_session_leases WHERE owner LIKE '%-' || $1 || '-%' "
            "AND expires_at > clock_timestamp()",
            str(pid),
        )
    ]
    stopping = None
    match fault:
        case "kill -9":
            await victim.kill()
        case "pause":
            victim.pause()
        case "SIGTERM":
            stopping = asyncio.create_task(victim.stop())
        case _:
            assert victim.proxy is not None
            victim.proxy.blackhole()
    seconds = await world.until(
        lambda: world.value(
            """
            SELECT count(*) = cardinality($1::BIGINT[])
            FROM et_session_leases l
            JOIN et_channel_sessions s ON s.id = l.session_id
            WHERE l.session_id = ANY ($1) AND l.expires_at > clock_timestamp()
              AND l.owner NOT LIKE '%-' || $2 || '-%' AND s.status = 'active'
            """,
            had,
            str(pid),
        ),
        150,
        f"the sessions {had} of {victim.name} with others after {fault}",
        every=0.1,
    )
    if stopping is not None:
        assert await stopping == 0, "a gateway that was asked to stop must end well"
    return seconds


async def mend(world: World, victim: Node, fault: str, *, restart: bool) -> None:
    # Others have been sending in its place for a while when it comes back.
    await asyncio.sleep(1)
    match fault:
        case "pause":
            victim.wake()
            await heard_again(world, victim)
        case "cut off from the database":
            assert victim.proxy is not None
            victim.proxy.heal()
        case _ if restart:
            await victim.start()


async def all_stored(world: World) -> None:
    async def check() -> bool:
        promised = {e.item for e in world.ledger() if e.kind == "acknowledged"}
        return promised <= set(await world.stored())

    await world.until(check, 120, "everything acknowledged is stored", every=0.2)


async def says_who_owns_what(report: Report, node: Node, shops: list[Shop], name: str) -> None:
    _, health = await node.api("GET", "/health")
    shown = {one["session_id"]: one.get("owner") for one in health["sessions"]}
    report.check(
        f"{name}/health says who owns each session",
        all(shown.get(shop.session) for shop in shops),
        str(health["sessions"])[:300],
    )
