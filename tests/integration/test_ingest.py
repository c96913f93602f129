"""Messages in, on a real PostgreSQL: stored once, in order, with lead and thread, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from core.channel import Cursor, MessageType, Person, SessionId, Stored, TenantId
from core.database import Database
from core.errors import DatabaseUnavailable, Invalid
from core.ingest import Ingest
from core.metrics import Metrics
from tests.support.inbound import Place, lid, make_place, phone, running


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def ingest(database: Database, metrics: Metrics) -> AsyncIterator[Ingest]:
    async with running(database, metrics) as started:
        yield started


def sample(metrics: Metrics, name: str, **labels: object) -> float:
    found = metrics.registry.get_sample_value(name, {key: str(value) for key, value in labels.items()})
    return found or 0.0


# --- the seed's scenarios


async def test_an_unknown_sender_becomes_a_lead_with_a_thread(place: Place, ingest: Ingest) -> None:
    person = Person(phone(1), name="Aisyah")
    stamp = int(time.time() * 1000) - 5000
    [stored] = await ingest.submit(
        [
            place.message(
                "M1", person, "hello there", channel_timestamp=stamp, sender_identifier="+601100000001"
            )
        ]
    )
    assert not stored.duplicate
    [row] = await place.rows()
    assert (row["id"], row["thread_id"], row["lead_id"]) == (
        stored.message_id,
        stored.thread_id,
        stored.lead_id,
    )
    assert row["content"] == "hello there"
    assert row["delivery_status"] == "received"
    assert (row["direction"], row["role"], row["channel"]) == ("inbound", "user", "whatsapp")
    assert row["channel_timestamp"] == stamp
    assert row["occurred_at"].timestamp() == pytest.approx(stamp / 1000)
    assert row["raw_payload"] == {"key": {"id": "M1"}}
    [lead] = await place.fetch("SELECT * FROM et_leads")
    assert (lead["external_id"], lead["kind"], lead["name"]) == (phone(1), "person", "Aisyah")
    [thread] = await place.fetch("SELECT * FROM et_threads")
    assert (thread["lead_id"], thread["status"], thread["handled_by"]) == (stored.lead_id, "active", "agent")


async def test_a_reply_joins_the_same_thread(place: Place, ingest: Ingest) -> None:
    [first] = await ingest.submit([place.message("M1")])
    [second] = await ingest.submit([place.message("M2", reply_to_message_id="M1")])
    assert (second.thread_id, second.lead_id) == (first.thread_id, first.lead_id)
    assert second.message_id > first.message_id
    assert (await place.rows())[1]["reply_to_message_id"] == "M1"


async def test_a_duplicate_is_stored_once_and_says_so(place: Place, ingest: Ingest, metrics: Metrics) -> None:
    [first] = await ingest.submit([place.message("M1", content="as it was")])
    for _ in range(3):
        [again] = await ingest.submit([place.message("M1", content="changed")])
        assert again == Stored(first.message_id, first.thread_id, first.lead_id, duplicate=True)
    assert [r["content"] for r in await place.rows()] == ["as it was"]
    tenant = place.tenant_id
    assert sample(metrics, "wa_messages_received_total", tenant_id=tenant) == 4
    assert sample(metrics, "wa_messages_written_total", tenant_id=tenant) == 1
    assert sample(metrics, "gateway_duplicates_suppressed_total", channel="whatsapp") == 3
    assert sample(metrics, "wa_write_latency_seconds_count", tenant_id=tenant) == 1


async def test_an_image_with_a_caption_keeps_its_description(place: Place, ingest: Ingest) -> None:
    media = {"state": "pending", "mime_type": "image/jpeg", "size": 1234, "caption": "look"}
    await ingest.submit(
        [place.message("M1", content="look", message_type=MessageType.IMAGE, media_metadata=media)]
    )
    [row] = await place.rows()
    assert (row["message_type"], row["content"], row["media_metadata"]) == ("image", "look", media)


async def test_a_hundred_senders_at_once_with_every_message_twice(place: Place, database: Database) -> None:
    messages = [place.message(f"M{i}", phone(i % 100), str(i)) for i in range(1000)]
    twice = messages + messages
    random.Random(7).shuffle(twice)
    async with running(database) as ingest:
        results = await asyncio.gather(*(ingest.submit([message]) for message in twice))
    assert sum(not stored.duplicate for [stored] in results) == 1000
    rows = await place.rows("channel_message_id")
    assert len(rows) == len({r["channel_message_id"] for r in rows}) == 1000
    assert await place.value("SELECT count(*) FROM et_leads") == 100
    assert await place.value("SELECT count(*) FROM et_threads") == 100


# --- identity of messages and people


async def test_the_same_id_from_two_senders_is_two_messages(place: Place, ingest: Ingest) -> None:
    stored = await ingest.submit(
        [place.message("SAME", phone(1), "one"), place.message("SAME", phone(2), "two")]
    )
    assert len({s.message_id for s in stored}) == 2
    assert [r["content"] for r in await place.rows("content")] == ["one", "two"]


async def test_the_same_id_twice_in_one_batch_is_one_message(place: Place, ingest: Ingest) -> None:
    first, second = await ingest.submit([place.message("M1"), place.message("M1")])
    assert (first.duplicate, second.duplicate) == (False, True)
    assert first.message_id == second.message_id


async def test_a_group_is_a_lead_of_its_own(place: Place, ingest: Ingest) -> None:
    group = Person("whatsapp-group:120363000000000000@g.us", kind="group", name="Football")
    await ingest.submit(
        [
            place.message(
                "M1", group, sender_identifier="+601100000001", chat_identifier="120363000000000000@g.us"
            )
        ]
    )
    [lead] = await place.fetch("SELECT * FROM et_leads")
    assert (lead["kind"], lead["name"]) == ("group", "Football")


async def test_a_name_is_filled_in_once_it_is_known_and_never_overwritten(
    place: Place, ingest: Ingest
) -> None:
    await ingest.submit([place.message("M1")])
    assert await place.value("SELECT name FROM et_leads") is None
    await ingest.submit([place.message("M2", Person(phone(1), name="Mei"))])
    assert await place.value("SELECT name FROM et_leads") == "Mei"
    await ingest.submit([place.message("M3", Person(phone(1), name="Other"))])
    assert await place.value("SELECT name FROM et_leads") == "Mei"


async def test_two_tenants_have_their_own_lead_for_one_person(database: Database, ingest: Ingest) -> None:
    one, two = await make_place(database), await make_place(database)
    [a], [b] = await asyncio.gather(ingest.submit([one.message("M1")]), ingest.submit([two.message("M1")]))
    assert a.lead_id != b.lead_id
    assert len(await one.rows()) == len(await two.rows()) == 1


async def test_a_new_lead_takes_the_sessions_workspace(database: Database, ingest: Ingest) -> None:
    place = await make_place(database)
    workspace = await place.value(
        "INSERT INTO et_workspaces (tenant_id, name) VALUES ($1, 'Sales') RETURNING id", place.tenant_id
    )
    await place.value(
        "UPDATE et_channel_sessions SET metadata = $2 WHERE id = $1",
        place.session_id,
        {"default_workspace_id": workspace},
    )
    await ingest.submit([place.message("M1")])
    assert await place.value("SELECT workspace_id FROM et_leads") == workspace


@pytest.mark.parametrize("wanted", [999_999, "nonsense", [], 10**30])
async def test_a_workspace_that_does_not_exist_costs_a_warning_not_the_message(
    database: Database, ingest: Ingest, wanted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = await make_place(database, metadata={"default_workspace_id": wanted})
    await ingest.submit([place.message("M1")])
    assert await place.value("SELECT workspace_id FROM et_leads") is None
    assert "lead.workspace_missing" in capsys.readouterr().out


async def test_another_tenants_workspace_is_not_taken(database: Database, ingest: Ingest) -> None:
    other = await make_place(database)
    workspace = await other.value(
        "INSERT INTO et_workspaces (tenant_id, name) VALUES ($1, 'Theirs') RETURNING id", other.tenant_id
    )
    place = await make_place(database, metadata={"default_workspace_id": workspace})
    await ingest.submit([place.message("M1")])
    assert (
        await place.value("SELECT workspace_id FROM et_leads WHERE tenant_id = $1", place.tenant_id) is None
    )


# --- order


async def test_messages_of_a_thread_keep_the_order_of_arrival(place: Place, ingest: Ingest) -> None:
    async def sender(n: int) -> None:
        for i in range(30):
            await ingest.submit(
                [place.message(f"{n}-{i}", phone(n), str(i), channel_timestamp=1_700_000_000_000)]
            )

    await asyncio.gather(*(sender(n) for n in range(20)))
    # Without waiting for the answers too.
    await asyncio.gather(*(ingest.submit([place.message(f"B{i}", phone(99), str(i))]) for i in range(250)))
    rows = await place.rows("lead_id, content")
    by_lead: dict[int, list[int]] = {}
    for row in rows:
        by_lead.setdefault(row["lead_id"], []).append(int(row["content"]))
    assert len(by_lead) == 21
    assert all(numbers == sorted(numbers) for numbers in by_lead.values())


async def test_lid_and_phone_of_one_person_keep_their_order_in_one_batch(
    place: Place, ingest: Ingest
) -> None:
    both = Person(phone(1), aliases=(lid(1),))
    people = [Person(phone(1)), Person(lid(1)), both, Person(lid(1)), Person(phone(1))]
    stored = await ingest.submit([place.message(f"M{i}", person, str(i)) for i, person in enumerate(people)])
    assert len({s.lead_id for s in stored}) == 1
    assert [r["content"] for r in await place.rows("content")] == ["0", "1", "2", "3", "4"]


# --- bad rows


async def test_a_bad_row_does_not_fail_its_neighbours(place: Place, ingest: Ingest, metrics: Metrics) -> None:
    gone = await make_place(place.db, tenant_id=place.tenant_id)
    await place.value("DELETE FROM et_channel_sessions WHERE id = $1", gone.session_id)
    # The same flusher: an even distance between the two session ids.
    bad = Place(place.db, place.tenant_id, SessionId(place.session_id + 1_000_000))
    messages = [place.message(f"M{i}", phone(i % 10)) for i in range(99)]
    messages.insert(57, bad.message("BAD"))
    outcomes = await ingest.submit_each(messages)
    assert [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Stored)] == [57]
    refused = outcomes[57]
    assert isinstance(refused, Invalid)
    assert f"session {bad.session_id} does not exist in tenant {place.tenant_id}" in refused.detail
    assert len(await place.rows()) == 99
    kind = "ForeignKeyViolationError"
    assert sample(metrics, "wa_write_errors_total", tenant_id=place.tenant_id, error_type=kind) == 1
    with pytest.raises(Invalid, match="does not exist"):
        await ingest.submit([place.message("M200"), bad.message("BAD")])
    assert (await place.rows())[-1]["channel_message_id"] == "M200"


async def test_what_a_text_cannot_hold_is_replaced_not_refused(place: Place, ingest: Ingest) -> None:
    await ingest.submit(
        [
            place.message("M1", Person(phone(1), name="a\0b"), "null \0 here"),
            place.message("M2", content="half a pair \ud83d", raw_payload={"text": "\0\ud83d"}),
        ]
    )
    rows = await place.rows("content, raw_payload")
    assert [r["content"] for r in rows] == ["null \ufffd here", "half a pair \ufffd"]
    assert rows[1]["raw_payload"] == {"text": "\ufffd\ufffd"}


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_message_id": ""},
        {"channel_message_id": "x" * 3000},
        {"raw_payload": {"bytes": b"x"}},
        {"person": Person("")},
        {"tenant_id": 0},
        {"session_id": 2**70},
        {"message_type": "hologram"},
        {"role": "king"},
        {"channel": "No Channel"},
    ],
)
async def test_what_can_never_be_stored_is_invalid(
    place: Place, ingest: Ingest, changes: dict[str, Any]
) -> None:
    good, bad = await ingest.submit_each([place.message("M1"), place.message("M2", **changes)])
    assert isinstance(good, Stored)
    assert isinstance(bad, Invalid)
    assert "hello" not in bad.detail


@pytest.mark.parametrize("stamp", [None, -5, 0, 10**15, 2**62, 2**70])
async def test_a_senseless_time_costs_the_time_not_the_message(
    place: Place, ingest: Ingest, stamp: int | None
) -> None:
    await ingest.submit([place.message("M1", channel_timestamp=stamp)])
    [row] = await place.rows("channel_timestamp, occurred_at")
    assert row["channel_timestamp"] is None
    assert abs(row["occurred_at"].timestamp() - time.time()) < 60


async def test_a_clock_that_runs_ahead_does_not_pin_its_message_to_the_end(
    place: Place, ingest: Ingest
) -> None:
    await ingest.submit([place.message("M1", channel_timestamp=int(time.time() * 1000) + 86_400_000)])
    [row] = await place.rows("occurred_at")
    assert row["occurred_at"].timestamp() <= time.time() + 5


async def test_an_unknown_tenant_is_refused(place: Place, ingest: Ingest) -> None:
    [outcome] = await ingest.submit_each([place.message("M1", tenant_id=TenantId(4711))])
    assert isinstance(outcome, Invalid)


# --- placeholders, other types, history


async def test_a_placeholder_is_filled_by_the_message_that_could_be_read_later(
    place: Place, ingest: Ingest
) -> None:
    subscription = place.db.hub.subscribe("et_inbound")
    [first] = await ingest.submit([place.message("M1", content=None, placeholder=True, raw_payload={"a": 1})])
    [row] = await place.rows()
    assert (row["message_type"], row["placeholder"], row["content"]) == ("unsupported", True, None)
    while await subscription.wait(0.3):
        pass  # what the insert said
    [filled] = await ingest.submit(
        [place.message("M1", content="now readable", raw_payload={"b": 2}, media_metadata={"state": "none"})]
    )
    assert filled == first
    [row] = await place.rows()
    assert (row["message_type"], row["placeholder"], row["content"]) == ("text", False, "now readable")
    assert (row["raw_payload"], row["media_metadata"]) == ({"b": 2}, {"state": "none"})
    assert row["delivery_status"] == "received"
    assert await subscription.wait(5), "the inbound worker was not woken"
    subscription.close()


async def test_a_late_placeholder_never_overwrites_what_was_read(place: Place, ingest: Ingest) -> None:
    await ingest.submit([place.message("M1", content="readable")])
    [again] = await ingest.submit([place.message("M1", content=None, placeholder=True)])
    assert again.duplicate
    [row] = await place.rows()
    assert (row["content"], row["placeholder"]) == ("readable", False)


@pytest.mark.parametrize("placeholder_first", [True, False])
async def test_placeholder_and_message_in_one_batch_give_the_message(
    place: Place, ingest: Ingest, placeholder_first: bool
) -> None:
    pair = [place.message("M1", content=None, placeholder=True), place.message("M1", content="readable")]
    outcomes = await ingest.submit(pair if placeholder_first else pair[::-1])
    assert sorted(o.duplicate for o in outcomes) == [False, True]
    [row] = await place.rows()
    assert (row["content"], row["placeholder"]) == ("readable", False)


async def test_reactions_edits_and_deletions_are_rows_of_their_own(place: Place, ingest: Ingest) -> None:
    await ingest.submit([place.message("M1", content="first")])
    await ingest.submit(
        [
            place.message("R1", content="👍", message_type=MessageType.REACTION, reply_to_message_id="M1"),
            place.message("E1", content="second", message_type=MessageType.EDITED, reply_to_message_id="M1"),
            place.message("D1", content=None, message_type=MessageType.DELETED, reply_to_message_id="M1"),
        ]
    )
    rows = await place.rows("message_type, content, reply_to_message_id")
    assert [tuple(r) for r in rows] == [
        ("text", "first", None),
        ("reaction", "👍", "M1"),
        ("edited", "second", "M1"),
        ("deleted", None, "M1"),
    ]


async def test_history_wakes_nobody(place: Place, ingest: Ingest) -> None:
    subscription = place.db.hub.subscribe("et_inbound")
    await subscription.wait(0.05)
    await ingest.submit(
        [
            place.message("H1", is_history=True, channel_timestamp=1_500_000_000_000),
            place.typed("H2", is_history=True, channel_timestamp=1_500_000_001_000),
        ]
    )
    assert not await subscription.wait(0.3)
    subscription.close()
    rows = await place.rows("is_history, delivery_status, occurred_at")
    assert [r["delivery_status"] for r in rows] == ["inbound_ignored", "sent"]
    assert all(r["is_history"] and r["occurred_at"].year == 2017 for r in rows)
    assert await place.value("SELECT handled_by FROM et_threads") == "agent"


# --- cursors


async def test_a_cursor_moves_with_its_message(place: Place, ingest: Ingest) -> None:
    await ingest.submit(
        [
            place.message("M1", cursor=Cursor("INBOX", {"uid": 1})),
            place.message("M2", cursor=Cursor("INBOX", {"uid": 2})),
            place.message("M3", cursor=Cursor("Sent", {"uid": 9})),
        ]
    )
    cursors = await place.fetch("SELECT name, value FROM et_session_cursors ORDER BY name")
    assert [tuple(c) for c in cursors] == [("INBOX", {"uid": 2}), ("Sent", {"uid": 9})]
    await ingest.submit([place.message("M3", cursor=Cursor("Sent", {"uid": 10}))])
    assert await place.value("SELECT value FROM et_session_cursors WHERE name = 'Sent'") == {"uid": 10}


async def test_a_cursor_can_move_without_a_message(place: Place, ingest: Ingest) -> None:
    await ingest.advance(place.session_id, Cursor("INBOX", {"uid": 5}))
    assert await place.value("SELECT value FROM et_session_cursors") == {"uid": 5}
    with pytest.raises(Invalid, match="session 424242 does not exist"):
        await ingest.advance(SessionId(424242), Cursor("INBOX", {}))


async def test_a_cursor_is_not_stored_when_its_message_is_refused(place: Place, ingest: Ingest) -> None:
    [outcome] = await ingest.submit_each(
        [place.message("M1", role="king", cursor=Cursor("INBOX", {"uid": 1}))]
    )
    assert isinstance(outcome, Invalid)
    assert await place.value("SELECT count(*) FROM et_session_cursors") == 0


# --- life


async def test_a_stop_writes_what_waits_and_takes_nothing_new(place: Place, database: Database) -> None:
    ingest = Ingest(database, Metrics())
    assert not ingest.healthy
    await ingest.start()
    assert ingest.healthy
    waiting = [asyncio.create_task(ingest.submit([place.message(f"M{i}")])) for i in range(300)]
    await asyncio.sleep(0)
    assert ingest.depth == 300
    await ingest.stop()
    await asyncio.gather(*waiting)
    assert len(await place.rows("id")) == 300
    assert ingest.depth == 0
    with pytest.raises(DatabaseUnavailable, match="not running"):
        await ingest.submit([place.message("M301")])


async def test_a_submitter_that_gives_up_does_not_disturb_the_others(place: Place, ingest: Ingest) -> None:
    tasks = [asyncio.create_task(ingest.submit([place.message(f"M{i}")])) for i in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(r, list) for r in results) == 10
    await ingest.submit([place.message("LAST")])
    assert ingest.healthy
