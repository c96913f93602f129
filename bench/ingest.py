"""Rows a second through ingest, and how long one message takes from arrival to commit, on a real PostgreSQL.

    python -m bench.ingest [DATABASE_URL] [--seconds 3] [--rounds 3] [--senders 100] [--sessions 4] [--rate 1000]

Without a URL an embedded server is started in a temporary folder and removed again. Every round runs ingest and, right
beside it, the same rows by three plain ways: batches of 100 through `unnest` and through COPY, two connections each, into a
table with the same columns and indexes but no triggers, keys or policies; and one row a statement from 16 connections into
the real table, triggers and all. Then an open loop at `--rate` a second. Absolute figures move with the neighbours of
a machine: read the ratios, which are taken within a round, and the processor time a row.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import asyncpg
import orjson

from bench import common
from bench.common import Figure, figure, percentiles
from core.channel import InboundMessage, MessageType, Person, SessionId, TenantId
from core.database import Database
from core.ingest import Ingest
from core.metrics import Metrics
from core.migrate import migrate

CALLERS = (256, 64, 32)

TEXT = "Is the blue one still there? I could come by this afternoon, after three or so."
PAYLOAD = {
    "key": {"remoteJid": "60123456789@s.whatsapp.net", "fromMe": False},
    "message": {"conversation": TEXT},
}


class Load:
    """Messages of `senders` people over `sessions` sessions of one tenant."""

    def __init__(self, tenant: int, sessions: list[int], senders: int) -> None:
        self._tenant = TenantId(tenant)
        self._sessions = [SessionId(s) for s in sessions]
        self._senders = senders
        self._numbers = itertools.count()

    def next(self) -> InboundMessage:
        n = next(self._numbers)
        sender = f"+6011{n % self._senders:08d}"
        return InboundMessage(
            tenant_id=self._tenant,
            session_id=self._sessions[n % self._senders % len(self._sessions)],
            channel="whatsapp",
            channel_message_id=f"3EB0{n:018X}",
            person=Person(f"whatsapp:{sender}", name="Aisyah"),
            message_type=MessageType.TEXT,
            content=TEXT,
            channel_timestamp=int(time.time() * 1000),
            sender_identifier=sender,
            raw_payload=PAYLOAD,
        )


@dataclass(slots=True)
class Way:
    """One way of storing, measured once a round."""

    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)
    """Processor time a row, in microseconds: of the server's connections, and of this process."""
    own_us: list[float] = field(default_factory=list)

    def cpu(self) -> str:
        return (
            f"server {common.percentile(self.server_us, 50):.0f} µs, "
            f"Python {common.percentile(self.own_us, 50):.0f} µs"
        )


class Clock:
    """`async with Clock(conn, way) as clock: clock.rows += …` adds a rate and the processor time of every connection."""

    def __init__(self, look: asyncpg.Connection[asyncpg.Record], way: Way) -> None:
        self._look = look
        self._way = way
        self.rows = 0

    async def _server(self) -> float:
        rows = await self._look.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return common.cpu_seconds(row["pid"] for row in rows)

    async def __aenter__(self) -> Clock:
        self._server_before = await self._server()
        self._own_before = time.process_time()
        self._began = time.monotonic()
        return self

    async def __aexit__(self, *_: object) -> None:
        rows = max(1, self.rows)
        self._way.rates.append(self.rows / (time.monotonic() - self._began))
        self._way.own_us.append((time.process_time() - self._own_before) / rows * 1e6)
        self._way.server_us.append((await self._server() - self._server_before) / rows * 1e6)


def fsyncs(count: int = 60) -> list[float]:
    """Seconds each took, in the folder that embedded servers are started in."""
    found = []
    with tempfile.TemporaryFile() as file:
        for _ in range(count):
            began = time.monotonic()
            os.pwrite(file.fileno(), bytes(8192), 0)
            os.fsync(file.fileno())
            found.append(time.monotonic() - began)
    return found


class Bench:
    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self.url = url
        self.seconds: float = options.seconds
        self.rounds: int = options.rounds
        self.senders: int = options.senders
        self.session_count: int = options.sessions
        self.rate: int = options.rate
        self._numbers = itertools.count()
        self._raw = orjson.dumps(PAYLOAD).decode()

    # ---- ingest ----

    async def closed_loop(self, callers: int, seconds: float, way: Way) -> None:
        """So many callers, each with its next message when its last one is committed."""
        async with Clock(self.look, way) as clock:
            end = time.monotonic() + seconds

            async def caller() -> None:
                while (started := time.monotonic()) < end:
                    await self.ingest.submit([self.load.next()])
                    way.waits.append(time.monotonic() - started)
                    clock.rows += 1

            await asyncio.gather(*(caller() for _ in range(callers)))

    async def open_loop(self, seconds: float) -> list[float]:
        """Arrivals at random moments, whether or not earlier ones are finished. Waits count from when a message was due."""
        waits: list[float] = []
        tasks: set[asyncio.Task[None]] = set()

        async def one(due: float) -> None:
            await self.ingest.submit([self.load.next()])
            waits.append(time.monotonic() - due)

        due = time.monotonic()
        end = due + seconds
        while due < end:
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += random.expovariate(self.rate)
        await asyncio.gather(*tasks)
        return waits

    # ---- the plain ways ----

    async def unnest(self, way: Way) -> None:
        statement = """
            INSERT INTO bench_plain (tenant_id, lead_id, thread_id, channel_session_id, channel, channel_message_id,
                channel_timestamp, occurred_at, direction, role, content, raw_payload, delivery_status)
            SELECT 1, r.lead, r.lead, 1, 'whatsapp', r.id, 1700000000000, now(), 'inbound', 'user', r.text, r.raw::jsonb,
                   'received'
            FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) AS r (lead, id, text, raw)
            ON CONFLICT DO NOTHING RETURNING channel_message_id
        """

        async def write(conn: asyncpg.Connection[asyncpg.Record], batch: list[int]) -> int:
            columns = [n % 100 for n in batch], [self._id(n) for n in batch], [TEXT] * 100, [self._raw] * 100
            return len(await conn.fetch(statement, *columns))

        await self._batches(way, write)

    async def copy(self, way: Way) -> None:
        columns = [
            "tenant_id",
            "lead_id",
            "thread_id",
            "channel_session_id",
            "channel",
            "channel_message_id",
            "channel_timestamp",
            "occurred_at",
            "direction",
            "role",
            "content",
            "raw_payload",
            "delivery_status",
        ]

        async def write(conn: asyncpg.Connection[asyncpg.Record], batch: list[int]) -> int:
            now = datetime.now(UTC)
            await conn.copy_records_to_table(
                "bench_plain",
                columns=columns,
                records=[
                    (1, n % 100, n % 100, 1, "whatsapp", self._id(n), 1700000000000, now, "inbound", "user", TEXT,
                     self._raw, "received")
                    for n in batch
                ],
            )  # fmt: skip
            return len(batch)

        await self._batches(way, write)

    async def _batches(
        self, way: Way, write: Callable[[asyncpg.Connection[asyncpg.Record], list[int]], Awaitable[int]]
    ) -> None:
        conns = [await asyncpg.connect(self.url) for _ in range(2)]
        try:
            async with Clock(self.look, way) as clock:
                end = time.monotonic() + self.seconds

                async def writer(conn: asyncpg.Connection[asyncpg.Record]) -> None:
                    while time.monotonic() < end:
                        clock.rows += await write(conn, [next(self._numbers) for _ in range(100)])

                await asyncio.gather(*map(writer, conns))
        finally:
            for conn in conns:
                await conn.close()

    async def naive(self, way: Way) -> None:
        """What a straightforward bridge does: find or make nothing, one INSERT and one commit a message."""
        statement = """
            INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, channel_message_id,
                channel_timestamp, direction, role, content, raw_payload, delivery_status)
            VALUES ($1, $2, $3, 'whatsapp', $4, 1700000000000, 'inbound', 'user', $5, $6, 'received')
            ON CONFLICT DO NOTHING
        """
        leads = [
            row["id"]
            for row in await self.look.fetch(
                "SELECT id FROM et_leads WHERE tenant_id = $1 ORDER BY id", self.tenant
            )
        ]
        conns = [await asyncpg.connect(self.url) for _ in range(16)]
        try:
            async with Clock(self.look, way) as clock:
                end = time.monotonic() + self.seconds

                async def writer(conn: asyncpg.Connection[asyncpg.Record]) -> None:
                    while time.monotonic() < end:
                        n = next(self._numbers)
                        lead = leads[n % len(leads)]
                        session = self.sessions[n % len(leads) % len(self.sessions)]
                        await conn.execute(
                            statement, self.tenant, lead, session, self._id(n), TEXT, self._raw
                        )
                        clock.rows += 1

                await asyncio.gather(*map(writer, conns))
        finally:
            for conn in conns:
                await conn.close()

    def _id(self, n: int) -> str:
        return f"3EB1{n:018X}"

    # ---- the run ----

    async def run(self) -> list[Figure]:
        await migrate(self.url)
        self.look = await asyncpg.connect(self.url)
        db = await Database.open(self.url, application_name="bench")
        try:
            await self._set_up()
            self.ingest = Ingest(db, Metrics())
            await self.ingest.start()
            self.load = Load(self.tenant, self.sessions, self.senders)
            try:
                return await self._measure()
            finally:
                await self.ingest.stop()
        finally:
            await db.close()
            await self.look.execute("DROP TABLE IF EXISTS bench_plain")
            await self.look.close()

    async def _set_up(self) -> None:
        # The owner of the tables: as superuser or with a policy of its own it may write them all.
        await self.look.execute("DROP TABLE IF EXISTS bench_plain")
        await self.look.execute("CREATE TABLE bench_plain (LIKE et_messages INCLUDING ALL)")
        self.tenant = await self.look.fetchval("INSERT INTO et_tenants (name) VALUES ('bench') RETURNING id")
        rows = await self.look.fetch(
            "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
            "SELECT $1, 'whatsapp', 'bench-' || n, 'active' FROM generate_series(1, $2::int) n RETURNING id",
            self.tenant,
            self.session_count,
        )
        self.sessions = [row["id"] for row in rows]

    async def _measure(self) -> list[Figure]:
        await self.closed_loop(64, 1.0, Way())  # warm: leads known, plans made
        unnest, copy, naive = Way(), Way(), Way()
        ours = {callers: Way() for callers in CALLERS}
        for _ in range(self.rounds):
            await self.unnest(unnest)
            for callers, way in ours.items():
                await self.closed_loop(callers, self.seconds, way)
            await self.copy(copy)
            await self.naive(naive)
        best = ours[CALLERS[0]]
        found = [
            figure(
                f"rows a second, {callers} callers",
                f"{common.rate(way.rates)}; {percentiles(way.waits)}",
            )
            for callers, way in ours.items()
        ]
        found += [
            figure("plain `unnest` of 100, 2 connections", common.rate(unnest.rates)),
            figure("plain COPY of 100, 2 connections", common.rate(copy.rates)),
            figure("naive, one row a commit, 16 connections", common.rate(naive.rates)),
            figure("ingest ÷ plain `unnest`", common.ratio(best.rates, unnest.rates), "0.45, aim 0.75"),
            figure("ingest ÷ naive", common.ratio(best.rates, naive.rates), "8, aim 12"),
            figure("processor time a row, ingest", best.cpu()),
            figure("processor time a row, plain `unnest`", unnest.cpu()),
        ]
        # In pieces, each between looks at the disk: a commit cannot be quicker than its fsync is at that moment.
        waits: list[float] = []
        syncs = await asyncio.to_thread(fsyncs)
        for _ in range(self.rounds):
            waits += await self.open_loop(max(self.seconds, 2.0))
            syncs += await asyncio.to_thread(fsyncs)
        found += [
            figure(f"arrival to commit at {self.rate:,}/s, open loop", percentiles(waits), "p95 ≤ 5 ms"),
            figure("meanwhile, writing and fsyncing 8 kB to a file and nothing else", percentiles(syncs)),
        ]
        return found


def options_from(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ingest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="a database that may be thrown away afterwards")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement, at most 60")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--senders", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--rate", type=int, default=1000)
    options = parser.parse_args(words)
    options.seconds = min(options.seconds, 60.0)
    return options


async def main(words: list[str] | None = None) -> list[Figure]:
    options = options_from(words)
    async with common.database(options.url) as url:
        print(f"ingest: {common.machine(await common.postgres_version(url))}", flush=True)
        return await Bench(url, options).run()


if __name__ == "__main__":
    common.quiet()
    common.run(main())
