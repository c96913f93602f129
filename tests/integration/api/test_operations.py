"""`/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import re
import shutil
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

from pydantic import SecretStr

from core.channel import SessionId, TenantId
from core.database import Database
from core.settings import Settings
from gateway.api import ensure_platform_key
from tests.support.api import Api, Tenant
from tests.support.inbound import Place, running
from tests.support.outbound import fetch, give_lease, value

FIVE = (
    "wa_messages_received_total", "wa_messages_written_total", "wa_write_errors_total", "wa_write_latency_seconds",
    "wa_sessions_active",
)  # fmt: skip


async def test_health_is_open_and_short(api: Api) -> None:
    answer = await api.get("/health")
    assert answer.status == 200
    assert {name: answer.json[name] for name in ("status", "database", "platform")} == {
        "status": "ok",
        "database": "connected",
        "platform": "none",
    }
    assert not any(answer.json[name] for name in ("sessions", "workers", "journal", "queue"))


async def test_with_a_key_health_says_who_owns_what(api: Api, shop: Tenant) -> None:
    other = await api.tenant("other")
    answer = (await api.get("/health", shop.key)).json
    assert [(one["session_id"], one["owner"], one["here"]) for one in answer["sessions"]] == [
        (shop.session_id, "gw-1", True)
    ]
    assert answer["platform"] == "connected"
    assert all(answer["workers"].values())
    assert answer["journal"] == {"spool": 0, "writable": True}
    assert answer["queue"]["queued"] == 0
    platform = (await api.get("/health", await api.make_key(None))).json
    assert {one["tenant_id"] for one in platform["sessions"]} == {shop.id, other.id}
    assert (await api.get("/health", "wrong")).status == 401


async def test_health_and_the_session_say_how_much_nobody_could_read(api: Api, shop: Tenant) -> None:
    other = await api.tenant("other")
    ours, theirs = (Place(api.db, TenantId(t.id), SessionId(t.session_id)) for t in (shop, other))
    async with running(api.db) as ingest:
        await ingest.submit(
            [
                *(ours.message(f"U{n}", placeholder=True) for n in range(3)),
                ours.message("H", placeholder=True, is_history=True),
                ours.message("C", placeholder=True, media_metadata={"call": "ringing"}),
                ours.message("M"),
                theirs.message("U", placeholder=True),
            ]
        )
    await fetch(
        api.db,
        "UPDATE et_messages SET created_at = now() - INTERVAL '25 hours' WHERE channel_message_id = 'U0'",
    )
    platform = await api.make_key(None)
    await give_lease(api.db, other.place, "gw-2")

    async def shown(key: str) -> tuple[int, dict[int, int]]:
        answer = (await api.get("/health", key)).json
        return answer["possible_loss"], {one["tenant_id"]: one["possible_loss"] for one in answer["sessions"]}

    assert await shown(shop.key) == (2, {shop.id: 2})
    assert await shown(platform) == (3, {shop.id: 2, other.id: 1})
    session = (await api.get(f"/sessions/{shop.id}/{shop.session_id}", shop.key)).json
    assert session["counters"]["possible_loss"] == 2
    assert (await api.get("/health")).json["possible_loss"] is None
    # One that its sender's phone sends again is lost no more.
    async with running(api.db) as ingest:
        await ingest.submit([ours.message("U1")])
    assert await shown(shop.key) == (1, {shop.id: 1})


async def test_health_tells_which_gateways_live_and_how_much_each_holds(api: Api, shop: Tenant) -> None:
    for owner, ago in (("gw-1", 1), ("gw-2", 2), ("gw-dead", 95)):
        await fetch(
            api.db,
            "INSERT INTO et_gateways (owner, host, data_dir_id, heartbeat_at)"
            " VALUES ($1, 'host-' || $1, 'd', now() - make_interval(secs => $2))",
            owner,
            ago,
        )
    other = await api.tenant("other")
    await give_lease(api.db, other.place, "gw-2")
    shown = (await api.get("/health", await api.make_key(None))).json["gateways"]
    assert [(one["owner"], one["alive"], one["here"], one["sessions"]) for one in shown] == [
        ("gw-1", True, True, 1),
        ("gw-2", True, False, 1),
        ("gw-dead", False, False, 0),
    ]
    # A tenant learns of those that run its own sessions.
    assert [one["owner"] for one in (await api.get("/health", shop.key)).json["gateways"]] == ["gw-1"]
    assert not (await api.get("/health")).json["gateways"]


async def test_a_session_whose_journal_takes_nothing_is_503(api: Api) -> None:
    api.manager.durable = False
    answer = await api.get("/health")
    assert (answer.status, answer.json["status"]) == (503, "error")
    api.manager.durable = True
    assert (await api.get("/health")).status == 200


async def test_a_dead_core_task_is_503(api: Api) -> None:
    api.manager.healthy = False
    answer = await api.get("/health")
    assert (answer.status, answer.json["status"]) == (503, "error")


async def test_metrics_are_text_that_promtool_accepts(api: Api, shop: Tenant) -> None:
    await shop.receive("hello")
    await api.post("/send", shop.send_body(), shop.key)
    answer = await api.get("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    for name in FIVE:
        assert re.search(rf"^# TYPE {name} ", text, re.M), name
    assert f'wa_messages_written_total{{tenant_id="{shop.id}"}} 1.0' in text
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: install the Debian package prometheus"
    checked = await asyncio.create_subprocess_exec(
        promtool, "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=STDOUT
    )
    said, _ = await asyncio.wait_for(checked.communicate(answer.body), 30)
    assert (checked.returncode, said) == (0, b"")


async def test_the_first_start_makes_one_platform_key(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    key = await ensure_platform_key(database, settings)
    assert key is not None
    assert await ensure_platform_key(database, settings) is None
    rows = await fetch(database, "SELECT tenant_id, scopes FROM et_api_keys")
    assert [(row["tenant_id"], sorted(row["scopes"])) for row in rows] == [
        (None, ["admin", "read", "send", "sessions"])
    ]


async def test_admin_api_key_is_a_platform_key(api: Api, tmp_path: Path) -> None:
    secret = "operator-chose-this-key"
    settings = Settings(data_dir=tmp_path, admin_api_key=SecretStr(secret))
    for _ in range(2):
        assert await ensure_platform_key(api.db, settings) is None
    assert (await api.get("/api/v1/tenants", secret)).status == 200
    assert await value(api.db, "SELECT count(*) FROM et_api_keys WHERE tenant_id IS NULL") == 1
