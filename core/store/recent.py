"""The latest messages of a whole tenant, as a person watches them come in. Reads only; runs as the API's role."""

from __future__ import annotations

from asyncpg import Record

from core.store.audit import Conn


async def messages(conn: Conn, tenant_id: int, *, limit: int) -> list[Record]:
    """Newest first, without imported history; texts are cut at 300 characters.

    There is no index over a tenant's messages by time, and none is needed: the newest `limit` messages stand in the
    `limit` threads that were active last, among the newest `limit` of each.
    """
    return await conn.fetch(
        """
        SELECT m.id, m.thread_id, m.channel, m.occurred_at, m.direction, m.role, m.message_type, m.sender_identifier,
               m.chat_identifier, left(m.content, 300) AS content, m.media_metadata, m.delivery_status,
               m.raw_payload ->> 'origin' AS origin, q.status AS queue_status, q.error_code, q.last_error,
               d.label AS decision_label, d.action AS decision_action, d.reason AS decision_reason,
               l.name AS lead_name, l.external_id AS lead_external_id, l.kind AS lead_kind,
               s.session_name, s.session_identifier
        FROM (
            SELECT t.id
            FROM et_threads t
            WHERE t.tenant_id = $1
              AND t.recent_at > '-infinity'
            ORDER BY t.recent_at DESC, t.last_message_at DESC, t.id DESC
            LIMIT $2
        ) busy
        CROSS JOIN LATERAL (
            SELECT *
            FROM et_messages x
            WHERE x.tenant_id = $1
              AND x.thread_id = busy.id
              AND NOT x.is_history
            ORDER BY x.occurred_at DESC, x.id DESC
            LIMIT $2
        ) m
        JOIN et_leads l ON l.tenant_id = m.tenant_id AND l.id = m.lead_id
        JOIN et_channel_sessions s ON s.tenant_id = m.tenant_id AND s.id = m.channel_session_id
        LEFT JOIN et_outbound_queue q ON q.tenant_id = m.tenant_id AND q.message_id = m.id
        LEFT JOIN et_decisions d ON d.tenant_id = m.tenant_id AND d.message_id = m.id
        ORDER BY m.occurred_at DESC, m.id DESC
        LIMIT $2
        """,
        tenant_id,
        limit,
    )
