"""P7: a full disk loses nothing: what cannot be made durable is not acknowledged, /health says so, and it gets over it.

DATA_DIR fills up under a channel with a journal and, with the database away, under the webhook's spool. Then the gateway is
killed, must refuse to start on the full disk, and starts again once there is room.
"""

from __future__ import annotations

import asyncio

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.disk import Disk, small_disk
from tests.faults.ledger import ACKNOWLEDGED
from tests.faults.poster import PosterProcess
from tests.faults.promises.p3 import webhooks
from tests.faults.run import Plan
from tests.faults.world import Node, World

SENDERS = 20


async def run(plan: Plan) -> Report:
    """Always on a server of its own: it is killed."""
    report = plan.report("P7")
    rounds = plan.times(1, 10)
    data = plan.folder / "data"
    disk = await small_disk(data)
    report.figures["disk"] = disk.kind
    async with disk, World(plan, quick=True) as world:
        shops = await world.shops("journaled", "scripted", "whatsapp")
        node = await world.node()
        await world.open_for_business(shops[:2])
        live = [shop.session for shop in shops[:2]]
        await world.peer.traffic(live, rate=20, senders=SENDERS, seed=f"{plan.seed}/p7")
        job = webhooks(plan, node, shops[2], 5000 * rounds, every=0.05)
        async with PosterProcess(plan.folder, "poster", job) as poster:
            await poster.has_received(1)
            for _ in range(rounds):
                await full_journal(report, world, node, disk, shops[0].session)
                await full_spool(report, world, node, disk, poster)
            await world.peer.hush()
            poster.hush()
            await world.taken_in(120)
            await poster.finished(240)
        await all_stored(world, node)
        report.figures["rounds"] = rounds
        ledger = [e for e in world.ledger(poster.ledger) if e.kind in ("offered", "acknowledged")]
        report.add("messages", checker.inbound(ledger, await world.stored()))
        report.zero("inversions", await world.inversions_in())
        await node.stop()
    return report


async def full_journal(report: Report, world: World, node: Node, disk: Disk, session: int) -> None:
    """The disk fills under a journal, with the gateway running, and is freed again."""
    await disk.fill(node)
    await health_says(world, node, 503)
    report.figures["/health with a full disk under a journal"] = "503 error"
    before = acknowledged(world, f"{session}.")
    await asyncio.sleep(1)
    report.zero("acknowledged by a journal on a full disk", acknowledged(world, f"{session}.") - before)
    await disk.free(node)
    await health_says(world, node, 200)
    report.figures["/health with room again"] = "200 ok"


async def full_spool(report: Report, world: World, node: Node, disk: Disk, poster: PosterProcess) -> None:
    """The same with the database away, so that webhooks need the spool; then a start on the full disk."""
    world.server.kill()
    await disk.fill(node)
    await health_says(world, node, 503)
    await poster.is_told(503, "journal")
    await node.kill()
    refused = await refuses_to_start(node)
    report.check("a start on a full disk is refused and says why", "DATA_DIR" in refused, refused)
    await disk.free(node)
    world.server.restart()
    await node.start()
    await health_says(world, node, 200)


async def refuses_to_start(node: Node) -> str:
    """Its last words."""
    try:
        await node.start(60)
    except AssertionError:
        return node.tail(5)
    await node.kill()
    return "it started"


def acknowledged(world: World, prefix: str) -> int:
    return sum(e.kind == ACKNOWLEDGED and e.item.startswith(prefix) for e in world.ledger())


async def health_says(world: World, node: Node, wanted: int) -> None:
    async def check() -> bool:
        status, body = await node.api("GET", "/health", key=None)
        return status == wanted and (wanted != 200 or body["status"] == "ok")

    await world.until(check, 90, f"/health answers {wanted}", every=0.1)


async def all_stored(world: World, node: Node) -> None:
    async def check() -> bool:
        _, health = await node.api("GET", "/health")
        promised = {e.item for e in world.ledger() if e.kind == ACKNOWLEDGED}
        return not health["journal"]["spool"] and promised <= set(await world.stored())

    await world.until(check, 120, "everything acknowledged is stored", every=0.2)
