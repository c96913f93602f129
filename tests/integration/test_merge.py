"""LID and phone are one person: one lead, whatever order they come in, whoever else is writing meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from core.channel import Person
from core.database import Database
from core.errors import DatabaseUnavailable
from core.ingest import Ingest
from tests.support.inbound import Place, lid, make_place, phone, running


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@pytest.fixture
async def ingest(database: Database) -> AsyncIterator[Ingest]:
    async with running(database) as started:
        yield started


@pytest.fixture
async def second(migrated_url: str, database: Database) -> AsyncIterator[Ingest]:
    """Another gateway on the same database."""
    other = await Database.open(migrated_url)
    async with running(other) as started:
        yield started
    await other.close()


async def leads(place: Place) -> list[tuple[int, str]]:
    rows = await place.fetch(
        "SELECT id, external_id FROM et_leads WHERE tenant_id = $1 ORDER BY id", place.tenant_id
    )
    return [tuple(r) for r in rows]


async def identities(place: Place) -> set[str]:
    rows = await place.fetch(
        "SELECT external_id FROM et_lead_identities WHERE tenant_id = $1", place.tenant_id
    )
    return {r["external_id"] for r in rows}


async def test_a_lid_whose_phone_becomes_known_is_the_same_lead(place: Place, ingest: Ingest) -> None:
    [first] = await ingest.submit([place.message("M1", lid(1))])
    assert await leads(place) == [(first.lead_id, lid(1))]
    [second] = await ingest.submit([place.message("M2", Person(phone(1), aliases=(lid(1),)))])
    assert (second.lead_id, second.thread_id) == (first.lead_id, first.thread_id)
    assert await leads(place) == [(first.lead_id, phone(1))]
    assert await identities(place) == {lid(1), phone(1)}
    # Any form finds it from now on.
    outcomes = await ingest.submit([place.message("M3", lid(1)), place.message("M4", phone(1))])
    assert {o.lead_id for o in outcomes} == {first.lead_id}


async def test_a_phone_learns_its_lid(place: Place, ingest: Ingest) -> None:
    [first] = await ingest.submit([place.message("M1", phone(1))])
    [second] = await ingest.submit([place.message("M2", Person(lid(1), aliases=(phone(1),)))])
    assert second.lead_id == first.lead_id
    assert await leads(place) == [(first.lead_id, phone(1))]


async def test_a_new_person_with_both_forms_is_known_by_phone(place: Place, ingest: Ingest) -> None:
    [first] = await ingest.submit([place.message("M1", Person(lid(1), aliases=(phone(1),)))])
    assert await leads(place) == [(first.lead_id, phone(1))]
    assert await identities(place) == {lid(1), phone(1)}


async def test_two_leads_that_turn_out_to_be_one_are_merged(place: Place, ingest: Ingest) -> None:
    [a], [b] = [
        await ingest.submit([place.message("M1", lid(1), "by lid")]),
        await ingest.submit([place.message("M1", phone(1), "by phone")]),
    ]
    assert a.lead_id != b.lead_id
    await ingest.submit([place.message("M2", phone(1))])
    [both] = await ingest.submit([place.message("M3", Person(phone(1), aliases=(lid(1),)))])
    assert both.lead_id == a.lead_id
    assert await leads(place) == [(a.lead_id, phone(1))]
    # The same channel id under both was one message.
    assert [r["channel_message_id"] for r in await place.rows()] == ["M1", "M2", "M3"]
    assert len({r["thread_id"] for r in await place.rows()}) == 1
    assert await place.value("SELECT new_id FROM et_lead_merges WHERE old_id = $1", b.lead_id) == a.lead_id
    # The vanished lead is still in the cache under the phone's form.
    [again] = await ingest.submit([place.message("M4", phone(1))])
    assert again.lead_id == a.lead_id


async def test_a_redelivery_under_the_other_form_is_a_duplicate(place: Place, ingest: Ingest) -> None:
    both = Person(phone(1), aliases=(lid(1),))
    await ingest.submit([place.message("M1", both)])
    for form in (phone(1), lid(1), both):
        [again] = await ingest.submit([place.message("M1", form)])
        assert again.duplicate
    assert len(await place.rows()) == 1


async def test_a_lead_merged_by_another_gateway_is_resolved_again(
    place: Place, ingest: Ingest, second: Ingest
) -> None:
    [a] = await ingest.submit([place.message("M1", lid(1))])
    [b] = await ingest.submit([place.message("M2", phone(1))])
    await second.submit([place.message("M3", Person(phone(1), aliases=(lid(1),)))])
    # The first gateway still has both old leads in its cache.
    outcomes = await ingest.submit(
        [place.message("M2", phone(1)), place.message("M4", phone(1)), place.message("M5", lid(1))]
    )
    assert [o.duplicate for o in outcomes] == [True, False, False]
    assert {o.lead_id for o in outcomes} == {min(a.lead_id, b.lead_id)}


async def test_an_erased_lead_is_made_anew(place: Place, ingest: Ingest) -> None:
    [first] = await ingest.submit([place.message("M1")])
    await place.value("DELETE FROM et_leads WHERE id = $1", first.lead_id)
    [second] = await ingest.submit([place.message("M2")])
    assert second.lead_id != first.lead_id
    assert await leads(place) == [(second.lead_id, phone(1))]


async def test_a_merge_that_is_refused_costs_no_message(place: Place, ingest: Ingest) -> None:
    # Somebody entered the number as a group.
    await place.value(
        "INSERT INTO et_leads (tenant_id, external_id, kind) VALUES ($1, $2, 'group')",
        place.tenant_id,
        phone(1),
    )
    await ingest.submit([place.message("M1", lid(1))])
    [stored] = await ingest.submit([place.message("M2", Person(phone(1), aliases=(lid(1),)))])
    assert not stored.duplicate
    assert len(await leads(place)) == 2


async def test_two_gateways_race_while_leads_are_merged(place: Place, ingest: Ingest, second: Ingest) -> None:
    """Both store the same messages, each person in three forms that are linked on the way."""
    chance = random.Random(11)
    messages = []
    for n in range(30):
        forms = [Person(phone(n)), Person(lid(n)), Person(phone(n), aliases=(lid(n),))]
        for i in range(10):
            messages.append(place.message(f"{n}-{i}", chance.choice(forms), name_of(n, i)))
        messages.append(place.message(f"{n}-link", forms[2], name_of(n, "link")))

    async def gateway(ingest: Ingest, seed: int) -> int:
        mine = list(messages)
        random.Random(seed).shuffle(mine)
        results = await asyncio.gather(*(ingest.submit([message]) for message in mine))
        return sum(not stored.duplicate for [stored] in results)

    await asyncio.gather(gateway(ingest, 1), gateway(second, 2))
    assert len(await leads(place)) == 30
    assert {external_id for _, external_id in await leads(place)} == {phone(n) for n in range(30)}
    rows = await place.rows("channel_message_id, content, lead_id")
    assert len(rows) == len({r["channel_message_id"] for r in rows}) == 330
    for n in range(30):
        assert len({r["lead_id"] for r in rows if r["channel_message_id"].startswith(f"{n}-")}) == 1
    assert await place.value("SELECT count(*) FROM et_threads") == 30


def name_of(n: int, i: object) -> str:
    return f"message {i} of {n}"


async def test_two_gateways_store_the_same_new_people_once(
    place: Place, ingest: Ingest, second: Ingest
) -> None:
    messages = [place.message(f"M{i}", phone(i % 50)) for i in range(500)]

    async def gateway(ingest: Ingest, seed: int) -> int:
        mine = list(messages)
        random.Random(seed).shuffle(mine)
        results = await asyncio.gather(*(ingest.submit([message]) for message in mine))
        return sum(not stored.duplicate for [stored] in results)

    new = await asyncio.gather(gateway(ingest, 1), gateway(second, 2))
    assert sum(new) == 500
    assert len(await place.rows()) == 500
    assert len(await leads(place)) == 50


async def test_operators_merge_while_messages_arrive(place: Place, ingest: Ingest) -> None:
    """Two numbers of one person, merged by hand under load: every message is there once."""
    [[a], [b]] = [await ingest.submit([place.message(f"first-{n}", phone(n))]) for n in (1, 2)]

    async def write(n: int) -> None:
        for i in range(40):
            while True:
                try:
                    await ingest.submit([place.message(f"{n}-{i}", phone(n))])
                    break
                except DatabaseUnavailable:
                    await asyncio.sleep(0.01)

    async def merge() -> None:
        await asyncio.sleep(0.02)
        await place.value("SELECT et_merge_leads($1, $2, $3)", place.tenant_id, a.lead_id, b.lead_id)

    await asyncio.gather(write(1), write(2), merge())
    rows = await place.rows("channel_message_id, lead_id")
    assert len(rows) == len({r["channel_message_id"] for r in rows}) == 82
    assert {r["lead_id"] for r in rows} == {a.lead_id}
