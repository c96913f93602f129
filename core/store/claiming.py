"""The claim: which due rows this worker may call now, in which order, committed as `dispatching`.

One statement. It knows nothing of clocks and rates: what a session may send is told to it, session by session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from asyncpg import Record

from core.channel import SessionId
from core.store.audit import Conn
from core.store.dispatching import AUTOMATIC, EXPIRED, PEOPLE

STRANGER, KNOWN, REPLY = 0, 1, 2
"""Lanes of `et_outbound_queue.lane`, which the row got when it was put in."""

WINDOW = 2000
"""How many due rows of one lane a claim looks at before it gives up: bounds what one endless thread can cost."""
STEPS = 100
"""How many different priorities in one session's lanes a claim walks through."""


@dataclass(frozen=True, slots=True)
class Due:
    """What may be claimed of one session now: so many rows, of lanes from `floor` on, so many of them to strangers.

    `day`: where those are counted; None: nobody counts them.
    """

    session_id: SessionId
    quota: int
    floor: int = STRANGER
    strangers: int = 1_000_000
    day: date | None = None


# Who may send: sessions whose lease is ours on the database's clock, of tenants that are not suspended.
# `due` walks the partial index session by session, lane by lane, priority by priority, so that nobody's hundred thousand
# rows are read for somebody else's one, and none that wait for tomorrow; then turns are dealt out: every tenant's first
# row, every tenant's second, …
# A row is held back by a row of its thread that is in flight, is due before it, or was tried before it. One that waits
# without having cost an attempt (a channel's limit, a pause) holds back nothing.
_CLAIM = """
WITH RECURSIVE mine AS MATERIALIZED (
    SELECT w.session_id, w.quota, w.floor, w.strangers, w.day, l.tenant_id
    FROM unnest($2::BIGINT[], $3::INT[], $4::INT[], $5::INT[], $6::DATE[]) AS w (session_id, quota, floor, strangers, day)
    JOIN et_session_leases l ON l.session_id = w.session_id
    JOIN et_tenants t ON t.id = l.tenant_id
    WHERE l.owner = $1
      AND l.expires_at > clock_timestamp()
      AND t.status = 'active'
      AND ($8::BIGINT IS NULL OR l.tenant_id = $8)
), steps AS (
    SELECT mine.session_id, first.lane, first.priority, 1 AS step
    FROM mine
    CROSS JOIN LATERAL (
        SELECT q.lane, q.priority
        FROM et_outbound_queue q
        WHERE q.channel_session_id = mine.session_id
          AND q.status = 'queued'
        ORDER BY q.lane DESC, q.priority DESC
        LIMIT 1
    ) first
    UNION ALL
    SELECT s.session_id, next.lane, next.priority, s.step + 1
    FROM steps s
    CROSS JOIN LATERAL (
        SELECT q.lane, q.priority
        FROM et_outbound_queue q
        WHERE q.channel_session_id = s.session_id
          AND q.status = 'queued'
          AND (q.lane, q.priority) < (s.lane, s.priority)
        ORDER BY q.lane DESC, q.priority DESC
        LIMIT 1
    ) next
    WHERE s.step < {steps}
), busy AS MATERIALIZED (
    SELECT b.thread_id
    FROM et_outbound_queue b
    WHERE b.status = 'dispatching'
      AND b.channel_session_id = ANY ($2::BIGINT[])
), due AS MATERIALIZED (
    SELECT d.id, d.lane, d.priority,
           row_number() OVER (PARTITION BY mine.tenant_id ORDER BY d.place, d.lane DESC, d.priority DESC, d.id) AS turn
    FROM mine
    CROSS JOIN LATERAL (
        SELECT c.id, c.lane, c.priority, c.next_attempt_at,
               row_number() OVER before AS place,
               sum((c.lane = 0)::INT) OVER before AS strangers
        FROM steps s
        CROSS JOIN LATERAL (
            SELECT r.id, s.lane, s.priority, r.next_attempt_at
            FROM (
                SELECT q.id, q.thread_id, q.send_at, q.next_attempt_at
                FROM et_outbound_queue q
                WHERE q.channel_session_id = mine.session_id
                  AND q.status = 'queued'
                  AND q.lane = s.lane
                  AND q.priority = s.priority
                  AND q.next_attempt_at <= now()
                ORDER BY q.next_attempt_at, q.id
                LIMIT {window}
            ) r
            WHERE r.send_at <= now()
              AND r.thread_id NOT IN (SELECT busy.thread_id FROM busy)
              -- A LIMIT, not EXISTS: that may be planned as one pass over all that waits, for every row.
              AND (
                  SELECT true
                  FROM et_outbound_queue b
                  WHERE b.thread_id = r.thread_id
                    AND b.status IN ('queued', 'dispatching') AND b.thread_id > 0
                    AND (b.send_at, b.id) < (r.send_at, r.id)
                    AND b.expires_at > now()
                    AND b.lane >= mine.floor
                    AND (b.status = 'queued') IS TRUE
                    AND (b.next_attempt_at <= now() OR b.retry_count > 0
                        OR (b.claim_epoch > 0 AND b.next_attempt_at <= now() + INTERVAL '1 minute'))
                  LIMIT 1
              ) IS NULL
            ORDER BY r.next_attempt_at, r.id
            LIMIT mine.quota
        ) c
        WHERE s.session_id = mine.session_id
          AND s.lane >= mine.floor
        WINDOW before AS (ORDER BY c.lane DESC, c.priority DESC, c.next_attempt_at, c.id ROWS UNBOUNDED PRECEDING)
    ) d
    WHERE d.place <= mine.quota
      AND d.strangers <= mine.strangers
), locked AS MATERIALIZED (
    SELECT q.id, a.automatic, q.claim_epoch = 0 AS untried,
           CASE
               WHEN q.expires_at <= now() THEN 'expired'
               -- 'closing': the reply that says so itself (opted out, a colleague will answer).
               WHEN m.raw_payload->>'closing' = 'true' THEN NULL
               WHEN l.opted_out_at IS NOT NULL AND coalesce(m.raw_payload->>'origin', '') <> ALL ({people})
                   THEN 'opted_out'
               WHEN t.handled_by = 'human' AND a.automatic THEN 'human_takeover'
           END AS stop,
           m.lead_id, m.message_type, m.content, m.media_url, m.raw_payload->'payload' AS payload, m.reply_to_message_id
    FROM (SELECT due.id FROM due ORDER BY due.turn, due.lane DESC, due.priority DESC, due.id LIMIT $7) p
    JOIN et_outbound_queue q ON q.id = p.id
    JOIN et_messages m ON m.id = q.message_id
    JOIN et_threads t ON t.id = m.thread_id
    JOIN et_leads l ON l.id = m.lead_id
    CROSS JOIN LATERAL (
        SELECT coalesce(q.dedupe_key LIKE 'reply:%', false)
            OR coalesce(m.raw_payload->>'origin', '') = ANY ({automatic}) AS automatic
    ) a
    WHERE (q.status = 'queued') IS TRUE  -- by its key
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
        updated_at = now(),
        error_code = k.stop,
        last_error = CASE k.stop WHEN 'expired' THEN {expired}
                                 WHEN 'opted_out' THEN 'this person has opted out of messages'
                                 WHEN 'human_takeover' THEN 'a person has taken this conversation over'
                                 ELSE q.last_error END
    FROM locked k
    WHERE q.id = k.id
    RETURNING q.id, q.tenant_id, q.channel_session_id, q.message_id, q.thread_id, q.channel, q.recipient, q.lane,
              q.status, q.claim_epoch, q.retry_count, q.next_attempt_at, q.priority, k.stop, k.automatic, k.untried,
              k.lead_id, k.message_type, k.content, k.media_url, k.payload, k.reply_to_message_id
), followed AS (
    UPDATE et_messages m
    SET delivery_status = v.status, updated_at = now()
    FROM moved v
    WHERE m.id = v.message_id
      AND m.delivery_status = 'queued'
), told AS (
    INSERT INTO et_events (tenant_id, kind, ref_id)
    SELECT v.tenant_id, 'status', v.message_id
    FROM moved v
), counted AS (
    INSERT INTO et_sending_days AS d (tenant_id, channel_session_id, day, strangers)
    SELECT v.tenant_id, v.channel_session_id, mine.day, count(*)
    FROM moved v
    JOIN mine ON mine.session_id = v.channel_session_id AND mine.day IS NOT NULL
    WHERE v.lane = 0 AND v.stop IS NULL AND v.untried
    GROUP BY 1, 2, 3
    ON CONFLICT (channel_session_id, day) DO UPDATE SET strangers = d.strangers + excluded.strangers
)
SELECT v.*,
       (SELECT pg_notify('et_events', '') FROM moved LIMIT 1) IS NULL AS hint,
       CASE WHEN v.recipient IS NULL AND v.stop IS NULL THEN (
           SELECT coalesce(i.chat_identifier, i.sender_identifier)
           FROM et_messages i
           WHERE i.thread_id = v.thread_id
             AND i.direction = 'inbound'
           ORDER BY i.occurred_at DESC, i.id DESC
           LIMIT 1
       ) END AS last_address,
       CASE WHEN v.recipient IS NULL AND v.stop IS NULL THEN (
           SELECT n.external_id
           FROM et_lead_identities n
           WHERE n.lead_id = v.lead_id
             AND split_part(n.external_id, ':', 1) IN (v.channel, v.channel || '-group', v.channel || '-lid')
           ORDER BY n.created_at DESC, length(split_part(n.external_id, ':', 1))
           LIMIT 1
       ) END AS identity,
       -- Whoever was no stranger when the row was put in is none now.
       v.lane = 0 AND (
           SELECT true
           FROM et_messages i
           WHERE i.tenant_id = v.tenant_id
             AND i.channel_session_id = v.channel_session_id
             AND i.lead_id = v.lead_id
             AND i.direction = 'inbound'
           LIMIT 1
       ) IS NULL AS first_contact,
       quoted.channel_message_id AS quoted_id, quoted.sender_identifier AS quoted_sender,
       quoted.content AS quoted_content, quoted.direction AS quoted_direction, quoted.raw_payload AS quoted_payload
FROM moved v
LEFT JOIN LATERAL (
    SELECT o.channel_message_id, o.sender_identifier, o.content, o.direction, o.raw_payload
    FROM et_messages o
    WHERE v.reply_to_message_id IS NOT NULL
      AND o.tenant_id = v.tenant_id
      AND o.channel_session_id = v.channel_session_id
      AND o.lead_id = v.lead_id
      AND o.channel_message_id = v.reply_to_message_id
    OFFSET 0  -- most messages quote nothing: then nothing is looked up
) quoted ON true
ORDER BY v.lane DESC, v.priority DESC, v.next_attempt_at, v.id
"""


def _array(values: Sequence[str]) -> str:
    return "ARRAY[" + ", ".join(f"'{value}'" for value in values) + "]"


_CLAIM = _CLAIM.format(
    window=WINDOW,
    steps=STEPS,
    people=_array(PEOPLE),
    automatic=_array(AUTOMATIC),
    expired=EXPIRED,
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
        [d.floor for d in due],
        [d.strangers for d in due],
        [d.day for d in due],
        limit,
        tenant_id,
    )
