"""Which recipients a channel can reach: asked of the session that runs here, and paced by its channel."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import Field

from core.channel import NumberCheck as NumberChecker
from core.channel import SessionId
from core.errors import Invalid
from core.identity import address_of, external_id
from gateway.api.models import Body, NoQuery, View
from gateway.api.problems import Problem, invalid
from gateway.api.routing import Call, Routes
from gateway.api.session_views import SUBJECT, action_of, read_session

routes = Routes("sessions")

MAX_CHECKED = 50
"""Recipients in one question: channels watch who looks people up in bulk."""


class Recipients(Body):
    recipients: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=320)]], Field(min_length=1, max_length=MAX_CHECKED)
    ]


class Reachable(View):
    results: dict[str, bool] = Field(description="Per recipient as it was given.")


@routes.add(
    "POST",
    "/sessions/{tenant_id}/{session_id}/check",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: Reachable},
    problems=(409, 502, 504),
)
async def check(call: Call[NoQuery, Recipients]) -> Reachable:
    """Ask the channel which of these it can reach.

    What it said before is remembered for a day; new questions are paced: 429 with `Retry-After` when they come too fast.
    """
    session = await read_session(call, call.id("session_id"))
    given: dict[str, str] = {}
    for index, recipient in enumerate(call.body.recipients):
        try:
            given[recipient] = address_of(external_id(session.channel_type, recipient))
        except Invalid as error:
            raise invalid(f"recipients.{index}", error.detail) from None
    checker = _checker(call, session.id)
    if checker is None:
        raise Problem(
            409,
            "session_not_here",
            f"session {session.id} is {session.status}, or another gateway runs it, or its channel cannot check"
            " recipients; connect it and ask the gateway that runs it",
            action=action_of(session),
        )
    found = await checker.check(list(dict.fromkeys(given.values())))
    return Reachable(results={recipient: bool(found.get(address)) for recipient, address in given.items()})


class _Checks(Protocol):
    async def check(self, recipients: list[str]) -> dict[str, bool]: ...


def _checker(call: Call[Any, Any], session_id: SessionId) -> _Checks | None:
    manager = call.services.sessions
    return None if manager is None else manager.capability(session_id, NumberChecker)  # type: ignore[type-abstract]
