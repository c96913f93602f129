"""History in bulk, and the rows in which imports say how far they are. One statement a step, none of them retries.

Every function but `imports` and `read` runs in the writer's own transaction, on its own connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asyncpg import Record

from core.store.audit import Conn
from core.store.messages import Row

Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Inserted:
    """How many rows were new, and the first and last id they got."""

    count: int
    first_id: int | None
    last_id: int | None


async def threads_of(conn: Conn, tenant_id: int, session_id: int, lead_ids: Sequence[int]) -> dict[int, int]:
    """Lead → the thread its history joins: the active one, else the one that was last used. History re-opens nothing."""
    # `+ 0`: while statistics are young the index over all threads of a session looks as good as the one over a lead's few.
    rows = await conn.fetch(
        """
        SELECT l.id AS lead_id, t.id
        FROM unnest($3::bigint[]) AS l (id)
        CROSS JOIN LATERAL (
            SELECT h.id
            FROM et_threads h
            WHERE h.tenant_id = $1
              AND h.lead_id = l.id
              AND h.channel_session_id + 0 = $2
            ORDER BY h.status = 'active' DESC, h.last_message_at DESC, h.id DESC
            LIMIT 1
        ) t
        """,
        tenant_id,
        session_id,
        lead_ids,
    )
    return {row["lead_id"]: row["id"] for row in rows}


async def insert(
    conn: Conn, rows: Sequence[Row], lead_ids: Sequence[int], thread_ids: Sequence[int | None]
) -> Inserted:
    """Store what is new. All rows are of one tenant, session and channel, no key stands in them twice; ids rise in the
    order given. A row without a thread gets one from the trigger. What people wrote long ago waits for nobody: it is stored
    as ignored."""
    # What is not counted was there already: DO NOTHING leaves a row out only for one with its key that is committed (it
    # waits for one that is not yet). Ingest asks once more because it must name the row; here its number is enough.
    first = rows[0]
    row = await conn.fetchrow(
        """
        WITH stored AS (
            INSERT INTO et_messages
                (tenant_id, channel_session_id, channel, is_history, lead_id, thread_id, channel_message_id,
                 channel_timestamp, occurred_at, direction, role, sender_identifier, chat_identifier, message_type,
                 content, reply_to_message_id, media_metadata, raw_payload, placeholder, delivery_status)
            SELECT $1, $2, $3, true, r.lead_id, r.thread_id, r.channel_message_id,
                   r.channel_timestamp, to_timestamp(r.occurred_at), r.direction, r.role, r.sender_identifier,
                   r.chat_identifier, r.message_type, r.content, r.reply_to_message_id, r.media_metadata::jsonb,
                   r.raw_payload::jsonb, r.placeholder,
                   CASE r.direction WHEN 'inbound' THEN 'inbound_ignored' ELSE 'sent' END
            FROM unnest($4::bigint[], $5::bigint[], $6::text[], $7::bigint[], $8::float8[], $9::text[], $10::text[],
                        $11::text[], $12::text[], $13::text[], $14::text[], $15::text[], $16::text[], $17::text[],
                        $18::boolean[])
                AS r (lead_id, thread_id, channel_message_id, channel_timestamp, occurred_at, direction, role,
                      sender_identifier, chat_identifier, message_type, content, reply_to_message_id, media_metadata,
                      raw_payload, placeholder)
            ON CONFLICT (tenant_id, channel_session_id, lead_id, channel_message_id) DO NOTHING
            RETURNING id
        )
        SELECT count(*) AS count, min(id) AS first_id, max(id) AS last_id
        FROM stored
        """,
        first.tenant_id,
        first.session_id,
        first.channel,
        lead_ids,
        thread_ids,
        [row.channel_message_id for row in rows],
        [row.channel_timestamp for row in rows],
        [row.occurred_at for row in rows],
        [row.direction for row in rows],
        [row.role for row in rows],
        [row.sender_identifier for row in rows],
        [row.chat_identifier for row in rows],
        [row.message_type for row in rows],
        [row.content for row in rows],
        [row.reply_to_message_id for row in rows],
        [row.media_metadata for row in rows],
        [row.raw_payload for row in rows],
        [row.placeholder for row in rows],
    )
    assert row is not None
    return Inserted(row["count"], row["first_id"], row["last_id"])


# --- the rows of imports ------------------------------------------------------------------------------------------


async def begin(
    conn: Conn, tenant_id: int, session_id: int, *, kind: str, actor: str, total: int | None
) -> int:
    """Raises ForeignKeyViolationError when the tenant has no such session."""
    import_id: int = await conn.fetchval(
        """
        INSERT INTO et_imports (tenant_id, session_id, kind, actor, total)
        VALUES ($1, $2, $3, $4, $5)
        RETURNING id
        """,
        tenant_id,
        session_id,
        kind,
        actor,
        total,
    )
    return import_id


async def add(
    conn: Conn, import_id: int, *, after: int, stored: int, duplicates: int, wrong: int, named: list[Any]
) -> bool:
    """Count one chunk, in the transaction that stored it. `after`: the lines that were settled before it, which makes
    counting it twice impossible. False: the row is gone, or stands elsewhere."""
    done = await conn.fetchval(
        """
        UPDATE et_imports
        SET lines = lines + $3::bigint + $4::bigint + $5::bigint,
            stored = stored + $3,
            duplicates = duplicates + $4,
            wrong = wrong + $5,
            wrong_lines = CASE WHEN $6::jsonb = '[]' THEN wrong_lines ELSE wrong_lines || $6::jsonb END,
            updated_at = clock_timestamp()
        WHERE id = $1
          AND lines = $2
        RETURNING true
        """,
        import_id,
        after,
        stored,
        duplicates,
        wrong,
        named,
    )
    return done is not None


async def finish(conn: Conn, import_id: int, status: Status, error: str | None) -> None:
    await conn.execute(
        """
        UPDATE et_imports
        SET status = $2, error = $3, updated_at = clock_timestamp(), finished_at = clock_timestamp()
        WHERE id = $1
          AND status = 'running'
        """,
        import_id,
        status,
        error,
    )


# A process that was killed cannot say so itself: an import from which nothing comes any more is interrupted.
_IMPORT = """
    i.id, i.session_id, i.kind, i.total, i.lines, i.stored, i.duplicates, i.wrong, i.wrong_lines, i.started_at,
    i.updated_at, i.finished_at,
    CASE WHEN silent THEN 'interrupted' ELSE i.status END AS status,
    CASE WHEN silent THEN 'nothing has come for ten minutes; what is stored stays, begin again to go on'
         ELSE i.error END AS error
"""
_FROM = """
    FROM et_imports i
    CROSS JOIN LATERAL (SELECT i.status = 'running' AND i.updated_at < now() - INTERVAL '10 minutes' AS silent) s
"""


async def read(conn: Conn, import_id: int) -> Record | None:
    return await conn.fetchrow(
        f"SELECT {_IMPORT} {_FROM} WHERE i.id = $1",
        import_id,
    )


async def imports(
    conn: Conn, tenant_id: int, *, session_id: int | None, before: int | None, limit: int
) -> list[Record]:
    """A tenant's imports, newest first."""
    return await conn.fetch(
        f"""
        SELECT {_IMPORT}
        {_FROM}
        WHERE i.tenant_id = $1
          AND ($2::bigint IS NULL OR i.session_id = $2)
          AND ($3::bigint IS NULL OR i.id < $3)
        ORDER BY i.id DESC
        LIMIT $4
        """,
        tenant_id,
        session_id,
        before,
        limit,
    )
