"""History in bulk: rows a second alone, again (everything is there already), and beside live traffic that must not suffer.

    python -m bench.history [DATABASE_URL] [--rows 100000] [--contacts 2000] [--rate 50]

Without a URL an embedded server is started in a temporary folder and removed again. Lines are JSON as `POST …/import` takes
them; reading them is part of the figure. Live messages go through ingest in the same process, as in a gateway, at random
moments; their waits are first taken without an import and then during one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import AsyncIterator

import asyncpg
import orjson

from bench import common
from bench.common import Figure, figure, percentiles
from bench.ingest import TEXT, Load
from core.database import Database
from core.history import Counts, HistoryImport
from core.history_lines import LineReader
from core.ingest import Ingest
from core.metrics import Metrics
from core.migrate import migrate

CHUNK = 1 << 16
QUIET_SECONDS = 3.0


async def lines(rows: int, contacts: int, first: int) -> AsyncIterator[bytes]:
    """A file of `rows` lines, in pieces as a body arrives in; never whole in memory."""
    held = bytearray()
    for n in range(rows):
        who = f"+6012{n % contacts:08d}"
        side = "sender" if n % 3 else "recipient"
        held += orjson.dumps(
            {
                "channel_message_id": f"3EB2{first + n:018X}",
                side: who,
                "name": "Aisyah",
                "timestamp": 1_600_000_000 + n,
                "content": TEXT,
            }
        )
        held += b"\n"
        if len(held) >= CHUNK:
            yield bytes(held)
            held.clear()
    yield bytes(held)


class Bench:
    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self.url = url
        self.rows: int = options.rows
        self.contacts: int = options.contacts
        self.rate: int = options.rate

    async def bring(self, db: Database, first: int) -> tuple[Counts, float]:
        """Import the rows from number `first`; what became of them, and the seconds it took."""
        work = HistoryImport(
            db, tenant_id=self.tenant, session_id=self.session, live_depth=lambda: self.ingest.depth
        )
        reader = LineReader(tenant_id=self.tenant, session_id=self.session, channel="whatsapp")
        began = time.monotonic()
        counts = await work.run(reader.items(lines(self.rows, self.contacts, first)))
        return counts, time.monotonic() - began

    async def live(self, until: asyncio.Event) -> list[float]:
        """People who write just now; seconds from when each message was due to its commit."""
        load = Load(self.tenant, [self.session], 100)
        waits: list[float] = []
        tasks: set[asyncio.Task[None]] = set()

        async def one(due: float) -> None:
            await self.ingest.submit([load.next()])
            waits.append(time.monotonic() - due)

        due = time.monotonic()
        while not until.is_set():
            due += random.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return waits

    async def run(self) -> list[Figure]:
        await migrate(self.url)
        db = await Database.open(self.url, application_name="bench")
        self.ingest = Ingest(db, Metrics())
        await self.ingest.start()
        try:
            await self._set_up()
            return await self._measure(db)
        finally:
            await self.ingest.stop()
            await db.close()

    async def _set_up(self) -> None:
        conn = await asyncpg.connect(self.url)
        try:
            self.tenant = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('bench') RETURNING id")
            self.session = await conn.fetchval(
                "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
                "VALUES ($1, 'whatsapp', 'bench-history', 'active') RETURNING id",
                self.tenant,
            )
        finally:
            await conn.close()

    async def _measure(self, db: Database) -> list[Figure]:
        before, _ = common.memory_mb(os.getpid())
        counts, took = await self.bring(db, 0)
        assert counts == Counts(self.rows, self.rows), counts
        after, _ = common.memory_mb(os.getpid())
        found = [
            figure(f"{self.rows:,} lines, alone", f"{self.rows / took:,.0f} rows/s", "≥ 5,000 rows/s"),
            figure("memory of the process, more at the end than before", f"{after - before:.0f} MB"),
        ]
        counts, took = await self.bring(db, 0)
        found.append(
            figure(
                "the same again",
                f"{counts.stored} stored, {counts.duplicates:,} duplicates, {self.rows / took:,.0f} lines/s",
                "0 stored",
            )
        )
        over = asyncio.Event()
        quiet = asyncio.create_task(self.live(over))
        await asyncio.sleep(QUIET_SECONDS)
        over.set()
        found.append(figure(f"live traffic at {self.rate}/s, alone", percentiles(await quiet)))
        over = asyncio.Event()
        busy = asyncio.create_task(self.live(over))
        counts, took = await self.bring(db, self.rows)
        over.set()
        waits = await busy
        assert counts == Counts(self.rows, self.rows), counts
        found += [
            figure(
                f"{self.rows:,} lines beside live traffic",
                f"{self.rows / took:,.0f} rows/s",
                "≥ 5,000 rows/s",
            ),
            figure(
                f"live traffic at {self.rate}/s beside them ({len(waits)} messages)",
                percentiles(waits),
                "p95 < 100 ms",
            ),
            figure("load average at the end", f"{os.getloadavg()[0]:.1f}"),
        ]
        return found


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.history",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="a database that may be thrown away afterwards")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--contacts", type=int, default=2000)
    parser.add_argument("--rate", type=int, default=50)
    options = parser.parse_args(words)
    async with common.database(options.url) as url:
        print(f"history: {common.machine(await common.postgres_version(url))}", flush=True)
        return await Bench(url, options).run()


if __name__ == "__main__":
    common.quiet()
    common.run(main())
