"""Texts a channel sends by itself (after a declined call): into the queue at most once per person and time."""

from __future__ import annotations

from datetime import timedelta

from core.store.audit import Conn


async def enqueue_once(
    conn: Conn,
    tenant_id: int,
    session_id: int,
    recipient: str,
    text: str,
    *,
    purpose: str,
    every: timedelta,
) -> bool:
    """Whether it was queued now. `recipient`: an external id. In the caller's transaction.

    The lock makes two calls of one person at the same moment wait for each other; it goes with the transaction.
    """
    await conn.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('et_automatic_reply ' || $1 || ' ' || $2, $3))",
        purpose,
        recipient,
        tenant_id,
    )
    row = await conn.fetchrow(
        """
        SELECT e.message_id
        FROM (
            SELECT NOT EXISTS (
                SELECT 1
                FROM et_messages m
                JOIN et_lead_identities i ON i.tenant_id = m.tenant_id AND i.lead_id = m.lead_id
                WHERE i.tenant_id = $1
                  AND i.external_id = $3
                  AND m.tenant_id = $1
                  AND m.channel_session_id = $2
                  AND m.direction = 'outbound'
                  AND m.occurred_at > now() - $6::interval
                  AND m.raw_payload ->> 'automatic' = $5
            ) AS due
        ) d
        CROSS JOIN LATERAL et_enqueue_outbound(
            tenant_id => $1,
            channel_session_id => $2,
            recipient => $3,
            content => $4,
            raw_payload => jsonb_build_object('origin', 'system', 'automatic', $5::text)
        ) e
        WHERE d.due
        """,
        tenant_id,
        session_id,
        recipient,
        text,
        purpose,
        every,
    )
    return row is not None
