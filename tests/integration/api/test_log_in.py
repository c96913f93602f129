"""Sessions that log in with credentials, over HTTP: checked on the spot, refused in words, sealed, never shown."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core import log_in
from core.channel import SessionStatus
from core.database import Database
from core.store import credentials as sealed
from tests.support.api import Api, Tenant, running_api
from tests.support.log_in import RIGHT, WRONG, Desk, credentials
from tests.support.outbound import eventually, fetch, value


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def api(database: Database, tmp_path: Path, desk: Desk) -> AsyncIterator[Api]:
    async with running_api(database, tmp_path, more_kinds={"desk": desk.kind()}) as running:
        yield running


async def kept(api: Api, shop: Tenant, session_id: int) -> dict[str, object]:
    async with api.db.worker() as conn:
        return await sealed.get(conn, api.services.keys, tenant_id=shop.id, session_id=session_id)


async def test_credentials_are_checked_kept_sealed_and_never_shown(
    api: Api, shop: Tenant, desk: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    body = {"channel_type": "desk", "settings": {"x": 1}, "credentials": credentials(),
            "proxy": "http://me:pr0xy-pass@proxy.test:8080"}  # fmt: skip
    made = await api.post(f"/sessions/{shop.id}", body, shop.key)
    assert made.status == 201
    session_id = made.json["session_id"]
    assert (made.json["identifier"], made.json["name"], made.json["status"], made.json["proxy"]) == (
        "shop@desk.test",
        "The shop's desk",
        "disconnected",
        "http://proxy.test:8080",
    )
    [(asked, metadata)] = desk.asked
    assert (asked, metadata["settings"], metadata["proxy"]) == (credentials(), {"x": 1}, body["proxy"])
    # What the channel said is kept, with its defaults filled in.
    assert await kept(api, shop, session_id) == {"port": 993, **credentials(), "proxy": body["proxy"]}

    everywhere = [made.body.decode(), (await api.get(f"/sessions/{shop.id}", shop.key)).body.decode()]
    everywhere.append((await api.get(f"/sessions/{shop.id}/{session_id}", shop.key)).body.decode())
    everywhere.append((await api.get("/api/v1/audit", shop.key)).body.decode())
    assert '"session_created"' in everywhere[-1]
    for table in ("et_channel_sessions", "et_session_runtime", "et_audit_log", "et_session_credentials"):
        rows = await fetch(api.db, f"SELECT to_jsonb(t)::TEXT AS row FROM {table} t")
        everywhere += [row["row"] for row in rows]
    everywhere += capfd.readouterr()
    for secret in (RIGHT, "pr0xy-pass"):
        assert not any(secret in text for text in everywhere)


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        (credentials(WRONG), "credentials.password", "the server said: 535 ••• is not the password"),
        (credentials(host="nowhere"), "credentials.server.host", "there is no server called 'nowhere'"),
        (credentials(host="away.test"), "credentials", "the server cannot be reached now"),
        (credentials(WRONG, host="broken.test"), "credentials", "they could not be checked (ValueError)"),
        (credentials(host="hangs.test"), "credentials", "no answer within 0 s"),
        (None, "credentials", "credentials.username, credentials.password"),
        ({}, "credentials", "a desk session logs in with them"),
    ],
)
async def test_what_is_refused_is_named_and_nothing_is_stored(
    api: Api,
    shop: Tenant,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    given: dict[str, object] | None,
    field: str,
    says: str,
) -> None:
    monkeypatch.setattr(log_in, "CHECK_SECONDS", 0.2)
    answer = await api.post(f"/sessions/{shop.id}", {"channel_type": "desk", "credentials": given}, shop.key)
    assert answer.status == 422
    assert answer.json["errors"][0]["field"] == field
    assert says in answer.json["errors"][0]["detail"]
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert await value(api.db, "SELECT count(*) FROM et_channel_sessions WHERE channel_type = 'desk'") == 0
    assert await value(api.db, "SELECT count(*) FROM et_session_credentials") == 0
    said = answer.body.decode() + "".join(capfd.readouterr())
    assert WRONG not in said
    assert RIGHT not in said


async def test_new_credentials_are_checked_and_must_be_of_the_same_account(
    api: Api, shop: Tenant, desk: Desk
) -> None:
    body = {"channel_type": "desk", "credentials": credentials(), "proxy": "http://a:b@proxy.test:1"}
    session_id = (await api.post(f"/sessions/{shop.id}", body, shop.key)).json["session_id"]
    path = f"/sessions/{shop.id}/{session_id}"
    before = await kept(api, shop, session_id)
    for wrong, field in (
        (credentials(WRONG), "credentials.password"),
        (credentials(username="other@desk.test"), "credentials"),
    ):
        answer = await api.patch(path, {"credentials": wrong, "name": "Changed"}, shop.key)
        assert (answer.status, answer.json["errors"][0]["field"]) == (422, field)
    assert "add another session" in answer.json["detail"]
    assert await kept(api, shop, session_id) == before
    assert (await api.get(path, shop.key)).json["name"] == "The shop's desk"

    # A session that stands still because its old ones were refused tries again by itself.
    await api.post(f"{path}/connect", None, shop.key)
    wanted_at = await value(
        api.db, "SELECT wanted_at FROM et_session_runtime WHERE session_id = $1", session_id
    )
    fresh = credentials(host="new.desk.test")
    assert (await api.patch(path, {"credentials": fresh}, shop.key)).status == 200
    assert await kept(api, shop, session_id) == {"port": 993, **fresh, "proxy": body["proxy"]}
    row = (
        await fetch(
            api.db, "SELECT wanted, wanted_at FROM et_session_runtime WHERE session_id = $1", session_id
        )
    )[0]
    assert (row["wanted"], row["wanted_at"] > wanted_at) == ("connected", True)
    assert (await api.get("/api/v1/audit?event=session_credentials_changed", shop.key)).json["items"]


async def test_an_account_the_tenant_has_goes_on_unless_it_is_live(api: Api, shop: Tenant) -> None:
    body = {"channel_type": "desk", "credentials": credentials(), "name": "Desk"}
    first = (await api.post(f"/sessions/{shop.id}", body, shop.key)).json["session_id"]
    sql = "UPDATE et_channel_sessions SET status = $2 WHERE id = $1"
    await fetch(api.db, sql, first, "active")
    live = await api.post(f"/sessions/{shop.id}", body, shop.key)
    assert (live.status, f"session {first}, which is active" in live.json["detail"]) == (409, True)
    assert live.json["action"] == f"to change its credentials, change session {first}"
    await fetch(api.db, sql, first, "logged_out")
    again = await api.post(f"/sessions/{shop.id}", body | {"name": "Desk again"}, shop.key)
    assert (again.status, again.json["session_id"], again.json["name"]) == (201, first, "Desk again")
    # Another tenant may have the same account; it is another session there.
    other = await api.tenant("other")
    assert (await api.post(f"/sessions/{other.id}", body, other.key)).json["session_id"] != first


async def test_a_session_made_over_http_connects_with_what_was_kept(
    database: Database, tmp_path: Path, desk: Desk
) -> None:
    async with running_api(database, tmp_path, real_sessions=True, more_kinds={"desk": desk.kind()}) as api:
        key = await api.make_key(None)
        tenant = (await api.post("/api/v1/tenants", {"name": "Acme"}, key)).json["id"]
        made = await api.post(
            f"/sessions/{tenant}", {"channel_type": "desk", "credentials": credentials()}, key
        )
        path = f"/sessions/{tenant}/{made.json['session_id']}"
        assert (await api.post(f"{path}/connect", None, key)).status == 200

        async def live() -> bool:
            return bool((await api.get(path, key)).json["status"] == SessionStatus.ACTIVE)

        await eventually(live)
        channel = desk.platform.channels[made.json["session_id"]]
        assert channel.context.credentials["password"] == RIGHT
        assert (await api.delete(path, key)).status == 200
        assert await value(api.db, "SELECT count(*) FROM et_session_credentials") == 0
        again = await api.post(
            f"/sessions/{tenant}", {"channel_type": "desk", "credentials": credentials()}, key
        )
        assert (again.status, again.json["session_id"]) == (201, made.json["session_id"])
        assert RIGHT not in json.dumps(again.json)
