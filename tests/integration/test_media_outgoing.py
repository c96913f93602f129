"""From media_url to a file: uploads, own media, fetched addresses, walls between tenants. Real database and HTTPS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web

from core.channel import Attempt, MessageId, MessageType, OutboundMessage, QueueId
from core.database import Database
from core.errors import NotSentError, RefusedError
from core.metrics import Metrics
from core.store import media as rows
from gateway.media import Fetcher, MediaStore, OutgoingMedia, media_path, sweep
from tests.support.inbound import Place, make_place
from tests.support.media import picture, serving


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", reserve=0)


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


async def upload(
    place: Place, store: MediaStore, body: bytes, filename: str | None = "a.png", seconds: float = 3600
) -> str:
    async with store.draft(limit=1 << 20) as draft:
        await draft.write(body)
        content = await draft.keep()
    outgoing = OutgoingMedia(place.db, store)
    upload_id, _ = await outgoing.add_upload(
        place.tenant_id, content, declared=None, filename=filename, seconds=seconds
    )
    return f"upload:{upload_id}"


async def code_of(outgoing: OutgoingMedia, tenant_id: int, url: str, message_type: str | None = None) -> str:
    with pytest.raises(RefusedError) as error:
        await outgoing.outgoing_media(tenant_id, url, message_type)
    return error.value.code


async def enqueue(place: Place, url: str, message_type: str = "image") -> OutboundMessage:
    row = await place._row(
        "SELECT * FROM et_enqueue_outbound($1, $2, '+60111222333', NULL, $3, $4)",
        place.tenant_id,
        place.session_id,
        message_type,
        url,
    )
    attempt = Attempt(
        place.tenant_id,
        place.session_id,
        QueueId(row["queue_id"]),
        MessageId(row["message_id"]),
        1,
        "whatsapp:+60111222333",
    )
    return OutboundMessage(attempt, MessageType(message_type), media_url=url)


async def test_an_upload_is_a_file_with_a_safe_name(place: Place, store: MediaStore) -> None:
    url = await upload(place, store, picture("PNG", 31, 17), "../../my cat.png")
    media = await OutgoingMedia(place.db, store).outgoing_media(place.tenant_id, url, MessageType.IMAGE)
    assert media.path.read_bytes() == picture("PNG", 31, 17)
    assert (media.mime_type, media.filename, media.size) == (
        "image/png",
        "my cat.png",
        media.path.stat().st_size,
    )
    assert (media.width, media.height) == (31, 17)


async def test_another_tenants_upload_or_media_is_not_there(place: Place, store: MediaStore) -> None:
    other = await make_place(place.db)
    outgoing = OutgoingMedia(place.db, store)
    url = await upload(place, store, picture())
    sent = await outgoing.prepare(await enqueue(place, url))
    own = media_path(sent.attempt.message_id)
    assert sent.media is not None
    assert (await outgoing.outgoing_media(place.tenant_id, own)).sha256 == sent.media.sha256
    for theirs in (url, own, "upload:999999", media_path(999999)):
        assert await code_of(outgoing, other.tenant_id, theirs) == "media_not_found"


async def test_naming_a_content_is_not_having_it(place: Place, store: MediaStore) -> None:
    """A backend may write what it likes into its rows: it opens no file of another tenant."""
    other = await make_place(place.db)
    outgoing = OutgoingMedia(place.db, store)
    media = await outgoing.outgoing_media(place.tenant_id, await upload(place, store, b"a secret"))
    message = await enqueue(other, "upload:1")
    await other.value(
        "UPDATE et_messages SET media_metadata = $2 WHERE id = $1",
        message.attempt.message_id,
        {"state": "stored", "sha256": media.sha256},
    )
    own = media_path(message.attempt.message_id)
    assert await code_of(outgoing, other.tenant_id, own) == "media_not_found"


async def test_the_api_role_reads_its_own_files_and_writes_none(place: Place, store: MediaStore) -> None:
    other = await make_place(place.db)
    await upload(place, store, picture())
    for tenant, seen in ((place.tenant_id, 1), (other.tenant_id, 0)):
        async with place.db.tenant(tenant) as conn:
            assert await conn.fetchval("SELECT count(*) FROM et_uploads") == seen
            assert await conn.fetchval("SELECT count(*) FROM et_media_files") == seen
    statements = (
        "INSERT INTO et_media_files (tenant_id, sha256, size) VALUES ($1, repeat('a', 64), 1)",
        "UPDATE et_uploads SET mime_type = 'x' WHERE tenant_id = $1",
        "SELECT count(*) FROM et_media_jobs WHERE tenant_id = $1",
    )
    for statement in statements:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with place.db.tenant(place.tenant_id) as conn:
                await conn.execute(statement, place.tenant_id)


async def test_a_file_is_fetched_once_for_many_messages(place: Place, store: MediaStore) -> None:
    metrics = Metrics()

    async def answer(_request: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return web.Response(body=picture(), content_type="image/png")

    async with serving(answer) as site:
        outgoing = OutgoingMedia(place.db, store, site.fetcher(), metrics=metrics)
        messages = [await enqueue(place, site.url("/cat.png?token=secret")) for _ in range(5)]
        prepared = await asyncio.gather(*(outgoing.prepare(message) for message in messages))
    assert len(site.requests) == 1
    assert {p.media.filename for p in prepared if p.media} == {"cat.png"}
    said = [row["media_metadata"] for row in await place.rows("media_metadata")]
    assert [(m["state"], m["mime_type"]) for m in said] == [("stored", "image/png")] * 5
    assert metrics.registry.get_sample_value("gateway_media_fetches_total", {"outcome": "fetched"}) == 1
    kept = await place.fetch("SELECT to_jsonb(u)::TEXT AS row FROM et_uploads u")
    assert "secret" not in kept[0]["row"]


async def test_what_was_fetched_is_no_upload_and_runs_out(place: Place, store: MediaStore) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=picture(), content_type="image/png")

    async with serving(answer) as site:
        outgoing = OutgoingMedia(place.db, store, site.fetcher())
        await outgoing.outgoing_media(place.tenant_id, site.url("/a.png"))
        upload_id = await place.value("SELECT id FROM et_uploads")
        assert await code_of(outgoing, place.tenant_id, f"upload:{upload_id}") == "media_not_found"
        await place.value("UPDATE et_uploads SET expires_at = now()")
        await outgoing.outgoing_media(place.tenant_id, site.url("/a.png"))
    assert len(site.requests) == 2
    assert await place.value("SELECT id FROM et_uploads") == upload_id


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://127.0.0.1:1/x", "media_private_address"),
        ("https://169.254.169.254/latest/meta-data", "media_private_address"),
        ("http://example.com/x", "media_bad_url"),
        ("upload:", "media_bad_url"),
        ("upload:1 OR 1=1", "media_bad_url"),
        ("upload:-1", "media_bad_url"),
        ("/api/v1/messaging/messages/../media", "media_bad_url"),
        ("/etc/passwd", "media_bad_url"),
        ("file:///etc/passwd", "media_bad_url"),
        ("https://" + "\x00", "media_bad_url"),
    ],
)
async def test_what_cannot_be_sent_is_refused_clearly(
    place: Place, store: MediaStore, url: str, code: str
) -> None:
    assert await code_of(OutgoingMedia(place.db, store), place.tenant_id, url) == code


async def test_a_file_of_the_wrong_type_is_refused_whatever_it_is_called(
    place: Place, store: MediaStore
) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=b"%PDF-1.4\n\xe2\xe3" + bytes(100), content_type="image/png")

    url = await upload(place, store, b"just words", "photo.png")
    async with serving(answer) as site:
        outgoing = OutgoingMedia(place.db, store, site.fetcher())
        assert await code_of(outgoing, place.tenant_id, url, "image") == "media_wrong_type"
        assert await code_of(outgoing, place.tenant_id, site.url("/p.png"), "image") == "media_wrong_type"
        as_document = await outgoing.outgoing_media(place.tenant_id, site.url("/p.png"), "document")
    assert as_document.mime_type == "application/pdf"


async def test_bytes_that_are_on_another_gateways_disk_can_be_waited_for(
    place: Place, store: MediaStore, tmp_path: Path
) -> None:
    url = await upload(place, store, picture())
    elsewhere = OutgoingMedia(place.db, MediaStore(tmp_path / "other", reserve=0))
    with pytest.raises(NotSentError, match="must share DATA_DIR") as error:
        await elsewhere.outgoing_media(place.tenant_id, url)
    assert error.value.code == "media_not_here"


async def test_a_message_without_media_is_left_alone(place: Place, store: MediaStore) -> None:
    message = await enqueue(place, "upload:1")
    plain = OutboundMessage(message.attempt, MessageType.TEXT, "hi")
    assert await OutgoingMedia(place.db, store, Fetcher()).prepare(plain) is plain


async def test_an_upload_lives_as_long_as_a_waiting_message_names_it(place: Place, store: MediaStore) -> None:
    wanted = await upload(place, store, b"wanted", seconds=-1)
    await upload(place, store, b"unwanted", seconds=-1)
    message = await enqueue(place, wanted, "document")
    await place.value("UPDATE et_media_files SET touched_at = now() - INTERVAL '1 day'")
    assert await sweep(place.db, store, grace=-1) == 1
    media = (await OutgoingMedia(place.db, store).prepare(message)).media
    assert media is not None
    assert media.path.read_bytes() == b"wanted"
    await place.value(
        "UPDATE et_messages SET delivery_status = 'cancelled' WHERE id = $1", message.attempt.message_id
    )
    assert await sweep(place.db, store, grace=-1) == 0  # the row says what was to be sent
    assert await place.value("SELECT count(*) FROM et_uploads") == 0


async def test_a_tenant_that_goes_takes_its_files_along(place: Place, store: MediaStore) -> None:
    await upload(place, store, picture())
    async with place.db.worker() as conn:
        await conn.execute("DELETE FROM et_channel_sessions WHERE tenant_id = $1", place.tenant_id)
        await conn.execute("DELETE FROM et_tenants WHERE id = $1", place.tenant_id)
    assert await sweep(place.db, store, grace=-1) == 1


async def test_every_statement_fits_the_schema(place: Place, store: MediaStore) -> None:
    async with place.db.worker() as conn:
        assert await rows.claim(conn, [], limit=1, lease=1) == []
        due: Any = await rows.next_due(conn, [place.session_id])
        assert (due["waiting"], due["seconds"]) == (0, None)
        assert await rows.of_message(conn, place.tenant_id, 1) is None
        assert not await rows.settle(conn, place.tenant_id, 1, None, {})
        assert await rows.overdue(conn, seconds=1) == []


async def test_whatever_goes_wrong_before_the_call_was_not_sent(
    place: Place, store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    outgoing = OutgoingMedia(place.db, store)
    message = await enqueue(place, await upload(place, store, picture()))

    async def gone(*_: object) -> None:
        raise ConnectionResetError("the database went away")

    monkeypatch.setattr(rows, "describe_outgoing", gone)
    with pytest.raises(NotSentError) as error:
        await outgoing.prepare(message)
    assert error.value.code == "media_not_ready"


async def test_a_fetch_that_takes_too_long_is_given_up_before_the_call(
    place: Place, store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.media.outgoing.PREPARE_SECONDS", 0.2)

    async def answer(_request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async with serving(answer) as site:
        outgoing = OutgoingMedia(place.db, store, site.fetcher())
        with pytest.raises(NotSentError, match="in time"):
            await outgoing.prepare(await enqueue(place, site.url("/slow")))
