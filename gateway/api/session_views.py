"""How a channel session is shown, and what a person must do about it. Reads rows; changes nothing."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from core.channel import SessionStatus
from core.store import crm as crm_store
from core.store import leases, overview
from core.store import sessions as store
from core.store.sessions import SessionRow
from gateway.api.models import JsonObject, SessionStatusName, View
from gateway.api.routing import Call, Subject

SUBJECT = Subject("session", "session_id", "et_channel_sessions")

_ACTIONS = {
    "pairing": "scan the QR code (GET …/qr), or ask for a code (POST …/pairing-code)",
    "logged_out": "pair it again: GET …/qr",
    "suspended": "see status_reason; wait until the channel lifts it",
}


class Session(View):
    session_id: int
    channel_type: str
    identifier: str
    name: str | None
    status: SessionStatusName
    status_reason: str | None
    last_connected: datetime | None
    action: str | None = Field(description="What a person must do now.")


class SessionDetail(Session):
    tenant_id: int
    wanted: str
    default_workspace_id: int | None
    expected_identifier: str | None
    proxy: str | None = Field(description="Without its user and password.")
    settings: JsonObject
    owner: str | None = Field(description="The gateway that runs it.")
    counters: dict[str, int] = Field(
        description="Threads, the queue by status, and `possible_loss`: inbound messages of the last 24 hours that could not"
        " be read and that nobody has sent again yet."
    )
    created_at: datetime
    updated_at: datetime


def action_of(session: SessionRow) -> str | None:
    """What a person must do now, or None."""
    if session.action is not None:
        return session.action
    if session.pending and session.status == SessionStatus.DISCONNECTED:
        return _ACTIONS["pairing"]
    return _ACTIONS.get(session.status)


def view(session: SessionRow) -> Session:
    return Session(**_fields(session))


def _fields(session: SessionRow) -> dict[str, Any]:
    return {
        "session_id": session.id,
        "channel_type": session.channel_type,
        "identifier": session.identifier,
        "name": session.name,
        "status": session.status.value,
        "status_reason": session.status_reason,
        "last_connected": session.last_connected_at,
        "action": action_of(session),
    }


async def read_session(call: Call[Any, Any], session_id: int) -> SessionRow:
    """The session a body or the path names. 404 when it is not this tenant's, with an audit row when it is another's."""
    if "session_id" not in call.request.match_info:
        await call.own("session", "et_channel_sessions", session_id)
    async with call.db.tenant(call.tenant_id) as conn:
        return await store.get(conn, call.tenant_id, session_id)


async def detail(call: Call[Any, Any], session_id: int) -> SessionDetail:
    """One session with its counters. Raises NotFound."""
    async with call.db.tenant(call.tenant_id) as conn:
        session = await store.get(conn, call.tenant_id, session_id)
        owner = await leases.holder(conn, session_id)
        counters = await crm_store.session_counters(conn, call.tenant_id, session_id)
        lost = await overview.possible_loss(conn, call.tenant_id, session_id)
    metadata = session.metadata
    settings = metadata.get("settings")
    workspace = metadata.get("default_workspace_id")
    return SessionDetail(
        **_fields(session),
        tenant_id=session.tenant_id,
        wanted=session.wanted,
        default_workspace_id=workspace if isinstance(workspace, int) else None,
        expected_identifier=metadata.get("expected_identifier"),
        proxy=metadata.get("proxy"),
        settings=settings if isinstance(settings, dict) else {},
        owner=owner,
        counters=counters | {"possible_loss": lost.get((int(call.tenant_id), session_id), 0)},
        created_at=session.created_at,
        updated_at=session.updated_at,
    )
