"""Every route × (own key, another tenant's key, no key, a key without the scope). A route without an entry here fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.database import Database
from core.store import sessions as session_store
from gateway.api import all_routes
from gateway.api.auth import SCOPES
from gateway.api.routing import Route
from tests.support.api import Answer, Api, Tenant, baileys, running_api
from tests.support.outbound import eventually, fetch, value


@dataclass
class World:
    """A tenant that has one of everything, and a stranger."""

    api: Api
    owner: Tenant
    stranger: Tenant
    ids: dict[str, int]


@dataclass
class Entry:
    """How to call a route for the owner of the world. `status`: what the owner's key gets."""

    status: int
    body: Callable[[World], Any] | None = None
    query: str = ""
    accept: str | None = None
    stream: bool = False
    content_type: str | None = None


def _send(world: World) -> Any:
    return world.owner.send_body("wall")


def _outbound(world: World) -> Any:
    return {
        "tenant_id": world.owner.id,
        "channel_session_id": world.owner.session_id,
        "recipient": "+60111222333",
        "content": "wall",
    }


def _named(world: World) -> Any:
    return {"tenant_id": world.owner.id, "name": "another"}


def _key(world: World) -> Any:
    return {"tenant_id": world.owner.id, "name": "another", "scopes": ["read"]}


def _rename(_: World) -> Any:
    return {"name": "renamed"}


def _webhook(_: World) -> Any:
    return baileys("wall", message_id="W1")


def _import(world: World) -> Any:
    return {"channel_message_id": "old", "sender": "+60111222333", "timestamp": 1_600_000_000}


TENANT = "?tenant_id={tenant_id}"
ENTRIES: dict[tuple[str, str], Entry] = {
    ("POST", "/send"): Entry(200, _send),
    ("GET", "/health"): Entry(200),
    ("GET", "/metrics"): Entry(200),
    ("GET", "/sessions/{tenant_id}"): Entry(200),
    ("POST", "/sessions/{tenant_id}"): Entry(201, lambda _: {"channel_type": "whatsapp"}),
    ("GET", "/sessions/{tenant_id}/{session_id}"): Entry(200),
    ("PATCH", "/sessions/{tenant_id}/{session_id}"): Entry(200, _rename),
    ("DELETE", "/sessions/{tenant_id}/{session_id}"): Entry(200),
    ("POST", "/sessions/{tenant_id}/{session_id}/connect"): Entry(200),
    ("POST", "/sessions/{tenant_id}/{session_id}/disconnect"): Entry(200),
    ("POST", "/sessions/{tenant_id}/{session_id}/check"): Entry(
        200, lambda _: {"recipients": ["+60111222333"]}
    ),
    ("POST", "/sessions/{tenant_id}/{session_id}/sync-history"): Entry(409),
    ("GET", "/sessions/{tenant_id}/{session_id}/qr"): Entry(409),
    ("POST", "/sessions/{tenant_id}/{session_id}/pairing-code"): Entry(
        409, lambda _: {"phone": "+60123456789"}
    ),
    ("POST", "/webhook/{tenant_id}/{session_id}"): Entry(200, _webhook),
    ("GET", "/webhook/{tenant_id}/{session_id}"): Entry(403),
    ("POST", "/api/v1/messaging/outbound"): Entry(201, _outbound),
    ("GET", "/api/v1/messaging/outbound"): Entry(200, query=TENANT),
    ("POST", "/api/v1/messaging/outbound/dispatch-next"): Entry(204, query=TENANT),
    ("GET", "/api/v1/messaging/outbound/{queue_id}"): Entry(200),
    ("POST", "/api/v1/messaging/outbound/{queue_id}/cancel"): Entry(200),
    ("POST", "/api/v1/messaging/outbound/{queue_id}/retry"): Entry(409),
    ("POST", "/api/v1/messaging/outbound/{queue_id}/settle"): Entry(409, lambda _: {"outcome": "arrived"}),
    ("GET", "/api/v1/messaging/threads"): Entry(200, query=TENANT),
    ("GET", "/api/v1/messaging/threads/{thread_id}"): Entry(200),
    ("POST", "/api/v1/messaging/threads/{thread_id}/takeover"): Entry(200),
    ("POST", "/api/v1/messaging/threads/{thread_id}/release"): Entry(200),
    ("POST", "/api/v1/messaging/threads/{thread_id}/archive"): Entry(200),
    ("GET", "/api/v1/messaging/messages/{message_id}"): Entry(200),
    ("GET", "/api/v1/messaging/messages/{message_id}/media"): Entry(404),
    ("POST", "/api/v1/messaging/uploads"): Entry(201, lambda _: {"a": "file"}, query=TENANT),
    ("GET", "/api/v1/messaging/leads"): Entry(200, query=TENANT),
    ("GET", "/api/v1/messaging/leads/{lead_id}"): Entry(200),
    ("PATCH", "/api/v1/messaging/leads/{lead_id}"): Entry(200, _rename),
    ("POST", "/api/v1/messaging/leads/{lead_id}/merge"): Entry(
        200, lambda world: {"into": world.ids["lead_id"]}
    ),
    ("GET", "/api/v1/messaging/leads/{lead_id}/timeline"): Entry(200),
    ("POST", "/api/v1/messaging/import"): Entry(
        200, _import, query=TENANT + "&channel_session_id={session_id}", content_type="application/x-ndjson"
    ),
    ("GET", "/api/v1/messaging/imports"): Entry(200, query=TENANT),
    ("GET", "/api/v1/messaging/imports/{import_id}"): Entry(200),
    ("GET", "/api/v1/events"): Entry(200, query=TENANT, stream=True),
    ("GET", "/api/v1/audit"): Entry(200, query=TENANT),
    ("POST", "/api/v1/tenants"): Entry(403, lambda _: {"name": "x"}),
    ("GET", "/api/v1/tenants"): Entry(403),
    ("GET", "/api/v1/tenants/{tenant_id}"): Entry(200),
    ("PATCH", "/api/v1/tenants/{tenant_id}"): Entry(403, _rename),
    ("DELETE", "/api/v1/tenants/{tenant_id}"): Entry(403),
    ("POST", "/api/v1/workspaces"): Entry(201, _named),
    ("GET", "/api/v1/workspaces"): Entry(200, query=TENANT),
    ("GET", "/api/v1/workspaces/{workspace_id}"): Entry(200),
    ("PATCH", "/api/v1/workspaces/{workspace_id}"): Entry(200, _rename),
    ("DELETE", "/api/v1/workspaces/{workspace_id}"): Entry(204),
    ("POST", "/api/v1/agents"): Entry(201, _named),
    ("GET", "/api/v1/agents"): Entry(200, query=TENANT),
    ("GET", "/api/v1/agents/{agent_id}"): Entry(200),
    ("PATCH", "/api/v1/agents/{agent_id}"): Entry(200, _rename),
    ("DELETE", "/api/v1/agents/{agent_id}"): Entry(204),
    ("POST", "/api/v1/keys"): Entry(201, _key),
    ("GET", "/api/v1/keys"): Entry(200, query=TENANT),
    ("GET", "/api/v1/keys/{key_id}"): Entry(200),
    ("PATCH", "/api/v1/keys/{key_id}"): Entry(200, _rename),
    ("DELETE", "/api/v1/keys/{key_id}"): Entry(204),
    ("GET", "/openapi.json"): Entry(200),
    ("GET", "/docs"): Entry(200),
}
ROUTES = all_routes()
WALLED = [route for route in ROUTES if route.access != "open" and (route.scopes or route.access != "own")]


def _name(route: Route) -> str:
    return f"{route.method} {route.path}"


class _AllReachable:
    async def check(self, recipients: list[str]) -> dict[str, bool]:
        return dict.fromkeys(recipients, True)


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    async with running_api(database, tmp_path) as api:
        yield await _populated(api)


async def _populated(api: Api) -> World:
    owner, stranger = await api.tenant("owner"), await api.tenant("stranger")
    assert (await owner.receive("hello")).status == 200
    message = (await fetch(api.db, "SELECT id, lead_id, thread_id FROM et_messages"))[0]
    ids = {"tenant_id": owner.id, "session_id": owner.session_id, "message_id": message["id"]}
    ids |= {"lead_id": message["lead_id"], "thread_id": message["thread_id"]}
    ids["queue_id"] = await value(
        api.db,
        "SELECT queue_id FROM et_enqueue_outbound($1, $2, '+60111222333', 'later', send_at => now() + INTERVAL '1 hour')",
        owner.id,
        owner.session_id,
    )
    for table in ("agents", "workspaces"):
        ids[f"{table[:-1]}_id"] = await value(
            api.db,
            f"INSERT INTO et_{table} (tenant_id, name) VALUES ($1, 'one') RETURNING id",
            owner.id,
        )
    ids["key_id"] = await value(
        api.db,
        "INSERT INTO et_api_keys (tenant_id, name, prefix, key_hash, scopes) "
        "VALUES ($1, 'one', 'zzz', '\\x00', '{read}') RETURNING id",
        owner.id,
    )
    ids["import_id"] = await value(
        api.db,
        "INSERT INTO et_imports (tenant_id, session_id, kind) VALUES ($1, $2, 'file') RETURNING id",
        owner.id,
        owner.session_id,
    )
    api.manager.capabilities[owner.session_id] = _AllReachable()
    return World(api, owner, stranger, ids)


async def _call(world: World, route: Route, key: str | None) -> Answer:
    entry = ENTRIES[route.method, route.path]
    path = (route.path + entry.query).format(**world.ids)
    body = entry.body(world) if entry.body is not None else None
    if entry.stream:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with world.api.session.get(world.api.url + path, headers=headers) as response:
            return Answer(response.status, response.headers, await response.content.readany())
    kind = {"Content-Type": entry.content_type} if entry.content_type else None
    return await world.api.call(route.method, path, key=key, body=body, headers=kind)


async def _denials(world: World, tenant_id: int) -> int:
    rows = "SELECT count(*) FROM et_audit_log WHERE event = 'access_denied' AND tenant_id = $1"
    return int(await value(world.api.db, rows, tenant_id))


def test_every_route_has_its_entry() -> None:
    assert {(route.method, route.path) for route in ROUTES} == set(ENTRIES)


def test_every_walled_route_names_a_scope() -> None:
    assert [_name(route) for route in WALLED if not route.scopes] == []
    assert all(route.scopes <= set(SCOPES) for route in ROUTES)


async def test_the_own_key_gets_in_everywhere(world: World) -> None:
    found: dict[str, int] = {}
    for route in sorted(ROUTES, key=lambda one: one.method == "DELETE"):
        call = asyncio.create_task(_call(world, route, world.owner.key))
        if route.method == "DELETE" and route.path.startswith("/sessions"):
            await _act_as_owner_of_the_session(world)
        answer = await call
        found[_name(route)] = answer.status
        assert answer.headers["X-Request-ID"]
    assert found == {f"{method} {path}": entry.status for (method, path), entry in ENTRIES.items()}


async def _act_as_owner_of_the_session(world: World) -> None:
    wanted = "SELECT wanted = 'deleted' FROM et_session_runtime WHERE session_id = $1"
    await eventually(lambda: value(world.api.db, wanted, world.owner.session_id))
    async with world.api.db.worker() as conn:
        await session_store.finish_delete(conn, world.owner.session_id)


async def test_no_key_and_a_wrong_key_are_401(world: World) -> None:
    wrong = world.owner.key[:-1] + ("a" if world.owner.key[-1] != "a" else "b")
    for route in WALLED:
        for key in (None, wrong, "x", "cg_0000000000_" + "A" * 43):
            answer = await _call(world, route, key)
            assert (answer.status, answer.code) == (401, "unauthenticated"), _name(route)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_missing_scope_is_403_and_audited(world: World) -> None:
    for count, route in enumerate(WALLED, 1):
        others = [scope for scope in SCOPES if scope not in route.scopes]
        key = await world.api.make_key(world.owner.id, *others)
        answer = await _call(world, route, key)
        assert (answer.status, answer.code) == (403, "missing_scope"), _name(route)
        assert await _denials(world, world.owner.id) == count, _name(route)


async def test_another_tenants_key_is_kept_out_and_audited(world: World) -> None:
    before = await _snapshot(world)
    for count, route in enumerate(WALLED, 1):
        answer = await _call(world, route, world.stranger.key)
        wanted = 404 if route.access == "subject" else 403
        assert answer.status == wanted, (_name(route), answer.body)
        assert await _denials(world, world.stranger.id) == count, _name(route)
    assert await _denials(world, world.owner.id) == 0
    assert await _snapshot(world) == before


async def _snapshot(world: World) -> Any:
    """What the owner has, to see that nothing of it moved."""
    tables = (
        "messages",
        "leads",
        "threads",
        "outbound_queue",
        "agents",
        "workspaces",
        "channel_sessions",
        "api_keys",
        "imports",
    )
    found = {}
    for table in tables:
        rows = await fetch(
            world.api.db,
            f"SELECT to_jsonb(t) - 'last_used_at' AS row FROM et_{table} t WHERE tenant_id = $1 ORDER BY id",
            world.owner.id,
        )
        found[table] = [row["row"] for row in rows]
    return found


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/send", {"channel_session_id": "session_id", "recipient": "+60111222333", "content": "x"}),
        ("POST", "/api/v1/messaging/outbound", {"channel_session_id": "session_id", "recipient": "+601112", "content": "x"}),
        ("POST", "/api/v1/workspaces", {"name": "x", "agent_id": "agent_id"}),
    ],
)  # fmt: skip
async def test_an_object_of_another_tenant_named_in_a_body_is_404_and_audited(
    world: World, method: str, path: str, body: dict[str, Any]
) -> None:
    filled = {name: world.ids.get(v, v) if isinstance(v, str) else v for name, v in body.items()}
    answer = await world.api.call(method, path, key=world.stranger.key, body=filled)
    assert answer.status == 404
    assert await _denials(world, world.stranger.id) == 1


async def test_another_tenants_lead_is_no_target_for_a_merge_or_a_message(world: World) -> None:
    api, stranger = world.api, world.stranger
    assert (await stranger.receive("mine")).status == 200
    own = await value(api.db, "SELECT id FROM et_leads WHERE tenant_id = $1", stranger.id)
    merged = await api.post(
        f"/api/v1/messaging/leads/{own}/merge", {"into": world.ids["lead_id"]}, stranger.key
    )
    sent = await api.post(
        "/api/v1/messaging/outbound",
        {"channel_session_id": stranger.session_id, "lead_id": world.ids["lead_id"], "content": "x"},
        stranger.key,
    )
    assert (merged.status, sent.status) == (404, 404)
    assert await _denials(world, stranger.id) == 2


async def test_lists_hold_nothing_of_another_tenant(world: World) -> None:
    lists = [
        route
        for route in WALLED
        if route.method == "GET" and route.access == "query" and "events" not in route.path
    ]
    assert len(lists) >= 7
    for route in lists:
        answer = await world.api.get(route.path, world.stranger.key)
        assert answer.status == 200
        items = answer.json["items"]
        own = {"keys": 1}.get(route.tag, 0)  # the stranger has nothing but the key it calls with
        assert len(items) == own, route.path


async def test_the_platform_key_acts_for_any_tenant(world: World) -> None:
    key = await world.api.make_key(None)
    for path in (
        f"/sessions/{world.owner.id}",
        f"/api/v1/messaging/threads?tenant_id={world.owner.id}",
        f"/api/v1/messaging/leads/{world.ids['lead_id']}",
        "/api/v1/tenants",
    ):
        assert (await world.api.get(path, key)).status == 200, path
    missing = await world.api.get("/api/v1/messaging/threads", key)
    assert (missing.status, missing.json["errors"][0]["field"]) == (422, "tenant_id")
    assert (await world.api.get("/sessions/999999", key)).status == 404


async def test_a_suspended_tenant_gets_403_but_its_inbound_is_stored(world: World) -> None:
    platform = await world.api.make_key(None)
    changed = await world.api.patch(f"/api/v1/tenants/{world.owner.id}", {"status": "suspended"}, platform)
    assert changed.status == 200
    for route in WALLED:
        if route.path.startswith("/webhook") or route.access == "platform" or "events" in route.path:
            continue
        answer = await _call(world, route, world.owner.key)
        assert (answer.status, answer.code) == (403, "tenant_suspended"), _name(route)
    assert (await world.owner.receive("still here", message_id="M2")).json["stored"] == 1
    assert (await world.api.post("/send", world.owner.send_body(), platform)).code == "tenant_suspended"
    again = await world.api.patch(f"/api/v1/tenants/{world.owner.id}", {"status": "active"}, platform)
    assert again.status == 200
    assert (await world.api.get(f"/sessions/{world.owner.id}", world.owner.key)).status == 200
