"""Agents: who answers, in whose words, decided by rules or by a model."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from asyncpg import Record
from pydantic import Field

from core.decide import config as deciding
from core.store import tenants as store
from gateway.api.models import Body, Id, JsonObject, Name, NoBody, NoQuery, Page, PageQuery, View
from gateway.api.paging import decode_id, page
from gateway.api.problems import not_found
from gateway.api.routing import Call, Reply, Routes, Subject

routes = Routes("agents")
SUBJECT = Subject("agent", "agent_id", "et_agents")

Decider = Literal["rules", "llm"]
Instructions = Annotated[str, Field(max_length=50_000)]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]


class Agent(View):
    id: int
    tenant_id: int
    name: str
    instructions: str
    decider: str
    model: str | None
    settings: JsonObject
    created_at: datetime
    updated_at: datetime


class NewAgent(Body):
    tenant_id: Id | None = None
    name: Name
    instructions: Instructions = ""
    decider: Decider = "rules"
    model: ModelName | None = None
    settings: JsonObject = Field(default_factory=dict, description="Rules, texts, opening hours, caps.")


class AgentChange(Body):
    name: Name | None = None
    instructions: Instructions | None = None
    decider: Decider | None = None
    model: ModelName | None = None
    settings: JsonObject | None = None


def _view(row: Record) -> Agent:
    return Agent(**dict(row))


@routes.add("POST", "/api/v1/agents", access="body", scope="admin", returns={201: Agent})
async def create(call: Call[NoQuery, NewAgent]) -> Agent:
    """Make an agent.

    It answers in the workspaces and threads it is given to, nowhere else.
    """
    body = call.body
    deciding.validate(body.settings, body.decider)
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.create_agent(
            conn,
            call.tenant_id,
            name=body.name,
            instructions=body.instructions,
            decider=body.decider,
            model=body.model,
            settings=body.settings,
        )
    return _view(row)


@routes.add("GET", "/api/v1/agents", access="query", scope=("admin", "read"), returns={200: Page[Agent]})
async def listed(call: Call[PageQuery, NoBody]) -> Page[Agent]:
    """List agents."""
    query = call.query
    async with call.db.tenant(call.tenant_id) as conn:
        rows = await store.list_agents(conn, call.tenant_id, decode_id(query.cursor), query.limit + 1)
    return page(rows, query.limit, _view, lambda row: (row["id"],))


@routes.add(
    "GET",
    "/api/v1/agents/{agent_id}",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "read"),
    returns={200: Agent},
)
async def read(call: Call[NoQuery, NoBody]) -> Agent:
    """Read an agent."""
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.read_agent(conn, call.tenant_id, call.id("agent_id"))
    if row is None:
        raise not_found("agent")
    return _view(row)


@routes.add(
    "PATCH",
    "/api/v1/agents/{agent_id}",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={200: Agent},
)
async def change(call: Call[NoQuery, AgentChange]) -> Agent:
    """Change an agent; what is left out stays, `settings` are replaced as a whole."""
    body = call.body
    async with call.db.tenant(call.tenant_id) as conn:
        before = await store.read_agent(conn, call.tenant_id, call.id("agent_id"))
        if before is None:
            raise not_found("agent")
        if body.settings is not None or body.decider is not None:
            settings = before["settings"] if body.settings is None else body.settings
            deciding.validate(settings, body.decider or before["decider"])
        row = await store.update_agent(
            conn,
            call.tenant_id,
            call.id("agent_id"),
            name=body.name,
            instructions=body.instructions,
            decider=body.decider,
            model_given="model" in body.model_fields_set,
            model=body.model,
            settings=body.settings,
        )
    if row is None:
        raise not_found("agent")
    return _view(row)


@routes.add(
    "DELETE",
    "/api/v1/agents/{agent_id}",
    access="subject",
    subject=SUBJECT,
    scope="admin",
    returns={204: None},
)
async def remove(call: Call[NoQuery, NoBody]) -> Reply:
    """Remove an agent. Where it answered, nobody answers by itself any more."""
    async with call.db.tenant(call.tenant_id) as conn:
        if not await store.delete_agent(conn, call.tenant_id, call.id("agent_id")):
            raise not_found("agent")
    return Reply(204)
