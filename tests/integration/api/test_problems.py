"""No input makes a 500, and every error says in one form what to do."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest

from core.database import Database
from gateway.api import Limits
from tests.support.api import Api, Tenant, running_api
from tests.support.postgres import PostgresServer

PROBLEM = {"type", "title", "status", "detail", "code", "request_id"}


ERRORS: list[tuple[str, str, int, str]] = [
        ("GET", "/nowhere", 404, "no_such_route"),
        ("GET", "/api/v1/messaging/import", 405, "method_not_allowed"),
        ("PUT", "/send", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/api/v1/messaging/leads", 401, "unauthenticated"),
    ]  # fmt: skip


async def test_errors_are_problems(api: Api) -> None:
    for method, path, status, code in ERRORS:
        answer = await api.call(method, path)
        assert (answer.status, answer.code) == (status, code)
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert set(answer.json) >= PROBLEM
        assert answer.json["request_id"] == answer.headers["X-Request-ID"]
        assert answer.json["status"] == status


async def test_a_sane_request_id_is_kept_and_any_other_replaced(api: Api) -> None:
    kept = await api.get("/health", headers={"X-Request-ID": "abc-123.4"})
    replaced = await api.get("/health", headers={"X-Request-ID": "a b;c" + "x" * 300})
    assert kept.headers["X-Request-ID"] == "abc-123.4"
    assert len(replaced.headers["X-Request-ID"]) == 32


BODIES: list[tuple[bytes, int, str]] = [
        (b"", 422, "invalid"),
        (b"{", 422, "malformed_json"),
        (b"[]", 422, "invalid"),
        (b"null", 422, "invalid"),
        (b"NaN", 422, "malformed_json"),
        (b'{"content": "\xff"}', 422, "malformed_json"),
        (b'{"content": "\\ud800"}', 422, "malformed_json"),
        (b'{"content": "a\\u0000b"}', 422, "invalid"),
        (b'{"\\u0000": 1}', 422, "invalid"),
        (b"[" * 5000, 422, "malformed_json"),
        (b'{"payload": ' + b"[" * 200 + b"]" * 200 + b"}", 422, "invalid"),
        (b'{"tenant_id": 99999999999999999999999}', 422, "invalid"),
        (b'{"tenant_id": 1e400}', 422, "malformed_json"),
        (b'{"tenant_id": true}', 422, "invalid"),
        (b'{"content": "' + b"x" * (1024 * 1024) + b'"}', 413, "too_large"),
    ]  # fmt: skip


async def test_no_body_makes_a_500(api: Api, shop: Tenant) -> None:
    for raw, status, code in BODIES:
        for path in ("/send", "/api/v1/messaging/outbound", f"/sessions/{shop.id}", "/api/v1/agents"):
            answer = await api.call("POST", path, key=shop.key, raw=raw)
            assert (answer.status, answer.code) == (status, code), (path, answer.body)


async def test_a_small_zip_of_a_big_body_is_413(api: Api, shop: Tenant) -> None:
    packed = gzip.compress(b'{"content": "' + b"x" * 50_000_000 + b'"}')
    answer = await api.call("POST", "/send", key=shop.key, raw=packed, headers={"Content-Encoding": "gzip"})
    assert answer.status == 413
    broken = await api.call(
        "POST", "/send", key=shop.key, raw=b"no zip", headers={"Content-Encoding": "gzip"}
    )
    assert broken.status in (400, 422)


CONTENT_TYPES = ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16")


async def test_another_content_type_is_415(api: Api, shop: Tenant) -> None:
    for kind in CONTENT_TYPES:
        answer = await api.call("POST", "/send", key=shop.key, raw=b"{}", headers={"Content-Type": kind})
        assert (answer.status, answer.code) == (415, "wrong_content_type")


QUERIES: list[str] = [
        "limit=0", "limit=-1", "limit=201", "limit=x", "limit=", "limit=99999999999999999999", "cursor=x", "cursor=",
        "cursor=W10", "cursor=WzFd", "cursor=WyJhIiwxXQ", "cursor=%00", "cursor=%ff", "cursor=%ed%a0%80", "colour=red",
        "limit=1&limit=2", "%00=1", "cursor=WyIwMDAxLTAxLTAxVDAwOjAwOjAwKzE0OjAwIiwxXQ",
        "cursor=WyIyMDI1LTAxLTAxVDAwOjAwOjAwKzAwOjAwIiw5OTk5OTk5OTk5OTk5OTk5OTk5OTldXQ",
    ]  # fmt: skip


async def test_a_wrong_query_is_422_with_the_parameter_named(api: Api, shop: Tenant) -> None:
    for query in QUERIES:
        answer = await api.get(f"/api/v1/messaging/threads?{query}", shop.key)
        assert answer.status == 422, answer.body
        assert answer.json["errors"][0]["field"]


NO_IDS: list[str] = ["0", "-1", "x", "9223372036854775808", "1e3", "%00", "%ff", "1%2f2", "١"]  # fmt: skip


async def test_an_id_that_can_be_none_is_404(api: Api, shop: Tenant) -> None:
    for text in NO_IDS:
        for path in (f"/api/v1/messaging/leads/{text}", f"/sessions/{shop.id}/{text}", f"/sessions/{text}"):
            answer = await api.get(path, shop.key)
            assert answer.status == 404, (path, answer.body)


STRANGE_KEYS: list[str] = ["", "x", "cg_", "ü" * 20, "cg_0000000000_" + "A" * 43, "A" * 600]  # fmt: skip


async def test_a_strange_key_is_401(api: Api) -> None:
    for key in STRANGE_KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        assert (await api.get("/api/v1/messaging/leads", headers=headers)).status == 401


async def test_search_text_is_no_pattern(api: Api, shop: Tenant) -> None:
    assert (await shop.receive("100% sure_thing")).status == 200
    for q, found in (("100%25 sure", 1), ("sure_thing", 1), ("1%25sure", 0), ("sureXthing", 0), ("%5C", 0)):
        answer = await api.get(f"/api/v1/messaging/threads?q={q}", shop.key)
        assert (answer.status, len(answer.json["items"])) == (200, found), q


async def test_too_many_requests_are_429_with_the_time_to_wait(database: Database, tmp_path: Path) -> None:
    async with running_api(database, tmp_path, limits=Limits(rate=1, burst=3)) as api:
        shop, other = await api.tenant(), await api.tenant("other")
        statuses = [(await api.get(f"/sessions/{shop.id}", shop.key)).status for _ in range(5)]
        assert statuses[:3] == [200, 200, 200]
        assert statuses[-1] == 429
        limited = await api.get(f"/sessions/{shop.id}", shop.key)
        assert int(limited.headers["Retry-After"]) >= 1
        assert (await api.get(f"/sessions/{other.id}", other.key)).status == 200
        assert (await api.get("/health")).status == 200


async def test_a_bug_is_a_500_that_tells_nothing(
    api: Api, shop: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr("core.store.crm.list_leads", broken)
    answer = await api.get("/api/v1/messaging/leads", shop.key)
    assert (answer.status, answer.code) == (500, "internal")
    assert b"hunter2" not in answer.body


async def test_without_the_database_it_is_503_with_retry_after(
    private_postgres: PostgresServer, tmp_path: Path
) -> None:
    from tests.conftest import migrate_blocking

    url = private_postgres.create_database()
    await asyncio.to_thread(migrate_blocking, url)
    database = await Database.open(url)
    try:
        async with running_api(database, tmp_path) as api:
            shop = await api.tenant()
            await asyncio.to_thread(private_postgres.kill)
            for path in (f"/sessions/{shop.id}", "/api/v1/messaging/threads", "/api/v1/audit"):
                answer = await api.get(path, shop.key)
                assert (answer.status, answer.code) == (503, "database_unavailable")
                assert int(answer.headers["Retry-After"]) > 0
            health = await api.get("/health")
            assert (health.status, health.json["status"]) == (200, "degraded")
            assert health.json["database"] == "disconnected"
            metrics = await api.get("/metrics")
            assert metrics.status == 200
    finally:
        await database.close()


BROKEN: list[bytes] = [
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    ]  # fmt: skip


async def test_a_request_too_broken_for_any_route_is_a_problem_too(api: Api) -> None:
    for raw in BROKEN:
        host, port = api.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
        assert b"X-Request-ID: " in head
        assert b"application/problem+json" in head
        assert b"broken_request" in body
        assert (await api.get("/health")).status == 200
