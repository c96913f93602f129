"""Asking a channel for older messages. What it brings is an import like any other: see `imports.py` for how far it is."""

from __future__ import annotations

from typing import Any

from core.channel import History, SessionId
from gateway.api.models import NoBody, NoQuery, View
from gateway.api.problems import Problem
from gateway.api.routing import Call, Reply, Routes
from gateway.api.session_views import SUBJECT, action_of, read_session

routes = Routes("sessions")


class UnderWay(View):
    success: bool = True
    parts: int
    """Parts of the history that are being fetched or stored now; `GET /api/v1/messaging/imports` shows the counts."""


@routes.add(
    "POST",
    "/sessions/{tenant_id}/{session_id}/sync-history",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={202: UnderWay},
    problems=(409,),
)
async def sync_history(call: Call[NoQuery, NoBody]) -> Reply:
    """Have older messages brought, as far as the channel can.

    A WhatsApp phone hands its history over once, when it is linked: while that goes on the answer is 202, afterwards 409
    with what to do. Progress: events of kind `import`, and the list of imports.
    """
    session = await read_session(call, call.id("session_id"))
    channel = _history(call, session.id)
    if channel is None:
        raise Problem(
            409,
            "session_not_here",
            f"session {session.id} is {session.status}, or another gateway runs it, or its channel keeps no history;"
            " connect it and ask the gateway that runs it",
            action=action_of(session),
        )
    return Reply(202, UnderWay(parts=await channel.sync_history()))


def _history(call: Call[Any, Any], session_id: SessionId) -> History | None:
    manager = call.services.sessions
    return None if manager is None else manager.capability(session_id, History)  # type: ignore[type-abstract]
