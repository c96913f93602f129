"""The outbound worker's SQL: mark, look for what a dead owner left, sweep what expired.

Each function is one statement. Nothing here decides what an outcome means and nothing calls a channel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from asyncpg import Record

from core.store.audit import Conn

PEOPLE = ("person", "operator", "console", "human", "phone")
"""`raw_payload.origin` of what a person wrote by hand: it also goes to somebody who opted out."""
AUTOMATIC = ("agent", "auto", "worker", "rules", "llm", "inbound_worker")
"""`raw_payload.origin` of an agent's own replies; their `dedupe_key` begins with `reply:` as well."""

ALONE = """
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL plan_cache_mode = force_generic_plan;
SET LOCAL gateway.together = 'on'
"""
"""First in a transaction that claims or marks.

By index, row by row and with one plan: one that a long-lived connection made while the queue was empty would otherwise
go on reading whole tables after a campaign of a hundred thousand rows has come in, and planning takes longer than a
small claim. No bitmaps: only a plain index scan clears away the entries of rows that have moved on. `gateway.together`:
the statement itself moves queue row and message and writes the events; the triggers which see to that for every other
writer return at once."""

APART = "SET LOCAL gateway.together = 'off'"
"""Before any other statement of such a transaction that writes messages or queue rows."""


EXPIRED = """
CASE WHEN q.error_code IS NOT NULL AND q.last_error IS NOT NULL AND q.claim_epoch = 0
     THEN 'its time ran out while it waited: ' || q.last_error
     ELSE 'it was not sent before its time ran out; the session was not ready in time' END
"""
"""`last_error` of a row that expired, as an expression over `q`: one that was held back says what for."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a claimed row goes. Fenced by `(queue_id, claim_epoch)`."""

    queue_id: int
    claim_epoch: int
    status: str
    error_code: str | None = None
    last_error: str | None = None
    retry_in: float = 0.0
    counts: bool = False
    """Whether this was a definite failure: `retry_count + 1`."""
    channel_message_id: str | None = None
    sent_at: datetime | None = None


# Queue row, message and event in one statement (see ALONE).
# A receipt may have moved the message further than `sent` already.
# `unknown` → `sent` or `failed`: the call came back after all.
# The channel's id is written only where no other row has it: an own echo that was stored first is merged by the caller.
_MARK = """
WITH o AS MATERIALIZED (
    SELECT *
    FROM unnest($1::BIGINT[], $2::BIGINT[], $3::TEXT[], $4::TEXT[], $5::TEXT[], $6::FLOAT8[], $7::BOOLEAN[],
                $8::TEXT[], $9::TIMESTAMPTZ[])
        AS o (id, epoch, status, error_code, last_error, retry_in, counts, channel_message_id, sent_at)
), q AS MATERIALIZED (
    UPDATE et_outbound_queue q
    SET status = o.status,
        error_code = o.error_code,
        last_error = o.last_error,
        retry_count = q.retry_count + coalesce(o.counts, false)::INT,
        next_attempt_at = CASE WHEN o.status = 'queued' THEN now() + make_interval(secs => o.retry_in)
                               ELSE q.next_attempt_at END,
        claimed_by = CASE WHEN o.status = 'queued' THEN NULL ELSE q.claimed_by END,
        claimed_at = CASE WHEN o.status = 'queued' THEN NULL ELSE q.claimed_at END,
        updated_at = now()
    FROM o
    WHERE q.id = o.id
      AND q.claim_epoch = o.epoch
      AND (q.status = 'dispatching' OR (q.status = 'unknown' AND o.status IN ('sent', 'failed'))) IS TRUE
    RETURNING q.id, q.tenant_id, q.message_id, o.status, o.channel_message_id, o.sent_at
), seen AS MATERIALIZED (
    SELECT q.*, e.id AS echo_id,
           CASE WHEN m.delivery_status IN ('dispatching', 'unknown') THEN q.status ELSE m.delivery_status END AS becomes,
           m.delivery_status AS was
    FROM q
    JOIN et_messages m ON m.id = q.message_id
    LEFT JOIN LATERAL (
        SELECT o.id
        FROM et_messages o
        WHERE o.tenant_id = m.tenant_id
          AND o.channel_session_id = m.channel_session_id
          AND o.lead_id = m.lead_id
          AND o.channel_message_id = q.channel_message_id
          AND o.id <> m.id
        OFFSET 0  -- one probe of the unique key, not a walk over everything this person was ever sent
    ) e ON true
), moved AS (
    UPDATE et_messages m
    SET delivery_status = seen.becomes,
        channel_message_id = CASE WHEN seen.echo_id IS NULL
                                  THEN coalesce(seen.channel_message_id, m.channel_message_id)
                                  ELSE m.channel_message_id END,
        channel_timestamp = coalesce((extract(epoch FROM seen.sent_at) * 1000)::BIGINT, m.channel_timestamp),
        updated_at = now()
    FROM seen
    WHERE m.id = seen.message_id
), told AS (
    INSERT INTO et_events (tenant_id, kind, ref_id)
    SELECT seen.tenant_id, 'status', seen.message_id
    FROM seen
    WHERE seen.becomes <> seen.was
)
SELECT seen.id, seen.message_id, seen.echo_id,
       (SELECT pg_notify('et_events', '') FROM q LIMIT 1) IS NULL AS hint,
       (SELECT pg_notify('et_outbound', '') FROM q WHERE q.status = 'queued' LIMIT 1) IS NULL AS again
FROM seen
"""


async def mark(conn: Conn, marks: Sequence[Mark]) -> list[Record]:
    """Apply outcomes; returns the rows that moved. A row that is missing had moved before (our own commit whose answer
    was lost, or another owner's finding), which is as good. Raises UniqueViolationError when an own echo got in
    between: repeat."""
    ordered = sorted(marks, key=lambda m: m.queue_id)
    # Most batches have no failure: unnest fills what an empty array leaves out with NULL.
    failures = ordered if any(m.status != "sent" for m in ordered) else []
    return await conn.fetch(
        _MARK,
        [m.queue_id for m in ordered],
        [m.claim_epoch for m in ordered],
        [m.status for m in ordered],
        [m.error_code for m in failures],
        [m.last_error for m in failures],
        [m.retry_in for m in failures],
        [m.counts for m in failures],
        [m.channel_message_id for m in ordered],
        [m.sent_at for m in ordered],
    )


@dataclass(frozen=True, slots=True)
class Left:
    """A row that is `dispatching` although we are not calling: somebody stopped between claim and outcome."""

    queue_id: int
    tenant_id: int
    session_id: int
    message_id: int
    claim_epoch: int
    claimed_by: str
    channel: str
    recipient: str
    channel_message_id: str | None
    age: float
    owner_alive: bool


async def left_behind(
    conn: Conn, sessions: Collection[int], *, alive_seconds: float, limit: int = 200
) -> list[Left]:
    """`dispatching` rows of these sessions, oldest first. `owner_alive`: its gateway has beaten its heart lately."""
    rows = await conn.fetch(
        """
        SELECT q.id, q.tenant_id, q.channel_session_id, q.message_id, q.claim_epoch, q.channel,
               coalesce(q.claimed_by, '') AS claimed_by,
               CASE WHEN m.channel_message_id LIKE 'out\\_%' THEN NULL ELSE m.channel_message_id END AS known_id,
               extract(epoch FROM clock_timestamp() - coalesce(q.claimed_at, q.updated_at))::FLOAT8 AS age,
               coalesce(g.heartbeat_at > clock_timestamp() - make_interval(secs => $2), false) AS owner_alive,
               coalesce(q.recipient, l.external_id) AS recipient
        FROM et_outbound_queue q
        JOIN et_messages m ON m.id = q.message_id
        JOIN et_leads l ON l.id = m.lead_id
        LEFT JOIN et_gateways g ON g.owner = q.claimed_by
        WHERE q.status = 'dispatching'
          AND q.channel_session_id = ANY ($1::BIGINT[])
        ORDER BY q.claimed_at
        LIMIT $3
        """,
        list(sessions),
        alive_seconds,
        limit,
    )
    return [
        Left(
            queue_id=r["id"],
            tenant_id=r["tenant_id"],
            session_id=r["channel_session_id"],
            message_id=r["message_id"],
            claim_epoch=r["claim_epoch"],
            claimed_by=r["claimed_by"],
            channel=r["channel"],
            recipient=r["recipient"],
            channel_message_id=r["known_id"],
            age=r["age"],
            owner_alive=r["owner_alive"],
        )
        for r in rows
    ]


async def abandoned(conn: Conn, *, alive_seconds: float, patience: float, limit: int = 200) -> list[Record]:
    """`dispatching` rows that nobody will look at: their gateway is gone and nobody has the session. Any worker may say
    `unknown` about them, fenced by epoch like every mark."""
    return await conn.fetch(
        """
        SELECT q.id, q.claim_epoch, q.tenant_id, q.channel_session_id, q.message_id, q.channel, q.retry_count
        FROM et_outbound_queue q
        LEFT JOIN et_gateways g ON g.owner = q.claimed_by
        LEFT JOIN et_session_leases l ON l.session_id = q.channel_session_id
        WHERE q.status = 'dispatching'
          AND q.claimed_at < clock_timestamp() - make_interval(secs => $2)
          AND coalesce(g.heartbeat_at < clock_timestamp() - make_interval(secs => $1), true)
          AND coalesce(l.expires_at < clock_timestamp() - make_interval(secs => $2), true)
        LIMIT $3
        """,
        alive_seconds,
        patience,
        limit,
    )


_EXPIRE = f"""
UPDATE et_outbound_queue q
SET status = 'failed', error_code = 'expired', last_error = {EXPIRED}
FROM (
    SELECT x.id
    FROM et_outbound_queue x
    WHERE x.status = 'queued'
      AND x.expires_at <= now()
      AND x.expires_at > '-infinity'
    ORDER BY x.expires_at
    LIMIT $1
    FOR UPDATE SKIP LOCKED
) late
WHERE q.id = late.id
RETURNING q.id, q.tenant_id, q.message_id, q.channel_session_id, q.channel, q.retry_count
"""  # noqa: S608  (an expression of our own)


async def expire(conn: Conn, *, limit: int = 500) -> list[Record]:
    """Fail what waited too long, whatever its session or tenant is doing. Several workers may sweep at once."""
    return await conn.fetch(_EXPIRE, limit)


async def outcomes(conn: Conn, queue_ids: Collection[int]) -> list[Record]:
    """Where these rows stand, with what a caller of `/send` wants to know."""
    return await conn.fetch(
        """
        SELECT q.id, q.tenant_id, q.message_id, q.channel, q.status, q.retry_count, q.error_code, q.last_error,
               CASE WHEN m.channel_message_id LIKE 'out\\_%' THEN NULL ELSE m.channel_message_id END
                   AS channel_message_id,
               to_timestamp(m.channel_timestamp / 1000.0) AS sent_at
        FROM et_outbound_queue q
        JOIN et_messages m ON m.id = q.message_id
        WHERE q.id = ANY ($1::BIGINT[])
        """,
        list(queue_ids),
    )


async def gauges(conn: Conn) -> dict[str, Any]:
    """What the queue's gauges show: rows by status that are not final, and the age of the oldest that is due."""
    row = await conn.fetchrow(
        """
        SELECT (SELECT count(*) FROM et_outbound_queue WHERE status = 'queued') AS queued,
               (SELECT count(*) FROM et_outbound_queue WHERE status = 'dispatching') AS dispatching,
               (SELECT count(*) FROM et_outbound_queue WHERE status = 'unknown') AS unknown,
               coalesce((SELECT extract(epoch FROM now() - min(next_attempt_at)) FROM et_outbound_queue
                         WHERE status = 'queued' AND next_attempt_at <= now()), 0)::FLOAT8 AS oldest
        """
    )
    assert row is not None
    return dict(row)


async def apply_parked_receipts(conn: Conn) -> int:
    """Receipts that came before their send was marked. Returns how many were applied."""
    return (
        await conn.fetchval(
            "SELECT et_apply_parked_receipts() WHERE EXISTS (SELECT FROM et_parked_receipts)",
        )
        or 0
    )


async def audit_failures(conn: Conn, actor: str, failures: Sequence[tuple[int, int, dict[str, Any]]]) -> None:
    """`send_failure` rows: tenant, queue id, detail."""
    await conn.execute(
        """
        INSERT INTO et_audit_log (tenant_id, actor, event, subject_type, subject_id, detail)
        SELECT f.tenant_id, $1, 'send_failure', 'outbound', f.queue_id::TEXT, f.detail
        FROM unnest($2::BIGINT[], $3::BIGINT[], $4::JSONB[]) AS f (tenant_id, queue_id, detail)
        """,
        actor,
        [tenant for tenant, _, _ in failures],
        [queue for _, queue, _ in failures],
        [detail for _, _, detail in failures],
    )
