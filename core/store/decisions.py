"""Storing a decision: everything that follows from it, in the caller's one transaction.

`hold` first: it locks lead, thread and messages in this order (the merge's order) and says what is still ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from core.store.audit import Conn
from core.store.dispatching import AUTOMATIC

REPLY_EXPIRES = timedelta(minutes=15)
"""A re-paired number must not fire yesterday's answers."""
REPLY_PRIORITY = 10
"""Answers go before campaigns."""

Status = Literal[
    "inbound_ai_replied", "inbound_follow_up", "inbound_human_takeover", "inbound_ignored", "inbound_error"
]


@dataclass(frozen=True, slots=True)
class Held:
    """What is locked: the thread as it stands now, and which messages are still claimed by us."""

    tenant_id: int
    tenant_active: bool
    thread_id: int
    session_id: int
    channel: str
    lead_id: int
    opted_out: bool
    human: bool
    message_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of et_decisions and the status that goes with it."""

    message_id: int
    status: Status
    action: str
    reason: str
    label: str
    decider: str
    model: str | None
    confidence: float | None
    reply_message_id: int | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What is enqueued. `inbound_message_id` makes the dedupe key: one reply per message whatever happens."""

    inbound_message_id: int
    content: str
    raw_payload: Mapping[str, Any]
    quote: str | None = None
    llm: Mapping[str, Any] | None = None


async def hold(conn: Conn, owner: str, message_ids: Sequence[int]) -> Held | None:
    """None: nothing of it is ours any more (given back, erased, or decided by an attempt whose answer got lost).

    Raises nothing of its own. The lead's lock keeps a merge out; the thread's keeps takeovers and claims in line.
    """
    lead = await conn.fetchrow(
        """
        SELECT l.id, l.opted_out_at
        FROM et_leads l
        WHERE l.id = (SELECT m.lead_id FROM et_messages m WHERE m.id = ANY ($1::bigint[]) ORDER BY m.id LIMIT 1)
        FOR NO KEY UPDATE
        """,
        message_ids,
    )
    if lead is None:
        return None
    thread = await conn.fetchrow(
        """
        SELECT h.id, h.tenant_id, h.channel, h.channel_session_id, h.handled_by, t.status AS tenant_status
        FROM et_threads h
        JOIN et_tenants t ON t.id = h.tenant_id
        WHERE h.lead_id = $2
          AND h.id = (SELECT m.thread_id FROM et_messages m WHERE m.id = ANY ($1::bigint[]) ORDER BY m.id LIMIT 1)
        FOR NO KEY UPDATE OF h
        """,
        message_ids,
        lead["id"],
    )
    if thread is None:
        return None
    await conn.execute(
        """
        SELECT m.id
        FROM et_messages m
        WHERE m.id = ANY ($1::bigint[])
        ORDER BY m.id
        FOR NO KEY UPDATE
        """,
        message_ids,
    )
    # A fresh statement: giving back takes the message's lock first, so what is seen here stays so.
    ours = await conn.fetch(
        """
        SELECT c.message_id
        FROM et_inbound_claims c
        JOIN et_messages m ON m.id = c.message_id
        WHERE c.owner = $1
          AND c.message_id = ANY ($2::bigint[])
          AND m.delivery_status = 'inbound_processing'
          AND m.thread_id = $3
        ORDER BY c.message_id
        """,
        owner,
        message_ids,
        thread["id"],
    )
    if not ours:
        return None
    return Held(
        tenant_id=thread["tenant_id"],
        tenant_active=thread["tenant_status"] == "active",
        thread_id=thread["id"],
        session_id=thread["channel_session_id"],
        channel=thread["channel"],
        lead_id=lead["id"],
        opted_out=lead["opted_out_at"] is not None,
        human=thread["handled_by"] == "human",
        message_ids=tuple(row["message_id"] for row in ours),
    )


async def enqueue_reply(conn: Conn, held: Held, reply: Reply) -> int:
    """The reply's message id. The address is chosen when it is sent: that of the last inbound message."""
    message_id: int = await conn.fetchval(
        """
        SELECT message_id
        FROM et_enqueue_outbound(
            tenant_id => $1,
            channel_session_id => $2,
            recipient => NULL,
            lead_id => $3,
            content => $4,
            dedupe_key => 'reply:' || $5::bigint,
            priority => $6,
            expires_in => $7,
            reply_to_message_id => $8,
            raw_payload => $9,
            llm => $10
        )
        """,
        held.tenant_id,
        held.session_id,
        held.lead_id,
        reply.content,
        reply.inbound_message_id,
        REPLY_PRIORITY,
        REPLY_EXPIRES,
        reply.quote,
        dict(reply.raw_payload),
        None if reply.llm is None else dict(reply.llm),
    )
    return message_id


async def store(conn: Conn, held: Held, rows: Sequence[Row]) -> None:
    """The decisions, and with them the messages' statuses (which ends their claims, by trigger)."""
    await conn.execute(
        """
        INSERT INTO et_decisions
            (tenant_id, message_id, thread_id, action, reason, label, decider, model, confidence, reply_message_id)
        SELECT $1, r.message_id, $2, r.action, r.reason, r.label, r.decider, r.model, r.confidence, r.reply_message_id
        FROM unnest($3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::float8[], $10::bigint[])
            AS r (message_id, action, reason, label, decider, model, confidence, reply_message_id)
        ORDER BY r.message_id
        ON CONFLICT (message_id) DO NOTHING
        """,
        held.tenant_id,
        held.thread_id,
        [row.message_id for row in rows],
        [row.action for row in rows],
        [row.reason for row in rows],
        [row.label for row in rows],
        [row.decider for row in rows],
        [row.model for row in rows],
        [row.confidence for row in rows],
        [row.reply_message_id for row in rows],
    )
    await conn.execute(
        """
        UPDATE et_messages m
        SET delivery_status = r.status
        FROM unnest($1::bigint[], $2::text[]) AS r (id, status)
        WHERE m.id = r.id
        """,
        [row.message_id for row in rows],
        [row.status for row in rows],
    )


async def plan_follow_up(conn: Conn, held: Held, *, label: str, next_step: str | None, at: datetime) -> None:
    """The thread's insight says when to come back; the rest of it is the analyzer's."""
    await conn.execute(
        """
        INSERT INTO et_thread_insights (tenant_id, thread_id, lead_id, label, next_step, next_followup_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (thread_id) DO UPDATE
        SET label = excluded.label,
            next_step = excluded.next_step,
            next_followup_at = excluded.next_followup_at
        """,
        held.tenant_id,
        held.thread_id,
        held.lead_id,
        label,
        next_step,
        at,
    )


async def opt_out(conn: Conn, held: Held) -> list[int]:
    """Nobody writes to this person by themselves any more: queued automatic messages are withdrawn, on every channel.

    Returns the ids of the withdrawn queue rows. What a backend queued stops at the send.
    """
    await conn.execute(
        """
        UPDATE et_leads
        SET opted_out_at = coalesce(opted_out_at, now())
        WHERE id = $1
        """,
        held.lead_id,
    )
    rows = await conn.fetch(
        """
        UPDATE et_outbound_queue
        SET status = 'cancelled',
            error_code = 'opted_out',
            last_error = 'this person has opted out of messages'
        WHERE status = 'queued' AND id IN (
            SELECT q.id
            FROM et_threads h
            JOIN et_outbound_queue q ON q.thread_id = h.id AND q.thread_id > 0 AND q.status = 'queued'
            JOIN et_messages m ON m.id = q.message_id
            WHERE h.tenant_id = $1
              AND h.lead_id = $2
              AND (q.dedupe_key LIKE 'reply:%' OR m.raw_payload ->> 'origin' = ANY ($3::text[]))
            ORDER BY q.id
            FOR NO KEY UPDATE OF q
        )
        RETURNING id
        """,
        held.tenant_id,
        held.lead_id,
        list(AUTOMATIC),
    )
    return [row["id"] for row in rows]


async def opt_in(conn: Conn, held: Held) -> None:
    await conn.execute("UPDATE et_leads SET opted_out_at = NULL WHERE id = $1", held.lead_id)
