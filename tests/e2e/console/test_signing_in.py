"""Who gets in: keys, cookies, tenants, scopes, forms that are not ours."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.console.conftest import Shop
from tests.support.browser import Desk
from tests.support.gateway import ADMIN_KEY, GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="package")


class Visitor:
    """A browser without pictures: cookies, forms, redirects."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http, self.url, self.csrf = http, url, ""

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.http.get(self.url + path, headers=headers) as answer:
            return await self._read(answer)

    async def post(self, path: str, **form: str) -> tuple[int, str]:
        async with self.http.post(self.url + path, data={"csrf": self.csrf, **form}) as answer:
            return await self._read(answer)

    async def _read(self, answer: aiohttp.ClientResponse) -> tuple[int, str]:
        text = await answer.text()
        found = re.search(r'name="csrf" value="([^"]+)"', text)
        self.csrf = found[1] if found else self.csrf
        return answer.status, text

    async def sign_in(self, key: str) -> tuple[int, str]:
        await self.get("/")
        return await self.post("/console/sign-in", key=key)


@pytest_asyncio.fixture(loop_scope="package")
async def visitor(gateway: GatewayProcess) -> AsyncIterator[Visitor]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
        yield Visitor(http, gateway.url)


async def test_the_key_opens_the_door_and_stands_nowhere(desk: Desk, shop: Shop) -> None:
    assert desk.page.url == f"{desk.url}{shop.path}"
    assert shop.key not in await desk.page.content()
    assert not any(shop.key in url for url in desk.requests)
    cookies = {cookie["name"]: cookie for cookie in await desk.context.cookies()}
    session = cookies["gateway_console"]
    assert (session["httpOnly"], session["sameSite"], shop.key in session["value"]) == (True, "Strict", False)
    assert "gateway_console" not in await desk.page.evaluate("document.cookie")
    await desk.press("Sign out")
    await desk.page.wait_for_selector("#key")
    await desk.context.add_cookies([session])
    await desk.page.goto(f"{desk.url}{shop.path}")
    await desk.page.wait_for_selector("#key")  # the cookie is worth nothing any more


async def test_a_wrong_key_is_refused_in_words(visitor: Visitor) -> None:
    status, text = await visitor.sign_in("cg_0123456789_" + "A" * 43)
    assert status == 401
    assert "The key is not valid; check that it was copied whole." in text
    assert "A" * 43 not in text


async def test_without_a_session_every_page_leads_to_the_door_and_back(visitor: Visitor, shop: Shop) -> None:
    status, text = await visitor.get(f"{shop.path}/threads?show=human")
    assert status == 200
    assert f'name="next" value="{shop.path}/threads?show=human"' in text
    for elsewhere in ("https://example.com", "//example.com", "/console\\..", "/send"):
        assert 'name="next"' not in (await visitor.get(f"/?next={elsewhere}"))[1]


async def test_a_tenants_key_sees_no_other_tenant_and_the_attempt_is_audited(
    visitor: Visitor, shop: Shop
) -> None:
    other = (await shop.gateway.ok("POST", "/api/v1/tenants", {"name": "Other"}))["id"]
    await visitor.sign_in(shop.key)
    for path in ("", "/threads", "/messages", "/channels/1", "/threads/1", "/stream"):
        status, text = await visitor.get(f"/console/{other}{path}")
        assert (status, "Other" in text) == (403, False), path
    rows = await shop.sql(
        "SELECT count(*) FROM et_audit_log WHERE tenant_id = $1 AND event = 'access_denied'"
        " AND detail ->> 'reason' = 'other_tenant'",
        shop.tenant,
    )
    assert rows == 6
    # Another tenant's row under one's own path is simply not there.
    theirs = await shop.gateway.ok("POST", f"/sessions/{other}", {"channel_type": "whatsapp"})
    assert (await visitor.get(f"{shop.path}/channels/{theirs['session_id']}"))[0] == 404
    assert (await visitor.post(f"{shop.path}/channels/{theirs['session_id']}/pair"))[0] == 404


async def test_a_platform_key_chooses_a_tenant(visitor: Visitor, shop: Shop) -> None:
    status, text = await visitor.sign_in(ADMIN_KEY)
    assert (status, f'href="/console/{shop.tenant}"' in text) == (200, True)
    assert re.search(
        r"Gateways.*?session.*?Alive", text, re.S
    )  # which gateways there are, for the platform alone
    status, text = await visitor.post("/console/tenants", name="<Fresh & new>")
    assert (status, "&lt;Fresh &amp; new&gt;" in text) == (200, True)
    assert (await visitor.get("/console/999999999"))[0] == 404


async def test_a_form_that_is_not_ours_changes_nothing(visitor: Visitor, shop: Shop) -> None:
    await visitor.sign_in(shop.key)
    for forged in ("", "x" * 32, "ß"):
        status, _ = await visitor.post(f"{shop.path}/channels", csrf=forged, name="Forged")
        assert status == 403
    await visitor.get("/")
    visitor.csrf = "forged"
    assert (await visitor.post("/console/sign-in", key=ADMIN_KEY))[0] == 403
    assert await shop.sql("SELECT count(*) FROM et_channel_sessions WHERE tenant_id = $1", shop.tenant) == 0


async def test_a_key_without_the_scope_sees_no_buttons_and_may_not_press_them(
    visitor: Visitor, shop: Shop
) -> None:
    session = (await shop.gateway.ok("POST", f"/sessions/{shop.tenant}", {"channel_type": "whatsapp"}))[
        "session_id"
    ]
    await shop.gateway.ok("GET", f"/sessions/{shop.tenant}/{session}/qr", Accept="application/json")
    await visitor.sign_in(await shop.key_with("read"))
    status, text = await visitor.get(f"{shop.path}/channels/{session}")
    assert (status, 'id="qr"' in text, "Stop linking" in text) == (200, False, False)
    for path in (
        "/channels",
        f"/channels/{session}/disconnect",
        f"/channels/{session}/log-out",
        "/threads/1/reply",
    ):
        status, text = await visitor.post(shop.path + path, text="x")
        assert (status, "scope" in text) == (403, True), path


async def test_a_revoked_key_is_out_within_seconds(visitor: Visitor, shop: Shop) -> None:
    await visitor.sign_in(shop.key)
    assert "Channels" in (await visitor.get(shop.path))[1]
    await shop.sql("UPDATE et_api_keys SET revoked_at = now() WHERE tenant_id = $1", shop.tenant)
    async with visitor.http.get(visitor.url + shop.path + "/stream") as stream:
        body = await stream.content.read()  # ends by itself
    assert b"event: signed-out" in body
    assert 'id="key"' in (await visitor.get(shop.path))[1]


async def test_pages_say_what_is_wrong_and_let_nothing_in(visitor: Visitor, shop: Shop) -> None:
    await visitor.sign_in(shop.key)
    for path in ("/console/nowhere", f"{shop.path}/threads/99", f"{shop.path}/threads/9999999999999999999"):
        status, text = await visitor.get(path)
        assert (status, "Start from the beginning" in text) == (404, True), path
    assert (await visitor.get(f"{shop.path}/threads?q=%00%25_%5C&show=nonsense&last=9"))[0] == 200
    assert (await visitor.get(f"{shop.path}", Cookie="tz=../../etc/passwd"))[0] == 200
    for path in ("/console/sign-in", f"{shop.path}/channels"):
        for status, kind, body in (
            (415, "application/json", b"{}"),
            (415, "multipart/form-data; boundary=x", b"--nothing"),
            (422, "application/x-www-form-urlencoded; charset=nothing", b"csrf=x"),
            (422, "application/x-www-form-urlencoded; charset=ascii", "csrf=ß".encode()),
            (413, "application/x-www-form-urlencoded", b"csrf=" + b"x" * (2 << 20)),
        ):
            async with visitor.http.post(
                visitor.url + path, data=io.BytesIO(body), headers={"Content-Type": kind}
            ) as refused:
                assert (refused.status, refused.content_type) == (status, "text/html"), (path, kind)
    async with visitor.http.get(visitor.url + shop.path) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == (
            "no-store",
            "nosniff",
        )
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
