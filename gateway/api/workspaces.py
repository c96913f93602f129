"""Workspaces: a time zone and the agent that answers in it."""

from __future__ import annotations

from datetime import datetime

from asyncpg import Record

from core.store import tenants as store
from gateway.api.models import Body, Id, Name, NoBody, NoQuery, Page, PageQuery, Timezone, View
from gateway.api.paging import decode_id, page
from gateway.api.problems import not_found
from gateway.api.routing import Call, Reply, Routes, Subject

routes = Routes("workspaces")
SUBJECT = Subject("workspace", "workspace_id", "et_workspaces")


class Workspace(View):
    id: int
    tenant_id: int
    name: str
    timezone: str
    agent_id: int | None
    created_at: datetime


class NewWorkspace(Body):
    tenant_id: Id | None = None
    name: Name
    timezone: Timezone = "UTC"
    agent_id: Id | None = None


class WorkspaceChange(Body):
    name: Name | None = None
    timezone: Timezone | None = None
    agent_id: Id | None = None
    """Given as null: nobody answers by itself any more."""


def _view(row: Record) -> Workspace:
    return Workspace(**dict(row))


async def _check_agent(call: Call[NoQuery, NewWorkspace] | Call[NoQuery, WorkspaceChange]) -> None:
    if call.body.agent_id is not None:
        await call.own("agent", "et_agents", call.body.agent_id)


@routes.add("POST", "/api/v1/workspaces", access="body", scope="admin", returns={201: Workspace})
async def create(call: Call[NoQuery, NewWorkspace]) -> Workspace:
    """Make a workspace."""
    body = call.body
    await _check_agent(call)
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.create_workspace(
            conn, call.tenant_id, name=body.name, timezone=body.timezone, agent_id=body.agent_id
        )
    return _view(row)


@routes.add(
    "GET", "/api/v1/workspaces", access="query", scope=("admin", "read"), returns={200: Page[Workspace]}
)
async def listed(call: Call[PageQuery, NoBody]) -> Page[Workspace]:
    """List workspaces."""
    query = call.query
    async with call.db.tenant(call.tenant_id) as conn:
        rows = await store.list_workspaces(conn, call.tenant_id, decode_id(query.cursor), query.limit + 1)
    return page(rows, query.limit, _view, lambda row: (row["id"],))


@routes.add(
    "GET",
    "/api/v1/workspaces/{workspace_id}",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "read"),
    returns={200: Workspace},
)
async def read(call: Call[NoQuery, NoBody]) -> Workspace:
    """Read a workspace."""
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.read_workspace(conn, call.tenant_id, call.id("workspace_id"))
    if row is None:
        raise not_found("workspace")
    return _view(row)


@routes.add(
    "PATCH",
    "/api/v1/workspaces/{workspace_id}",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={200: Workspace},
)
async def change(call: Call[NoQuery, WorkspaceChange]) -> Workspace:
    """Change a workspace; what is left out stays."""
    body = call.body
    await _check_agent(call)
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.update_workspace(
            conn,
            call.tenant_id,
            call.id("workspace_id"),
            name=body.name,
            timezone=body.timezone,
            agent_given="agent_id" in body.model_fields_set,
            agent_id=body.agent_id,
        )
    if row is None:
        raise not_found("workspace")
    return _view(row)


@routes.add(
    "DELETE",
    "/api/v1/workspaces/{workspace_id}",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={204: None},
)
async def remove(call: Call[NoQuery, NoBody]) -> Reply:
    """Remove a workspace. Its leads stay, without a workspace."""
    async with call.db.tenant(call.tenant_id) as conn:
        if not await store.delete_workspace(conn, call.tenant_id, call.id("workspace_id")):
            raise not_found("workspace")
    return Reply(204)
