"""What a session's sink does beyond storing: names for people known without one, texts of the channel's own."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from core.channel import Person
from core.database import Database
from core.metrics import Metrics
from gateway.session_sinks import SessionStore
from tests.support.inbound import Place, make_place, running

DAY = timedelta(hours=24)


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


async def say(
    place: Place, person: str, text: str = "Please write to us", purpose: str = "call_text"
) -> bool:
    store = SessionStore(place.db)
    return await store.automatic_reply(place.tenant_id, place.session_id, person, text, purpose, DAY)


async def queued(place: Place) -> list[tuple[str, str]]:
    async with place.db.worker() as conn:
        rows = await conn.fetch(
            "SELECT q.recipient, m.content FROM et_outbound_queue q JOIN et_messages m ON m.id = q.message_id ORDER BY q.id"
        )
    return [tuple(row) for row in rows]


async def test_a_person_is_written_once_a_day_however_often_they_call(place: Place) -> None:
    done = await asyncio.gather(*(say(place, "whatsapp:+60111222333") for _ in range(4)))
    assert sorted(done) == [False, False, False, True]
    assert await say(place, "whatsapp:+60111222444")
    assert await queued(place) == [
        ("+60111222333", "Please write to us"),
        ("+60111222444", "Please write to us"),
    ]
    async with place.db.worker() as conn:
        await conn.execute("UPDATE et_messages SET occurred_at = now() - INTERVAL '25 hours'")
    assert await say(place, "whatsapp:+60111222333")


async def test_another_purpose_is_another_text(place: Place) -> None:
    assert await say(place, "whatsapp:+60111222333")
    assert await say(place, "whatsapp:+60111222333", purpose="greeting")


async def test_what_may_not_be_sent_is_no_failure(place: Place) -> None:
    async with place.db.worker() as conn:
        await conn.execute("UPDATE et_tenants SET status = 'suspended' WHERE id = $1", place.tenant_id)
    assert not await say(place, "whatsapp:+60111222333")
    assert await queued(place) == []


async def test_only_people_without_a_name_get_one(place: Place) -> None:
    async with running(place.db, Metrics()) as ingest:
        await ingest.submit(
            [
                place.message("M1", Person("whatsapp:+60111222333", name=None)),
                place.message("M2", Person("whatsapp:+60111222444", name="Ali of the shop")),
            ]
        )
    names = {f"whatsapp:+6011122{n}": f"Phone book {n}" for n in (2333, 2444, 2555)}
    await SessionStore(place.db).names(place.tenant_id, names)
    async with place.db.worker() as conn:
        rows = await conn.fetch("SELECT external_id, name FROM et_leads ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        ("whatsapp:+60111222333", "Phone book 2333"),
        ("whatsapp:+60111222444", "Ali of the shop"),
    ]
