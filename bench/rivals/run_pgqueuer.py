"""Drains waiting jobs with pgqueuer, in an environment of its own: `URL ITEMS CONNECTIONS BATCH`. Prints JSON.

In no order. Its tables are logged ones, as it makes them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.types import QueueExecutionMode


async def main(url: str, items: int, connections: int, batch: int) -> None:
    async with asyncpg.create_pool(url, min_size=connections, max_size=connections) as pool:
        queuer = PgQueuer(AsyncpgPoolDriver(pool))
        if await pool.fetchval("SELECT to_regclass('pgqueuer')") is None:
            await queuer.qm.queries.install()
        seen: list[float] = []

        async def noop(job: object) -> None:
            seen.append(time.monotonic())

        queuer.entrypoint("noop")(noop)
        await queuer.qm.queries.enqueue(["noop"] * items, [b"1"] * items, [0] * items)
        began = time.monotonic()
        await queuer.run(batch_size=batch, mode=QueueExecutionMode.drain)
    print(json.dumps({"version": version("pgqueuer"), "items": len(seen), "seconds": max(seen) - began}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
