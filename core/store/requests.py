"""The queue as the API uses it: put in, look, list, withdraw, send again. Claiming and marking are the worker's.

Runs as the API's role inside the tenant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from asyncpg import Record

from core.store.audit import Conn

_ITEM = """
    q.id AS queue_id, q.message_id, q.thread_id, q.channel, q.channel_session_id, q.recipient, q.status, q.priority,
    q.retry_count, q.send_at, q.next_attempt_at, q.expires_at, q.dedupe_key, q.error_code, q.last_error,
    q.created_at, q.updated_at,
    m.lead_id, m.message_type, m.channel_message_id, m.delivery_status
"""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to put into the queue; `recipient` or `lead_id`."""

    session_id: int
    message_type: str
    recipient: str | None = None
    lead_id: int | None = None
    content: str | None = None
    media_url: str | None = None
    payload: dict[str, Any] | None = None
    reply_to_message_id: str | None = None
    dedupe_key: str | None = None
    send_at: datetime | None = None
    raw_payload: dict[str, Any] = field(default_factory=dict)


async def enqueue(conn: Conn, tenant_id: int, outgoing: Outgoing) -> Record:
    """`message_id, queue_id, thread_id`; with a repeated dedupe key those of the first call."""
    row = await conn.fetchrow(
        """
        SELECT message_id, queue_id, thread_id
        FROM et_enqueue_outbound(
            tenant_id => $1,
            channel_session_id => $2,
            recipient => $3,
            content => $4,
            message_type => $5,
            media_url => $6,
            dedupe_key => $7,
            payload => $8,
            send_at => $9,
            reply_to_message_id => $10,
            raw_payload => $11,
            lead_id => $12
        )
        """,
        tenant_id,
        outgoing.session_id,
        outgoing.recipient,
        outgoing.content,
        outgoing.message_type,
        outgoing.media_url,
        outgoing.dedupe_key,
        outgoing.payload,
        outgoing.send_at,
        outgoing.reply_to_message_id,
        outgoing.raw_payload,
        outgoing.lead_id,
    )
    assert row is not None
    return row


async def by_dedupe_key(conn: Conn, tenant_id: int, dedupe_key: str) -> Record | None:
    """The item of an earlier call, with what tells whether it was the same call."""
    return await conn.fetchrow(
        f"""
        SELECT {_ITEM}, m.content, m.media_url, m.raw_payload ->> 'request_hash' AS request_hash
        FROM et_outbound_queue q
        JOIN et_messages m ON m.id = q.message_id AND m.tenant_id = q.tenant_id
        WHERE q.tenant_id = $1
          AND q.dedupe_key = $2
        """,  # noqa: S608  (our own column list)
        tenant_id,
        dedupe_key,
    )


async def read(conn: Conn, tenant_id: int, queue_id: int) -> Record | None:
    return await conn.fetchrow(
        f"""
        SELECT {_ITEM}
        FROM et_outbound_queue q
        JOIN et_messages m ON m.id = q.message_id AND m.tenant_id = q.tenant_id
        WHERE q.tenant_id = $1
          AND q.id = $2
        """,  # noqa: S608
        tenant_id,
        queue_id,
    )


async def listed(
    conn: Conn,
    tenant_id: int,
    *,
    status: str | None,
    session_id: int | None,
    before: int | None,
    limit: int,
) -> list[Record]:
    """Newest first."""
    return await conn.fetch(
        f"""
        SELECT {_ITEM}
        FROM et_outbound_queue q
        JOIN et_messages m ON m.id = q.message_id AND m.tenant_id = q.tenant_id
        WHERE q.tenant_id = $1
          AND q.id > 0
          AND ($2::text IS NULL OR q.status = $2)
          AND ($3::bigint IS NULL OR q.channel_session_id = $3)
          AND ($4::bigint IS NULL OR q.id < $4)
        ORDER BY q.id DESC
        LIMIT $5
        """,  # noqa: S608
        tenant_id,
        status,
        session_id,
        before,
        limit,
    )


async def cancel(conn: Conn, tenant_id: int, queue_id: int) -> bool:
    """Withdraw an item that waits. False when it no longer does (or never was)."""
    done = await conn.execute(
        """
        UPDATE et_outbound_queue
        SET status = 'cancelled',
            error_code = 'cancelled',
            last_error = 'withdrawn before it was sent'
        WHERE tenant_id = $1
          AND id = $2
          AND status = 'queued'
        """,
        tenant_id,
        queue_id,
    )
    return done.endswith(" 1")


async def retry(conn: Conn, queue_id: int) -> None:
    """An operator sends a failed or unknown item again; the function refuses any other."""
    await conn.execute("SELECT et_retry_outbound($1)", queue_id)


async def count(conn: Conn, tenant_id: int, status: Literal["failed", "unknown"]) -> int:
    """How many items an operator has to look at, by the partial index of those."""
    return int(
        await conn.fetchval(
            "SELECT count(*) FROM et_outbound_queue WHERE tenant_id = $1 AND status = $2", tenant_id, status
        )
    )


_TROUBLE = f"""
    SELECT {_ITEM}, m.content, m.raw_payload ->> 'origin' AS origin, q.claimed_at,
           l.name AS lead_name, l.external_id AS lead_external_id,
           s.session_name, s.session_identifier
    FROM et_outbound_queue q
    JOIN et_messages m ON m.id = q.message_id AND m.tenant_id = q.tenant_id
    JOIN et_leads l ON l.id = m.lead_id AND l.tenant_id = q.tenant_id
    JOIN et_channel_sessions s ON s.id = q.channel_session_id AND s.tenant_id = q.tenant_id
"""  # noqa: S608  (our own column list)


async def trouble(
    conn: Conn, tenant_id: int, status: Literal["failed", "unknown"], *, limit: int
) -> list[Record]:
    """What did not go out, or may not have, newest first, with who it was for."""
    return await conn.fetch(
        f"{_TROUBLE} WHERE q.tenant_id = $1 AND q.status = $2 ORDER BY q.id DESC LIMIT $3",
        tenant_id,
        status,
        limit,
    )


async def with_person(conn: Conn, tenant_id: int, queue_id: int) -> Record | None:
    """One item, whatever its status, with who it was for."""
    return await conn.fetchrow(f"{_TROUBLE} WHERE q.tenant_id = $1 AND q.id = $2", tenant_id, queue_id)


GIVEN_UP = "given_up"


async def settle(conn: Conn, tenant_id: int, queue_id: int, *, arrived: bool) -> bool:
    """An operator says what became of an item whose outcome is unknown: it arrived, or it is given up. False when it is
    not unknown (any more): evidence came meanwhile, or somebody was quicker. Inside a transaction."""
    found = await conn.fetchval(
        """
        SELECT message_id
        FROM et_outbound_queue
        WHERE tenant_id = $1
          AND id = $2
          AND status = 'unknown'
        FOR UPDATE
        """,
        tenant_id,
        queue_id,
    )
    if found is None:
        return False
    # The other row of the pair follows by trigger. A person has seen it there: that is more than `sent`.
    if arrived:
        await conn.execute(
            "UPDATE et_messages SET delivery_status = 'delivered' WHERE tenant_id = $1 AND id = $2",
            tenant_id,
            found,
        )
    await conn.execute(
        """
        UPDATE et_outbound_queue
        SET status = CASE WHEN $3 THEN status ELSE 'failed' END,
            error_code = CASE WHEN $3 THEN NULL ELSE $4 END,
            last_error = CASE WHEN $3 THEN NULL ELSE 'a person gave it up: nothing proved that it arrived' END
        WHERE tenant_id = $1
          AND id = $2
        """,
        tenant_id,
        queue_id,
        arrived,
        GIVEN_UP,
    )
    return True
