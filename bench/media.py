"""How long the event loop is held up while 20 MB go in and out, and what media costs a text message on its way in.

    python -m bench.media [--megabytes 20] [--rounds 3]

Everything runs on one loop, clients too, so the figures are an upper bound. A timer is due every millisecond; its worst
delay is the lag. The cost is that of `INSERT INTO et_messages`, with the triggers and indexes of media and without, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from core.channel import MessageType, SessionId
from core.database import Database
from core.metrics import Metrics
from core.migrate import migrate
from gateway.media import MediaStore, MediaWorker, OutgoingMedia
from tests.support.api import running_api
from tests.support.inbound import Place, make_place, running
from tests.support.media import MediaChannel, Owned, serving
from tests.support.postgres import PostgresServer

ROWS = 5000
PIECE = 1 << 16
INSERT = """
    INSERT INTO et_messages (tenant_id, lead_id, thread_id, channel_session_id, channel, channel_message_id, direction, role,
                             content, raw_payload, occurred_at, delivery_status)
    SELECT $1, $2, $3, $4, 'whatsapp', $5::TEXT || n, 'inbound', 'user', 'hello there', '{"key": {"id": "x"}}', now(),
           'inbound_ignored'
    FROM generate_series(1, $6::INT) n
"""


@asynccontextmanager
async def lag(name: str) -> AsyncIterator[None]:
    """Print the worst delay of a timer while the body runs."""
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - due)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0.05)
    began = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - began
        task.cancel()
        print(f"{name:<34} {took * 1000:8.0f} ms   worst lag {worst * 1000:6.1f} ms", flush=True)


async def transfers(url: str, folder: Path, body: bytes) -> None:
    db = await Database.open(url)
    try:
        await _transfers(db, folder, body)
    finally:
        await db.close()


async def _transfers(db: Database, folder: Path, body: bytes) -> None:
    place = await make_place(db)
    store = MediaStore(folder / "in", reserve=0)
    worker = MediaWorker(db, Metrics(), store, Owned({SessionId(place.session_id): _Chunks(body)}))
    await worker.start()
    async with lag("in: downloaded from a channel"), running(db) as ingest:
        said = {"state": "pending"}
        message = place.message("m1", message_type=MessageType.DOCUMENT, media_metadata=said)
        (stored,) = await ingest.submit([message])
        await _until(lambda: _has_media(place, stored.message_id))
    await worker.stop()

    async def answer(request: web.Request) -> web.StreamResponse:
        # In pieces: encrypting all of it in one go would hold up the loop that server and client share here.
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        for at in range(0, len(body), PIECE):
            await response.write(body[at : at + PIECE])
        return response

    async with serving(answer) as site:
        outgoing = OutgoingMedia(db, MediaStore(folder / "out", reserve=0), site.fetcher())
        async with lag("out: fetched over HTTPS"):
            await outgoing.outgoing_media(place.tenant_id, site.url("/film"))

    async with running_api(db, folder / "api") as api:
        shop = await api.tenant()
        headers = {"Content-Type": "application/octet-stream"}
        async with lag("in: uploaded to the API"):
            upload = await api.call(
                "POST", "/api/v1/messaging/uploads", key=shop.key, raw=body, headers=headers
            )
        assert upload.status == 201, upload.body
        request = {
            "channel_session_id": shop.session_id, "recipient": "+60111222333", "message_type": "document",
            "media_url": f"upload:{upload.json['id']}", "send_at": "2100-01-01T00:00:00Z",
        }  # fmt: skip
        created = await api.post("/api/v1/messaging/outbound", request, shop.key)
        path = f"/api/v1/messaging/messages/{created.json['message_id']}/media"
        async with lag("out: served by the API"):
            served = await api.get(path, shop.key)
        assert served.body == body


class _Chunks(MediaChannel):
    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._body = body

    async def download(self, message: Any, target: Any) -> None:
        for at in range(0, len(self._body), PIECE):
            await target.write(self._body[at : at + PIECE])
            await asyncio.sleep(0)


async def _has_media(place: Place, message_id: int) -> bool:
    return await place.value("SELECT media_url FROM et_messages WHERE id = $1", message_id) is not None


async def _until(there: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await there():  # noqa: ASYNC110  (the database tells nobody here)
            await asyncio.sleep(0.02)


async def insert_cost(url: str, server: PostgresServer, rounds: int) -> None:
    """Microseconds a row of plain text, with what media adds to the table and without."""
    db = await Database.open(url)
    place = await make_place(db)
    async with running(db) as ingest:
        (first,) = await ingest.submit([place.message("m0")])
    took: dict[bool, list[float]] = {True: [], False: []}
    name = url.split("?", maxsplit=1)[0].rsplit("/", 1)[-1]
    for turn in range(rounds * 2):
        with_media = turn % 2 == 0
        switch = "ENABLE" if with_media else "DISABLE"
        server.superuser_sql(
            "".join(
                f"ALTER TABLE et_messages {switch} TRIGGER {trigger};"
                for trigger in (
                    "et_messages_media_inserted",
                    "et_messages_media_wanted",
                    "et_messages_media_settled",
                )
            )
            + f"UPDATE pg_index SET indisready = {with_media}, indisvalid = {with_media} WHERE indexrelid IN "
            "('et_messages_media'::regclass, 'et_messages_uploads'::regclass);",
            name,
        )
        async with db.worker() as conn:
            for batch in range(11):
                began = time.perf_counter()
                fields = (
                    place.tenant_id,
                    first.lead_id,
                    first.thread_id,
                    place.session_id,
                    f"t{turn}b{batch}-",
                )
                await conn.execute(INSERT, *fields, ROWS // 10)
                if batch:  # the first one warms up
                    took[with_media].append((time.perf_counter() - began) / (ROWS // 10) * 1e6)
    await db.close()
    on, off = statistics.median(took[True]), statistics.median(took[False])
    print(
        f"a text row: {on:.1f} µs with media, {off:.1f} µs without: {on - off:+.1f} µs (medians of {rounds * 10})"
    )


async def run(megabytes: int, rounds: int) -> None:
    server = PostgresServer()
    await asyncio.to_thread(server.start)
    try:
        body = os.urandom(megabytes << 20)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "api").mkdir()
                url = await asyncio.to_thread(server.create_database)
                await migrate(url)
                await transfers(url, Path(folder), body)
        url = await asyncio.to_thread(server.create_database)
        await migrate(url)
        await insert_cost(url, server, rounds)
    finally:
        await asyncio.to_thread(server.close)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    uvloop.run(run(options.megabytes, options.rounds))


if __name__ == "__main__":
    main()
