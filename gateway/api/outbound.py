"""The queue of messages to send: put in, look at, withdraw, send again."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, cast

from asyncpg import Record
from pydantic import Field

from core.channel import TenantId
from core.store import audit
from core.store import requests as store
from gateway.api import outgoing as shared
from gateway.api.models import (
    Body,
    ChannelName,
    Id,
    JsonObject,
    Moment,
    NoBody,
    NoQuery,
    OutboundType,
    Page,
    PageQuery,
    QueueStatus,
    TenantQuery,
    Text,
    View,
)
from gateway.api.paging import decode_id, page
from gateway.api.problems import Problem, invalid, not_found
from gateway.api.routing import Call, Reply, Routes, Subject
from gateway.api.session_views import read_session

routes = Routes("outbound")
SUBJECT = Subject("outbound item", "queue_id", "et_outbound_queue")


class NewOutbound(Body):
    tenant_id: Id | None = None
    lead_id: Id | None = Field(None, description="Or `recipient`.")
    recipient: shared.Recipient | None = None
    channel: ChannelName | None = Field(None, description="Checked against the session's, when given.")
    channel_session_id: Id
    message_type: OutboundType = "text"
    content: Text | None = None
    media_url: shared.MediaUrl | None = None
    payload: JsonObject | None = None
    reply_to_message_id: shared.ChannelMessageId | None = None
    send_at: Moment | None = None
    dedupe_key: shared.DedupeKey | None = None


class Queued(View):
    message_id: int
    queue_id: int
    thread_id: int
    status: QueueStatus


class Outbound(View):
    queue_id: int
    message_id: int
    thread_id: int
    lead_id: int
    channel: str
    channel_session_id: int
    recipient: str | None
    message_type: str
    status: QueueStatus
    delivery_status: str = Field(description="The message's: goes on to `delivered` and `read`.")
    channel_message_id: str | None
    priority: int
    retry_count: int
    send_at: datetime
    next_attempt_at: datetime
    expires_at: datetime
    dedupe_key: str | None
    error_code: str | None
    last_error: str | None
    created_at: datetime
    updated_at: datetime


class OutboundQuery(PageQuery):
    status: QueueStatus | None = None
    channel_session_id: Id | None = None


class Dispatched(View):
    queue_id: int
    message_id: int
    channel: str
    status: QueueStatus
    retry_count: int
    detail: str | None


def _view(row: Record) -> Outbound:
    values: dict[str, Any] = dict(row)
    if values["channel_message_id"].startswith("out_"):
        values["channel_message_id"] = None  # a stand-in until the channel gives one
    return Outbound(**values)


@routes.add(
    "POST",
    "/api/v1/messaging/outbound",
    access="body",
    scope="send",
    returns={201: Queued, 200: Queued},
    problems=(409,),
    headers=(("Idempotency-Key", "The same as `dedupe_key`."),),
)
async def create(call: Call[NoQuery, NewOutbound]) -> Reply:
    """Put a message into the queue.

    A repeated `dedupe_key` answers 200 with the first one's ids and present status, and sends nothing.
    """
    body = call.body
    if (body.lead_id is None) == (body.recipient is None):
        raise invalid("recipient", "give either recipient or lead_id")
    header = shared.key_from_header(call.request.headers.get("Idempotency-Key"))
    if header is not None and body.dedupe_key not in (None, header):
        raise invalid("dedupe_key", "differs from the header Idempotency-Key; give one of them")
    shared.check_content(
        body.message_type, body.content, body.media_url, body.payload, body.reply_to_message_id
    )
    session = await read_session(call, body.channel_session_id)
    if body.channel is not None and body.channel != session.channel_type:
        raise invalid("channel", f"session {session.id} is a {session.channel_type} session")
    if body.lead_id is not None:
        await call.own("lead", "et_leads", body.lead_id)
    person = (
        shared.normal_recipient(session.channel_type, body.recipient)
        if body.recipient is not None
        else body.lead_id
    )
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
        lead_id=body.lead_id,
        content=body.content,
        media_url=body.media_url,
        payload=body.payload,
        reply_to_message_id=body.reply_to_message_id,
        dedupe_key=header or body.dedupe_key,
        send_at=body.send_at,
        raw_payload=shared.origin(hashed),
    )
    row, repeated = await enqueue(call, call.tenant_id, outgoing, hashed)
    return Reply(
        200 if repeated else 201,
        Queued(**{name: row[name] for name in Queued.model_fields}),
    )


async def enqueue(
    call: Call[Any, Any], tenant_id: TenantId, outgoing: store.Outgoing, hashed: str
) -> tuple[Record, bool]:
    """The item's row, and whether an earlier call had made it. 422 for a key that stands for another message."""
    async with call.db.tenant(tenant_id) as conn:
        if outgoing.dedupe_key is not None:
            earlier = await store.by_dedupe_key(conn, tenant_id, outgoing.dedupe_key)
            if earlier is not None:
                if not shared.same_request(earlier, hashed, outgoing):
                    raise shared.other_body()
                return earlier, True
        ids = await store.enqueue(conn, tenant_id, outgoing)
        if outgoing.dedupe_key is None:
            row = await store.read(conn, tenant_id, ids["queue_id"])
            assert row is not None
            return row, False
        # Another call with the same key may have been a moment quicker.
        stored = await store.by_dedupe_key(conn, tenant_id, outgoing.dedupe_key)
        assert stored is not None
        if not shared.same_request(stored, hashed, outgoing):
            raise shared.other_body()
        return stored, False


@routes.add(
    "GET",
    "/api/v1/messaging/outbound",
    access="query",
    scope=("read", "send"),
    returns={200: Page[Outbound]},
)
async def listed(call: Call[OutboundQuery, NoBody]) -> Page[Outbound]:
    """List the queue, newest first; by `status` to find what is `unknown` or `failed`."""
    query = call.query
    before = decode_id(query.cursor)
    async with call.db.tenant(call.tenant_id) as conn:
        rows = await store.listed(
            conn,
            call.tenant_id,
            status=query.status,
            session_id=query.channel_session_id,
            before=before,
            limit=query.limit + 1,
        )
    return page(rows, query.limit, _view, lambda row: (row["queue_id"],))


@routes.add(
    "POST",
    "/api/v1/messaging/outbound/dispatch-next",
    access="query",
    scope="send",
    returns={200: Dispatched, 204: None},
)
async def dispatch_next(call: Call[TenantQuery, NoBody]) -> Reply:
    """Dispatch the tenant's next due item now and say what became of it; 204 when none is due."""
    worker = call.services.outbound
    if worker is None:
        raise Problem(
            503, "no_worker", "this gateway sends nothing; ask another one", headers={"Retry-After": "30"}
        )
    done = await worker.dispatch_next(call.tenant_id)
    if done is None:
        return Reply(204)
    return Reply(
        200,
        Dispatched(
            queue_id=done.queue_id,
            message_id=done.message_id,
            channel=done.channel,
            status=cast("QueueStatus", done.status),
            retry_count=done.retry_count,
            detail=done.detail,
        ),
    )


async def _item(call: Call[NoQuery, Any]) -> Outbound:
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.read(conn, call.tenant_id, call.id("queue_id"))
    if row is None:
        raise not_found("outbound item")
    return _view(row)


@routes.add(
    "GET",
    "/api/v1/messaging/outbound/{queue_id}",
    access="subject",
    subject=SUBJECT,
    scope=("read", "send"),
    returns={200: Outbound},
)
async def read(call: Call[NoQuery, NoBody]) -> Outbound:
    """Read one item."""
    return await _item(call)


@routes.add(
    "POST",
    "/api/v1/messaging/outbound/{queue_id}/cancel",
    access="subject",
    subject=SUBJECT,
    scope="send",
    returns={200: Outbound},
    problems=(409,),
)
async def cancel(call: Call[NoQuery, NoBody]) -> Outbound:
    """Withdraw an item that has not been handed to the channel yet. Again: no error."""
    async with call.db.tenant(call.tenant_id) as conn:
        done = await store.cancel(conn, call.tenant_id, call.id("queue_id"))
    item = await _item(call)
    if not done and item.status != "cancelled":
        raise Problem(
            409, "not_queued", f"the item is {item.status}; only one that is still queued can be withdrawn"
        )
    return item


@routes.add(
    "POST",
    "/api/v1/messaging/outbound/{queue_id}/retry",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={200: Outbound},
    problems=(409,),
)
async def retry(call: Call[NoQuery, NoBody]) -> Outbound:
    """Send a `failed` or `unknown` item again.

    An unknown one may have arrived the first time: look at the phone before.
    """
    async with call.db.tenant(call.tenant_id) as conn:
        await store.retry(conn, call.id("queue_id"))
        await audit.write(
            conn,
            "outbound_retried",
            tenant_id=call.tenant_id,
            actor=call.caller.actor,
            subject_type="outbound",
            subject_id=call.id("queue_id"),
        )
    return await _item(call)


class Settled(Body):
    outcome: Literal["arrived", "given_up"] = Field(
        description="`arrived`: somebody has seen it on the other side; the message becomes `delivered`."
        " `given_up`: it becomes `failed`."
    )


@routes.add(
    "POST",
    "/api/v1/messaging/outbound/{queue_id}/settle",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={200: Outbound},
    problems=(409,),
)
async def settle(call: Call[NoQuery, Settled]) -> Outbound:
    """Say what became of an `unknown` item: a person has looked. 409 when it is not unknown any more."""
    queue_id = call.id("queue_id")
    async with call.db.tenant(call.tenant_id) as conn:
        done = await store.settle(conn, call.tenant_id, queue_id, arrived=call.body.outcome == "arrived")
        if done:
            await audit.write(
                conn,
                "outbound_settled",
                tenant_id=call.tenant_id,
                actor=call.caller.actor,
                subject_type="outbound",
                subject_id=queue_id,
                detail={"outcome": call.body.outcome},
            )
    item = await _item(call)
    if not done:
        raise Problem(
            409, "not_unknown", f"the item is {item.status}; only one that is unknown can be settled"
        )
    return item
