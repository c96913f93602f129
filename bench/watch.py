"""Sees commits from outside: a process of its own, listening on a connection of its own. Started by `bench.whatsapp`.

    python -m bench.watch DATABASE_URL

Prints `ready`; on a line of input it prints one JSON object, channel message id → monotonic seconds at which another
connection had read the row, and ends. So the figures hold the commit, the notification and a query: what a reader of
the database waits for, and never less than the commit took. It also ends when its input is closed.
"""

from __future__ import annotations

import asyncio
import sys
import time

import asyncpg
import orjson

from bench import common

OVERLAP_SECONDS = 0.25
"""Ids are given before they are committed: rows under the highest id may still appear for so long. What comes later
than that is seen at the end, and counts as seen then. Each look reads these rows again, beside what is measured."""
POLL_SECONDS = 0.25


class Watch:
    def __init__(self, conn: asyncpg.Connection[asyncpg.Record]) -> None:
        self._conn = conn
        self._notified = asyncio.Event()
        self._highest: list[tuple[float, int]] = [(0.0, 0)]
        self.seen: dict[str, float] = {}

    async def run(self) -> None:
        await self._conn.add_listener("et_inbound", lambda *_: self._notified.set())
        await self._look()
        print("ready", flush=True)
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._notified.wait()
            except TimeoutError:
                pass
            self._notified.clear()
            await self._look()

    async def _look(self) -> None:
        started = time.monotonic()
        while len(self._highest) > 1 and self._highest[1][0] < started - OVERLAP_SECONDS:
            self._highest.pop(0)
        await self.look(above=self._highest[0][1])

    async def look(self, *, above: int) -> None:
        rows = await self._conn.fetch(
            "SELECT id, channel_message_id FROM et_messages WHERE id > $1 AND direction = 'inbound'", above
        )
        now = time.monotonic()
        for row in rows:
            self.seen.setdefault(row["channel_message_id"], now)
        highest = max((row["id"] for row in rows), default=0)
        if highest > self._highest[-1][1]:
            self._highest.append((now, highest))


async def main(url: str) -> None:
    conn = await asyncpg.connect(url)
    watch = Watch(conn)
    running = asyncio.create_task(watch.run())
    asked = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    if running.cancelled():
        await watch.look(above=0)
    print(orjson.dumps(watch.seen).decode(), flush=True)
    await conn.close()


if __name__ == "__main__":
    common.run(main(sys.argv[1]))
