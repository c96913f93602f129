"""Uploads and downloads over HTTP: streamed, ranged, walled, and no input that makes a 500."""

from __future__ import annotations

import os
from typing import Any

import aiohttp
import pytest

from core.channel import SessionId
from core.metrics import Metrics
from gateway.api import uploads
from gateway.media import MediaStore, MediaWorker
from tests.support.api import Answer, Api, Tenant
from tests.support.media import MediaChannel, Owned, picture
from tests.support.outbound import eventually, value

UPLOADS = "/api/v1/messaging/uploads"


async def post_form(api: Api, key: str, form: aiohttp.FormData | aiohttp.MultipartWriter) -> Answer:
    headers = {"Authorization": f"Bearer {key}"}
    async with api.session.post(api.url + UPLOADS, data=form, headers=headers) as response:
        return Answer(response.status, response.headers, await response.read())


async def post_raw(api: Api, key: str, body: bytes, kind: str, query: str = "") -> Answer:
    return await api.call("POST", UPLOADS + query, key=key, raw=body, headers={"Content-Type": kind})


async def message_with(api: Api, tenant: Tenant, media: Any, direction: str = "inbound") -> int:
    """A stored message of this tenant with this media_metadata."""
    answer = await tenant.receive("look", message_id=f"M{os.urandom(4).hex()}")
    assert answer.json["stored"] == 1
    message_id: int = await value(api.db, "SELECT max(id) FROM et_messages WHERE tenant_id = $1", tenant.id)
    await value(
        api.db,
        "UPDATE et_messages SET media_metadata = $2, message_type = 'image' WHERE id = $1",
        message_id,
        media,
    )
    return message_id


async def stored_media(api: Api, tenant: Tenant, body: bytes, **said: Any) -> str:
    """The path of a message whose media was downloaded by the real worker."""
    message_id = await message_with(api, tenant, {"state": "pending", **said})
    owned = Owned({SessionId(tenant.session_id): MediaChannel(body)})
    store = MediaStore(api.services.settings.media_dir)
    worker = MediaWorker(api.db, Metrics(), store, owned)
    await worker.start()

    async def there() -> bool:
        url = await value(api.db, "SELECT media_url FROM et_messages WHERE id = $1", message_id)
        return url is not None

    await eventually(there)
    await worker.stop()
    return f"/api/v1/messaging/messages/{message_id}/media"


async def test_a_file_is_uploaded_as_it_is_or_in_a_form(api: Api, shop: Tenant) -> None:
    body = picture()
    raw = await post_raw(api, shop.key, body, "image/jpeg", "?filename=..%2Fcat.png")
    assert (raw.status, raw.json["mime_type"], raw.json["size"]) == (201, "image/png", len(body))
    form = aiohttp.FormData()
    form.add_field("note", "not a file")
    form.add_field("file", body, filename="dog.png", content_type="image/png")
    formed = await post_form(api, shop.key, form)
    assert (formed.status, formed.json["mime_type"], formed.json["size"]) == (201, "image/png", len(body))
    async with api.db.worker() as conn:
        kept = await conn.fetch("SELECT id, filename, sha256 FROM et_uploads ORDER BY id")
    assert [(row["id"], row["filename"]) for row in kept] == [
        (raw.json["id"], "cat.png"),
        (formed.json["id"], "dog.png"),
    ]
    assert kept[0]["sha256"] == kept[1]["sha256"]


async def test_a_message_can_name_an_upload_and_shows_it_while_it_waits(api: Api, shop: Tenant) -> None:
    upload = (await post_raw(api, shop.key, picture(), "image/png", "?filename=cat.png")).json
    body = {
        "tenant_id": shop.id,
        "channel_session_id": shop.session_id,
        "recipient": "+60111222333",
        "message_type": "image",
        "media_url": f"upload:{upload['id']}",
        "send_at": "2100-01-01T00:00:00Z",
    }
    created = await api.post("/api/v1/messaging/outbound", body, shop.key)
    assert created.status == 201
    shown = await api.get(f"/api/v1/messaging/messages/{created.json['message_id']}/media", shop.key)
    assert (shown.status, shown.body) == (200, picture())


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/octet-stream"),
        (b"", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nv\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name=a; filename="f"\r\n\r\nhalf', "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name=a; filename="f"\r\nContent-Transfer-Encoding: base64\r\n\r\nAA==\r\n'
         b"--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nbad header\r\n\r\nv\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\nv\r\n--y--\r\n--x--\r\n",
         "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
async def test_what_holds_no_file_is_refused_and_leaves_nothing(
    api: Api, shop: Tenant, body: bytes, kind: str
) -> None:
    answer = await post_raw(api, shop.key, body, kind)
    assert (answer.status, answer.headers["Content-Type"]) == (422, "application/problem+json"), answer.body
    assert await value(api.db, "SELECT count(*) FROM et_uploads") == 0
    assert not [path for path in api.services.settings.media_dir.rglob("*") if path.is_file()]


async def test_two_files_at_once_are_refused(api: Api, shop: Tenant) -> None:
    form = aiohttp.FormData()
    form.add_field("a", b"one", filename="a.txt")
    form.add_field("b", b"two", filename="b.txt")
    answer = await post_form(api, shop.key, form)
    assert (answer.status, "one file at a time" in answer.json["detail"]) == (422, True)


async def test_too_large_is_413_announced_or_not(
    api: Api, shop: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "LIMIT", 100_000)
    body = os.urandom(100_001)

    async def unannounced() -> Any:
        yield body

    headers = {"Authorization": f"Bearer {shop.key}", "Content-Type": "application/octet-stream"}
    assert (await post_raw(api, shop.key, body, "application/octet-stream")).status == 413
    async with api.session.post(api.url + UPLOADS, data=unannounced(), headers=headers) as response:
        assert response.status == 413
    assert (await post_raw(api, shop.key, body[:-1], "application/octet-stream")).status == 201


async def test_stored_media_is_served_whole_and_in_ranges(api: Api, shop: Tenant) -> None:
    body = os.urandom(200_000)
    path = await stored_media(api, shop, body, filename='naïve "x".pdf', mime_type="application/pdf")
    whole = await api.get(path, shop.key)
    assert (whole.status, whole.body) == (200, body)
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    assert whole.headers["Content-Type"] == "application/pdf"
    assert whole.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    assert whole.headers["Content-Disposition"] == (
        "attachment; filename=\"na_ve x.pdf\"; filename*=UTF-8''na%C3%AFve%20x.pdf"
    )
    part = await api.get(path, shop.key, headers={"Range": "bytes=1000-1999"})
    assert (part.status, part.body) == (206, body[1000:2000])
    assert part.headers["Content-Range"] == "bytes 1000-1999/200000"
    tail = await api.get(path, shop.key, headers={"Range": "bytes=-5"})
    assert (tail.status, tail.body) == (206, body[-5:])
    for wrong in ("bytes=200000-", "bytes=a-b", "bytes=5-1", "lines=1-2"):
        outside = await api.get(path, shop.key, headers={"Range": wrong})
        assert (outside.status, outside.code) == (416, "range_not_satisfiable"), wrong
        assert outside.headers["Content-Range"] == "bytes */200000"


async def test_a_page_in_a_file_is_a_download(api: Api, shop: Tenant) -> None:
    path = await stored_media(api, shop, b"<html><script>alert(1)</script>", filename="a.html")
    answer = await api.get(path, shop.key)
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["Content-Security-Policy"].startswith("sandbox")


async def test_what_is_on_its_way_gone_or_never_was_says_so(api: Api, shop: Tenant) -> None:
    path = await stored_media(api, shop, b"bytes")
    states: list[tuple[Any, int, str]] = [
        ({"state": "pending"}, 409, "media_pending"),
        ({"state": "failed", "error": "media_expired", "reason": "dropped"}, 410, "media_expired"),
        ({"state": "stored", "sha256": "a" * 64}, 404, "no_media"),
        ({"latitude": 1}, 404, "no_media"),
        (None, 404, "no_media"),
        ([1], 404, "no_media"),
    ]
    for said, status, code in states:
        message_id = await message_with(api, shop, said)
        answer = await api.get(f"/api/v1/messaging/messages/{message_id}/media", shop.key)
        assert (answer.status, answer.code) == (status, code)
    for file in api.services.settings.media_dir.rglob("*"):
        if file.is_file():
            file.unlink()
    gone = await api.get(path, shop.key)
    assert (gone.status, gone.code) == (404, "media_not_here")


async def test_another_tenants_media_is_not_there(api: Api, shop: Tenant) -> None:
    stranger = await api.tenant("stranger")
    path = await stored_media(api, shop, b"private")
    assert (await api.get(path, stranger.key)).status == 404
    assert (await api.get(path)).status == 401
    upload = (await post_raw(api, shop.key, b"private", "text/plain")).json["id"]
    message_id = await message_with(api, stranger, None)
    await value(api.db, "UPDATE et_messages SET media_url = $2 WHERE id = $1", message_id, f"upload:{upload}")
    assert (await api.get(f"/api/v1/messaging/messages/{message_id}/media", stranger.key)).status == 404
