"""`POST /send`: one message through the same queue as everything else, waiting for what becomes of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from asyncpg import Record
from pydantic import Field

from core.outbound import Outcome
from core.store import requests as store
from core.store.sessions import SessionRow
from gateway.api import outgoing as shared
from gateway.api.models import Body, Id, JsonObject, NoQuery, OutboundType, Text, View
from gateway.api.outbound import enqueue
from gateway.api.problems import Problem
from gateway.api.routing import Call, Reply, Routes
from gateway.api.session_views import action_of, read_session

routes = Routes("send")

NOT_LIVE = frozenset({"connecting", "disconnected"})
NEVER = frozenset({"pairing", "logged_out", "suspended"})


class Send(Body):
    tenant_id: Id | None = None
    channel_session_id: Id
    recipient: shared.Recipient
    message_type: OutboundType = "text"
    content: Text | None = None
    media_url: shared.MediaUrl | None = None
    payload: JsonObject | None = None
    reply_to_message_id: shared.ChannelMessageId | None = None
    timeout_s: Annotated[float, Field(ge=0, le=60, strict=False)] = 20
    """How long to wait for the outcome."""


class SendDone(View):
    success: Literal[True] = True
    channel_message_id: str | None
    sent_at: datetime | None
    message_id: int
    queue_id: int


class SendQueued(View):
    success: Literal[True] = True
    status: Literal["queued"] = "queued"
    message_id: int
    queue_id: int


@routes.add(
    "POST",
    "/send",
    access="body",
    scope="send",
    returns={200: SendDone, 202: SendQueued},
    problems=(409, 502, 504),
    headers=(("Idempotency-Key", "A repeat answers with the item's present state and sends nothing."),),
)
async def send(call: Call[NoQuery, Send]) -> Reply:
    """Send a message and wait for the outcome.

    200: the channel accepted it. 202: it waits in the queue. 409: the session cannot send until a person acts.
    502: the channel refused it. 504: cut off, nothing proves whether it went out; it is never sent again by itself.
    """
    body = call.body
    key = shared.key_from_header(call.request.headers.get("Idempotency-Key"))
    shared.check_content(
        body.message_type, body.content, body.media_url, body.payload, body.reply_to_message_id
    )
    session = await read_session(call, body.channel_session_id)
    person = shared.normal_recipient(session.channel_type, body.recipient)
    hashed = shared.request_hash(
        body.channel_session_id,
        person,
        body.message_type,
        body.content,
        body.media_url,
        body.payload,
        body.reply_to_message_id,
    )
    outgoing = store.Outgoing(
        session_id=body.channel_session_id,
        message_type=body.message_type,
        recipient=body.recipient,
        content=body.content,
        media_url=body.media_url,
        payload=body.payload,
        reply_to_message_id=body.reply_to_message_id,
        dedupe_key=key,
        raw_payload=shared.origin(hashed),
    )
    if session.status in NEVER:
        await _refuse(call, session, outgoing, hashed)
    row, repeated = await enqueue(call, call.tenant_id, outgoing, hashed)
    worker = call.services.outbound
    if not repeated and session.status not in NOT_LIVE and worker is not None and body.timeout_s > 0:
        outcome = await worker.wait_outcome(row["queue_id"], body.timeout_s)
        if outcome is not None:
            return _reply(outcome)
    return _reply(await _present(call, row))


async def _refuse(
    call: Call[NoQuery, Send], session: SessionRow, outgoing: store.Outgoing, hashed: str
) -> None:
    """409 and nothing stored, unless this is the repeat of a call that got through before."""
    if outgoing.dedupe_key is not None:
        async with call.db.tenant(call.tenant_id) as conn:
            earlier = await store.by_dedupe_key(conn, call.tenant_id, outgoing.dedupe_key)
        if earlier is not None:
            return
    action = action_of(session)
    raise Problem(
        409,
        f"session_{session.status}",
        f"session {session.id} is {session.status}: {action or 'connect it first'}; nothing was stored",
        action=action,
    )


async def _present(call: Call[NoQuery, Send], row: Record) -> Outcome:
    """Where the item stands now, without waiting."""
    async with call.db.tenant(call.tenant_id) as conn:
        now = await store.read(conn, call.tenant_id, row["queue_id"]) or row
    own_id = now["channel_message_id"]
    return Outcome(
        queue_id=now["queue_id"],
        message_id=now["message_id"],
        channel=now["channel"],
        status=now["status"],
        retry_count=now["retry_count"],
        error_code=now["error_code"],
        last_error=now["last_error"],
        channel_message_id=None if own_id.startswith("out_") else own_id,
        sent_at=now["updated_at"],
    )


def _reply(outcome: Outcome) -> Reply:
    ids: dict[str, Any] = {"message_id": outcome.message_id, "queue_id": outcome.queue_id}
    match outcome.status:
        case "sent":
            return Reply(
                200,
                SendDone(channel_message_id=outcome.channel_message_id, sent_at=outcome.sent_at, **ids),
            )
        case "failed":
            detail = outcome.last_error or "the channel refused the message"
            raise Problem(502, outcome.error_code or "refused", detail, **ids)
        case "unknown":
            raise Problem(
                504,
                "outcome_unknown",
                "the send was cut off and nothing proves whether it went out; it is not sent again by itself: look at"
                " the phone, then use the item's retry if it did not arrive",
                **ids,
            )
        case "cancelled":
            detail = outcome.last_error or "the message was withdrawn before it was sent"
            raise Problem(409, outcome.error_code or "cancelled", detail, **ids)
        case _:
            return Reply(202, SendQueued(**ids))
