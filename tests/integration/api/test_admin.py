"""Tenants, workspaces, agents, keys, audit."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from tests.support.api import Api, Tenant
from tests.support.outbound import eventually, fetch, value


async def test_the_platform_sets_up_a_tenant_from_nothing(api: Api, platform_key: str) -> None:
    tenant = await api.post("/api/v1/tenants", {"name": "Acme"}, platform_key)
    assert tenant.status == 201
    assert {name: tenant.json[name] for name in ("name", "status")} == {"name": "Acme", "status": "active"}
    tenant_id = tenant.json["id"]
    agent = await api.post("/api/v1/agents", {"tenant_id": tenant_id, "name": "Bot"}, platform_key)
    assert (agent.status, agent.json["decider"]) == (201, "rules")
    workspace = await api.post(
        "/api/v1/workspaces",
        {
            "tenant_id": tenant_id,
            "name": "Sales",
            "timezone": "Asia/Kuala_Lumpur",
            "agent_id": agent.json["id"],
        },
        platform_key,
    )
    assert (workspace.status, workspace.json["agent_id"]) == (201, agent.json["id"])
    key = await api.post(
        "/api/v1/keys", {"tenant_id": tenant_id, "name": "backend", "scopes": ["send", "read"]}, platform_key
    )
    assert key.status == 201
    assert key.json["key"].startswith(f"cg_{key.json['prefix']}_")
    assert (await api.get("/api/v1/workspaces", key.json["key"])).json["items"][0]["id"] == workspace.json[
        "id"
    ]
    listed = (await api.get(f"/api/v1/keys?tenant_id={tenant_id}", platform_key)).json["items"]
    assert [one["name"] for one in listed] == ["backend"]
    assert "key" not in listed[0]
    assert "key_hash" not in listed[0]
    gone = await api.delete(f"/api/v1/tenants/{tenant_id}", platform_key)
    assert gone.status == 204
    assert (await api.get(f"/api/v1/tenants/{tenant_id}", platform_key)).status == 404


async def test_a_tenant_with_messages_is_removed_whole(api: Api, shop: Tenant, platform_key: str) -> None:
    await shop.receive("hello")
    assert (await api.post("/send", shop.send_body(), shop.key)).status == 200
    await api.post(f"/sessions/{shop.id}/{shop.session_id}/connect", None, shop.key)
    refused = await api.delete(f"/api/v1/tenants/{shop.id}", platform_key)
    assert (refused.status, refused.code) == (409, "sessions_connected")
    await api.post(f"/sessions/{shop.id}/{shop.session_id}/disconnect", None, shop.key)
    assert (await api.delete(f"/api/v1/tenants/{shop.id}", platform_key)).status == 204
    assert await value(api.db, "SELECT count(*) FROM et_messages") == 0


async def test_a_key_is_stored_as_a_hash_alone(api: Api, shop: Tenant) -> None:
    key = (await api.post("/api/v1/keys", {"name": "k", "scopes": ["read"]}, shop.key)).json["key"]
    rows = await fetch(api.db, "SELECT to_jsonb(k)::text AS row FROM et_api_keys k")
    assert all(key not in row["row"] for row in rows)
    log = await fetch(api.db, "SELECT event, actor, detail::text AS detail FROM et_audit_log")
    assert [row["event"] for row in log] == ["key_created"]
    assert log[0]["actor"].startswith("key:")
    assert key not in log[0]["detail"]


async def test_a_revoked_key_is_dead_at_once_and_stays_listed(api: Api, shop: Tenant) -> None:
    made = (await api.post("/api/v1/keys", {"name": "k", "scopes": ["read"]}, shop.key)).json
    assert (await api.get("/api/v1/messaging/leads", made["key"])).status == 200
    assert (await api.delete(f"/api/v1/keys/{made['id']}", shop.key)).status == 204
    assert (await api.get("/api/v1/messaging/leads", made["key"])).status == 401
    listed = (await api.get(f"/api/v1/keys/{made['id']}", shop.key)).json
    assert listed["revoked_at"]
    events = [row["event"] for row in await fetch(api.db, "SELECT event FROM et_audit_log ORDER BY id")]
    assert events == ["key_created", "key_revoked"]


async def test_a_key_revoked_elsewhere_is_dead_within_two_seconds(api: Api, shop: Tenant) -> None:
    key = await api.make_key(shop.id, "read")
    assert (await api.get("/api/v1/messaging/leads", key)).status == 200
    async with api.db.worker() as conn:
        await conn.execute("UPDATE et_api_keys SET revoked_at = now() WHERE scopes = '{read}'")

    async def refused() -> bool:
        return (await api.get("/api/v1/messaging/leads", key)).status == 401

    await eventually(refused, seconds=2)


async def test_an_expired_key_is_401(api: Api, shop: Tenant) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    made = (
        await api.post("/api/v1/keys", {"name": "k", "scopes": ["read"], "expires_at": soon}, shop.key)
    ).json
    assert (await api.get("/api/v1/messaging/leads", made["key"])).status == 200
    await asyncio.sleep(1.1)
    assert (await api.get("/api/v1/messaging/leads", made["key"])).status == 401
    past = {"name": "k", "scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"}
    assert (await api.post("/api/v1/keys", past, shop.key)).json["errors"][0]["field"] == "expires_at"


async def test_when_a_key_was_used_is_written_down_later(api: Api, shop: Tenant) -> None:
    from gateway.api.auth import Keys

    keys = Keys(api.db)
    await keys.principal(shop.key)
    await keys.stop()
    assert await value(api.db, "SELECT last_used_at FROM et_api_keys WHERE tenant_id = $1", shop.id)


async def test_a_tenant_makes_keys_of_its_own_only(api: Api, shop: Tenant) -> None:
    other = await api.tenant("other")
    made = (
        await api.post("/api/v1/keys", {"name": "k", "scopes": ["read"], "tenant_id": None}, shop.key)
    ).json
    assert made["tenant_id"] == shop.id
    foreign = await api.post(
        "/api/v1/keys", {"name": "k", "scopes": ["read"], "tenant_id": other.id}, shop.key
    )
    assert foreign.status == 403
    for scopes in ([], ["root"], "read"):
        assert (await api.post("/api/v1/keys", {"name": "k", "scopes": scopes}, shop.key)).status == 422


async def test_the_platform_makes_and_lists_platform_keys(api: Api, platform_key: str) -> None:
    made = await api.post(
        "/api/v1/keys", {"tenant_id": None, "name": "ops", "scopes": ["admin"]}, platform_key
    )
    assert (made.status, made.json["tenant_id"]) == (201, None)
    listed = (await api.get("/api/v1/keys", platform_key)).json["items"]
    assert {one["name"] for one in listed} == {"test", "ops"}
    assert (await api.delete(f"/api/v1/keys/{made.json['id']}", platform_key)).status == 204
    assert (await api.get("/api/v1/tenants", made.json["key"])).status == 401


async def test_a_tenants_key_cannot_see_a_platform_key(api: Api, shop: Tenant, platform_key: str) -> None:
    key_id = await value(api.db, "SELECT id FROM et_api_keys WHERE tenant_id IS NULL")
    assert (await api.get(f"/api/v1/keys/{key_id}", shop.key)).status == 404
    assert (await api.delete(f"/api/v1/keys/{key_id}", shop.key)).status == 404
    assert (await api.get("/api/v1/tenants", platform_key)).status == 200


async def test_wrong_agent_settings_are_refused_with_the_place(api: Api, shop: Tenant) -> None:
    answer = await api.post(
        "/api/v1/agents", {"name": "Bot", "settings": {"rules": [{"nonsense": 1}]}}, shop.key
    )
    assert answer.status == 422
    assert "rules" in answer.json["detail"]
    made = (await api.post("/api/v1/agents", {"name": "Bot"}, shop.key)).json
    changed = await api.patch(
        f"/api/v1/agents/{made['id']}", {"instructions": "Be kind.", "model": None}, shop.key
    )
    assert (changed.json["instructions"], changed.json["name"]) == ("Be kind.", "Bot")
    wrong = await api.patch(f"/api/v1/agents/{made['id']}", {"settings": {"rules": 5}}, shop.key)
    assert wrong.status == 422


async def test_the_audit_log_is_the_tenants_own_newest_first(api: Api, shop: Tenant) -> None:
    other = await api.tenant("other")
    await api.get(f"/sessions/{other.id}", shop.key)
    await api.post("/api/v1/keys", {"name": "k", "scopes": ["read"]}, shop.key)
    items = (await api.get("/api/v1/audit", shop.key)).json["items"]
    assert [one["event"] for one in items] == ["key_created", "access_denied"]
    assert (await api.get("/api/v1/audit", other.key)).json["items"] == []
    one = (await api.get("/api/v1/audit?limit=1", shop.key)).json
    rest = (await api.get(f"/api/v1/audit?cursor={one['next_cursor']}", shop.key)).json
    assert [entry["event"] for entry in rest["items"]] == ["access_denied"]
