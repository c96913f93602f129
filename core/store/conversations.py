"""Looking up what was said, for channels whose messages name each other. Reads only."""

from __future__ import annotations

from collections.abc import Sequence

from asyncpg import Record

from core.store.audit import Conn


async def written(
    conn: Conn, tenant_id: int, session_id: int, channel_message_ids: Sequence[str]
) -> list[Record]:
    """Messages this session sent, by the channel's ids: id, the lead they are in, and the payload they were made from."""
    return await conn.fetch(
        """
        SELECT m.channel_message_id, l.external_id, l.kind, m.raw_payload->'payload' AS payload
        FROM et_messages m
        JOIN et_leads l ON l.id = m.lead_id
        WHERE m.channel_session_id = $2
          AND m.channel_message_id = ANY ($3::TEXT[])
          AND m.tenant_id = $1
          AND m.direction = 'outbound'
        """,
        tenant_id,
        session_id,
        list(channel_message_ids),
    )


async def last_said(conn: Conn, tenant_id: int, message_id: int) -> Record | None:
    """The newest inbound message of the thread that an outbound message stands in, if there is one."""
    return await conn.fetchrow(
        """
        SELECT i.channel_message_id, i.sender_identifier, i.content, i.raw_payload
        FROM et_messages m
        JOIN et_messages i ON i.tenant_id = m.tenant_id AND i.thread_id = m.thread_id AND i.direction = 'inbound'
        WHERE m.id = $2
          AND m.tenant_id = $1
          AND i.role = 'user'
        ORDER BY i.occurred_at DESC, i.id DESC
        LIMIT 1
        """,
        tenant_id,
        message_id,
    )
