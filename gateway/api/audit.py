"""The tenant's audit log, newest first."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from asyncpg import Record
from pydantic import Field

from core.store import crm as store
from gateway.api.models import JsonObject, NoBody, Page, PageQuery, View
from gateway.api.paging import decode_id, page
from gateway.api.routing import Call, Routes

routes = Routes("audit")


class AuditEntry(View):
    id: int
    actor: str
    event: str
    subject_type: str | None
    subject_id: str | None
    detail: JsonObject
    created_at: datetime


class AuditQuery(PageQuery):
    event: Annotated[str, Field(max_length=100)] | None = None


def _view(row: Record) -> AuditEntry:
    return AuditEntry(**dict(row))


@routes.add("GET", "/api/v1/audit", access="query", scope=("admin", "read"), returns={200: Page[AuditEntry]})
async def listed(call: Call[AuditQuery, NoBody]) -> Page[AuditEntry]:
    """The audit log, newest first."""
    query = call.query
    async with call.db.tenant(call.tenant_id) as conn:
        rows = await store.list_audit(
            conn, call.tenant_id, event=query.event, before=decode_id(query.cursor), limit=query.limit + 1
        )
    return page(rows, query.limit, _view, lambda row: (row["id"],))
