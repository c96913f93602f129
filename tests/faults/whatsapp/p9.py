"""P9 through the real WhatsApp client: 1,000 messages from 100 senders in a minute while another session's child is killed.

What became of each message. `python -m bench.whatsapp --kill-child` measures how long they take, with a third process
that sees the commits; the time here ends at the beginning of the row's transaction.
"""

from __future__ import annotations

import asyncio
import random
import time

from bench.whatsapp import arrivals
from tests.faults.checker import Report, percentiles
from tests.faults.run import Plan
from tests.faults.whatsapp.killing import Killer, database
from tests.faults.whatsapp.rig import Line, Rig
from tests.faults.whatsapp.verdict import judge_inbound, settle

KILL_EVERY = 3.0


async def run(plan: Plan, *, url: str | None = None) -> Report:
    report, rng = plan.report("P9"), plan.rng("p9")
    count, senders, seconds = (60, 20, 3.0) if plan.short else (1000, 100, 60.0)
    async with database(url) as (_, address), Rig(plan.folder, address, lines=2, rng=rng) as rig:
        measured, other = rig.lines
        killer = Killer(rig, rng)
        killing = asyncio.create_task(keep_killing(killer, other))
        ids = await open_loop(rig, measured, rng, count, senders, seconds)
        killing.cancel()
        await asyncio.wait([killing])
        await settle(rig)
        report.figures |= killer.told()
        report.figures["senders, seconds"] = f"{senders}, {seconds:.0f}"
        report.check("the other session's child was killed", len(killer.kills) > 0)
        await judge_inbound(rig, report)
        report.figures["arrival to transaction, ms"] = percentiles(await latencies(rig, ids))
    return report


async def keep_killing(killer: Killer, line: Line) -> None:
    while True:
        if kill := killer.strike(line, "another session's child"):
            killer.kills.append(kill)
        await asyncio.sleep(KILL_EVERY)


async def open_loop(
    rig: Rig, line: Line, rng: random.Random, count: int, senders: int, seconds: float
) -> list[str]:
    """Each at its own moment, whatever became of the ones before."""
    people = [rig.sandbox.person(f"+6011{n:07}", f"S{n}") for n in range(senders)]
    start, ids = time.monotonic(), []
    for number, due in enumerate(arrivals(count, seconds, rng)):
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        msg_id = await people[number % senders].send_text(line.shop, f"{number}")
        rig.witness.wrote(msg_id, line.session, f"{number}", "lid")
        ids.append(msg_id)
    return ids


async def latencies(rig: Rig, ids: list[str]) -> list[float]:
    rows = await rig.db.fetch(
        "SELECT channel_message_id, extract(epoch FROM created_at)::float8 AS at FROM et_messages"
        " WHERE channel_message_id = ANY ($1)",
        ids,
    )
    return [(row["at"] - rig.sandbox.written(row["channel_message_id"])[0].at) * 1000 for row in rows]
