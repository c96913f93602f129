"""Reading and storing beside millions of messages: pages of a person's timeline, the list of threads, and ingest.

    python -m bench.timeline [--levels 1000000 5000000] [--seconds 1.5] [--rounds 3]

Two embedded servers: one holds 10,000 messages and stays so (but for what the measurements add), the other one is filled
to each level in turn, its triggers off while it is, its indexes all there when it is measured. Both are then measured in
turns, so that neighbours disturb both. Every thread holds 100 messages at every level; what is read and written to
belongs to 100 people spread over all of them. Pages go through the API's own functions and role, one transaction each.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import asyncpg

from bench import common
from bench.common import Figure, figure, percentiles
from bench.ingest import PAYLOAD, TEXT
from core.channel import InboundMessage, MessageType, Person, SessionId, TenantId
from core.database import Database
from core.embedded import EmbeddedPostgres
from core.ingest import Ingest
from core.metrics import Metrics
from core.migrate import migrate
from core.store import crm
from core.store.audit import Conn

SMALL = 10_000
IN_A_THREAD = 100
PEOPLE = 100
CALLERS = 64
PAGES = 100
PAGE = 50
CHUNK = 250_000
DISK_BYTES_A_ROW = 1_200
"""With its indexes, its share of the log, and room to spare."""

_PEOPLE = """
    WITH lead AS (
        INSERT INTO et_leads (tenant_id, external_id, name)
        SELECT $1, 'whatsapp:+6011' || lpad(n::text, 8, '0'), 'Aisyah'
        FROM generate_series($3::int, $4::int - 1) n
        RETURNING id, external_id
    ), identity AS (
        INSERT INTO et_lead_identities (tenant_id, external_id, lead_id)
        SELECT $1, external_id, id FROM lead
    )
    INSERT INTO et_threads (tenant_id, lead_id, channel, channel_session_id, last_message_at)
    SELECT $1, id, 'whatsapp', $2, now() - random() * INTERVAL '1 year' FROM lead
"""
# One message for each thread in turn, as they would have come.
_MESSAGES = """
    INSERT INTO et_messages (tenant_id, lead_id, thread_id, channel_session_id, channel, channel_message_id,
        channel_timestamp, occurred_at, direction, role, sender_identifier, content, raw_payload, delivery_status)
    SELECT $1, (t.leads)[k], (t.threads)[k], $2, 'whatsapp', '3EC0' || lpad(to_hex(n), 18, '0'), 1600000000000 + n * 1000,
           to_timestamp(1600000000 + n), 'inbound', 'user', '+60110000000', $5, $6::jsonb, 'inbound_ignored'
    FROM (SELECT array_agg(lead_id ORDER BY id) AS leads, array_agg(id ORDER BY id) AS threads
          FROM et_threads WHERE id = ANY ($7::bigint[])) t,
         generate_series($3::bigint, $4::bigint - 1) n,
         LATERAL (SELECT 1 + (n % cardinality(t.leads))::int AS k) x
"""


@dataclass(slots=True)
class Measured:
    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds a page took: a person's newest messages, …"""
    back: list[float] = field(default_factory=list)
    """… the page before, by its cursor, …"""
    threads: list[float] = field(default_factory=list)
    """… and the list of the latest threads."""


class Side:
    """One server with so many messages in it."""

    def __init__(self, server: EmbeddedPostgres, db: Database) -> None:
        self._server = server
        self._db = db
        self._ingest = Ingest(db, Metrics())
        self._random = random.Random(1)
        self._numbers = itertools.count()
        self._people: list[tuple[int, str]] = []
        self.count = 0

    async def set_up(self) -> None:
        async with self._db.worker() as conn:
            self._tenant = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('bench') RETURNING id")
            self._session = await conn.fetchval(
                "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
                "VALUES ($1, 'whatsapp', 'bench', 'active') RETURNING id",
                self._tenant,
            )
        await self._ingest.start()

    async def stop(self) -> None:
        await self._ingest.stop()

    async def fill(self, count: int) -> float:
        """Up to so many messages; the seconds it took."""
        began = time.monotonic()
        conn = await asyncpg.connect(self._server.superuser_url, command_timeout=600)
        try:
            # Off only in this session: triggers and foreign keys, which the ingest benchmark measures.
            await conn.execute("SET session_replication_role = replica")
            await conn.execute("SET maintenance_work_mem = '512MB'")
            indexes = await conn.fetch(
                "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index "
                "WHERE indrelid = 'et_messages'::regclass AND NOT indisunique"
            )
            for index in indexes:
                await conn.execute(f"DROP INDEX {index['name']}")
            people = (self.count // IN_A_THREAD, count // IN_A_THREAD)
            await conn.execute(_PEOPLE, self._tenant, self._session, *people)
            threads = [
                row["id"]
                for row in await conn.fetch(
                    "SELECT id FROM et_threads ORDER BY id DESC LIMIT $1", people[1] - people[0]
                )
            ]
            for low in range(self.count, count, CHUNK):
                high = min(low + CHUNK, count)
                raw = '{"message": {"conversation": "..."}}'
                await conn.execute(
                    _MESSAGES, self._tenant, self._session, low, high, TEXT, raw, threads, timeout=300
                )
            for index in indexes:
                await conn.execute(index["definition"])
            for table in ("et_messages", "et_threads", "et_leads", "et_lead_identities"):
                await conn.execute(f"VACUUM (ANALYZE) {table}")
            await conn.execute("CHECKPOINT")
        finally:
            await conn.close()
        self.count = count
        async with self._db.worker() as held:
            rows = await held.fetch("SELECT id, external_id FROM et_leads ORDER BY id")
        self._people = [tuple(row) for row in self._random.sample(rows, PEOPLE)]
        await self._ingest.submit([self._message() for _ in range(PEOPLE)])  # everybody is known now
        return time.monotonic() - began

    def _message(self) -> InboundMessage:
        n = next(self._numbers)
        _, external_id = self._people[n % PEOPLE]
        return InboundMessage(
            tenant_id=TenantId(self._tenant),
            session_id=SessionId(self._session),
            channel="whatsapp",
            channel_message_id=f"3EB0{n:018X}",
            person=Person(external_id),
            message_type=MessageType.TEXT,
            content=TEXT,
            channel_timestamp=int(time.time() * 1000),
            sender_identifier=external_id.removeprefix("whatsapp:"),
            raw_payload=PAYLOAD,
        )

    # ---- measuring ----

    async def store(self, seconds: float, into: Measured) -> None:
        """As fast as so many callers can."""
        stored = 0
        began = time.monotonic()

        async def caller() -> None:
            nonlocal stored
            while time.monotonic() < began + seconds:
                await self._ingest.submit([self._message()])
                stored += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        into.rates.append(stored / (time.monotonic() - began))

    async def read(self, into: Measured) -> None:
        """One page of each sort."""
        lead_id, _ = self._random.choice(self._people)
        page = await self._timed(into.first, partial(self._timeline, lead_id, (None, None)))
        last = (page[-1]["occurred_at"], page[-1]["id"])
        await self._timed(into.back, partial(self._timeline, lead_id, last))
        await self._timed(into.threads, self._threads)

    async def _timeline(
        self, lead_id: int, start: tuple[datetime | None, int | None], conn: Conn
    ) -> list[asyncpg.Record]:
        return await crm.timeline(conn, self._tenant, lead_id, start=start, newest_first=True, limit=PAGE)

    async def _threads(self, conn: Conn) -> list[asyncpg.Record]:
        return await crm.list_threads(conn, self._tenant, crm.ThreadFilter(), before=(None, None), limit=PAGE)

    async def _timed(
        self, into: list[float], read: Callable[[Conn], Awaitable[list[asyncpg.Record]]]
    ) -> list[asyncpg.Record]:
        began = time.monotonic()
        async with self._db.tenant(self._tenant) as conn:
            rows = await read(conn)
        into.append(time.monotonic() - began)
        return rows

    async def size_mb(self) -> float:
        async with self._db.worker() as conn:
            return float(await conn.fetchval("SELECT pg_database_size(current_database()) / 1048576.0"))


@asynccontextmanager
async def side(folder: Path) -> AsyncIterator[Side]:
    server = EmbeddedPostgres(folder)
    try:
        url = await server.start()
        await migrate(url)
        db = await Database.open(url, application_name="bench")
        try:
            made = Side(server, db)
            await made.set_up()
            try:
                yield made
            finally:
                await made.stop()
        finally:
            await db.close()
    finally:
        await server.stop()


def _slower(there: list[float], here: list[float]) -> str:
    """How the median wait at a level compares with the median beside few messages."""
    return f"{common.percentile(there, 50) / max(common.percentile(here, 50), 1e-9):.2f} ×"


async def level(small: Side, big: Side, seconds: float, rounds: int) -> list[Figure]:
    here, there = Measured(), Measured()
    for warm in (small, big):
        await warm.store(0.5, Measured())
        for _ in range(10):
            await warm.read(Measured())
    for _ in range(rounds):
        for _ in range(PAGES):
            await small.read(here)
            await big.read(there)
        await small.store(seconds, here)
        await big.store(seconds, there)
    name = f"{big.count:,} messages"
    beside = f"beside {SMALL:,}"
    return [
        figure(f"{name}, on disk", f"{await big.size_mb() / 1024:.1f} GB"),
        figure(f"{name}, ingest, {CALLERS} callers", f"{common.rate(there.rates)}; {beside}: {common.rate(here.rates)}"),
        figure(f"{name}, ingest ÷ {beside}", common.ratio(there.rates, here.rates), "≥ 0.75"),
        *(
            figure(
                f"{name}, {what}",
                f"{percentiles(mine)}; {beside}: {percentiles(theirs)}; median {_slower(mine, theirs)}",
                "≤ 1.25 ×",
            )
            for what, mine, theirs in (
                (f"page of {PAGE} of a timeline", there.first, here.first),
                ("the page before it", there.back, here.back),
                (f"list of the latest {PAGE} threads", there.threads, here.threads),
            )
        ),
    ]  # fmt: skip


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        async with AsyncExitStack() as stack:
            small = await stack.enter_async_context(side(Path(folder) / "small"))
            big = await stack.enter_async_context(side(Path(folder) / "big"))
            await small.fill(SMALL)
            for count in sorted(options.levels):
                needed = (count - big.count) * DISK_BYTES_A_ROW
                free = shutil.disk_usage(folder).free
                if free < needed:
                    found.append(
                        figure(
                            f"{count:,} messages",
                            f"left out: {needed / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free",
                        )
                    )
                    break
                took = await big.fill(count)
                print(f"  filled to {count:,} in {took:.0f} s", flush=True)
                found += await level(small, big, options.seconds, options.rounds)
    return found


if __name__ == "__main__":
    common.quiet()
    common.run(main())
