"""Channel sessions and what is wanted of them. The API and the session manager meet in these rows only.

A wish is a row (`want`), the owner of the session acts on it, and says in rows what came of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import asyncpg
from asyncpg import Record

from core.channel import Json, SessionId, SessionState, SessionStatus, TenantId
from core.errors import Conflict, NotFound
from core.store.audit import Conn

Wanted = Literal["connected", "disconnected", "deleted"]
PENDING = "pending:"
ORPHANED = "gateway_gone"

ACTIONS = {
    "qr_timeout": "ask for a new QR code and scan it within a minute",
    "logged_out_by_phone": "pair the number again: its phone has logged this device out",
    "wrong_number": "pair again with the number that was expected",
    "already_live": "nothing: this number is connected under another session",
    "stream_replaced": "end the other program that uses this session, then connect",
    "temporary_ban": "wait until the ban has passed and send less; do not pair again",
    "client_outdated": "update the gateway",
    "auth_failed": "check the credentials and enter them again",
    "secret_key_missing": "put the missing key back into SECRET_KEYS, or enter the credentials again",
    "secret_damaged": "enter the credentials again",
    "unknown_channel": "start a gateway that has this channel",
}
"""What a person must do, by `status_reason`, where the channel says nothing better."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session with what its owner says about it."""

    id: SessionId
    tenant_id: TenantId
    channel_type: str
    identifier: str
    name: str | None
    status: SessionStatus
    status_reason: str | None
    metadata: Json
    created_at: datetime
    updated_at: datetime
    last_connected_at: datetime | None
    wanted: Wanted
    wanted_at: datetime | None
    login_method: str | None
    login_phone: str | None
    qr: str | None
    qr_expires_at: datetime | None
    pairing_code: str | None
    pairing_code_expires_at: datetime | None
    pairing_state: str | None
    pairing_reason: str | None
    generation: int
    """Grows with every change of the wish, the QR or the code."""
    data_dir_id: str | None
    action: str | None
    """What a person must do now, or None."""

    @property
    def pending(self) -> bool:
        """Its number is not known yet."""
        return self.identifier.startswith(PENDING)


_COLUMNS = """
    s.id, s.tenant_id, s.channel_type, s.session_identifier, s.session_name, s.status, s.status_reason, s.metadata,
    s.created_at, s.updated_at, s.last_connected_at,
    coalesce(r.wanted, 'disconnected') AS wanted, r.wanted_at, r.login_method, r.login_phone, r.qr, r.qr_expires_at,
    r.pairing_code, r.pairing_code_expires_at, r.pairing_state, r.pairing_reason,
    coalesce(r.generation, 0) AS generation, r.data_dir_id, r.action
"""
_FROM = "FROM et_channel_sessions s LEFT JOIN et_session_runtime r ON r.session_id = s.id"


def _row(row: Record) -> SessionRow:
    reason = row["status_reason"]
    return SessionRow(
        id=SessionId(row["id"]),
        tenant_id=TenantId(row["tenant_id"]),
        channel_type=row["channel_type"],
        identifier=row["session_identifier"],
        name=row["session_name"],
        status=SessionStatus(row["status"]),
        status_reason=reason,
        metadata=row["metadata"] or {},
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        last_connected_at=row["last_connected_at"],
        wanted=row["wanted"],
        wanted_at=row["wanted_at"],
        login_method=row["login_method"],
        login_phone=row["login_phone"],
        qr=row["qr"],
        qr_expires_at=row["qr_expires_at"],
        pairing_code=row["pairing_code"],
        pairing_code_expires_at=row["pairing_code_expires_at"],
        pairing_state=row["pairing_state"],
        pairing_reason=row["pairing_reason"],
        generation=row["generation"],
        data_dir_id=row["data_dir_id"],
        action=row["action"] or ACTIONS.get(reason or ""),
    )


# --- what the API does


async def create(
    conn: Conn,
    tenant_id: int,
    channel_type: str,
    *,
    name: str | None = None,
    identifier: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    status: SessionStatus = SessionStatus.DISCONNECTED,
) -> SessionRow:
    """Add a session; it is not started. Without an `identifier` it is `pending:<uuid>` until a number is known.

    Raises Conflict when the tenant has a session with this identifier.
    """
    try:
        session_id = await conn.fetchval(
            """
            INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, session_name, metadata, status)
            VALUES ($1, $2, coalesce($3, 'pending:' || gen_random_uuid()), $4, $5, $6)
            RETURNING id
            """,
            tenant_id,
            channel_type,
            identifier,
            name,
            dict(metadata or {}),
            status.value,
        )
    except asyncpg.UniqueViolationError:
        raise Conflict(f"this tenant already has a {channel_type} session for {identifier}") from None
    await conn.execute(
        "INSERT INTO et_session_runtime (session_id, tenant_id) VALUES ($1, $2)", session_id, tenant_id
    )
    return await get(conn, tenant_id, session_id)


async def list_all(conn: Conn, tenant_id: int) -> list[SessionRow]:
    rows = await conn.fetch(f"SELECT {_COLUMNS} {_FROM} WHERE s.tenant_id = $1 ORDER BY s.id", tenant_id)
    return [_row(row) for row in rows]


async def get(conn: Conn, tenant_id: int, session_id: int) -> SessionRow:
    """Raises NotFound."""
    row = await conn.fetchrow(
        f"SELECT {_COLUMNS} {_FROM} WHERE s.tenant_id = $1 AND s.id = $2",
        tenant_id,
        session_id,
    )
    if row is None:
        raise NotFound(f"session {session_id} does not exist")
    return _row(row)


async def find(conn: Conn, session_id: int) -> SessionRow:
    """One session, whosever it is: for the person who runs the server. Raises NotFound."""
    row = await conn.fetchrow(f"SELECT {_COLUMNS} {_FROM} WHERE s.id = $1", session_id)
    if row is None:
        raise NotFound(f"session {session_id} does not exist")
    return _row(row)


async def by_identifier(conn: Conn, tenant_id: int, channel_type: str, identifier: str) -> SessionRow | None:
    """The tenant's session with this address; its row stays locked until the transaction ends."""
    row = await conn.fetchrow(
        f"""
        SELECT {_COLUMNS} {_FROM}
        WHERE s.tenant_id = $1
          AND s.channel_type = $2
          AND s.session_identifier = $3
        FOR NO KEY UPDATE OF s
        """,
        tenant_id,
        channel_type,
        identifier,
    )
    return None if row is None else _row(row)


async def patch(
    conn: Conn,
    tenant_id: int,
    session_id: int,
    *,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> SessionRow:
    """Change the name, merge `metadata` over what is there (a None removes the key). Raises NotFound."""
    await conn.execute(
        """
        UPDATE et_channel_sessions
        SET session_name = coalesce($3, session_name),
            metadata = jsonb_strip_nulls(metadata || $4::JSONB)
        WHERE tenant_id = $1
          AND id = $2
        """,
        tenant_id,
        session_id,
        name,
        dict(metadata or {}),
    )
    return await get(conn, tenant_id, session_id)


async def want(
    conn: Conn,
    session_id: int,
    wanted: Wanted,
    *,
    login_method: Literal["qr", "code"] | None = None,
    phone: str | None = None,
) -> None:
    """Write down what a person wants; the owner acts within a second or so. `login_method` starts a pairing.

    `deleted` is for good: log out on the channel, forget keys and credentials, keep the messages; any gateway that may
    take the session does it. Raises NotFound.
    """
    done = await conn.fetchval(
        """
        INSERT INTO et_session_runtime AS r (session_id, tenant_id, wanted, login_method, login_phone, generation)
        SELECT s.id, s.tenant_id, $2, $3, $4, 1
        FROM et_channel_sessions s
        WHERE s.id = $1
        ON CONFLICT (session_id) DO UPDATE
        SET wanted = excluded.wanted,
            wanted_at = clock_timestamp(),
            login_method = excluded.login_method,
            login_phone = excluded.login_phone,
            pairing_state = CASE WHEN excluded.login_method IS NULL THEN r.pairing_state END,
            pairing_reason = CASE WHEN excluded.login_method IS NULL THEN r.pairing_reason END,
            qr = CASE WHEN excluded.wanted = 'connected' AND excluded.login_method = 'qr' AND r.qr_expires_at > now()
                      THEN r.qr END,
            pairing_code = NULL,
            pairing_code_expires_at = NULL,
            generation = r.generation + 1
        RETURNING r.session_id
        """,
        session_id,
        wanted,
        login_method,
        phone,
    )
    if done is None:
        raise NotFound(f"session {session_id} does not exist")


# --- what the owner does


async def all_wanted(
    conn: Conn, held: Sequence[int], kinds: Sequence[str]
) -> list[tuple[SessionRow, str | None]]:
    """Sessions of these channels that should run or be ended, and those we hold, each with its live lease's owner."""
    rows = await conn.fetch(
        f"""
        SELECT {_COLUMNS}, CASE WHEN l.expires_at > clock_timestamp() THEN l.owner END AS owner
        {_FROM}
        LEFT JOIN et_session_leases l ON l.session_id = s.id
        WHERE (r.wanted IN ('connected', 'deleted') AND s.channel_type = ANY ($2::TEXT[]))
           OR s.id = ANY ($1::BIGINT[])
        ORDER BY s.id
        """,
        list(held),
        list(kinds),
    )
    return [(_row(row), row["owner"]) for row in rows]


async def write_state(conn: Conn, session_id: int, state: SessionState) -> None:
    """Where the session stands. A row that already says so is left alone: every change is an event.

    `last_connected_at` is the last moment at which it was active.
    """
    await conn.execute(
        """
        UPDATE et_channel_sessions
        SET status = $2,
            status_reason = $3,
            session_name = coalesce(session_name, $4),
            last_connected_at = CASE WHEN $2 = 'active' OR status = 'active' THEN clock_timestamp()
                                     ELSE last_connected_at END
        WHERE id = $1
          AND (status, coalesce(status_reason, '')) IS DISTINCT FROM ($2, coalesce($3, ''))
        """,
        session_id,
        state.status.value,
        state.reason,
        state.name,
    )
    await conn.execute(
        "UPDATE et_session_runtime SET action = $2 WHERE session_id = $1 AND action IS DISTINCT FROM $2",
        session_id,
        state.action,
    )


async def show_pairing(
    conn: Conn,
    session_id: int,
    state: Literal["qr", "code", "paired", "timeout", "failed"],
    *,
    qr: str | None = None,
    code: str | None = None,
    expires_at: datetime | None = None,
    reason: str | None = None,
    stop: bool = False,
) -> None:
    """A step of a pairing. `stop`: the wish is withdrawn too, so that nobody starts over by itself."""
    await conn.execute(
        """
        UPDATE et_session_runtime
        SET pairing_state = $2,
            pairing_reason = $6,
            qr = $3,
            qr_expires_at = CASE WHEN $3::TEXT IS NULL THEN NULL ELSE $5::TIMESTAMPTZ END,
            pairing_code = $4,
            pairing_code_expires_at = CASE WHEN $4::TEXT IS NULL THEN NULL ELSE $5::TIMESTAMPTZ END,
            wanted = CASE WHEN $7 AND wanted = 'connected' THEN 'disconnected' ELSE wanted END,
            login_method = CASE WHEN $2 IN ('qr', 'code') THEN login_method END,
            login_phone = CASE WHEN $2 IN ('qr', 'code') THEN login_phone END,
            generation = generation + 1
        WHERE session_id = $1
        """,
        session_id,
        state,
        qr,
        code,
        expires_at,
        reason,
        stop,
    )


async def finish_delete(conn: Conn, session_id: int) -> None:
    """The session is logged out and forgotten; its messages stay, and the number may be paired again later."""
    await conn.execute("DELETE FROM et_session_credentials WHERE session_id = $1", session_id)
    await conn.execute("DELETE FROM et_session_cursors WHERE session_id = $1", session_id)
    await conn.execute(
        """
        UPDATE et_session_runtime
        SET wanted = 'disconnected', data_dir_id = NULL, qr = NULL, qr_expires_at = NULL, pairing_code = NULL,
            pairing_code_expires_at = NULL, login_method = NULL, login_phone = NULL, pairing_state = NULL,
            pairing_reason = NULL, action = NULL, generation = generation + 1
        WHERE session_id = $1
        """,
        session_id,
    )
    await write_state(conn, session_id, SessionState(SessionStatus.LOGGED_OUT, "deleted"))


async def mark_orphans(conn: Conn) -> int:
    """Sessions that say they are connected although the gateway that had them is gone and nobody has taken over."""
    status = await conn.execute(
        """
        UPDATE et_channel_sessions s
        SET status = 'disconnected', status_reason = $1
        FROM et_session_leases l
        WHERE l.session_id = s.id
          AND l.expires_at < clock_timestamp() - INTERVAL '5 seconds'
          AND s.status IN ('active', 'connecting')
        """,
        ORPHANED,
    )
    return int(status.rpartition(" ")[2])
