"""Items a second through the outbound queue, thread order kept, with a channel that answers at once.

    python bench/queue.py DATABASE_URL [--items 20000] [--threads 2000] [--sessions 10] [--rate 0]

The database must be migrated and may be thrown away afterwards. Without --rate the rows are there before the worker starts;
with --rate that many a second come in through et_enqueue_outbound meanwhile, ten a transaction, over connections of their
own, and the percentiles are from commit to the channel's acceptance.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from datetime import UTC, datetime

import structlog

from core.channel import Attempt, NotSent, OutboundMessage, Sent, SessionId, Unknown
from core.database import Database
from core.metrics import Metrics
from core.outbound import OutboundWorker

OWNER = "bench"


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


async def run(url: str, items: int, threads: int, sessions: int, rate: int) -> None:
    db = await Database.open(url, application_name="bench")
    backend = await Database.open(url, application_name="bench-backend", worker_connections=4)
    try:
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
        dispatcher = Instant(ids)
        worker = OutboundWorker(db, Metrics(), dispatcher, owner=OWNER)
        committed: dict[int, datetime] = {}

        async def put(first: int, count: int) -> None:
            async with backend.worker() as conn:
                rows = await conn.fetch(
                    "SELECT e.queue_id FROM generate_series($2::INT, $3::INT) n, LATERAL et_enqueue_outbound("
                    "$1, ($4::BIGINT[])[1 + (n % $5) % cardinality($4::BIGINT[])], 'p' || 1 + n % $5, 'text ' || n) e",
                    tenant, first, first + count - 1, ids, threads,
                )  # fmt: skip
                now = datetime.now(UTC)
                committed.update({row["queue_id"]: now for row in rows})

        if not rate:
            for n in range(0, items, 500):
                await put(n, 500)
        began = time.monotonic()
        await worker.start()
        if rate:
            async with asyncio.TaskGroup() as group:
                for n in range(0, items, 10):
                    await asyncio.sleep(max(0.0, began + n / rate - time.monotonic()))
                    group.create_task(put(n, 10))
        async with asyncio.timeout(120):
            await dispatcher.all_of(items)
        done = time.monotonic()
        await worker.stop()
        waits = sorted((at - committed[number]).total_seconds() * 1000 for number, at in dispatcher.seen)
        print(
            f"{len(waits)} items, {threads} threads, {sessions} sessions: "
            f"handed over in {done - began:.2f} s = {items / (done - began):,.0f} items/s; "
            f"inversions {dispatcher.inversions}, second calls {len(waits) - len({n for n, _ in dispatcher.seen})}"
        )
        if rate:
            at = {p: waits[min(len(waits) - 1, int(len(waits) * p / 100))] for p in (50, 95, 99)}
            print(
                f"at {rate}/s from commit to channel: "
                + ", ".join(f"p{p} {ms:.1f} ms" for p, ms in at.items())
            )
    finally:
        await db.close()
        await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2_000)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--rate", type=int, default=0)
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    try:
        import uvloop

        run_with = uvloop.run
    except ImportError:
        run_with = asyncio.run
    run_with(run(given.url, given.items, given.threads, given.sessions, given.rate))


if __name__ == "__main__":
    main()
