"""`/api/v1/events`: everything once and in order, over breaks, slow readers and long transactions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.database import Database
from gateway.api import feed
from tests.conftest import migrate_blocking
from tests.support.api import Api, Tenant, running_api
from tests.support.outbound import eventually, value
from tests.support.postgres import PostgresServer


@dataclass
class Reader:
    """A client of the stream, collecting what it gets."""

    events: list[tuple[str, Any]] = field(default_factory=list)
    last_id: str | None = None
    comments: int = 0
    ended: bool = False

    def refs(self, kind: str) -> list[int]:
        return [data["id"] for name, data in self.events if name == kind]


@asynccontextmanager
async def reading(
    api: Api, key: str, *, last_id: str | None = None, query: str = ""
) -> AsyncIterator[Reader]:
    headers = {"Authorization": f"Bearer {key}"}
    if last_id is not None:
        headers["Last-Event-ID"] = last_id
    reader = Reader()
    async with api.session.get(f"{api.url}/api/v1/events{query}", headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["X-Request-ID"]

        async def read() -> None:
            kind = ""
            async for line in response.content:
                text = line.decode().rstrip("\n")
                name, _, rest = text.partition(": ")
                if name == "id":
                    reader.last_id = rest
                elif name == "event":
                    kind = rest
                elif name == "data":
                    reader.events.append((kind, json.loads(rest)))
                elif text.startswith(":"):
                    reader.comments += 1
            reader.ended = True

        task = asyncio.create_task(read())
        await eventually(_is(lambda: reader.last_id is not None or reader.events))
        try:
            yield reader
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _is(check: Any) -> Any:
    async def checked() -> Any:
        return check()

    return checked


async def _got(reader: Reader, kind: str, count: int) -> None:
    await eventually(_is(lambda: len(reader.refs(kind)) >= count), what=f"{count} {kind} events")


async def test_a_message_and_its_status_arrive_as_they_happen(api: Api, shop: Tenant) -> None:
    async with reading(api, shop.key) as reader:
        await shop.receive("hello")
        await _got(reader, "message", 1)
        assert (await api.post("/send", shop.send_body(), shop.key)).status == 200
        await _got(reader, "status", 2)
        kind, data = reader.events[0]
        assert kind == "message"
        assert data["direction"] == "inbound"
        assert data["thread_id"] > 0
        assert "content" not in data
        sent = [one for name, one in reader.events if name == "status"]
        assert sent[-1]["delivery_status"] == "sent"


async def test_nothing_of_another_tenant_arrives(api: Api, shop: Tenant) -> None:
    other = await api.tenant("other")
    async with reading(api, other.key) as theirs, reading(api, shop.key) as ours:
        await shop.receive("hello")
        await _got(ours, "message", 1)
        await other.receive("mine", message_id="X")
        await _got(theirs, "message", 1)
        assert {data["tenant_id"] for _, data in theirs.events} == {other.id}
        assert {data["tenant_id"] for _, data in ours.events} == {shop.id}


async def test_a_broken_stream_resumes_without_gap_or_repeat(api: Api, shop: Tenant) -> None:
    seen: list[int] = []
    last_id: str | None = None
    for round_ in range(4):
        async with reading(api, shop.key, last_id=last_id) as reader:
            await shop.receive(f"live {round_}", message_id=f"L{round_}")
            await _got(reader, "message", 1 if round_ == 0 else 3)
            seen += reader.refs("message")
            last_id = reader.last_id
        for number in range(2):
            await shop.receive("away", message_id=f"A{round_}-{number}")
    async with reading(api, shop.key, last_id=last_id) as reader:
        await _got(reader, "message", 2)
        seen += reader.refs("message")
    async with api.db.worker() as conn:
        stored = [row["id"] for row in await conn.fetch("SELECT id FROM et_messages ORDER BY id")]
    assert seen == stored
    assert len(seen) == 12


async def test_a_transaction_that_commits_late_is_not_skipped(api: Api, shop: Tenant) -> None:
    """Its events have lower numbers than some that are visible already: those must wait for it."""
    slow = await asyncpg.connect(api.db.url)
    try:
        await slow.execute("SET ROLE et_worker")
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute(
            "INSERT INTO et_events (tenant_id, kind, ref_id) VALUES ($1, 'message', 424242)", shop.id
        )
        async with reading(api, shop.key) as reader:
            await shop.receive("quick")
            await asyncio.sleep(0.3)
            assert reader.refs("message") == [], "an event overtook a transaction that was still running"
            await transaction.commit()
            await _got(reader, "message", 2)
            assert reader.refs("message")[0] == 424242
    finally:
        await slow.close()


@pytest.mark.parametrize("last_id", ["1.1.1", "x", "", "1.2", "9" * 400, "-1.-1.-1"])
async def test_a_place_too_long_ago_or_made_up_is_one_reset(api: Api, shop: Tenant, last_id: str) -> None:
    await shop.receive("before", message_id="B")
    async with reading(api, shop.key, last_id=last_id or None) as reader:
        await shop.receive("after", message_id="C")
        await _got(reader, "message", 1)
        kinds = [kind for kind, _ in reader.events]
        assert kinds.count("reset") == (1 if last_id else 0)
        assert kinds[-1] == "message"


async def test_a_reader_that_falls_behind_still_gets_everything(
    api: Api, shop: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BUFFER", 3)
    async with reading(api, shop.key) as reader:
        async with api.db.worker() as conn:
            await conn.execute(
                "INSERT INTO et_events (tenant_id, kind, ref_id) SELECT $1, 'message', n FROM generate_series(1, 1700) n",
                shop.id,
            )
        await _got(reader, "message", 1700)
        assert reader.refs("message") == list(range(1, 1701))


async def test_many_readers_cost_one_query_not_many(api: Api, shop: Tenant) -> None:
    async with _many(api, shop, 40) as readers:
        await shop.receive("hello")
        await asyncio.gather(*(_got(reader, "message", 1) for reader in readers))
        assert len(api.db.hub._subscriptions["et_events"]) == 1


@asynccontextmanager
async def _many(api: Api, shop: Tenant, count: int) -> AsyncIterator[list[Reader]]:
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(reading(api, shop.key)) for _ in range(count)]


async def test_a_revoked_key_ends_the_stream(api: Api, shop: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.events.KEY_CHECK_SECONDS", 0.1)
    key = await api.make_key(shop.id, "read")
    async with reading(api, key) as reader:
        async with api.db.worker() as conn:
            await conn.execute("UPDATE et_api_keys SET revoked_at = now() WHERE scopes = '{read}'")
        await eventually(_is(lambda: reader.ended))


async def test_streams_do_not_hold_up_the_shutdown(api: Api, shop: Tenant, tmp_path: Any) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    async with running_api(api.db, folder) as second:
        streams = [
            await second.session.get(
                f"{second.url}/api/v1/events", headers={"Authorization": f"Bearer {shop.key}"}
            )
            for _ in range(3)
        ]
        began = time.monotonic()
    assert time.monotonic() - began < 2.5
    for stream in streams:
        stream.close()


async def test_old_events_are_pruned(api: Api, shop: Tenant) -> None:
    from core.store import events

    async with api.db.worker() as conn:
        await conn.execute(
            "INSERT INTO et_events (tenant_id, kind, ref_id, created_at) VALUES ($1, 'message', 1, now() - INTERVAL '25 h')",
            shop.id,
        )
        assert await events.prune(conn) == 1
    assert await value(api.db, "SELECT count(*) FROM et_events WHERE ref_id = 1 AND kind = 'message'") == 0


async def test_a_stream_outlives_a_database_outage(private_postgres: PostgresServer, tmp_path: Path) -> None:
    url = private_postgres.create_database()
    await asyncio.to_thread(migrate_blocking, url)
    database = await Database.open(url)
    try:
        async with running_api(database, tmp_path) as api:
            shop = await api.tenant()
            async with reading(api, shop.key) as reader:
                await shop.receive("before", message_id="O1")
                await _got(reader, "message", 1)
                await asyncio.to_thread(private_postgres.kill)
                assert (await shop.receive("during", message_id="O2")).json["spooled"] == 1
                await asyncio.to_thread(private_postgres.restart)
                await _got(reader, "message", 2)
                assert not reader.ended
    finally:
        await database.close()
