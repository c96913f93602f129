"""Rows for tests of the outbound side, written as a tenant's own SQL would, and a running worker around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from asyncpg import Record

from core.database import Database
from core.dispatch import Dispatcher, Timings
from core.metrics import Metrics
from core.outbound import OutboundWorker

QUICK = Timings(
    poll=0.2,
    backoff=(0.05, 0.1),
    tend=0.05,
    recover=0.05,
    settings=0.1,
    held=0.1,
    resolve=2,
    resolve_patience=0.5,
    owner_alive=30,
    stop=2,
)


@dataclass(frozen=True, slots=True)
class Place:
    """A tenant with one session whose lease `owner` holds."""

    tenant_id: int
    session_id: int
    owner: str


async def fetch(db: Database, sql: str, *args: Any) -> list[Record]:
    async with db.worker() as conn:
        return await conn.fetch(sql, *args)


async def value(db: Database, sql: str, *args: Any) -> Any:
    async with db.worker() as conn:
        return await conn.fetchval(sql, *args)


async def make_place(
    db: Database,
    *,
    owner: str = "gw-1",
    tenant_id: int | None = None,
    channel: str = "fake",
    name: str = "shop",
) -> Place:
    if tenant_id is None:
        tenant_id = await value(db, "INSERT INTO et_tenants (name) VALUES ($1) RETURNING id", name)
    session_id = await value(
        db,
        "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
        "VALUES ($1, $2, gen_random_uuid()::TEXT, 'active') RETURNING id",
        tenant_id,
        channel,
    )
    place = Place(tenant_id, session_id, owner)
    await give_lease(db, place, owner)
    return place


async def give_lease(db: Database, place: Place, owner: str, *, seconds: float = 3600) -> None:
    async with db.worker() as conn:
        await conn.execute(
            "INSERT INTO et_session_leases AS l (session_id, tenant_id, owner, expires_at) "
            "VALUES ($1, $2, $3, now() + make_interval(secs => $4)) ON CONFLICT (session_id) DO UPDATE "
            "SET owner = excluded.owner, epoch = l.epoch + 1, expires_at = excluded.expires_at",
            place.session_id,
            place.tenant_id,
            owner,
            seconds,
        )


async def enqueue(db: Database, place: Place, text: str, *, to: str = "alice", **more: Any) -> int:
    """One queue item; returns its id. `more` are further arguments of et_enqueue_outbound."""
    names = "".join(f", {name} => ${n}" for n, name in enumerate(more, 5))
    given = f"tenant_id => $1, channel_session_id => $2, recipient => $3, content => $4{names}"
    queue_id: int = await value(
        db,
        f"SELECT queue_id FROM et_enqueue_outbound({given})",
        place.tenant_id,
        place.session_id,
        to,
        text,
        *more.values(),
    )
    return queue_id


async def item(db: Database, queue_id: int) -> Record:
    rows = await fetch(
        db,
        "SELECT q.*, m.delivery_status, m.channel_message_id FROM et_outbound_queue q "
        "JOIN et_messages m ON m.id = q.message_id WHERE q.id = $1",
        queue_id,
    )
    return rows[0]


async def eventually(check: Callable[[], Awaitable[Any]], *, seconds: float = 10.0, what: str = "it") -> Any:
    """Poll until `check` gives something true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = await check()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        await asyncio.sleep(0.01)


async def reached(db: Database, queue_id: int, status: str, *, seconds: float = 10.0) -> Record:
    """The item, once it has this status."""

    async def check() -> Record | None:
        row = await item(db, queue_id)
        return row if row["status"] == status else None

    try:
        found: Record = await eventually(check, seconds=seconds)
    except AssertionError:
        row = await item(db, queue_id)
        raise AssertionError(
            f"item {queue_id} is {row['status']} ({row['last_error']}), not {status}"
        ) from None
    return found


async def all_reached(db: Database, queue_ids: Sequence[int], status: str, *, seconds: float = 20.0) -> None:
    async def check() -> bool:
        count = await value(
            db,
            "SELECT count(*) FROM et_outbound_queue WHERE id = ANY ($1::BIGINT[]) AND status = $2",
            list(queue_ids),
            status,
        )
        return bool(count == len(queue_ids))

    await eventually(check, seconds=seconds, what=f"{len(queue_ids)} items {status}")


@asynccontextmanager
async def running(
    db: Database,
    dispatcher: Dispatcher,
    *,
    owner: str = "gw-1",
    timings: Timings = QUICK,
    metrics: Metrics | None = None,
    **more: Any,
) -> AsyncIterator[OutboundWorker]:
    worker = OutboundWorker(db, metrics or Metrics(), dispatcher, owner=owner, timings=timings, **more)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()
