"""Tenants: made, renamed, suspended and removed by the platform alone."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from asyncpg import Record
from pydantic import Field

from core.store import tenants as store
from gateway.api.models import Body, JsonObject, Name, NoBody, NoQuery, Page, PlainPageQuery, View
from gateway.api.paging import decode_id, page
from gateway.api.problems import Problem, not_found
from gateway.api.routing import KEYS, Call, Reply, Routes, Subject

routes = Routes("tenants")
SUBJECT = Subject("tenant", "tenant_id", "et_tenants")


class Tenant(View):
    id: int
    name: str
    status: Literal["active", "suspended"]
    settings: JsonObject
    created_at: datetime


class NewTenant(Body):
    name: Name
    settings: JsonObject = Field(default_factory=dict)


class TenantChange(Body):
    name: Name | None = None
    status: Literal["active", "suspended"] | None = Field(
        None, description="`suspended`: the API answers 403, nothing is sent, inbound is still stored."
    )
    settings: JsonObject | None = None


def _view(row: Record) -> Tenant:
    return Tenant(**dict(row))


@routes.add("POST", "/api/v1/tenants", access="platform", scope="admin", returns={201: Tenant})
async def create(call: Call[NoQuery, NewTenant]) -> Tenant:
    """Make a tenant."""
    async with call.db.worker() as conn:
        return _view(await store.create_tenant(conn, call.body.name, call.body.settings))


@routes.add("GET", "/api/v1/tenants", access="platform", scope=("admin", "read"), returns={200: Page[Tenant]})
async def listed(call: Call[PlainPageQuery, NoBody]) -> Page[Tenant]:
    """List tenants."""
    limit = call.query.limit
    async with call.db.worker() as conn:
        rows = await store.list_tenants(conn, decode_id(call.query.cursor), limit + 1)
    return page(rows, limit, _view, lambda row: (row["id"],))


@routes.add(
    "GET",
    "/api/v1/tenants/{tenant_id}",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "read"),
    returns={200: Tenant},
)
async def read(call: Call[NoQuery, NoBody]) -> Tenant:
    """Read a tenant."""
    async with call.db.worker() as conn:
        row = await store.read_tenant(conn, call.tenant_id)
    if row is None:
        raise not_found("tenant")
    return _view(row)


@routes.add(
    "PATCH",
    "/api/v1/tenants/{tenant_id}",
    access="platform",
    subject=SUBJECT,
    scope="admin",
    returns={200: Tenant},
)
async def change(call: Call[NoQuery, TenantChange]) -> Tenant:
    """Rename, suspend or re-activate a tenant."""
    body = call.body
    async with call.db.worker() as conn:
        row = await store.update_tenant(
            conn, call.tenant_id, name=body.name, status=body.status, settings=body.settings
        )
    if row is None:
        raise not_found("tenant")
    call.request.app[KEYS].forget()
    return _view(row)


@routes.add(
    "DELETE",
    "/api/v1/tenants/{tenant_id}",
    access="platform",
    subject=SUBJECT,
    scope="admin",
    returns={204: None},
    problems=(409,),
)
async def remove(call: Call[NoQuery, NoBody]) -> Reply:
    """Remove a tenant with everything it has.

    Its sessions must be disconnected first, so that nothing arrives while it goes.
    """
    async with call.db.worker() as conn, conn.transaction():
        live = await store.live_sessions(conn, call.tenant_id)
        if live:
            raise Problem(
                409, "sessions_connected", f"{live} of its sessions are connected; disconnect them first"
            )
        if not await store.delete_tenant(conn, call.tenant_id):
            raise not_found("tenant")
    call.request.app[KEYS].forget()
    return Reply(204)
