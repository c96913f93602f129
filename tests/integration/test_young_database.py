"""A database of the first minute has no statistics: what is planned while it is empty must not cost dear when it fills."""

from __future__ import annotations

import asyncpg

from core.channel import SessionId
from core.database import Database
from core.store import claiming, dispatching
from core.store.audit import Conn
from core.store.claiming import Due
from tests.support.outbound import Place, make_place, value

ROWS = 3_000
READS = 40
"""Rows that claiming one may cost, where reading all that waits would be thousands."""


async def many(conn: Conn, place: Place, rows: int) -> None:
    await conn.execute(
        "SELECT count(*) FROM generate_series(1, $3::INT) n, "
        "LATERAL et_enqueue_outbound($1, $2, 'p' || n % 1000, 'text ' || n)",
        place.tenant_id,
        place.session_id,
        rows,
    )


async def claim(conn: Conn, place: Place, rows: int) -> tuple[int, int]:
    """How many rows were claimed (and are sent now), and how many were read for that."""
    read = (
        "SELECT sum(coalesce(idx_tup_fetch, 0) + seq_tup_read)::BIGINT FROM pg_stat_xact_user_tables "
        "WHERE relname IN ('et_outbound_queue', 'et_messages', 'et_threads', 'et_leads')"
    )
    async with conn.transaction():
        await conn.execute(dispatching.ALONE)
        before = await conn.fetchval(read)
        due = [Due(SessionId(place.session_id), rows)]
        claimed = len(await claiming.claim(conn, place.owner, due, limit=rows))
        read_now = await conn.fetchval(read)
    await conn.execute("UPDATE et_outbound_queue SET status = 'sent' WHERE status = 'dispatching'")
    return claimed, read_now - before


async def test_tables_that_grow_are_analyzed_without_waiting_for_autovacuum(database: Database) -> None:
    place = await make_place(database)

    async with database.worker() as conn:
        await many(conn, place, ROWS)

    known = "SELECT reltuples FROM pg_class WHERE oid = $1::TEXT::regclass"
    for table in ("et_messages", "et_threads", "et_leads", "et_outbound_queue"):
        assert await value(database, known, table) > 50, table


async def test_a_claim_planned_while_little_waited_does_not_read_a_campaign_for_every_row(
    database: Database, migrated_url: str
) -> None:
    place = await make_place(database)
    owner = await asyncpg.connect(migrated_url)
    async with database.worker() as conn:
        await many(conn, place, ROWS)
        while (await claim(conn, place, 250))[0]:
            pass
        await owner.execute("ANALYZE et_outbound_queue")  # nothing waits, says autovacuum
        for _ in range(7):  # by then every plan is made, and kept
            await many(conn, place, 1)
            await claim(conn, place, 10)
        await many(conn, place, ROWS)
        claimed, read = await claim(conn, place, 100)
    await owner.close()

    assert claimed == 100
    assert read / claimed < READS
