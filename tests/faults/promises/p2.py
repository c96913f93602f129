"""P2: a redelivered message is stored once, and the same id from two people twice.

Two processes post every message five times each over two gateways, under phone number, LID and both, with a restart between.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.poster import Job, Post, PosterProcess, baileys
from tests.faults.run import Plan
from tests.faults.world import Node, Shop, World
from tests.support.gateway import ADMIN_KEY

TIMES = 5
FORMS = ("phone", "lid", "both")


async def run(plan: Plan, **server: Any) -> Report:
    report = plan.report("P2")
    people = plan.times(3, 200)
    async with World(plan, **server) as world:
        # Two gateways with folders of their own: nothing is shared but the database.
        nodes = [
            await world.node("a", data="data-a", start=False),
            await world.node("b", data="data-b", start=False),
        ]
        # One after the other at first: both migrate an empty database only once, which is not what is tested here.
        await asyncio.gather(*(node.start() for node in nodes))
        (shop,) = await world.shops("whatsapp")
        first = [post for person in range(people) for post in messages(person, proven=False)]
        proofs = [post for person in range(people) for post in messages(person, proven=True)]
        ledgers = []
        for name, posts in (("first", first), ("proven", proofs)):
            posters = [
                PosterProcess(
                    plan.folder, f"{name}-{n}", job(nodes, shop, shuffled(plan, f"{name}{n}", posts))
                )
                for n in (1, 2)
            ]
            ledgers += [poster.ledger for poster in posters]
            async with posters[0], posters[1]:
                if name == "proven":
                    await restart_while(posters, nodes, report)
                await asyncio.gather(*(poster.finished(240) for poster in posters))
        stored = await world.rows(
            """
            SELECT l.external_id || '/' || m.channel_message_id AS item
            FROM et_messages m
            JOIN et_leads l ON l.id = m.lead_id
            """
        )
        ledger = world.ledger(*ledgers)
        report.add("messages", checker.inbound(ledger, [row["item"] for row in stored]))
        distinct = {entry.item for entry in ledger if entry.kind == "offered"}
        report.figures["deliveries"] = sum(entry.kind == "acknowledged" for entry in ledger)
        report.figures["rows"] = len(stored)
        report.zero("rows that are not distinct messages", abs(len(stored) - len(distinct)))
        people_found = await world.value("SELECT count(*) FROM et_leads")
        report.zero("leads that are not distinct people", abs(people_found - people))
        for node in nodes:
            await node.stop()
    return report


def phone(person: int) -> str:
    return f"6011{2_000_000 + person}"


def messages(person: int, *, proven: bool) -> list[Post]:
    """Three messages of one person, in three forms. The ids are the same for everybody: only the sender tells them apart.

    Not `proven`: nothing says yet that LID and number are one person, and each message comes under one of them."""
    made = []
    for n, form in enumerate(FORMS):
        number, lid = phone(person), f"10000{person:09d}"
        hidden = (form == "lid" and not proven) or (form == "both")
        body = baileys(
            f"SAME{n}", number, f"{n}", lid=lid if hidden or proven else None, proven=proven or form == "both"
        )
        made.append(Post(f"whatsapp:+{number}/SAME{n}", f"{person}", body))
    return made


def shuffled(plan: Plan, name: str, posts: list[Post]) -> list[Post]:
    mixed = list(posts)
    plan.rng(name).shuffle(mixed)
    return mixed


def job(nodes: list[Node], shop: Shop, posts: list[Post]) -> Job:
    addresses = [
        f"http://127.0.0.1:{node.environ['PORT']}/webhook/{shop.tenant}/{shop.session}" for node in nodes
    ]
    return Job(addresses, ADMIN_KEY, posts, times=TIMES, patience=200)


async def restart_while(posters: list[PosterProcess], nodes: list[Node], report: Report) -> None:
    """Kill one gateway in the middle of it, and start it again."""
    await posters[0].has_received(1)
    await nodes[0].kill()
    await nodes[0].start()
    report.figures["restarts"] = 1
