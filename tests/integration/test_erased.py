"""Somebody who was erased stays erased: nothing of before comes back, and a later message makes a lead that is opted out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from core.channel import InboundMessage, Person, Stored
from core.database import Database
from core.history import Counts, HistoryImport
from core.ingest import Ingest
from core.ingest_batch import ERASED
from core.metrics import Metrics
from core.store import suppressions
from tests.support.inbound import Place, lid, make_place, phone, running

PERSON = phone(7)
OTHER = phone(8)


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@pytest.fixture
async def ingest(database: Database) -> AsyncIterator[Ingest]:
    async with running(database, Metrics()) as started:
        yield started


def said(place: Place, message_id: str, person: str | Person = PERSON, *, ago: float = 0.0) -> InboundMessage:
    stamp = int((time.time() - ago) * 1000)
    return place.message(message_id, person, channel_timestamp=stamp)


async def erase(place: Place, lead_id: int) -> None:
    async with place.db.worker() as conn, conn.transaction():
        rows = await conn.fetch("SELECT external_id FROM et_lead_identities WHERE lead_id = $1", lead_id)
        await suppressions.add(conn, [(place.tenant_id, r["external_id"]) for r in rows], reason="erased")
        await conn.execute("DELETE FROM et_leads WHERE id = $1", lead_id)


async def leads(place: Place) -> dict[str, bool]:
    """External id → opted out."""
    rows = await place.fetch("SELECT external_id, opted_out_at FROM et_leads ORDER BY id")
    return {row["external_id"]: row["opted_out_at"] is not None for row in rows}


async def test_what_was_said_before_does_not_come_back(place: Place, ingest: Ingest) -> None:
    first, second = said(place, "M1", ago=60), said(place, "M2", ago=30)
    [stored] = await ingest.submit([first])
    await erase(place, stored.lead_id)
    # By the writer that has the lead in its memory, by one that never saw it, and in a batch with somebody else's.
    assert await ingest.submit([first]) == [ERASED]
    async with running(place.db) as another:
        outcomes = await another.submit([first, said(place, "M1", OTHER, ago=60), second])
    assert [one.erased for one in outcomes] == [True, False, True]
    assert await leads(place) == {OTHER: False}
    assert [row["channel_message_id"] for row in await place.rows()] == ["M1"]


async def test_a_later_message_makes_a_lead_that_is_opted_out_and_the_past_stays_away(
    place: Place, ingest: Ingest
) -> None:
    old = said(place, "M1", ago=60)
    [before] = await ingest.submit([old])
    await erase(place, before.lead_id)
    [after] = await ingest.submit([said(place, "M2")])
    assert not after.duplicate
    assert after.lead_id != before.lead_id
    assert await leads(place) == {PERSON: True}
    assert await ingest.submit([old, said(place, "M3"), said(place, "M0", ago=600)]) == [
        ERASED,
        Stored(*(await stored_as(place, "M3"))),
        ERASED,
    ]
    assert [row["channel_message_id"] for row in await place.rows()] == ["M2", "M3"]


async def stored_as(place: Place, message_id: str) -> tuple[int, int, int]:
    [row] = await place.fetch(
        "SELECT id, thread_id, lead_id FROM et_messages WHERE channel_message_id = $1", message_id
    )
    return tuple(row)


async def test_a_replay_of_before_stays_away_whatever_the_senders_clock_said(
    place: Place, ingest: Ingest
) -> None:
    ahead = replace(said(place, "M1", ago=-3600), arrived_at=time.time())
    [stored] = await ingest.submit([ahead])
    await erase(place, stored.lead_id)
    assert await ingest.submit([ahead]) == [ERASED]
    assert await leads(place) == {}


async def test_every_form_of_the_person_is_remembered(place: Place, ingest: Ingest) -> None:
    both = Person(PERSON, aliases=(lid(7),))
    [stored] = await ingest.submit([said(place, "M1", both, ago=60)])
    await erase(place, stored.lead_id)
    assert await ingest.submit([said(place, "M1", lid(7), ago=60), said(place, "M1", both, ago=60)]) == [
        ERASED,
        ERASED,
    ]
    await ingest.submit([said(place, "M2", lid(7))])
    assert await leads(place) == {lid(7): True}


async def test_history_brings_nothing_of_them_back(place: Place, ingest: Ingest) -> None:
    [stored] = await ingest.submit([said(place, "M1", ago=60)])
    await erase(place, stored.lead_id)

    async def past() -> AsyncIterator[InboundMessage]:
        for n in range(4):
            yield said(place, f"H{n}", PERSON if n % 2 else OTHER, ago=1000 - n)

    job = HistoryImport(place.db, tenant_id=place.tenant_id, session_id=place.session_id)
    assert await job.run(past()) == Counts(lines=4, stored=2, duplicates=2)
    assert await leads(place) == {OTHER: False}

    async def only_theirs() -> AsyncIterator[InboundMessage]:
        yield said(place, "H9", ago=1000)

    again = HistoryImport(place.db, tenant_id=place.tenant_id, session_id=place.session_id)
    assert await again.run(only_theirs()) == Counts(lines=1, duplicates=1)


async def test_a_backend_that_writes_to_them_first_makes_a_lead_that_is_opted_out(
    place: Place, ingest: Ingest
) -> None:
    [stored] = await ingest.submit([said(place, "M1", ago=60)])
    await erase(place, stored.lead_id)
    await place.enqueue(recipient=PERSON)
    assert await leads(place) == {PERSON: True}


async def test_another_tenant_knows_nothing_of_it(place: Place, ingest: Ingest) -> None:
    elsewhere = await make_place(place.db)
    mine, theirs = await ingest.submit([said(place, "M1", ago=60), said(elsewhere, "M1", ago=60)])
    await erase(place, mine.lead_id)
    assert await ingest.submit([said(place, "M1", ago=60)]) == [ERASED]
    [again] = await ingest.submit([said(elsewhere, "M2", ago=60)])
    assert (again.lead_id, again.erased) == (theirs.lead_id, False)


async def test_messages_that_arrive_while_their_person_is_erased_come_to_nothing_or_to_a_new_lead(
    place: Place, ingest: Ingest
) -> None:
    [stored] = await ingest.submit([said(place, "M0", ago=60)])
    old = [said(place, f"M{n}", ago=60) for n in range(200)]
    _, *outcomes = await asyncio.gather(
        erase(place, stored.lead_id), *(ingest.submit_each([message]) for message in old)
    )
    assert all(isinstance(one, Stored) for [one] in outcomes)
    assert await leads(place) == {}
    assert await place.rows() == []


def test_the_same_address_has_another_hash_in_another_tenant() -> None:
    assert suppressions.identity_hash(1, PERSON) != suppressions.identity_hash(2, PERSON)


async def test_the_hash_is_the_same_in_sql(place: Place) -> None:
    external_id = "email:zoë@example.com"
    found = await place.value("SELECT et_identity_hash($1, $2)", place.tenant_id, external_id)
    assert found == suppressions.identity_hash(place.tenant_id, external_id)
