"""Items a second through the outbound queue, thread order kept, with a channel that answers at once.

    python -m bench.outbound [DATABASE_URL] [--items 10000] [--threads 2000] [--sessions 10] [--rate 2000] [--seconds 5]

Two runs: with the rows there before the worker starts, and with `--rate` rows a second that come in meanwhile by plain
SQL, ten a transaction, over connections of their own. Waits go from after COMMIT to the channel's call; the first second,
in which every connection makes its plans, does not count. And how many rows one connection puts in, by plain SQL and by
et_enqueue_outbound.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from datetime import UTC, datetime, timedelta

from bench import common
from bench.common import Figure, figure, percentiles
from core.channel import Attempt, NotSent, OutboundMessage, Sent, SessionId, Unknown
from core.database import Database
from core.metrics import Metrics
from core.migrate import migrate
from core.outbound import OutboundWorker
from core.store.audit import Conn

OWNER = "bench"
WARM_UP = 1.0
BACKENDS = 4
"""Connections that put rows into the queue. When they cannot keep the rate, the figure says which one they kept."""


class Instant:
    """A dispatcher that accepts everything at once and remembers when."""

    def __init__(self, sessions: list[int]) -> None:
        self.changed = asyncio.Event()
        self.seen: list[tuple[int, datetime]] = []
        self.last: dict[str, int] = {}
        self.inversions = 0
        self._wanted = 0
        self._done = asyncio.Event()
        self._sendable = {SessionId(s): float("inf") for s in sessions}

    def sendable(self) -> dict[SessionId, float]:
        return self._sendable

    def owned(self) -> frozenset[SessionId]:
        return frozenset(self._sendable)

    async def all_of(self, items: int) -> None:
        """Wait until this many have been handed over."""
        self._wanted = items
        if len(self.seen) < items:
            await self._done.wait()

    async def send(self, message: OutboundMessage) -> Sent:
        now = datetime.now(UTC)
        number = int(message.attempt.queue_id)
        self.inversions += self.last.get(message.attempt.recipient, 0) > number
        self.last[message.attempt.recipient] = number
        self.seen.append((number, now))
        if len(self.seen) == self._wanted:
            self._done.set()
        return Sent(f"B{number:016d}", now)

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        return Unknown("bench")


async def by_plain_sql(
    conn: Conn, tenant: int, sessions: list[int], threads: int, first: int, count: int
) -> list[int]:
    """So many rows in one transaction, as a backend would put them in; their queue ids."""
    async with conn.transaction():
        messages = await conn.fetch(
            """
            INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, content)
            SELECT $1, l.id, ($4::BIGINT[])[1 + (n % $5) % cardinality($4::BIGINT[])], 'outbound', 'text ' || n
            FROM generate_series($2::INT, $3::INT) n
            CROSS JOIN LATERAL (
                SELECT l.id FROM et_leads l WHERE l.tenant_id = $1 AND l.external_id = 'fake:p' || 1 + n % $5 LIMIT 1
            ) l
            RETURNING id
            """,
            tenant, first, first + count - 1, sessions, threads,
        )  # fmt: skip
        queued = await conn.fetch(
            "INSERT INTO et_outbound_queue (message_id) SELECT unnest($1::BIGINT[]) RETURNING id",
            [row["id"] for row in messages],
        )
    return [row["id"] for row in queued]


async def by_function(
    conn: Conn, tenant: int, sessions: list[int], threads: int, first: int, count: int
) -> list[int]:
    """The same through et_enqueue_outbound."""
    rows = await conn.fetch(
        """
        SELECT e.queue_id
        FROM generate_series($2::INT, $3::INT) n
        CROSS JOIN LATERAL et_enqueue_outbound(
            $1, ($4::BIGINT[])[1 + (n % $5) % cardinality($4::BIGINT[])], 'p' || 1 + n % $5, 'text ' || n) e
        """,
        tenant, first, first + count - 1, sessions, threads,
    )  # fmt: skip
    return [row["queue_id"] for row in rows]


async def shop(db: Database, threads: int, sessions: int) -> tuple[int, list[int]]:
    """A tenant of its own, whose sessions are ours, and the people it knows."""
    async with db.worker() as conn:
        tenant = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('bench') RETURNING id")
        ids = [
            r["id"]
            for r in await conn.fetch(
                "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
                "SELECT $1, 'fake', 's' || n, 'active' FROM generate_series(1, $2::INT) n RETURNING id",
                tenant,
                sessions,
            )
        ]
        await conn.execute(
            "INSERT INTO et_session_leases (session_id, tenant_id, owner, expires_at) "
            "SELECT s, $1, $2, now() + INTERVAL '1 day' FROM unnest($3::BIGINT[]) s",
            tenant,
            OWNER,
            ids,
        )
        # People exist already: what is measured is the queue, not the making of leads.
        await conn.execute(
            "INSERT INTO et_leads (tenant_id, external_id) SELECT $1, 'fake:p' || n FROM generate_series(1, $2::INT) n",
            tenant,
            threads,
        )
    return tenant, ids


async def putting(url: str, rows: int, threads: int, sessions: int) -> list[Figure]:
    """How many rows a second one connection puts in, ten a transaction."""
    db = await Database.open(url, application_name="bench")
    try:
        tenant, ids = await shop(db, threads, sessions)
        found = []
        for put, how in ((by_plain_sql, "plain SQL"), (by_function, "et_enqueue_outbound")):
            async with db.worker() as conn:
                await put(conn, tenant, ids, threads, 0, threads)  # everybody has a thread
                began = time.monotonic()
                for first in range(0, rows, 10):
                    await put(conn, tenant, ids, threads, first, 10)
                rate = rows / (time.monotonic() - began)
            found.append(
                figure(f"putting in by {how}, ten a transaction, one connection", f"{rate:,.0f} rows/s")
            )
        return found
    finally:
        await db.close()


async def measure(url: str, items: int, threads: int, sessions: int, rate: int) -> list[Figure]:
    """One run with a tenant of its own; `rate` 0: everything is there before the worker starts."""
    db = await Database.open(url, application_name="bench")
    backend = await Database.open(url, application_name="bench-backend", worker_connections=BACKENDS)
    try:
        tenant, ids = await shop(db, threads, sessions)
        dispatcher = Instant(ids)
        worker = OutboundWorker(db, Metrics(), dispatcher, owner=OWNER)
        committed: dict[int, datetime] = {}

        async def put(first: int, count: int) -> None:
            async with backend.worker() as conn:
                queued = await by_plain_sql(conn, tenant, ids, threads, first, count)
                now = datetime.now(UTC)
                committed.update(dict.fromkeys(queued, now))

        if not rate:
            for n in range(0, items, 500):
                await put(n, 500)
        began = time.monotonic()
        await worker.start()
        if rate:
            due = iter(range(0, items, 10))

            async def backend_writer() -> None:
                for n in due:
                    await asyncio.sleep(max(0.0, began + n / rate - time.monotonic()))
                    await put(n, 10)

            async with asyncio.TaskGroup() as group:
                for _ in range(BACKENDS):
                    group.create_task(backend_writer())
        filled = time.monotonic()
        async with asyncio.timeout(120):
            await dispatcher.all_of(items)
        done = time.monotonic()
        await worker.stop()
        calls = len(dispatcher.seen)
        kept = (
            f"inversions {dispatcher.inversions}, second calls {calls - len({n for n, _ in dispatcher.seen})}"
        )
        what = f"{calls:,} items, {threads:,} threads, {sessions} sessions"
        if not rate:
            return [
                figure(f"{what}, waiting", f"{items / (done - began):,.0f}/s; {kept}", "≥ 40 × procrastinate")
            ]
        warm = min(committed.values()) + timedelta(seconds=WARM_UP)
        waits = [
            (at - committed[number]).total_seconds()
            for number, at in dispatcher.seen
            if committed[number] > warm
        ]
        return [
            figure(
                f"{what}, coming at {items / (filled - began):,.0f}/s of {rate:,}: commit to channel",
                f"{percentiles(waits)}; {kept}",
                "p95 ≤ 15 ms",
            )
        ]
    finally:
        await db.close()
        await backend.close()


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.outbound",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="a database that may be thrown away afterwards")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2_000)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--rate", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=6.0, help="of the run at that rate, at most 60")
    options = parser.parse_args(words)
    async with common.database(options.url) as url:
        print(f"outbound: {common.machine(await common.postgres_version(url))}", flush=True)
        await migrate(url)
        found = await measure(url, options.items, options.threads, options.sessions, 0)
        at_rate = int(options.rate * min(options.seconds, 60.0)) // 10 * 10
        found += await measure(url, at_rate, options.threads, options.sessions, options.rate)
        return found + await putting(url, 2_000, options.threads, options.sessions)


if __name__ == "__main__":
    common.quiet()
    common.run(main())
