"""What `/health` and `/metrics` say of the database: sessions with their owners, the queue by status, what may be lost.
Across tenants."""

from __future__ import annotations

from asyncpg import Record

from core.store.audit import Conn


async def sessions(conn: Conn, tenant_id: int | None, limit: int) -> list[Record]:
    """Sessions somebody wants connected, or that are: with status and owner. `tenant_id` None: everybody's."""
    return await conn.fetch(
        """
        SELECT s.id AS session_id, s.tenant_id, s.channel_type, s.status, s.status_reason,
               coalesce(r.wanted, 'disconnected') AS wanted,
               CASE WHEN l.expires_at > clock_timestamp() THEN l.owner END AS owner
        FROM et_channel_sessions s
        LEFT JOIN et_session_runtime r ON r.session_id = s.id
        LEFT JOIN et_session_leases l ON l.session_id = s.id
        WHERE ($1::bigint IS NULL OR s.tenant_id = $1)
          AND (r.wanted = 'connected' OR s.status IN ('active', 'connecting'))
        ORDER BY s.id
        LIMIT $2
        """,
        tenant_id,
        limit,
    )


async def queue(conn: Conn, tenant_id: int | None) -> dict[str, int]:
    """Rows that are not done, by status. The partial indexes hold exactly these."""
    row = await conn.fetchrow(
        """
        SELECT count(*) FILTER (WHERE status = 'queued') AS queued,
               count(*) FILTER (WHERE status = 'dispatching') AS dispatching,
               count(*) FILTER (WHERE status = 'unknown') AS unknown
        FROM et_outbound_queue
        WHERE ($1::bigint IS NULL OR tenant_id = $1)
          AND status IN ('queued', 'dispatching', 'unknown')
        """,
        tenant_id,
    )
    assert row is not None
    return dict(row)


async def possible_loss(
    conn: Conn, tenant_id: int | None, session_id: int | None = None
) -> dict[tuple[int, int], int]:
    """By tenant and session: inbound messages of the last day that could not be read and that nobody has sent again yet."""
    # A call that rings is a placeholder, too, until it ends.
    rows = await conn.fetch(
        """
        SELECT tenant_id, channel_session_id, count(*) AS messages
        FROM et_messages
        WHERE placeholder
          AND direction = 'inbound'
          AND NOT is_history
          AND created_at > now() - INTERVAL '1 day'
          AND media_metadata->>'call' IS NULL
          AND ($1::bigint IS NULL OR tenant_id = $1)
          AND ($2::bigint IS NULL OR channel_session_id = $2)
        GROUP BY tenant_id, channel_session_id
        """,
        tenant_id,
        session_id,
    )
    return {(row["tenant_id"], row["channel_session_id"]): row["messages"] for row in rows}
