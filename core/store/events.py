"""Reading the event log in an order nothing can slip into: by transaction, and only below the oldest one still running.

Only reads, but for pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncpg import Record

from core.store.audit import Conn

KEPT_HOURS = 24


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the log; everything after it is still to be read."""

    xid: int
    id: int


async def now_position(conn: Conn) -> Position:
    """Where a stream starts that wants only what comes."""
    xid = await conn.fetchval("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
    assert isinstance(xid, int)
    return Position(xid, -1)


async def after(conn: Conn, positions: Mapping[int, Position], *, limit: int) -> list[Record]:
    """Up to `limit` events of each tenant behind its position, in order, with what they are about.

    `settled` is false from the first one on that a running transaction might still precede: read those again later.
    """
    return await conn.fetch(
        """
        WITH horizon AS MATERIALIZED (
            SELECT pg_snapshot_xmin(pg_current_snapshot()) AS xmin
        )
        SELECT e.xid::text::bigint AS xid, e.id, e.tenant_id, e.kind, e.ref_id, e.created_at,
               e.xid < horizon.xmin AS settled,
               coalesce(m.thread_id, d.thread_id, i.thread_id) AS thread_id,
               coalesce(m.lead_id, i.lead_id) AS lead_id,
               coalesce(m.channel_session_id, s.id) AS session_id,
               coalesce(d.message_id, m.id) AS message_id,
               m.direction, m.message_type, m.delivery_status,
               d.action, coalesce(d.label, i.label) AS label,
               s.status AS session_status, s.status_reason AS session_reason
        FROM horizon
        CROSS JOIN unnest($1::bigint[], $2::text[], $3::bigint[]) AS p (tenant_id, xid, id)
        CROSS JOIN LATERAL (
            SELECT v.*
            FROM et_events v
            WHERE v.tenant_id = p.tenant_id
              AND (v.xid, v.id) > (p.xid::xid8, p.id)
            ORDER BY v.xid, v.id
            LIMIT $4
        ) e
        LEFT JOIN et_messages m ON e.kind IN ('message', 'status') AND m.id = e.ref_id AND m.tenant_id = e.tenant_id
        LEFT JOIN et_decisions d ON e.kind = 'decision' AND d.id = e.ref_id AND d.tenant_id = e.tenant_id
        LEFT JOIN et_thread_insights i ON e.kind = 'insight' AND i.id = e.ref_id AND i.tenant_id = e.tenant_id
        LEFT JOIN et_channel_sessions s ON e.kind = 'session' AND s.id = e.ref_id AND s.tenant_id = e.tenant_id
        ORDER BY e.tenant_id, e.xid, e.id
        """,
        list(positions),
        [str(position.xid) for position in positions.values()],
        [position.id for position in positions.values()],
        limit,
    )


async def prune(conn: Conn) -> int:
    """Forget what is older than a day. Any gateway may; twice does no harm."""
    gone = await conn.fetchval("SELECT et_prune_events(make_interval(hours => $1))", KEPT_HOURS)
    assert isinstance(gone, int)
    return gone
