"""Sessions and pairing: everything through rows, played here by the owner of the session in SQL."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from core.channel import SessionState, SessionStatus
from core.database import Database
from core.errors import ThrottledError
from core.store import session_moves
from core.store import sessions as store
from tests.support.api import Api, Tenant, running_api
from tests.support.outbound import eventually, fetch, value

QR = "2@abc,def,ghi,jkl"


async def _new(api: Api, shop: Tenant, **more: Any) -> int:
    answer = await api.post(f"/sessions/{shop.id}", {"channel_type": "whatsapp", **more}, shop.key)
    assert answer.status == 201, answer.body
    return int(answer.json["session_id"])


async def _show_qr(api: Api, session_id: int, qr: str = QR, seconds: float = 60) -> None:
    """What the gateway that owns the session does."""
    async with api.db.worker() as conn:
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        await store.show_pairing(conn, session_id, "qr", qr=qr, expires_at=expires)


async def _wanted(api: Api, session_id: int, method: str) -> None:
    sql = "SELECT wanted = 'connected' AND login_method = $2 FROM et_session_runtime WHERE session_id = $1"
    await eventually(lambda: value(api.db, sql, session_id, method))


async def test_a_session_is_made_listed_changed_and_forgotten(api: Api, shop: Tenant) -> None:
    workspace = await value(
        api.db, "INSERT INTO et_workspaces (tenant_id, name) VALUES ($1, 'w') RETURNING id", shop.id
    )
    session_id = await _new(
        api,
        shop,
        name="Sales",
        default_workspace_id=workspace,
        expected_identifier="60 12-345 6789",
        proxy="socks5://user:pw@proxy.example:1080",
        credentials={"app_secret": "s3cret"},
    )
    one = (await api.get(f"/sessions/{shop.id}/{session_id}", shop.key)).json
    assert one["status"] == "pairing"
    assert one["wanted"] == "disconnected"
    assert one["default_workspace_id"] == workspace
    assert one["expected_identifier"] == "+60123456789"
    assert one["proxy"] == "socks5://proxy.example:1080"
    assert "qr" in one["action"].lower()
    stored = json.dumps(
        [dict(row) for row in await fetch(api.db, "SELECT metadata FROM et_channel_sessions")]
    )
    assert "pw" not in stored
    assert "s3cret" not in stored
    listed = (await api.get(f"/sessions/{shop.id}", shop.key)).json
    assert [item["session_id"] for item in listed] == [shop.session_id, session_id]
    assert set(listed[0]) == {
        "session_id", "channel_type", "identifier", "name", "status", "status_reason", "last_connected", "action",
    }  # fmt: skip
    changed = await api.patch(
        f"/sessions/{shop.id}/{session_id}",
        {"name": "Support", "default_workspace_id": None, "proxy": None},
        shop.key,
    )
    assert (changed.json["name"], changed.json["default_workspace_id"], changed.json["proxy"]) == (
        "Support",
        None,
        None,
    )


WRONG: list[tuple[dict[str, Any], str]] = [
        ({"channel_type": "fax"}, "channel_type"),
        ({"channel_type": "whatsapp", "expected_identifier": "hello"}, "expected_identifier"),
        ({"channel_type": "whatsapp", "proxy": "ftp://x"}, "proxy"),
        ({"channel_type": "whatsapp", "name": " "}, "name"),
        ({}, "channel_type"),
    ]  # fmt: skip


async def test_what_is_wrong_with_a_new_session_is_named(api: Api, shop: Tenant) -> None:
    for body, field in WRONG:
        answer = await api.post(f"/sessions/{shop.id}", body, shop.key)
        assert (answer.status, answer.json["errors"][0]["field"]) == (422, field)


async def test_connect_and_disconnect_are_wishes_and_idempotent(api: Api, shop: Tenant) -> None:
    session_id = await _new(api, shop)
    sql = "SELECT wanted, generation FROM et_session_runtime WHERE session_id = $1"
    for path, wanted in (("connect", "connected"), ("disconnect", "disconnected")):
        for _ in range(2):
            assert (await api.post(f"/sessions/{shop.id}/{session_id}/{path}", None, shop.key)).status == 200
        assert (await fetch(api.db, sql, session_id))[0]["wanted"] == wanted
    assert (await fetch(api.db, sql, session_id))[0]["generation"] == 2


async def test_the_qr_starts_the_pairing_and_comes_in_four_forms(api: Api, shop: Tenant) -> None:
    session_id = await _new(api, shop)
    path = f"/sessions/{shop.id}/{session_id}/qr"
    first = asyncio.create_task(api.get(path, shop.key, headers={"Accept": "application/json"}))
    await _wanted(api, session_id, "qr")
    await _show_qr(api, session_id)
    answer = await asyncio.wait_for(first, 5)
    assert answer.status == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json["qr"] == QR
    assert answer.json["status"] == "pairing"
    assert answer.json["image"].startswith("data:image/png;base64,")
    assert answer.json["expires_at"]
    generation = await value(
        api.db, "SELECT generation FROM et_session_runtime WHERE session_id = $1", session_id
    )
    png = await api.get(path, shop.key, headers={"Accept": "image/png"})
    svg = await api.get(path, shop.key, headers={"Accept": "image/svg+xml"})
    text = await api.get(path, shop.key, headers={"Accept": "text/plain"})
    assert png.body.startswith(b"\x89PNG")
    assert b"<svg" in svg.body
    assert "█" in text.body.decode() or "▀" in text.body.decode()
    assert {one.headers["Cache-Control"] for one in (png, svg, text)} == {"no-store"}
    assert (await api.get(path, shop.key, headers={"Accept": "application/pdf"})).status == 406
    now = await value(api.db, "SELECT generation FROM et_session_runtime WHERE session_id = $1", session_id)
    assert now == generation, "asking for the current QR must not start the pairing over"


async def test_a_paired_session_has_no_qr(api: Api, shop: Tenant) -> None:
    answer = await api.get(f"/sessions/{shop.id}/{shop.session_id}/qr", shop.key)
    assert (answer.status, answer.code) == (409, "already_paired")
    code = await api.post(
        f"/sessions/{shop.id}/{shop.session_id}/pairing-code", {"phone": "+60123456789"}, shop.key
    )
    assert (code.status, code.code) == (409, "already_paired")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    kind = ""
    async for line in response.content:
        text = line.decode().strip()
        if text.startswith("event: "):
            kind = text[7:]
        elif text.startswith("data: "):
            yield kind, json.loads(text[6:])


def _stream(api: Api, shop: Tenant, session_id: int) -> Any:
    headers = {"Authorization": f"Bearer {shop.key}", "Accept": "text/event-stream"}
    return api.session.get(f"{api.url}/sessions/{shop.id}/{session_id}/qr", headers=headers)


async def test_the_stream_shows_every_new_code_and_then_paired(api: Api, shop: Tenant) -> None:
    session_id = await _new(api, shop)
    async with asyncio.timeout(15), _stream(api, shop, session_id) as response:
        assert response.headers["Cache-Control"] == "no-store"
        events = _events(response)
        await _wanted(api, session_id, "qr")
        await _show_qr(api, session_id, "first")
        assert [(kind, data["qr"]) for kind, data in [await anext(events)]] == [("qr", "first")]
        await _show_qr(api, session_id, "second")
        assert (await anext(events))[1]["qr"] == "second"
        async with api.db.worker() as conn, conn.transaction():
            await store.show_pairing(conn, session_id, "paired")
            await store.write_state(conn, session_id, SessionState(SessionStatus.ACTIVE))
        kind, data = await anext(events)
        assert (kind, data["session_id"]) == ("paired", session_id)
        assert [event async for event in events] == []


async def test_a_pairing_that_takes_up_an_older_session_says_which(api: Api, shop: Tenant) -> None:
    session_id, number = await _new(api, shop), "+60199999999"
    async with asyncio.timeout(15), _stream(api, shop, session_id) as response:
        events = _events(response)
        await _wanted(api, session_id, "qr")
        await _show_qr(api, session_id)
        await anext(events)
        async with api.db.worker() as conn, conn.transaction():
            older = await store.create(conn, shop.id, "whatsapp", identifier=number)
            assert (await session_moves.identify(conn, session_id, number)).outcome == "known"
            await session_moves.adopt(conn, api.services.keys, session_id, older.id, "gw-1", ttl=30)
        assert await anext(events) == ("paired", {"session_id": older.id})


async def test_a_pairing_nobody_scans_ends_in_timeout(api: Api, shop: Tenant) -> None:
    session_id = await _new(api, shop)
    async with asyncio.timeout(15), _stream(api, shop, session_id) as response:
        events = _events(response)
        await _wanted(api, session_id, "qr")
        async with api.db.worker() as conn:
            await store.show_pairing(conn, session_id, "timeout", reason="qr_timeout", stop=True)
        kind, data = await anext(events)
        assert (kind, data["reason"]) == ("timeout", "qr_timeout")


async def test_a_pairing_code_is_asked_for_and_shown(api: Api, shop: Tenant) -> None:
    session_id = await _new(api, shop)
    path = f"/sessions/{shop.id}/{session_id}/pairing-code"
    asked = asyncio.create_task(api.post(path, {"phone": "60 12-345 6789"}, shop.key))
    await _wanted(api, session_id, "code")
    phone = await value(
        api.db, "SELECT login_phone FROM et_session_runtime WHERE session_id = $1", session_id
    )
    assert phone == "+60123456789"
    async with api.db.worker() as conn:
        expires = datetime.now(UTC) + timedelta(seconds=100)
        await store.show_pairing(conn, session_id, "code", code="ABCD-EFGH", expires_at=expires)
    answer = await asyncio.wait_for(asked, 5)
    assert (answer.status, answer.json["code"]) == (200, "ABCD-EFGH")
    assert (await api.post(path, {"phone": "hello"}, shop.key)).json["errors"][0]["field"] == "phone"


async def test_settings_are_checked_by_the_channel_they_are_for(api: Api, shop: Tenant) -> None:
    path = f"/sessions/{shop.id}/{shop.session_id}"
    good = {"typing": True, "read_receipts": True, "groups": False, "call_policy": "decline"}
    assert (await api.patch(path, {"settings": good}, shop.key)).json["settings"] == good
    for wrong, field in (({"typping": True}, "settings.typping"), ({"groups": "no"}, "settings.groups")):
        answer = await api.patch(path, {"settings": wrong}, shop.key)
        assert (answer.status, answer.json["errors"][0]["field"]) == (422, field)
        body = {"channel_type": "whatsapp", "settings": wrong}
        assert (await api.post(f"/sessions/{shop.id}", body, shop.key)).status == 422
    assert (await api.get(path, shop.key)).json["settings"] == good
    # All of them are replaced.
    assert (await api.patch(path, {"settings": {}}, shop.key)).json["settings"] == {}


async def test_numbers_are_looked_up_in_small_portions_and_not_too_often(api: Api, shop: Tenant) -> None:
    class Hasty:
        async def check(self, recipients: list[str]) -> dict[str, bool]:
            raise ThrottledError("too often", retry_after=1.6, code="check_paced")

    path = f"/sessions/{shop.id}/{shop.session_id}/check"
    api.manager.capabilities[shop.session_id] = Hasty()
    many = {"recipients": [f"+6012300{n:04}" for n in range(51)]}
    assert (await api.post(path, many, shop.key)).status == 422
    answer = await api.post(path, {"recipients": many["recipients"][:50]}, shop.key)
    assert (answer.status, answer.json["code"], answer.headers["Retry-After"]) == (429, "check_paced", "2")


async def test_check_asks_the_live_channel(api: Api, shop: Tenant) -> None:
    class Checker:
        async def check(self, recipients: list[str]) -> dict[str, bool]:
            return {one: one.endswith("1") for one in recipients}

    path = f"/sessions/{shop.id}/{shop.session_id}/check"
    body = {"recipients": ["60 123 000 001", "+60123000002"]}
    assert (await api.post(path, body, shop.key)).status == 409
    api.manager.capabilities[shop.session_id] = Checker()
    answer = await api.post(path, body, shop.key)
    assert answer.json == {"results": {"60 123 000 001": True, "+60123000002": False}}
    wrong = await api.post(path, {"recipients": ["+60123000002", "x"]}, shop.key)
    assert wrong.json["errors"][0]["field"] == "recipients.1"


async def test_a_drawn_code_reads_back(api: Api, shop: Tenant) -> None:
    """The picture says what the row says: decoded modules are compared, not pixels."""
    import segno

    session_id = await _new(api, shop)
    await _show_qr(api, session_id)
    async with api.db.worker() as conn:
        await store.want(conn, session_id, "connected", login_method="qr")
    await _show_qr(api, session_id)
    answer = await api.get(f"/sessions/{shop.id}/{session_id}/qr", shop.key, headers={"Accept": "image/png"})
    expected = io.BytesIO()
    segno.make_qr(QR, error="L").save(expected, kind="png", scale=6, border=4)
    assert answer.body == expected.getvalue()


async def test_a_number_is_paired_used_and_forgotten_with_the_real_session_manager(
    database: Database, tmp_path: Path
) -> None:
    """From an empty tenant to a sent message, over HTTP alone; only the channel is scripted."""
    async with running_api(database, tmp_path, real_sessions=True) as api:
        platform_key = await api.make_key(None)
        tenant = (await api.post("/api/v1/tenants", {"name": "Acme"}, platform_key)).json["id"]
        made = await api.post(f"/sessions/{tenant}", {"channel_type": "whatsapp"}, platform_key)
        path = f"/sessions/{tenant}/{made.json['session_id']}"
        code = await api.get(f"{path}/qr", platform_key, headers={"Accept": "application/json"})
        assert (code.status, code.json["qr"]) == (200, "QR-1")
        headers = {"Authorization": f"Bearer {platform_key}", "Accept": "text/event-stream"}
        async with asyncio.timeout(15), api.session.get(f"{api.url}{path}/qr", headers=headers) as response:
            events = _events(response)
            assert (await anext(events))[1]["qr"] == "QR-1"
            await api.platform.channels[made.json["session_id"]].scan()
            kind, data = await anext(events)
            assert (kind, data["session_id"]) == ("paired", made.json["session_id"])
        await eventually(_status(api, path, platform_key, "active"))
        body = {
            "tenant_id": tenant,
            "channel_session_id": made.json["session_id"],
            "recipient": "+60111222333",
            "content": "hi",
        }
        assert (await api.post("/send", body, platform_key)).status == 200
        assert f'wa_sessions_active{{tenant_id="{tenant}"}} 1.0' in (await api.get("/metrics")).body.decode()
        assert (await api.get("/health")).json["platform"] == "connected"
        assert (await api.post(f"{path}/disconnect", None, platform_key)).status == 200
        await eventually(_status(api, path, platform_key, "disconnected"))
        assert (await api.get(f"{path}/qr", platform_key)).code == "already_paired"
        assert (await api.post("/send", body, platform_key)).status == 202
        gone = await api.delete(path, platform_key)
        assert (gone.status, gone.json["status"], gone.json["status_reason"]) == (
            200,
            "logged_out",
            "deleted",
        )
        assert (await api.post("/send", body, platform_key)).status == 409


def _status(api: Api, path: str, key: str, wanted: str) -> Any:
    async def check() -> bool:
        return bool((await api.get(path, key)).json["status"] == wanted)

    return check
