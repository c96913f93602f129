"""Threads: the CRM's list, one conversation with its messages, and a person taking over or giving back."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import asyncpg
from asyncpg import Record
from pydantic import Field

from core.store import audit
from core.store import crm as store
from core.store.threads import hand_to_person
from gateway.api.leads import SEARCH_SECONDS, too_wide
from gateway.api.messages import Message
from gateway.api.messages import view as message_view
from gateway.api.models import Direction, Id, Moment, NoBody, NoQuery, Page, PageQuery, PlainPageQuery, View
from gateway.api.paging import decode_moment, page
from gateway.api.problems import not_found
from gateway.api.routing import Call, Routes, Subject

routes = Routes("threads")
SUBJECT = Subject("thread", "thread_id", "et_threads")

Status = Literal["active", "archived", "closed"]
Handler = Literal["agent", "human"]


class ThreadLead(View):
    id: int
    external_id: str
    name: str | None
    kind: str
    tags: list[str]
    opted_out_at: datetime | None


class Insight(View):
    label: str | None
    next_step: str | None
    next_followup_at: datetime | None
    summary: str | None
    analyzed_through_message_id: int | None
    updated_at: datetime


class LastMessage(View):
    id: int
    direction: Direction
    message_type: str
    content: str | None = Field(description="At most 300 characters.")
    occurred_at: datetime
    delivery_status: str


class Thread(View):
    id: int
    tenant_id: int
    channel: str
    channel_session_id: int
    agent_id: int | None
    status: Status
    handled_by: Handler
    last_message_at: datetime
    created_at: datetime
    updated_at: datetime
    lead: ThreadLead
    insight: Insight | None
    last_message: LastMessage | None


class ThreadDetail(Thread):
    messages: Page[Message] = Field(
        description="The latest ones, oldest of them first; `next_cursor` leads to the ones before."
    )


class Taken(Thread):
    cancelled: list[int] = Field(description="Queue ids of automatic replies that were withdrawn.")


class ThreadQuery(PageQuery):
    status: Status | None = None
    label: Annotated[str, Field(max_length=100)] | None = None
    handled_by: Handler | None = None
    due_before: Moment | None = Field(None, description="Whose `next_followup_at` is not later than this.")
    channel_session_id: Id | None = None
    lead_id: Id | None = None
    q: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Part of the lead's name or address, or of one of the latest 200 messages."
    )


def _parts(row: Record) -> dict[str, Any]:
    values: dict[str, Any] = dict(row)
    lead = {name: values.pop(f"lead_{name}") for name in ThreadLead.model_fields}
    insight = {name: values.pop(f"insight_{name}") for name in Insight.model_fields}
    # Both the thread and its last message end in these names.
    last = {name: values.pop(f"last_{name}") for name in LastMessage.model_fields}
    return {
        **values,
        "lead": ThreadLead(**lead),
        "insight": Insight(**insight) if insight["updated_at"] is not None else None,
        "last_message": LastMessage(**last) if last["id"] is not None else None,
    }


def _view(row: Record) -> Thread:
    return Thread(**_parts(row))


@routes.add("GET", "/api/v1/messaging/threads", access="query", scope="read", returns={200: Page[Thread]})
async def listed(call: Call[ThreadQuery, NoBody]) -> Page[Thread]:
    """List and search conversations, latest first: lead, last message, insight."""
    query = call.query
    before = decode_moment(query.cursor)
    wanted = store.ThreadFilter(
        status=query.status,
        handled_by=query.handled_by,
        label=query.label,
        due_before=query.due_before,
        channel_session_id=query.channel_session_id,
        lead_id=query.lead_id,
        pattern=store.like(query.q) if query.q is not None else None,
    )
    try:
        async with call.db.tenant(call.tenant_id) as conn:
            if query.q is not None:
                await store.bound_search(conn, SEARCH_SECONDS)
            rows = await store.list_threads(
                conn, call.tenant_id, wanted, before=before, limit=query.limit + 1
            )
    except asyncpg.QueryCanceledError:
        if query.q is None:
            raise
        raise too_wide() from None
    return page(rows, query.limit, _view, lambda row: (row["last_message_at"], row["id"]))


@routes.add(
    "GET",
    "/api/v1/messaging/threads/{thread_id}",
    access="subject",
    subject=SUBJECT,
    scope="read",
    returns={200: ThreadDetail},
)
async def read(call: Call[PlainPageQuery, NoBody]) -> ThreadDetail:
    """Read a conversation: thread, lead, latest insight, messages.

    The first page holds the latest messages; `limit` and `cursor` page back in time.
    """
    query = call.query
    before = decode_moment(query.cursor)
    thread_id = call.id("thread_id")
    async with call.db.tenant(call.tenant_id) as conn:
        thread = await store.read_thread(conn, call.tenant_id, thread_id)
        if thread is None:
            raise not_found("thread")
        rows = await store.thread_messages(
            conn, call.tenant_id, thread_id, before=before, limit=query.limit + 1
        )
    newest_first = page(rows, query.limit, message_view, lambda row: (row["occurred_at"], row["id"]))
    messages = Page[Message](items=newest_first.items[::-1], next_cursor=newest_first.next_cursor)
    return ThreadDetail(**_parts(thread), messages=messages)


async def _row(call: Call[NoQuery, NoBody], conn: audit.Conn) -> Record:
    row = await store.read_thread(conn, call.tenant_id, call.id("thread_id"))
    if row is None:
        raise not_found("thread")
    return row


async def _audit(call: Call[NoQuery, NoBody], conn: audit.Conn, event: audit.Event) -> None:
    await audit.write(
        conn,
        event,
        tenant_id=call.tenant_id,
        actor=call.caller.actor,
        subject_type="thread",
        subject_id=call.id("thread_id"),
    )


@routes.add(
    "POST",
    "/api/v1/messaging/threads/{thread_id}/takeover",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "send"),
    returns={200: Taken},
)
async def takeover(call: Call[NoQuery, NoBody]) -> Taken:
    """A person takes the conversation over.

    Automatic replies that still wait are withdrawn in the same transaction. What was handed to the channel a moment
    ago may still arrive.
    """
    thread_id = call.id("thread_id")
    async with call.db.tenant(call.tenant_id) as conn:
        before = await _row(call, conn)
        cancelled = await hand_to_person(conn, [thread_id])
        if before["handled_by"] != "human":
            await _audit(call, conn, "thread_taken_over")
        row = await _row(call, conn)
    return Taken(**_parts(row), cancelled=cancelled)


@routes.add(
    "POST",
    "/api/v1/messaging/threads/{thread_id}/release",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "send"),
    returns={200: Thread},
)
async def release(call: Call[NoQuery, NoBody]) -> Thread:
    """Give the conversation back to the agent, which answers from the next message on."""
    async with call.db.tenant(call.tenant_id) as conn:
        if await store.hand_to_agent(conn, call.tenant_id, call.id("thread_id")):
            await _audit(call, conn, "thread_released")
        row = await _row(call, conn)
    return _view(row)


@routes.add(
    "POST",
    "/api/v1/messaging/threads/{thread_id}/archive",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "send"),
    returns={200: Thread},
)
async def archive(call: Call[NoQuery, NoBody]) -> Thread:
    """Archive the conversation. The person's next message opens a new one."""
    async with call.db.tenant(call.tenant_id) as conn:
        await store.archive(conn, call.tenant_id, call.id("thread_id"))
        row = await _row(call, conn)
    return _view(row)
