"""Media of stored messages: downloaded after the commit, once, with retries, on the row at the end. Real database."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from core.channel import MediaSource, MessageType
from core.database import Database
from core.errors import MediaExpired, NotSentError, RefusedError, ThrottledError
from core.metrics import Metrics
from core.store import media as rows
from gateway.media import MediaStore, MediaWorker, Timings, forget, media_path, sweep
from tests.support.inbound import Place, make_place, running
from tests.support.media import MediaChannel, Owned, RetryingChannel, picture

QUICK = Timings(poll=0.2, backoff=(0.01,), attempts=3, tend=3600)
CARRIES = {
    "state": "pending",
    "mime_type": "image/jpeg",
    "caption": "look",
    "filename": "../cat.jpg",
    "duration": 3,
}


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", reserve=0)


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@asynccontextmanager
async def working(
    place: Place, store: MediaStore, channel: Any, timings: Timings = QUICK, metrics: Metrics | None = None
) -> AsyncIterator[MediaWorker]:
    owned = Owned({place.session_id: channel})
    worker = MediaWorker(place.db, metrics or Metrics(), store, owned, timings=timings)
    await worker.start()
    try:
        yield worker
        assert worker.healthy
    finally:
        await worker.stop()


async def receive(place: Place, *ids: str, **changes: Any) -> list[int]:
    """Store messages that carry media; returns their ids."""
    fields = {"message_type": MessageType.IMAGE, "media_metadata": CARRIES} | changes
    async with running(place.db) as ingest:
        stored = await ingest.submit([place.message(name, **fields) for name in ids])
    return [row.message_id for row in stored]


async def until(place: Place, message_id: int, good: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(10):
        while True:
            (row,) = await place.rows("*", f"id = {message_id}")
            if good(row):
                return row
            await asyncio.sleep(0.02)


async def settled(place: Place, message_id: int) -> Any:
    return await until(place, message_id, lambda row: row["media_metadata"]["state"] != "pending")


async def idle(worker: MediaWorker) -> None:
    async with asyncio.timeout(10):
        while worker.in_flight:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)


async def jobs(place: Place) -> list[Any]:
    return await place.fetch("SELECT * FROM et_media_jobs ORDER BY message_id")


async def test_what_a_message_carries_is_stored_and_described(place: Place, store: MediaStore) -> None:
    metrics = Metrics()
    channel = MediaChannel(picture("PNG", 31, 17))
    assert isinstance(channel, MediaSource)
    async with working(place, store, channel, Timings(), metrics) as worker:
        (message_id,) = await receive(place, "m1")
        row = await settled(place, message_id)
        await idle(worker)
    said = row["media_metadata"]
    assert row["media_url"] == media_path(message_id) == f"/api/v1/messaging/messages/{message_id}/media"
    assert store.path(said["sha256"]).read_bytes() == picture("PNG", 31, 17)
    assert said == {
        "state": "stored", "filename": "cat.jpg", "mime_type": "image/png", "size": len(picture("PNG", 31, 17)),
        "sha256": said["sha256"], "width": 31, "height": 17, "caption": "look", "duration": 3,
    }  # fmt: skip
    asked = channel.asked[0]
    assert (asked.message_id, asked.channel_message_id, asked.attempt) == (message_id, "m1", 1)
    assert asked.raw_payload == {"key": {"id": "m1"}}
    assert await jobs(place) == []
    events = await place.fetch(
        "SELECT kind FROM et_events WHERE ref_id = $1 AND kind IN ('message', 'status') ORDER BY xid, id",
        message_id,
    )
    assert [e["kind"] for e in events] == ["message", "status"]
    assert metrics.registry.get_sample_value(
        "gateway_media_downloads_total", {"channel": "whatsapp", "outcome": "stored"}
    ) == 1  # fmt: skip


async def test_only_messages_with_pending_media_make_work(place: Place, store: MediaStore) -> None:
    await receive(place, "text", message_type=MessageType.TEXT, media_metadata=None)
    await receive(place, "place", message_type=MessageType.LOCATION, media_metadata={"latitude": 1})
    await receive(place, "done", media_metadata={"state": "stored"})
    assert await jobs(place) == []
    (first,) = await receive(place, "pending")
    await receive(place, "pending")  # again: a duplicate makes nothing
    assert [job["message_id"] for job in await jobs(place)] == [first]


async def test_a_placeholder_that_is_filled_makes_work(place: Place, store: MediaStore) -> None:
    await receive(place, "m1", message_type=MessageType.UNSUPPORTED, media_metadata=None, placeholder=True)
    assert await jobs(place) == []
    await receive(place, "m1")
    assert len(await jobs(place)) == 1


async def test_the_same_picture_twice_is_one_file(place: Place, store: MediaStore) -> None:
    body = picture()
    async with working(place, store, MediaChannel(body, body)):
        first, second = await receive(place, "m1", "m2")
        told = [(await settled(place, m))["media_metadata"]["sha256"] for m in (first, second)]
    assert told[0] == told[1]
    assert len(list(store.contents())) == 1
    assert len(await place.fetch("SELECT 1 FROM et_media_files")) == 1


async def test_a_failure_is_tried_again_from_where_it_stopped(place: Place, store: MediaStore) -> None:
    body = os.urandom(100_000)

    class Dropping(MediaChannel):
        async def download(self, message: Any, target: Any) -> None:
            self.asked.append(message)
            if message.attempt == 1:
                await target.write(body[:60_000])
                raise NotSentError("the connection was lost", code="websocket_not_connected")
            assert target.offset == 60_000
            await target.write(body[60_000:])

    channel = Dropping()
    async with working(place, store, channel):
        (message_id,) = await receive(place, "m1")
        row = await settled(place, message_id)
    assert store.path(row["media_metadata"]["sha256"]).read_bytes() == body
    assert [asked.attempt for asked in channel.asked] == [1, 2]


async def test_it_is_given_up_with_a_reason(place: Place, store: MediaStore) -> None:
    broken = [NotSentError("no route", code="unreachable"), RuntimeError("bug"), TimeoutError()]
    async with working(place, store, MediaChannel(*broken)):
        (message_id,) = await receive(place, "m1")
        row = await settled(place, message_id)
    said = row["media_metadata"]
    assert (said["state"], said["error"]) == ("failed", "media_timeout")
    assert "gave up after 3 attempts" in said["reason"]
    assert row["media_url"] is None
    audited = await place.fetch("SELECT subject_id, detail FROM et_audit_log WHERE event = 'worker_error'")
    assert [(a["subject_id"], a["detail"]) for a in audited] == [(str(message_id), {"error": "RuntimeError"})]


async def test_what_is_gone_or_empty_or_too_large_is_failed(place: Place, store: MediaStore) -> None:
    refused = RefusedError("deleted by the sender", code="media_gone")
    large = {"size": 5000, **CARRIES}
    timings = Timings(poll=0.2, backoff=(0.01,), attempts=1, size=1000)
    async with working(place, store, MediaChannel(refused), timings):
        (gone,) = await receive(place, "m1")
        assert (await settled(place, gone))["media_metadata"]["error"] == "media_gone"
    async with working(place, store, MediaChannel(b""), timings):
        (empty,) = await receive(place, "m2")
        assert (await settled(place, empty))["media_metadata"]["error"] == "media_empty"
    async with working(place, store, MediaChannel(b"x" * 1001), timings):
        announced, unannounced = await receive(place, "m3", media_metadata=large) + await receive(place, "m4")
        for message_id in (announced, unannounced):
            assert (await settled(place, message_id))["media_metadata"]["error"] == "media_too_large"
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


async def test_throttling_costs_no_attempt(place: Place, store: MediaStore) -> None:
    slow = [ThrottledError("later", retry_after=0.01) for _ in range(5)]
    channel = MediaChannel(*slow, picture())
    async with working(place, store, channel):
        (message_id,) = await receive(place, "m1")
        assert (await settled(place, message_id))["media_metadata"]["state"] == "stored"
    assert [asked.attempt for asked in channel.asked] == [1] * 6


async def test_dropped_media_is_asked_for_once_more(place: Place, store: MediaStore) -> None:
    channel = RetryingChannel(MediaExpired("the server has dropped it"), picture())
    channel.answer = {"direct_path": "/v/new"}
    async with working(place, store, channel):
        (message_id,) = await receive(place, "m1")
        assert (await settled(place, message_id))["media_metadata"]["state"] == "stored"
    assert [asked.hints for asked in channel.asked] == [None, {"direct_path": "/v/new"}]


async def test_a_phone_that_does_not_answer_is_asked_again_within_bounds(
    place: Place, store: MediaStore
) -> None:
    channel = RetryingChannel(*[MediaExpired("dropped") for _ in range(3)])
    async with working(place, store, channel):
        (silent,) = await receive(place, "m1")
        assert (await settled(place, silent))["media_metadata"]["error"] == "media_expired"
    assert len(channel.asked) == 3
    channel = RetryingChannel(MediaExpired("dropped"))
    channel.answer = RefusedError("the phone has deleted it too", code="media_gone")
    async with working(place, store, channel):
        (gone,) = await receive(place, "m2")
        assert (await settled(place, gone))["media_metadata"]["error"] == "media_gone"


async def test_expired_without_a_way_to_ask_is_failed(place: Place, store: MediaStore) -> None:
    async with working(place, store, MediaChannel(MediaExpired("dropped"))):
        (message_id,) = await receive(place, "m1")
        assert (await settled(place, message_id))["media_metadata"]["error"] == "media_expired"


async def test_jobs_wait_for_a_session_that_can(place: Place, store: MediaStore) -> None:
    (message_id,) = await receive(place, "m1")
    worker = MediaWorker(place.db, Metrics(), store, Owned({}), timings=QUICK)
    assert await worker._round() == QUICK.poll
    (job,) = await jobs(place)
    assert (job["attempts"], job["message_id"]) == (0, message_id)
    async with working(place, store, MediaChannel(picture())):
        assert (await settled(place, message_id))["media_metadata"]["state"] == "stored"


async def test_what_nobody_could_download_in_time_is_failed(place: Place, store: MediaStore) -> None:
    (message_id,) = await receive(place, "m1")
    worker = MediaWorker(place.db, Metrics(), store, Owned({}))
    await worker.tend()
    assert len(await jobs(place)) == 1
    await place.fetch("UPDATE et_media_jobs SET created_at = now() - INTERVAL '15 days'")
    await worker.tend()
    said = (await settled(place, message_id))["media_metadata"]
    assert (said["state"], said["error"]) == ("failed", "media_expired")


async def test_new_media_goes_before_history(place: Place, store: MediaStore) -> None:
    await receive(place, "h1", "h2", "h3", is_history=True)
    (fresh,) = await receive(place, "m1")
    async with place.db.worker() as conn:
        first = await rows.claim(conn, [place.session_id], limit=1, lease=60)
        second = await rows.claim(conn, [place.session_id], limit=10, lease=60)
        third = await rows.claim(conn, [place.session_id], limit=10, lease=60)
    assert [row["message_id"] for row in first] == [fresh]
    assert (len(second), len(third)) == (3, 0)


async def test_stopping_gives_the_job_back_and_keeps_what_came(place: Place, store: MediaStore) -> None:
    began = asyncio.Event()

    class Slow(MediaChannel):
        async def download(self, message: Any, target: Any) -> None:
            await target.write(b"first ")
            began.set()
            await asyncio.sleep(60)

    class Rest(MediaChannel):
        async def download(self, message: Any, target: Any) -> None:
            self.asked.append(message)
            await target.write(b"second" if target.offset == 6 else b"wrong")

    async with working(place, store, Slow()):
        (message_id,) = await receive(place, "m1")
        await asyncio.wait_for(began.wait(), 10)
    (job,) = await jobs(place)
    assert job["attempts"] == 0
    rest = Rest()
    async with working(place, store, rest):
        row = await settled(place, message_id)
    assert store.path(row["media_metadata"]["sha256"]).read_bytes() == b"first second"
    assert rest.asked[0].attempt == 1


async def test_a_message_that_is_erased_meanwhile_leaves_no_file(place: Place, store: MediaStore) -> None:
    class Erasing(MediaChannel):
        async def download(self, message: Any, target: Any) -> None:
            await target.write(b"private")
            await place.fetch("DELETE FROM et_messages WHERE id = $1", message.message_id)
            self.asked.append(message)

    channel = Erasing()
    async with working(place, store, channel) as worker:
        await receive(place, "m1")
        while not channel.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await idle(worker)
    assert await jobs(place) == []
    assert await place.fetch("SELECT 1 FROM et_media_files") == []
    assert await sweep(place.db, store, grace=-1) == 1
    assert list(store.contents()) == []


async def test_erasing_removes_files_that_nobody_else_names(place: Place, store: MediaStore) -> None:
    other = await make_place(place.db)
    shared, own = picture("PNG"), picture("GIF")
    async with working(place, store, MediaChannel(shared, own), Timings(poll=0.2, parallel=1)):
        mine = [await receive(place, "m1"), await receive(place, "m2")]
        digests = {(await settled(place, m))["media_metadata"]["sha256"] for (m,) in mine}
    async with working(other, store, MediaChannel(shared)):
        (theirs,) = await receive(other, "m1")
        kept = (await settled(other, theirs))["media_metadata"]["sha256"]
    (lead,) = {row["lead_id"] for row in await place.rows("lead_id")}
    async with place.db.worker() as conn:
        named = await rows.contents_of_lead(conn, place.tenant_id, lead)
    assert set(named) == digests
    await place.fetch("DELETE FROM et_leads WHERE id = $1", lead)
    assert await forget(place.db, store, place.tenant_id, named, grace=-1) == 1
    assert [name for name, _ in store.contents()] == [kept]
    owners = await place.fetch("SELECT tenant_id, sha256 FROM et_media_files")
    assert [tuple(row) for row in owners] == [(other.tenant_id, kept)]


async def test_the_regular_round_spares_what_is_named_or_new(place: Place, store: MediaStore) -> None:
    async with working(place, store, MediaChannel(picture())):
        (message_id,) = await receive(place, "m1")
        await settled(place, message_id)
    async with store.draft(limit=100) as draft:
        await draft.write(b"nobody's")
        stray = await draft.keep()
    assert await sweep(place.db, store) == 0
    long_ago = time.time() - 7200
    for name, _ in list(store.contents()):
        os.utime(store.path(name), (long_ago, long_ago))
    await place.fetch("UPDATE et_media_files SET touched_at = now() - INTERVAL '2 hours'")
    assert await sweep(place.db, store) == 1
    assert not stray.path.exists()
    assert len(list(store.contents())) == 1
