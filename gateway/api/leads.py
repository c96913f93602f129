"""Leads: the people a tenant talks to, one row each whatever channels they use."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import asyncpg
from asyncpg import Record
from pydantic import AfterValidator, Field

from core.store import crm as store
from core.store.leads import merge as merge_leads
from gateway.api.messages import Message
from gateway.api.messages import view as message_view
from gateway.api.models import Body, Id, NoBody, NoQuery, Page, PageQuery, PlainPageQuery, Timezone, View
from gateway.api.paging import decode_id, decode_moment, page
from gateway.api.problems import Problem, invalid, not_found
from gateway.api.routing import Call, Routes, Subject

routes = Routes("leads")
SUBJECT = Subject("lead", "lead_id", "et_leads")
SEARCH_SECONDS = 5.0


class Lead(View):
    id: int
    tenant_id: int
    workspace_id: int | None
    external_id: str
    identities: list[str] = Field(description="Every address known to be this person's.")
    kind: Literal["person", "group"]
    name: str | None
    timezone: str | None
    tags: list[str]
    opted_out_at: datetime | None
    created_at: datetime
    updated_at: datetime


class LeadQuery(PageQuery):
    q: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Part of the name or of an address."
    )
    tag: Annotated[str, Field(max_length=100)] | None = None
    kind: Literal["person", "group"] | None = None
    opted_out: bool | None = None
    workspace_id: Id | None = None


def _unique(tags: list[str]) -> list[str]:
    return sorted(set(tags))


Tag = Annotated[str, Field(min_length=1, max_length=100)]


class LeadChange(Body):
    name: Annotated[str, Field(max_length=200)] | None = None
    timezone: Timezone | None = None
    workspace_id: Id | None = None
    tags: Annotated[list[Tag], Field(max_length=100), AfterValidator(_unique)] | None = Field(
        None, description="Replaces all tags."
    )
    opted_out: bool | None = Field(None, description="True: nothing automatic is sent to them any more.")


class Merge(Body):
    into: Id = Field(description="The other lead. The lower id survives, whichever is named here.")


class TimelineQuery(PlainPageQuery):
    order: Literal["asc", "desc"] = Field("asc", description="`desc`: newest first.")


def _view(row: Record) -> Lead:
    return Lead(**dict(row))


def too_wide() -> Problem:
    return invalid("q", "this search takes too long; make it longer, or narrow it with the other filters")


@routes.add("GET", "/api/v1/messaging/leads", access="query", scope="read", returns={200: Page[Lead]})
async def listed(call: Call[LeadQuery, NoBody]) -> Page[Lead]:
    """List and search leads, newest first."""
    query = call.query
    before = decode_id(query.cursor)
    try:
        async with call.db.tenant(call.tenant_id) as conn:
            if query.q is not None:
                await store.bound_search(conn, SEARCH_SECONDS)
            rows = await store.list_leads(
                conn,
                call.tenant_id,
                pattern=store.like(query.q) if query.q is not None else None,
                tag=query.tag,
                kind=query.kind,
                opted_out=query.opted_out,
                workspace_id=query.workspace_id,
                before=before,
                limit=query.limit + 1,
            )
    except asyncpg.QueryCanceledError:
        if query.q is None:
            raise
        raise too_wide() from None
    return page(rows, query.limit, _view, lambda row: (row["id"],))


@routes.add(
    "GET",
    "/api/v1/messaging/leads/{lead_id}",
    access="subject",
    subject=SUBJECT,
    scope="read",
    returns={200: Lead},
)
async def read(call: Call[NoQuery, NoBody]) -> Lead:
    """Read a lead. The id of one that was merged away answers with the survivor."""
    return await _read(call, call.id("lead_id"))


async def _read(
    call: Call[NoQuery, NoBody] | Call[NoQuery, LeadChange] | Call[NoQuery, Merge], lead_id: int
) -> Lead:
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.read_lead(conn, call.tenant_id, lead_id)
    if row is None:
        raise not_found("lead")
    return _view(row)


@routes.add(
    "PATCH",
    "/api/v1/messaging/leads/{lead_id}",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "send"),
    returns={200: Lead},
)
async def change(call: Call[NoQuery, LeadChange]) -> Lead:
    """Change name, tags, time zone, workspace or opt-out; what is left out stays."""
    body = call.body
    if body.workspace_id is not None:
        await call.own("workspace", "et_workspaces", body.workspace_id)
    change = store.LeadChange(
        given=frozenset(body.model_fields_set),
        name=body.name,
        timezone=body.timezone,
        workspace_id=body.workspace_id,
        tags=body.tags,
        opted_out=body.opted_out,
    )
    lead_id = call.id("lead_id")
    async with call.db.tenant(call.tenant_id) as conn:
        if not await store.update_lead(conn, call.tenant_id, lead_id, change):
            raise not_found("lead")
    return await _read(call, lead_id)


@routes.add(
    "POST",
    "/api/v1/messaging/leads/{lead_id}/merge",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={200: Lead},
)
async def merge(call: Call[NoQuery, Merge]) -> Lead:
    """Make two leads one: they are the same person. Answers with the survivor."""
    await call.own("lead", "et_leads", call.body.into)
    async with call.db.tenant(call.tenant_id) as conn:
        await store.name_actor(conn, call.caller.actor)
        survivor = await merge_leads(conn, call.tenant_id, call.id("lead_id"), call.body.into)
    return await _read(call, survivor)


@routes.add(
    "GET",
    "/api/v1/messaging/leads/{lead_id}/timeline",
    access="subject",
    subject=SUBJECT,
    scope="read",
    returns={200: Page[Message]},
)
async def timeline(call: Call[TimelineQuery, NoBody]) -> Page[Message]:
    """Every message with this person on every channel, in one order."""
    query = call.query
    start = decode_moment(query.cursor)
    async with call.db.tenant(call.tenant_id) as conn:
        lead = await store.read_lead(conn, call.tenant_id, call.id("lead_id"))
        if lead is None:
            raise not_found("lead")
        rows = await store.timeline(
            conn,
            call.tenant_id,
            lead["id"],
            start=start,
            newest_first=query.order == "desc",
            limit=query.limit + 1,
        )
    return page(rows, query.limit, message_view, lambda row: (row["occurred_at"], row["id"]))
