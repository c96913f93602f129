"""Drains waiting jobs with procrastinate, in an environment of its own: `URL ITEMS CONCURRENCY THREADS`.

THREADS 0: in no order; else a lock per thread, which keeps each thread's order. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from importlib.metadata import version

from procrastinate import App, PsycopgConnector

PUTTING = 8


async def main(url: str, items: int, concurrency: int, threads: int) -> None:
    # One connection a job that runs, and some for fetching: the pool is not what holds it up.
    app = App(connector=PsycopgConnector(conninfo=url, min_size=concurrency, max_size=concurrency + PUTTING))
    seen: list[float] = []

    async def noop(n: int) -> None:
        seen.append(time.monotonic())

    async with app.open_async():
        task = app.task(name="noop")(noop)
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        if threads:
            gate = asyncio.Semaphore(PUTTING)

            async def put(n: int) -> None:
                async with gate:
                    await task.configure(lock=f"thread-{n % threads}").defer_async(n=n)

            await asyncio.gather(*(put(n) for n in range(items)))
        else:
            await task.batch_defer_async(*({"n": n} for n in range(items)))
        began = time.monotonic()
        await app.run_worker_async(concurrency=concurrency, wait=False, install_signal_handlers=False)
    print(json.dumps({"version": version("procrastinate"), "items": len(seen), "seconds": max(seen) - began}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
