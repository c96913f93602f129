"""What pacing remembers: how many strangers a session wrote to on which day, and until when its channel refuses them.

Also the rows that wait for it: they are moved to the time they will go, with the reason in `error_code` and `last_error`.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from asyncpg import Record

from core.store.audit import Conn

FIRST_CONTACTS, QUIET_HOURS = "first_contacts_used_up", "quiet_hours"
"""`error_code` of rows that wait for tomorrow, and for the morning."""


async def load(conn: Conn, sessions: Collection[int]) -> list[Record]:
    """Settings, time zone, counts and holds of these sessions. `recent`: by day, the last three; `days`: on how many there
    were any at all."""
    return await conn.fetch(
        """
        SELECT s.id, s.tenant_id, s.channel_type, s.metadata -> 'settings' -> 'sending' AS sending,
               w.timezone, d.recent, d.days, h.code, h.detail,
               extract(epoch FROM h.until - clock_timestamp())::FLOAT8 AS held_seconds
        FROM et_channel_sessions s
        LEFT JOIN et_workspaces w ON w.tenant_id = s.tenant_id
                                 AND w.id = CASE WHEN s.metadata ->> 'default_workspace_id' ~ '^[0-9]{1,18}$'
                                                 THEN (s.metadata ->> 'default_workspace_id')::BIGINT END
        CROSS JOIN LATERAL (
            SELECT coalesce(jsonb_object_agg(x.day, x.strangers) FILTER (WHERE x.back <= 3), '{}') AS recent,
                   count(*)::INT AS days
            FROM (
                SELECT c.day, c.strangers, row_number() OVER (ORDER BY c.day DESC) AS back
                FROM et_sending_days c
                WHERE c.channel_session_id = s.id
            ) x
        ) d
        LEFT JOIN et_sending_holds h ON h.channel_session_id = s.id AND h.until > clock_timestamp()
        WHERE s.id = ANY ($1::BIGINT[])
        """,
        list(sessions),
    )


async def hold(
    conn: Conn, *, tenant_id: int, session_id: int, seconds: float, code: str, detail: str
) -> None:
    """The channel takes no strangers for so long. A longer hold stays."""
    await conn.execute(
        """
        INSERT INTO et_sending_holds AS h (tenant_id, channel_session_id, until, code, detail)
        SELECT s.tenant_id, s.id, clock_timestamp() + make_interval(secs => $3), $4, $5
        FROM et_channel_sessions s
        WHERE s.tenant_id = $1 AND s.id = $2
        ON CONFLICT (channel_session_id) DO UPDATE
        SET until = excluded.until, code = excluded.code, detail = excluded.detail
        WHERE h.until < excluded.until
        """,
        tenant_id,
        session_id,
        seconds,
        code,
        detail,
    )


async def put_off(
    conn: Conn, session_id: int, *, lane: int, until: datetime, code: str, detail: str, limit: int = 1000
) -> int:
    """Move due rows of these lanes (up to and with `lane`) to `until`, saying why. Returns how many; as many as `limit`:
    there may be more."""
    status = await conn.execute(
        """
        UPDATE et_outbound_queue q
        SET next_attempt_at = $3, error_code = $4, last_error = $5, updated_at = now()
        FROM (
            SELECT x.id
            FROM et_outbound_queue x
            WHERE x.channel_session_id = $1
              AND x.status = 'queued'
              AND x.lane <= $2
              AND x.next_attempt_at <= now()
            ORDER BY x.lane DESC, x.priority DESC, x.next_attempt_at, x.id
            LIMIT $6
            FOR UPDATE SKIP LOCKED
        ) late
        WHERE q.id = late.id
        """,
        session_id,
        lane,
        until,
        code,
        detail,
        limit,
    )
    return int(status.rpartition(" ")[2])


async def bring_back(conn: Conn, session_id: int, *, codes: Collection[str], limit: int = 5000) -> int:
    """Rows that were put off for a reason that is none any more are due again."""
    status = await conn.execute(
        """
        UPDATE et_outbound_queue q
        SET next_attempt_at = greatest(now(), q.send_at), error_code = NULL, last_error = NULL, updated_at = now()
        FROM (
            SELECT x.id
            FROM et_outbound_queue x
            WHERE x.channel_session_id = $1
              AND x.status = 'queued'
              AND x.lane <= 1
              AND x.next_attempt_at > now()
              AND x.error_code = ANY ($2::TEXT[])
            LIMIT $3
            FOR UPDATE SKIP LOCKED
        ) held
        WHERE q.id = held.id
        """,
        session_id,
        list(codes),
        limit,
    )
    return int(status.rpartition(" ")[2])
