"""The outbound worker's SQL: claim, mark, look for what a dead owner left, sweep what expired.

Each function is one statement. Nothing here decides what an outcome means and nothing calls a channel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from asyncpg import Record

from core.channel import SessionId
from core.store.audit import Conn

PEOPLE = ("person", "operator", "console", "human", "phone")
"""`raw_payload.origin` of what a person wrote by hand: it also goes to somebody who opted out."""
AUTOMATIC = ("agent", "auto", "worker", "rules", "llm", "inbound_worker")
"""`raw_payload.origin` of an agent's own replies; their `dedupe_key` begins with `reply:` as well."""

WINDOW = 2000
"""How many due rows of one session a claim looks at before it gives up: bounds what one endless thread can cost."""


BY_INDEX = "SET LOCAL enable_seqscan = off"
"""First in a transaction that claims or marks: a plan that a long-lived connection made while the queue was empty would
otherwise go on reading the whole table after a campaign of a hundred thousand rows has come in."""


@dataclass(frozen=True, slots=True)
class Due:
    """What may be claimed of one session now. `replies_only`: the channel takes no first contacts at the moment."""

    session_id: SessionId
    quota: int
    replies_only: bool = False


# Who may send: sessions whose lease is ours on the database's clock, of tenants that are not suspended.
# `due` walks the partial index session by session, so that nobody's hundred thousand rows are read for somebody else's
# one; then turns are dealt out: every tenant's first row, every tenant's second, …
# A row is held back by a row of its thread that is in flight, is due before it, or was tried before it.
_CLAIM = """
WITH mine AS MATERIALIZED (
    SELECT w.session_id, w.quota, w.replies_only, l.tenant_id
    FROM unnest($2::BIGINT[], $3::INT[], $4::BOOLEAN[]) AS w (session_id, quota, replies_only)
    JOIN et_session_leases l ON l.session_id = w.session_id
    JOIN et_tenants t ON t.id = l.tenant_id
    WHERE l.owner = $1
      AND l.expires_at > clock_timestamp()
      AND t.status = 'active'
      AND ($6::BIGINT IS NULL OR l.tenant_id = $6)
), busy AS MATERIALIZED (
    SELECT b.thread_id
    FROM et_outbound_queue b
    WHERE b.status = 'dispatching'
      AND b.channel_session_id = ANY ($2::BIGINT[])
), due AS MATERIALIZED (
    SELECT d.id,
           row_number() OVER (PARTITION BY mine.tenant_id ORDER BY d.place, d.priority DESC, d.id) AS turn,
           d.priority
    FROM mine
    CROSS JOIN LATERAL (
        SELECT c.id, c.priority, row_number() OVER (ORDER BY c.priority DESC, c.next_attempt_at, c.id) AS place
        FROM (
            SELECT r.id, r.priority, r.next_attempt_at
            FROM (
                SELECT q.id, q.thread_id, q.send_at, q.priority, q.next_attempt_at
                FROM et_outbound_queue q
                WHERE q.channel_session_id = mine.session_id
                  AND q.status = 'queued'
                  AND q.next_attempt_at <= now()
                ORDER BY q.priority DESC, q.next_attempt_at, q.id
                LIMIT {window}
            ) r
            WHERE r.send_at <= now()
              AND r.thread_id NOT IN (SELECT busy.thread_id FROM busy)
              AND NOT EXISTS (
                  SELECT
                  FROM et_outbound_queue b
                  WHERE b.thread_id = r.thread_id
                    AND b.status = 'queued'
                    AND (b.send_at, b.id) < (r.send_at, r.id)
                    AND b.expires_at > now()
                    AND (b.next_attempt_at <= now() OR b.claim_epoch > 0 OR b.retry_count > 0)
              )
              AND (NOT mine.replies_only OR EXISTS (
                  SELECT
                  FROM et_threads h
                  JOIN et_messages i ON i.tenant_id = h.tenant_id AND i.lead_id = h.lead_id
                  WHERE h.id = r.thread_id
                    AND i.channel_session_id = mine.session_id
                    AND i.direction = 'inbound'
              ))
            ORDER BY r.priority DESC, r.next_attempt_at, r.id
            LIMIT mine.quota
        ) c
    ) d
), locked AS MATERIALIZED (
    SELECT q.id,
           CASE
               WHEN q.expires_at <= now() THEN 'expired'
               -- 'closing': the reply that says so itself (opted out, a colleague will answer).
               WHEN m.raw_payload->>'closing' = 'true' THEN NULL
               WHEN l.opted_out_at IS NOT NULL AND coalesce(m.raw_payload->>'origin', '') <> ALL ({people})
                   THEN 'opted_out'
               WHEN t.handled_by = 'human' AND a.automatic THEN 'human_takeover'
           END AS stop,
           a.automatic
    FROM (SELECT due.id FROM due ORDER BY due.turn, due.priority DESC, due.id LIMIT $5) p
    JOIN et_outbound_queue q ON q.id = p.id
    JOIN et_messages m ON m.id = q.message_id
    JOIN et_threads t ON t.id = m.thread_id
    JOIN et_leads l ON l.id = m.lead_id
    CROSS JOIN LATERAL (
        SELECT coalesce(q.dedupe_key LIKE 'reply:%', false)
            OR coalesce(m.raw_payload->>'origin', '') = ANY ({automatic}) AS automatic
    ) a
    WHERE q.status = 'queued'
    FOR UPDATE OF q SKIP LOCKED
), moved AS (
    UPDATE et_outbound_queue q
    SET status = CASE k.stop WHEN 'expired' THEN 'failed'
                             WHEN 'opted_out' THEN 'cancelled'
                             WHEN 'human_takeover' THEN 'cancelled'
                             ELSE 'dispatching' END,
        claimed_by = CASE WHEN k.stop IS NULL THEN $1 ELSE q.claimed_by END,
        claimed_at = CASE WHEN k.stop IS NULL THEN clock_timestamp() ELSE q.claimed_at END,
        claim_epoch = q.claim_epoch + CASE WHEN k.stop IS NULL THEN 1 ELSE 0 END,
        error_code = k.stop,
        last_error = CASE k.stop WHEN 'expired' THEN {expired}
                                 WHEN 'opted_out' THEN 'this person has opted out of messages'
                                 WHEN 'human_takeover' THEN 'a person has taken this conversation over'
                                 ELSE q.last_error END
    FROM locked k
    WHERE q.id = k.id
    RETURNING q.id, q.tenant_id, q.channel_session_id, q.message_id, q.thread_id, q.channel, q.recipient,
              q.claim_epoch, q.retry_count, q.next_attempt_at, q.priority, k.stop, k.automatic
)
SELECT v.*, m.lead_id, m.message_type, m.content, m.media_url,
       m.raw_payload->'payload' AS payload,
       m.reply_to_message_id,
       CASE WHEN v.recipient IS NULL AND v.stop IS NULL THEN (
           SELECT coalesce(i.chat_identifier, i.sender_identifier)
           FROM et_messages i
           WHERE i.tenant_id = v.tenant_id
             AND i.thread_id = v.thread_id
             AND i.direction = 'inbound'
           ORDER BY i.occurred_at DESC, i.id DESC
           LIMIT 1
       ) END AS last_address,
       CASE WHEN v.recipient IS NULL AND v.stop IS NULL THEN (
           SELECT n.external_id
           FROM et_lead_identities n
           WHERE n.tenant_id = v.tenant_id
             AND n.lead_id = m.lead_id
             AND split_part(n.external_id, ':', 1) IN (v.channel, v.channel || '-group', v.channel || '-lid')
           ORDER BY n.created_at DESC, length(split_part(n.external_id, ':', 1))
           LIMIT 1
       ) END AS identity,
       NOT EXISTS (
           SELECT
           FROM et_messages i
           WHERE i.tenant_id = v.tenant_id
             AND i.lead_id = m.lead_id
             AND i.channel_session_id = v.channel_session_id
             AND i.direction = 'inbound'
       ) AS first_contact,
       quoted.channel_message_id AS quoted_id, quoted.sender_identifier AS quoted_sender,
       quoted.content AS quoted_content, quoted.direction AS quoted_direction, quoted.raw_payload AS quoted_payload
FROM moved v
JOIN et_messages m ON m.id = v.message_id
LEFT JOIN LATERAL (
    SELECT o.channel_message_id, o.sender_identifier, o.content, o.direction, o.raw_payload
    FROM et_messages o
    WHERE m.reply_to_message_id IS NOT NULL
      AND o.tenant_id = m.tenant_id
      AND o.channel_session_id = m.channel_session_id
      AND o.lead_id = m.lead_id
      AND o.channel_message_id = m.reply_to_message_id
    OFFSET 0  -- most messages quote nothing: then nothing is looked up
) quoted ON true
ORDER BY v.priority DESC, v.next_attempt_at, v.id
"""

EXPIRED = "it was not sent before its time ran out; the session was not ready in time"


def _array(values: Sequence[str]) -> str:
    return "ARRAY[" + ", ".join(f"'{value}'" for value in values) + "]"


_CLAIM = _CLAIM.format(
    window=WINDOW, people=_array(PEOPLE), automatic=_array(AUTOMATIC), expired=f"'{EXPIRED}'"
)


async def claim(
    conn: Conn, owner: str, due: Sequence[Due], *, limit: int, tenant_id: int | None = None
) -> list[Record]:
    """Take up to `limit` rows: they are `dispatching` when the caller's transaction commits, and may be called only
    after that. Rows with `stop` were ended instead of claimed."""
    return await conn.fetch(
        _CLAIM,
        owner,
        [d.session_id for d in due],
        [d.quota for d in due],
        [d.replies_only for d in due],
        limit,
        tenant_id,
    )


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


# Queue row and message move in one statement; the triggers then find nothing left to do.
# A receipt may have moved the message further than `sent` already.
# `unknown` → `sent` or `failed`: the call came back after all.
# The channel's id is written only where no other row has it: an own echo that was stored first is merged by the caller.
_MARK = """
WITH o AS MATERIALIZED (
    SELECT *
    FROM unnest($1::BIGINT[], $2::BIGINT[], $3::TEXT[], $4::TEXT[], $5::TEXT[], $6::FLOAT8[], $7::BOOLEAN[],
                $8::TEXT[], $9::TIMESTAMPTZ[])
        AS o (id, epoch, status, error_code, last_error, retry_in, counts, channel_message_id, sent_at)
), q AS (
    UPDATE et_outbound_queue q
    SET status = o.status,
        error_code = o.error_code,
        last_error = o.last_error,
        retry_count = q.retry_count + o.counts::INT,
        next_attempt_at = CASE WHEN o.status = 'queued' THEN now() + make_interval(secs => o.retry_in)
                               ELSE q.next_attempt_at END,
        claimed_by = CASE WHEN o.status = 'queued' THEN NULL ELSE q.claimed_by END,
        claimed_at = CASE WHEN o.status = 'queued' THEN NULL ELSE q.claimed_at END
    FROM o
    WHERE q.id = o.id
      AND q.claim_epoch = o.epoch
      AND (q.status = 'dispatching' OR (q.status = 'unknown' AND o.status IN ('sent', 'failed')))
    RETURNING q.id, q.tenant_id, q.message_id, q.channel_session_id, q.channel, q.retry_count,
              o.status, o.channel_message_id, o.sent_at
), taken AS MATERIALIZED (
    SELECT q.id, e.id AS echo_id
    FROM q
    JOIN et_messages m ON m.id = q.message_id
    JOIN et_messages e ON e.tenant_id = m.tenant_id
                      AND e.channel_session_id = m.channel_session_id
                      AND e.lead_id = m.lead_id
                      AND e.channel_message_id = q.channel_message_id
                      AND e.id <> m.id
), m AS (
    UPDATE et_messages m
    SET delivery_status = CASE WHEN m.delivery_status IN ('dispatching', 'unknown') THEN q.status
                               ELSE m.delivery_status END,
        channel_message_id = CASE WHEN q.id IN (SELECT taken.id FROM taken) THEN m.channel_message_id
                                  ELSE coalesce(q.channel_message_id, m.channel_message_id) END,
        channel_timestamp = coalesce((extract(epoch FROM q.sent_at) * 1000)::BIGINT, m.channel_timestamp)
    FROM q
    WHERE m.id = q.message_id
    RETURNING m.id
)
SELECT q.*, taken.echo_id
FROM q
LEFT JOIN taken ON taken.id = q.id
"""


async def mark(conn: Conn, marks: Sequence[Mark]) -> list[Record]:
    """Apply outcomes; returns the rows that moved. A row that is missing had moved before (our own commit whose answer
    was lost, or another owner's finding), which is as good. Raises UniqueViolationError when an own echo got in
    between: repeat."""
    ordered = sorted(marks, key=lambda m: m.queue_id)
    return await conn.fetch(
        _MARK,
        [m.queue_id for m in ordered],
        [m.claim_epoch for m in ordered],
        [m.status for m in ordered],
        [m.error_code for m in ordered],
        [m.last_error for m in ordered],
        [m.retry_in for m in ordered],
        [m.counts for m in ordered],
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


async def expire(conn: Conn, *, limit: int = 500) -> list[Record]:
    """Fail what waited too long, whatever its session or tenant is doing. Several workers may sweep at once."""
    return await conn.fetch(
        """
        UPDATE et_outbound_queue q
        SET status = 'failed', error_code = 'expired', last_error = $2
        FROM (
            SELECT x.id
            FROM et_outbound_queue x
            WHERE x.status = 'queued'
              AND x.expires_at <= now()
            ORDER BY x.expires_at
            LIMIT $1
            FOR UPDATE SKIP LOCKED
        ) late
        WHERE q.id = late.id
        RETURNING q.id, q.tenant_id, q.message_id, q.channel_session_id, q.channel, q.retry_count
        """,
        limit,
        EXPIRED,
    )


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
