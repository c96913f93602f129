"""Leases on sessions and the gateways that hold them. Every time in here is the database's.

A lease is a row; who holds it may send. Inbound messages are never fenced by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from asyncpg import Record

from core.channel import SessionId
from core.store.audit import Conn


@dataclass(frozen=True, slots=True)
class Bid:
    """A session we would take."""

    session_id: SessionId
    files: str | None = None
    """The id of our data folder when the session lives in files: it must be the one the session's row names."""


async def beat(conn: Conn, owner: str, host: str, data_dir_id: str) -> None:
    """Say that this gateway lives."""
    await conn.execute(
        """
        INSERT INTO et_gateways AS g (owner, host, data_dir_id)
        VALUES ($1, $2, $3)
        ON CONFLICT (owner) DO UPDATE SET heartbeat_at = clock_timestamp()
        """,
        owner,
        host,
        data_dir_id,
    )


async def forget_gateway(conn: Conn, owner: str) -> None:
    """It has stopped, or is proven dead: its leases are free (their rows stay, so that the epochs go on growing) and its
    claims may be resolved."""
    await conn.execute(
        """
        UPDATE et_session_leases
        SET expires_at = clock_timestamp() - INTERVAL '1 second'
        WHERE owner = $1
          AND expires_at > clock_timestamp()
        """,
        owner,
    )
    await conn.execute("DELETE FROM et_gateways WHERE owner = $1", owner)


async def forget_silent(conn: Conn, *, seconds: float) -> None:
    """Rows of gateways that ended long ago without a word."""
    await conn.execute(
        "DELETE FROM et_gateways WHERE heartbeat_at < clock_timestamp() - make_interval(secs => $1)", seconds
    )


async def neighbours(conn: Conn, owner: str, data_dir_id: str) -> list[str]:
    """Other owners that share our data folder, so that their lock file tells whether they live."""
    rows = await conn.fetch(
        "SELECT owner FROM et_gateways WHERE data_dir_id = $2 AND owner <> $1", owner, data_dir_id
    )
    return [row["owner"] for row in rows]


async def take(conn: Conn, owner: str, bids: Sequence[Bid], *, ttl: float) -> dict[SessionId, int]:
    """Take what is free or has run out; returns epoch by session. Each take raises the epoch: the epoch of a session
    never repeats while its row stands, so it is kept when a lease is given up."""
    if not bids:
        return {}
    # A session that lives in files is bound to the first folder that takes it.
    await conn.execute(
        """
        UPDATE et_session_runtime r
        SET data_dir_id = b.files
        FROM unnest($1::BIGINT[], $2::TEXT[]) AS b (session_id, files)
        WHERE r.session_id = b.session_id
          AND b.files IS NOT NULL
          AND r.data_dir_id IS NULL
        """,
        [b.session_id for b in bids],
        [b.files for b in bids],
    )
    rows = await conn.fetch(
        """
        INSERT INTO et_session_leases AS l (session_id, tenant_id, owner, expires_at)
        SELECT s.id, s.tenant_id, $1, clock_timestamp() + make_interval(secs => $4)
        FROM unnest($2::BIGINT[], $3::TEXT[]) AS b (session_id, files)
        JOIN et_channel_sessions s ON s.id = b.session_id
        JOIN et_session_runtime r ON r.session_id = s.id
        WHERE b.files IS NULL OR r.data_dir_id = b.files
        ORDER BY s.id
        ON CONFLICT (session_id) DO UPDATE
        SET owner = excluded.owner,
            epoch = l.epoch + 1,
            expires_at = excluded.expires_at,
            acquired_at = clock_timestamp()
        WHERE l.expires_at <= clock_timestamp()
        RETURNING l.session_id, l.epoch
        """,
        owner,
        [b.session_id for b in bids],
        [b.files for b in bids],
        ttl,
    )
    return {SessionId(row["session_id"]): row["epoch"] for row in rows}


async def seize(conn: Conn, owner: str, session_id: int, *, ttl: float) -> int:
    """Take one whoever holds it: for the surviving row of a pairing, whose old device is not live."""
    epoch = await conn.fetchval(
        """
        INSERT INTO et_session_leases AS l (session_id, tenant_id, owner, expires_at)
        SELECT s.id, s.tenant_id, $1, clock_timestamp() + make_interval(secs => $3)
        FROM et_channel_sessions s
        WHERE s.id = $2
        ON CONFLICT (session_id) DO UPDATE
        SET owner = excluded.owner, epoch = l.epoch + 1, expires_at = excluded.expires_at,
            acquired_at = clock_timestamp()
        RETURNING l.epoch
        """,
        owner,
        session_id,
        ttl,
    )
    return int(epoch)


async def renew(conn: Conn, owner: str, held: dict[SessionId, int], *, ttl: float) -> frozenset[SessionId]:
    """Those that are still ours, by owner and epoch. One that ran out and that nobody took is ours again."""
    rows = await conn.fetch(
        """
        UPDATE et_session_leases l
        SET expires_at = clock_timestamp() + make_interval(secs => $4)
        FROM unnest($2::BIGINT[], $3::BIGINT[]) AS h (session_id, epoch)
        WHERE l.session_id = h.session_id
          AND l.epoch = h.epoch
          AND l.owner = $1
        RETURNING l.session_id
        """,
        owner,
        list(held),
        list(held.values()),
        ttl,
    )
    return frozenset(SessionId(row["session_id"]) for row in rows)


async def give_up(conn: Conn, owner: str, sessions: Collection[int]) -> None:
    """Free at once for the next one; the row stays, so that its epoch goes on growing."""
    await conn.execute(
        """
        UPDATE et_session_leases
        SET expires_at = clock_timestamp() - INTERVAL '1 second'
        WHERE owner = $1
          AND session_id = ANY ($2::BIGINT[])
          AND expires_at > clock_timestamp()
        """,
        owner,
        list(sessions),
    )


async def holder(conn: Conn, session_id: int) -> str | None:
    """Who holds it now, for `/health` and messages."""
    owner: str | None = await conn.fetchval(
        "SELECT owner FROM et_session_leases WHERE session_id = $1 AND expires_at > clock_timestamp()",
        session_id,
    )
    return owner


async def holders(conn: Conn, tenant_id: int) -> dict[int, str]:
    """Who holds which of the tenant's sessions now."""
    rows = await conn.fetch(
        "SELECT session_id, owner FROM et_session_leases WHERE tenant_id = $1 AND expires_at > clock_timestamp()",
        tenant_id,
    )
    return {row["session_id"]: row["owner"] for row in rows}


async def gateways(conn: Conn, *, alive_seconds: float) -> list[Record]:
    """Every gateway that has said anything lately, with how many sessions it holds: of all tenants, and so only as worker.

    One that was stopped has no row; one that died keeps its row, and is not `alive`, until it is found dead."""
    return await conn.fetch(
        """
        SELECT g.owner, g.host, g.started_at, g.heartbeat_at,
               g.heartbeat_at > clock_timestamp() - make_interval(secs => $1) AS alive,
               count(l.session_id) AS sessions
        FROM et_gateways g
        LEFT JOIN et_session_leases l ON l.owner = g.owner AND l.expires_at > clock_timestamp()
        GROUP BY g.owner
        ORDER BY g.started_at, g.owner
        """,
        alive_seconds,
    )
