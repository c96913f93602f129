"""Rows a second through ingest, and how long one message takes from arrival to commit, on a real PostgreSQL.

    python -m bench.ingest [DATABASE_URL] [--seconds 5] [--senders 100] [--sessions 4] [--rate 1000]

Without a URL an embedded server is started in a temporary folder and removed again. Prints, per number of concurrent
callers, rows a second and percentiles; the same load as plain batches of 100 by two connections into a table with the
same columns and indexes but no triggers; and the percentiles of an open loop at `--rate` a second.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import orjson
import structlog
import uvloop

from core.channel import InboundMessage, MessageType, Person, SessionId, TenantId
from core.database import Database
from core.embedded import EmbeddedPostgres
from core.ingest import Ingest
from core.metrics import Metrics
from core.migrate import migrate

TEXT = "Is the blue one still there? I could come by this afternoon, after three or so."
PAYLOAD = {
    "key": {"remoteJid": "60123456789@s.whatsapp.net", "fromMe": False},
    "message": {"conversation": TEXT},
}


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return "  ".join(
        f"p{p} {ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1000:.1f} ms" for p in (50, 95, 99)
    )


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


async def closed_loop(ingest: Ingest, load: Load, callers: int, seconds: float) -> float:
    took: list[float] = []
    end = time.monotonic() + seconds

    async def caller() -> None:
        while (started := time.monotonic()) < end:
            await ingest.submit([load.next()])
            took.append(time.monotonic() - started)

    began = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(callers)))
    rate = len(took) / (time.monotonic() - began)
    print(f"{callers:4} callers   {rate:8.0f} rows/s   {percentiles(took)}", flush=True)
    return rate


async def open_loop(ingest: Ingest, load: Load, rate: int, seconds: float) -> None:
    """Arrivals at random moments, whether or not earlier ones are finished."""
    took: list[float] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(due: float) -> None:
        await ingest.submit([load.next()])
        took.append(time.monotonic() - due)

    due = time.monotonic()
    end = due + seconds
    while due < end:
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += random.expovariate(rate)
    await asyncio.gather(*tasks)
    print(f"open loop, {rate}/s for {seconds:.0f} s: {len(took)} stored   {percentiles(took)}", flush=True)


async def plain(url: str, seconds: float) -> float:
    """What the same server takes without us: batches of 100 by two connections, no triggers."""
    setup = await asyncpg.connect(url)
    await setup.execute("CREATE TABLE bench_plain (LIKE et_messages INCLUDING ALL)")
    statement = """
        INSERT INTO bench_plain (tenant_id, lead_id, thread_id, channel_session_id, channel, channel_message_id,
            channel_timestamp, occurred_at, direction, role, content, raw_payload, delivery_status)
        SELECT 1, r.lead, r.lead, 1, 'whatsapp', r.id, 1700000000000, now(), 'inbound', 'user', r.text, r.raw::jsonb,
               'received'
        FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) AS r (lead, id, text, raw)
        ON CONFLICT DO NOTHING RETURNING channel_message_id
    """
    raw = orjson.dumps(PAYLOAD).decode()
    numbers = itertools.count()
    end = time.monotonic() + seconds
    stored = 0

    async def writer() -> None:
        nonlocal stored
        conn = await asyncpg.connect(url)
        try:
            while time.monotonic() < end:
                batch = [next(numbers) for _ in range(100)]
                rows = await conn.fetch(
                    statement,
                    [n % 100 for n in batch],
                    [f"3EB0{n:018X}" for n in batch],
                    [TEXT] * 100,
                    [raw] * 100,
                )
                stored += len(rows)
        finally:
            await conn.close()

    began = time.monotonic()
    await asyncio.gather(writer(), writer())
    rate = stored / (time.monotonic() - began)
    await setup.execute("DROP TABLE bench_plain")
    await setup.close()
    print(f"plain batches  {rate:8.0f} rows/s   (100 rows, 2 connections, no triggers, no leads)", flush=True)
    return rate


@asynccontextmanager
async def server(url: str | None) -> AsyncIterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        embedded = EmbeddedPostgres(Path(folder))
        try:
            yield await embedded.start()
        finally:
            await embedded.stop()


async def run(options: argparse.Namespace) -> None:
    async with server(options.url) as url:
        await migrate(url)
        raw = await plain(url, options.seconds)
        db = await Database.open(url, application_name="bench")
        try:
            async with db.worker() as conn:
                tenant = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('bench') RETURNING id")
                sessions = await conn.fetch(
                    "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
                    "SELECT $1, 'whatsapp', 'bench-' || n, 'active' FROM generate_series(1, $2::int) n RETURNING id",
                    tenant,
                    options.sessions,
                )
            ingest = Ingest(db, Metrics())
            await ingest.start()
            load = Load(tenant, [row["id"] for row in sessions], options.senders)
            await closed_loop(ingest, load, 64, 1.0)  # warm: leads known, plans made
            for callers in (256, 64, 32):
                rate = await closed_loop(ingest, load, callers, options.seconds)
                print(f"               {rate / raw:8.2f} of plain batches")
            await open_loop(ingest, load, options.rate, options.seconds)
            await ingest.stop()
        finally:
            await db.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", help="a database that may be thrown away afterwards")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement, at most 60")
    parser.add_argument("--senders", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--rate", type=int, default=1000)
    options = parser.parse_args()
    options.seconds = min(options.seconds, 60.0)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    uvloop.run(run(options))


if __name__ == "__main__":
    main()
