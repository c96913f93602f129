"""`/webhook`: proven senders only, good messages stored, bad ones named, and nothing lost while the database is away."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from core import faults
from core.channel import InboundMessage, Stored
from core.database import Database
from core.errors import JournalError
from core.ingest import Ingest
from core.store import credentials
from tests.conftest import migrate_blocking
from tests.support.api import Api, Tenant, baileys, running_api
from tests.support.outbound import eventually, fetch, value
from tests.support.postgres import PostgresServer


def _path(shop: Tenant) -> str:
    return f"/webhook/{shop.id}/{shop.session_id}"


async def _give_secrets(api: Api, shop: Tenant, **secrets: str) -> None:
    async with api.db.worker() as conn:
        await credentials.put(
            conn, api.services.keys, tenant_id=shop.id, session_id=shop.session_id, credentials=secrets
        )


def _signed(body: Any, secret: str) -> tuple[bytes, dict[str, str]]:
    raw = json.dumps(body).encode()
    digest = hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()
    return raw, {"X-Hub-Signature-256": f"sha256={digest}"}


async def test_a_message_is_stored_once_with_lead_and_thread(api: Api, shop: Tenant) -> None:
    first = await shop.receive("hello")
    again = await shop.receive("hello")
    assert first.json == {"received": True, "stored": 1, "duplicates": 0, "spooled": 0, "errors": []}
    assert again.json == {"received": True, "stored": 0, "duplicates": 1, "spooled": 0, "errors": []}
    rows = await fetch(
        api.db, "SELECT m.content, l.external_id FROM et_messages m JOIN et_leads l ON l.id = m.lead_id"
    )
    assert [tuple(row) for row in rows] == [("hello", "whatsapp:+60111222333")]


async def test_good_messages_are_stored_and_bad_ones_named(api: Api, shop: Tenant) -> None:
    body = [
        baileys("one", message_id="A"),
        {"nonsense": 1},
        5,
        baileys("two", message_id="B", at={"low": 1760000000, "high": 0}),
    ]
    answer = await api.post(_path(shop), body, shop.key)
    assert answer.status == 200
    assert answer.json["stored"] == 2
    assert [error["index"] for error in answer.json["errors"]] == [1, 2]


@pytest.mark.parametrize("body", [[{"nonsense": 1}, 7], 5, "text", {"key": 1}])
async def test_only_bad_messages_are_422(api: Api, shop: Tenant, body: Any) -> None:
    answer = await api.post(_path(shop), body, shop.key)
    assert (answer.status, answer.code) == (422, "nothing_usable")
    assert answer.json["errors"]


async def test_nul_and_other_dirt_does_not_lose_a_message(api: Api, shop: Tenant) -> None:
    body = baileys("a\x00b", message_id="N\x001") | {"extra": {"\x00": ["\x00"]}}
    answer = await api.post(_path(shop), body, shop.key)
    assert answer.json["stored"] == 1, answer.body
    assert await value(api.db, "SELECT content FROM et_messages") == "ab"


async def test_a_signature_proves_the_sender(api: Api, shop: Tenant) -> None:
    await _give_secrets(api, shop, app_secret="s3cret")
    raw, headers = _signed(baileys("signed"), "s3cret")
    assert (await api.call("POST", _path(shop), raw=raw, headers=headers)).json["stored"] == 1
    forged, forged_headers = _signed(baileys("forged", message_id="F"), "wrong")
    for headers in (forged_headers, {"X-Hub-Signature-256": "sha256="}, {"X-Hub-Signature-256": "ü"}, {}):
        answer = await api.call("POST", _path(shop), raw=forged, headers=headers)
        assert answer.status == 401
    elsewhere = await api.call("POST", f"/webhook/{shop.id}/999999", raw=raw, headers=_signed(1, "s3cret")[1])
    assert elsewhere.status == 401


async def test_a_session_without_a_secret_takes_no_signature(api: Api, shop: Tenant) -> None:
    raw, headers = _signed(baileys("x"), "")
    assert (await api.call("POST", _path(shop), raw=raw, headers=headers)).status == 401


async def test_the_challenge_is_answered_for_the_right_token_alone(api: Api, shop: Tenant) -> None:
    await _give_secrets(api, shop, verify_token="tok")
    query = "?hub.mode=subscribe&hub.verify_token={}&hub.challenge=12345"
    good = await api.get(_path(shop) + query.format("tok"))
    assert (good.status, good.body) == (200, b"12345")
    assert good.headers["Content-Type"].startswith("text/plain")
    assert (await api.get(_path(shop) + query.format("wrong"))).status == 403
    assert (await api.get(_path(shop))).status == 403
    assert (await api.get(f"/webhook/{shop.id}/999999" + query.format("tok"))).status == 403


async def test_an_outage_spools_and_stores_in_order_when_it_ends(
    private_postgres: PostgresServer, tmp_path: Path
) -> None:
    url = private_postgres.create_database()
    await asyncio.to_thread(migrate_blocking, url)
    database = await Database.open(url)
    try:
        async with running_api(database, tmp_path) as api:
            shop = await api.tenant()
            assert (await shop.receive("0", message_id="M0")).json["stored"] == 1
            await asyncio.to_thread(private_postgres.kill)
            for number in range(1, 6):
                answer = await shop.receive(str(number), message_id=f"M{number}")
                assert answer.status == 200, answer.body
                assert (answer.json["received"], answer.json["spooled"]) == (True, 1)
            assert (await api.get("/health")).json["status"] == "degraded"
            assert b'gateway_journal_depth{journal="spool"} 5.0' in (await api.get("/metrics")).body
            await asyncio.to_thread(private_postgres.restart)
            await eventually(_always(lambda: api.services.spool.depth == 0), seconds=30)
            rows = await fetch(database, "SELECT content FROM et_messages ORDER BY id")
            assert [row["content"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
            assert api.journal.depth() == 0
            assert (await shop.receive("5", message_id="M5")).json["duplicates"] == 1
    finally:
        await database.close()


async def test_what_was_spooled_before_a_restart_is_stored_after_it(
    database: Database, tmp_path: Path
) -> None:
    async with running_api(database, tmp_path) as api:
        shop = await api.tenant()
        key = f"{shop.id}/{shop.session_id}"
        await asyncio.to_thread(api.journal.append, "webhook", key, json.dumps(baileys("late")).encode())
        await asyncio.to_thread(
            api.journal.append, "webhook", f"{shop.id}/999999", json.dumps(baileys("x")).encode()
        )
    async with running_api(database, tmp_path) as api:
        await eventually(_always(lambda: api.services.spool.depth == 0))
        assert [row["content"] for row in await fetch(database, "SELECT content FROM et_messages")] == [
            "late"
        ]


async def test_what_was_stored_from_the_spool_is_there_for_a_database_that_was_set_back(
    database: Database, tmp_path: Path
) -> None:
    async with running_api(database, tmp_path) as api:
        shop = await api.tenant()
        key = f"{shop.id}/{shop.session_id}"
        bodies = [json.dumps(baileys(f"{n}", message_id=f"M{n}")).encode() for n in range(2)]
        await asyncio.to_thread(api.journal.append_many, [("webhook", key, body) for body in bodies])
    async with running_api(database, tmp_path) as api:
        await eventually(_always(lambda: api.services.spool.depth == 0))
        await fetch(database, "DELETE FROM et_messages WHERE channel_message_id = 'M1'")
    async with running_api(database, tmp_path) as api:
        await eventually(_always(lambda: api.services.spool.depth == 0))
        stored = await fetch(database, "SELECT content FROM et_messages ORDER BY id")
        assert [row["content"] for row in stored] == ["0", "1"]


async def test_the_spool_is_emptied_by_many_at_once(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New bodies queue up behind the spooled ones: one at a time, a busy sender would never get past them."""
    sizes: list[int] = []
    submit = Ingest.submit

    async def counting(self: Ingest, messages: Sequence[InboundMessage]) -> list[Stored]:
        sizes.append(len(messages))
        return await submit(self, messages)

    monkeypatch.setattr(Ingest, "submit", counting)
    async with running_api(database, tmp_path) as api:
        shop = await api.tenant()
        key = f"{shop.id}/{shop.session_id}"
        bodies = [json.dumps(baileys(f"{n}", message_id=f"M{n}")).encode() for n in range(150)]
        bodies.insert(40, b'{"key":{}}')  # nothing can be made of this one, and it holds up nobody
        await asyncio.to_thread(api.journal.append_many, [("webhook", key, body) for body in bodies])
    async with running_api(database, tmp_path) as api:
        await eventually(_always(lambda: api.services.spool.depth == 0))
        rows = await fetch(database, "SELECT content FROM et_messages ORDER BY id")
    assert [row["content"] for row in rows] == [f"{n}" for n in range(150)]
    assert len(sizes) < 10


async def test_a_body_that_is_being_written_is_not_lost_to_the_count(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay looks at the disk just before the body is on it: the body must be counted, or nobody looks at it again."""
    async with running_api(database, tmp_path) as api:
        shop = await api.tenant()
        spool, journal = api.services.spool, api.journal
        append, goes_on = journal.append, threading.Event()

        def slowly(kind: str, key: str, payload: bytes) -> int:
            assert goes_on.wait(20)
            return append(kind, key, payload)

        monkeypatch.setattr(journal, "append", slowly)
        writing = asyncio.create_task(spool.append(shop.id, shop.session_id, baileys("late")))
        await eventually(_always(lambda: spool.depth == 1))
        await spool._replay()
        goes_on.set()
        await writing
        await eventually(_always(lambda: spool.depth == 0))
        rows = await fetch(database, "SELECT content FROM et_messages")
    assert [row["content"] for row in rows] == ["late"]


async def test_a_sender_that_goes_away_leaves_the_spool_in_no_doubt(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_api(database, tmp_path) as api:
        shop = await api.tenant()
        spool, goes_on = api.services.spool, threading.Event()

        def fails(kind: str, key: str, payload: bytes) -> int:
            assert goes_on.wait(20)
            raise JournalError("the disk is full")

        monkeypatch.setattr(api.journal, "append", fails)
        writing = asyncio.create_task(spool.append(shop.id, shop.session_id, baileys("late")))
        await eventually(_always(lambda: spool.depth == 1))
        writing.cancel()
        goes_on.set()
        await eventually(_always(lambda: spool.depth == 0))
        assert not spool.holds(shop.id, shop.session_id)


async def test_what_can_be_neither_stored_nor_spooled_is_503_and_health_says_so(
    private_postgres: PostgresServer, tmp_path: Path
) -> None:
    url = private_postgres.create_database()
    await asyncio.to_thread(migrate_blocking, url)
    database = await Database.open(url)
    try:
        async with running_api(database, tmp_path) as api:
            shop = await api.tenant()
            assert (await shop.receive("0", message_id="M0")).status == 200
            await asyncio.to_thread(private_postgres.kill)
            api.journal.close()
            answer = await shop.receive("1", message_id="M1")
            assert (answer.status, answer.code) == (503, "journal")
            health = await api.get("/health")
            assert (health.status, health.json["status"]) == (503, "error")
    finally:
        faults.disarm()
        await database.close()


def _always(check: Any) -> Any:
    async def checked() -> Any:
        return check()

    return checked
