"""Whose number is it: a session that was added without one gets it, or becomes part of the older session that has it.

Threads and messages stay with the older row. Nothing here knows files: who moves a session's folder reads `moves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.channel import SessionId
from core.errors import NotFound
from core.secrets import KeyRing
from core.store import credentials, leases
from core.store.audit import Conn


@dataclass(frozen=True, slots=True)
class Identified:
    """What a number that became known means: `same` and `named`, it is this session's now; `known`, an older session of
    this tenant has it and is not live; `live`, that one is connected and not ours to take."""

    outcome: Literal["same", "named", "known", "live"]
    session_id: SessionId


async def identify(conn: Conn, session_id: int, identifier: str) -> Identified:
    """Give a session its number unless another session of the tenant has it. Inside the caller's transaction; both rows
    stay locked until it ends. Raises NotFound."""
    row = await conn.fetchrow(
        """
        SELECT tenant_id, channel_type, session_identifier
        FROM et_channel_sessions
        WHERE id = $1
        FOR NO KEY UPDATE
        """,
        session_id,
    )
    if row is None:
        raise NotFound(f"session {session_id} does not exist any more")
    if row["session_identifier"] == identifier:
        return Identified("same", SessionId(session_id))
    older = await conn.fetchrow(
        """
        SELECT s.id, s.status, coalesce(l.expires_at > clock_timestamp(), false) AS held
        FROM et_channel_sessions s
        LEFT JOIN et_session_leases l ON l.session_id = s.id
        WHERE s.tenant_id = $1
          AND s.channel_type = $2
          AND s.session_identifier = $3
        FOR NO KEY UPDATE OF s
        """,
        row["tenant_id"],
        row["channel_type"],
        identifier,
    )
    if older is None:
        await conn.execute(
            "UPDATE et_channel_sessions SET session_identifier = $2 WHERE id = $1", session_id, identifier
        )
        return Identified("named", SessionId(session_id))
    live = older["held"] and older["status"] in ("active", "connecting")
    return Identified("live" if live else "known", SessionId(older["id"]))


async def adopt(conn: Conn, ring: KeyRing, old_id: int, new_id: int, owner: str, *, ttl: float) -> int:
    """A pending session becomes part of the older one with its number: threads and messages stay with the older row,
    wish, cursors and credentials move to it, the pending row goes. Inside the transaction that called `identify`.

    Returns the epoch of our lease on the surviving row.
    """
    tenant_id = await conn.fetchval("SELECT tenant_id FROM et_channel_sessions WHERE id = $1", old_id)
    epoch = await leases.seize(conn, owner, new_id, ttl=ttl)
    await _fold(conn, tenant_id, old_id, new_id)
    await credentials.move(conn, ring, tenant_id=tenant_id, old_id=old_id, new_id=new_id)
    await conn.execute("DELETE FROM et_channel_sessions WHERE id = $1", old_id)
    return epoch


async def _fold(conn: Conn, tenant_id: int, old_id: int, new_id: int) -> None:
    """Everything of a pending session becomes the surviving one's. It hardly ever has messages of its own."""
    ids = (old_id, new_id)
    await conn.execute(
        """
        UPDATE et_threads t
        SET status = 'archived'
        WHERE t.channel_session_id = $1
          AND t.status = 'active'
          AND EXISTS (
              SELECT
              FROM et_threads o
              WHERE o.tenant_id = t.tenant_id AND o.lead_id = t.lead_id
                AND o.channel_session_id = $2 AND o.status = 'active'
          )
        """,
        *ids,
    )
    await conn.execute(
        """
        DELETE FROM et_messages m
        WHERE m.channel_session_id = $1
          AND EXISTS (
              SELECT
              FROM et_messages o
              WHERE o.tenant_id = m.tenant_id AND o.channel_session_id = $2 AND o.lead_id = m.lead_id
                AND o.channel_message_id = m.channel_message_id
          )
        """,
        *ids,
    )
    for table in ("et_messages", "et_threads", "et_outbound_queue"):
        await conn.execute(
            f"UPDATE {table} SET channel_session_id = $2 WHERE channel_session_id = $1",  # noqa: S608
            *ids,
        )
    # The surviving row keeps its own name, workspace and settings; what the pairing was asked for wins.
    await conn.execute(
        """
        UPDATE et_channel_sessions s
        SET metadata = s.metadata || p.metadata, session_name = coalesce(s.session_name, p.session_name)
        FROM et_channel_sessions p
        WHERE p.id = $1
          AND s.id = $2
        """,
        *ids,
    )
    await conn.execute("DELETE FROM et_session_runtime WHERE session_id = $1", new_id)
    await conn.execute("UPDATE et_session_runtime SET session_id = $2 WHERE session_id = $1", *ids)
    await conn.execute("DELETE FROM et_session_cursors WHERE session_id = $1", new_id)
    await conn.execute("UPDATE et_session_cursors SET session_id = $2 WHERE session_id = $1", *ids)
    await conn.execute(
        "INSERT INTO et_session_moves (tenant_id, old_id, new_id) VALUES ($1, $2, $3)", tenant_id, *ids
    )
    await conn.execute("UPDATE et_session_moves SET new_id = $2 WHERE new_id = $1", *ids)


async def moves(conn: Conn, old_ids: Sequence[int]) -> dict[int, int]:
    """Which of these sessions became part of which, whatever their tenant: for folders that were left behind."""
    rows = await conn.fetch(
        "SELECT old_id, new_id FROM et_session_moves WHERE old_id = ANY ($1::BIGINT[])", list(old_ids)
    )
    return {row["old_id"]: row["new_id"] for row in rows}


async def survivor(conn: Conn, tenant_id: int, session_id: int) -> SessionId | None:
    """The session that a pending one became part of, when its number turned out to be known."""
    found = await conn.fetchval(
        "SELECT new_id FROM et_session_moves WHERE tenant_id = $1 AND old_id = $2", tenant_id, session_id
    )
    return None if found is None else SessionId(found)
