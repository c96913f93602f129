"""The log of everything said: inserting what channels saw, finding what was there already, filling placeholders.

Nothing here decides or retries. Rows come in sorted by the caller (tenant, session, lead, arrival): two gateways that
store the same messages then wait for each other instead of deadlocking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from asyncpg import Record

from core.channel import Cursor
from core.store import echoes
from core.store.audit import Conn

MessageKey: TypeAlias = tuple[int, int, int, str]
"""(tenant id, session id, lead id, channel message id): the dedupe key."""


class Row(NamedTuple):
    """One message as it is stored. JSON is text already, so that encoding it cannot fail inside a batch.

    A tuple, because a hundred of them are turned into columns for every batch."""

    tenant_id: int
    session_id: int
    channel: str
    channel_message_id: str
    channel_timestamp: int | None
    occurred_at: float
    """Epoch seconds; the trigger holds back what lies in the future."""
    direction: str
    role: str
    sender_identifier: str | None
    chat_identifier: str | None
    message_type: str
    content: str | None
    reply_to_message_id: str | None
    media_metadata: str | None
    raw_payload: str
    is_history: bool
    placeholder: bool


async def insert(conn: Conn, rows: Sequence[Row], lead_ids: Sequence[int]) -> list[Record]:
    """Store what is new; returns id, thread_id and the dedupe key of the new rows. Identities rise in the order given."""
    columns = list(zip(*rows, strict=True))
    # Functions in FROM hand their rows out in order and nothing here sorts or joins: ids rise in order of arrival.
    # Where there is no active thread yet, the trigger finds or makes it; it would do so for every row, at a price.
    return await conn.fetch(
        """
        INSERT INTO et_messages
            (tenant_id, lead_id, channel_session_id, channel, channel_message_id, channel_timestamp, occurred_at,
             direction, role, sender_identifier, chat_identifier, message_type, content, reply_to_message_id,
             media_metadata, raw_payload, is_history, placeholder, delivery_status, thread_id)
        SELECT r.tenant_id, r.lead_id, r.session_id, r.channel, r.channel_message_id, r.channel_timestamp,
               to_timestamp(r.occurred_at), r.direction, r.role, r.sender_identifier, r.chat_identifier,
               r.message_type, r.content, r.reply_to_message_id, r.media_metadata::jsonb, r.raw_payload::jsonb,
               r.is_history, r.placeholder,
               CASE WHEN r.direction <> 'inbound' THEN 'sent' WHEN r.is_history THEN 'inbound_ignored' ELSE 'received' END,
               r.thread_id
        FROM ROWS FROM (
                unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::float8[],
                       $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[],
                       $15::text[], $16::text[], $17::boolean[], $18::boolean[]),
                et_active_threads($1::bigint[], $2::bigint[], $3::bigint[])
            ) AS r (tenant_id, lead_id, session_id, channel, channel_message_id, channel_timestamp, occurred_at,
                    direction, role, sender_identifier, chat_identifier, message_type, content, reply_to_message_id,
                    media_metadata, raw_payload, is_history, placeholder, thread_id)
        ON CONFLICT (tenant_id, channel_session_id, lead_id, channel_message_id) DO NOTHING
        RETURNING id, thread_id, tenant_id, channel_session_id, lead_id, channel_message_id
        """,
        columns[0],
        lead_ids,
        *columns[1:],
    )


async def find(conn: Conn, keys: Sequence[MessageKey]) -> list[Record]:
    """Which of these are stored: id, thread_id, direction, delivery_status, placeholder and the dedupe key."""
    return await conn.fetch(
        """
        SELECT m.id, m.thread_id, m.direction, m.delivery_status, m.placeholder,
               m.tenant_id, m.channel_session_id, m.lead_id, m.channel_message_id
        FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[])
            AS k (tenant_id, session_id, lead_id, channel_message_id)
        JOIN et_messages m
            ON m.tenant_id = k.tenant_id AND m.channel_session_id = k.session_id AND m.lead_id = k.lead_id
           AND m.channel_message_id = k.channel_message_id
        """,
        [key[0] for key in keys],
        [key[1] for key in keys],
        [key[2] for key in keys],
        [key[3] for key in keys],
    )


async def fill(conn: Conn, message_id: int, row: Row) -> bool:
    """Put what can be read now into a placeholder; the trigger wakes the inbound worker. False: it is none any more."""
    filled = await conn.fetchval(
        """
        UPDATE et_messages
        SET placeholder = false, message_type = $2, content = $3, reply_to_message_id = $4,
            media_metadata = $5::text::jsonb, raw_payload = $6::text::jsonb,
            sender_identifier = coalesce($7, sender_identifier), chat_identifier = coalesce($8, chat_identifier),
            channel_timestamp = coalesce($9, channel_timestamp)
        WHERE id = $1 AND placeholder
        RETURNING id
        """,
        message_id,
        row.message_type,
        row.content,
        row.reply_to_message_id,
        row.media_metadata,
        row.raw_payload,
        row.sender_identifier,
        row.chat_identifier,
        row.channel_timestamp,
    )
    return filled is not None


async def set_cursors(conn: Conn, cursors: Sequence[tuple[int, Cursor]]) -> set[int]:
    """Where pull channels continue, by session id; the last of each name counts. Returns the sessions that exist."""
    latest = {(session_id, cursor.name): cursor.value for session_id, cursor in cursors}
    keys = sorted(latest)
    rows = await conn.fetch(
        """
        INSERT INTO et_session_cursors (session_id, name, tenant_id, value)
        SELECT c.session_id, c.name, s.tenant_id, c.value
        FROM unnest($1::bigint[], $2::text[], $3::jsonb[]) AS c (session_id, name, value)
        JOIN et_channel_sessions s ON s.id = c.session_id
        ORDER BY c.session_id, c.name
        ON CONFLICT (session_id, name) DO UPDATE SET value = excluded.value, updated_at = now()
        RETURNING session_id
        """,
        [key[0] for key in keys],
        [key[1] for key in keys],
        [latest[key] for key in keys],
    )
    return {row["session_id"] for row in rows}


async def cursors_of(conn: Conn, session_id: int) -> dict[str, Cursor]:
    """The stored cursors of a session, by name."""
    rows = await conn.fetch("SELECT name, value FROM et_session_cursors WHERE session_id = $1", session_id)
    return {row["name"]: Cursor(row["name"], row["value"]) for row in rows}


# --- own messages that come back as an echo ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Echo:
    """What an outbound message seen on the channel says about itself."""

    tenant_id: int
    session_id: int
    channel_message_id: str
    queue_id: int | None = None
    """Proven by the secret it carries."""
    claim_epoch: int | None = None


LONG_ID = 16
"""Ids this long are random and unique per session, so they prove the message in any chat. Short ones (Telegram counts
them per chat) prove it only together with the lead, which is what the dedupe key does."""


async def own(conn: Conn, echoes_seen: Sequence[Echo]) -> dict[int, Record]:
    """Which echoes are queue items of ours, by position; the queue rows are locked, in id order."""
    candidates = await conn.fetch(
        """
        SELECT e.n::integer AS n, q.id AS queue_id
        FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS e (tenant_id, session_id, queue_id, n)
        JOIN et_outbound_queue q
            ON q.id = e.queue_id AND q.tenant_id = e.tenant_id AND q.channel_session_id = e.session_id
        UNION
        SELECT e.n::integer, q.id
        FROM unnest($1::bigint[], $2::bigint[], $4::text[]) WITH ORDINALITY AS e (tenant_id, session_id, channel_id, n)
        JOIN et_messages m
            ON m.channel_session_id = e.session_id AND m.channel_message_id = e.channel_id
           AND m.tenant_id = e.tenant_id AND m.direction = 'outbound'
        JOIN et_outbound_queue q ON q.message_id = m.id
        WHERE length(e.channel_id) >= $5
        """,
        [e.tenant_id for e in echoes_seen],
        [e.session_id for e in echoes_seen],
        [e.queue_id for e in echoes_seen],
        [e.channel_message_id for e in echoes_seen],
        LONG_ID,
    )
    if not candidates:
        return {}
    locked = await conn.fetch(
        """
        SELECT q.id AS queue_id, q.status, q.claim_epoch, q.message_id
        FROM et_outbound_queue q
        WHERE q.id = ANY ($1::bigint[])
        ORDER BY q.id
        FOR NO KEY UPDATE OF q
        """,
        sorted({row["queue_id"] for row in candidates}),
    )
    # A fresh statement: the marker may have committed the message's id while we waited for the lock.
    items = await conn.fetch(
        """
        SELECT q.id AS queue_id, q.status, q.claim_epoch, m.id, m.thread_id, m.lead_id, m.channel_message_id
        FROM et_outbound_queue q
        JOIN et_messages m ON m.id = q.message_id
        WHERE q.id = ANY ($1::bigint[])
        """,
        [row["queue_id"] for row in locked],
    )
    by_queue = {item["queue_id"]: item for item in items}
    return {row["n"] - 1: by_queue[row["queue_id"]] for row in candidates if row["queue_id"] in by_queue}


async def prove_sent(conn: Conn, message_ids: Sequence[int]) -> int:
    """The channel knows these: whatever the call's outcome was believed to be, they are sent. Moves queue rows, the
    trigger their messages. Returns how many moved."""
    rows = await conn.fetch(
        """
        UPDATE et_outbound_queue
        SET status = 'sent', error_code = NULL, last_error = NULL
        WHERE message_id = ANY ($1::bigint[]) AND status IN ('dispatching', 'unknown')
        RETURNING id
        """,
        message_ids,
    )
    return len(rows)


async def claim_proven(conn: Conn, queue_id: int) -> None:
    """A row that was put back as "not sent" although an earlier try did go out: it must not go out again. The way to
    `sent` leads over `dispatching`."""
    await conn.execute(
        "UPDATE et_outbound_queue SET status = 'dispatching' WHERE id = $1 AND status = 'queued'", queue_id
    )


async def merge_echo(conn: Conn, message_id: int, channel_message_id: str) -> None:
    """Give our message the channel's id. When an echo of it was stored first, the echo's row goes and ours takes over
    how far its receipts had come (the message must be `sent` already)."""
    echo_id = await conn.fetchval(
        """
        SELECT e.id
        FROM et_messages m
        JOIN et_messages e
            ON e.tenant_id = m.tenant_id AND e.channel_session_id = m.channel_session_id AND e.lead_id = m.lead_id
           AND e.channel_message_id = $2 AND e.id <> m.id
        WHERE m.id = $1
        """,
        message_id,
        channel_message_id,
    )
    if echo_id is not None:
        await echoes.merge(conn, message_id=message_id, echo_id=echo_id)
        return
    await conn.execute(
        "UPDATE et_messages SET channel_message_id = $2 WHERE id = $1 AND channel_message_id <> $2",
        message_id,
        channel_message_id,
    )
