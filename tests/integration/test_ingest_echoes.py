"""Own messages that come back: a queue item's echo moves the item on, a text typed on the phone hands the thread over."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from core.channel import Person
from core.database import Database
from core.ingest import Ingest
from core.store import messages as store
from tests.support.inbound import Place, lid, make_place, running

SENT_ID = "3EB0C0FFEE0123456789AB"


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@pytest.fixture
async def ingest(database: Database) -> AsyncIterator[Ingest]:
    async with running(database) as started:
        yield started


def secret(queue_id: int, epoch: int = 1) -> dict[str, object]:
    """What the channel's convert writes when it recognises its own message secret."""
    return {"origin": "phone", "queue_ref": {"queue_id": queue_id, "claim_epoch": epoch}}


# --- typed on the phone


async def test_a_text_typed_on_the_phone_hands_the_thread_to_a_person(place: Place, ingest: Ingest) -> None:
    [asked] = await ingest.submit([place.message("M1")])
    automatic = await place.enqueue(content="auto", dedupe_key=f"reply:{asked.message_id}")
    by_origin = await place.enqueue(content="auto too", raw_payload={"origin": "agent"})
    manual = await place.enqueue(content="by hand", dedupe_key="order-1")
    [typed] = await ingest.submit([place.typed("P1", "I take over")])
    assert not typed.duplicate
    assert typed.thread_id == asked.thread_id
    [row] = await place.rows(where="channel_message_id = 'P1'")
    assert (row["direction"], row["role"], row["delivery_status"]) == ("outbound", "assistant", "sent")
    assert row["raw_payload"]["origin"] == "phone"
    assert await place.value("SELECT handled_by FROM et_threads") == "human"
    assert (await place.states(automatic["queue_id"]))[:2] == ("cancelled", "cancelled")
    assert (await place.states(by_origin["queue_id"]))[:2] == ("cancelled", "cancelled")
    assert (await place.states(manual["queue_id"]))[:2] == ("queued", "queued")


async def test_a_repeated_echo_does_not_take_the_thread_back(place: Place, ingest: Ingest) -> None:
    await ingest.submit([place.typed("P1")])
    await place.value("UPDATE et_threads SET handled_by = 'agent'")
    [again] = await ingest.submit([place.typed("P1")])
    assert again.duplicate
    assert await place.value("SELECT handled_by FROM et_threads") == "agent"


async def test_receipts_move_what_was_typed_on_the_phone(place: Place, ingest: Ingest) -> None:
    await ingest.submit([place.typed("P1")])
    await ingest.apply_status([place.receipt("read", "P1")])
    assert (await place.rows())[0]["delivery_status"] == "read"


# --- echoes of queue items


@pytest.mark.parametrize("status", ["dispatching", "unknown"])
async def test_an_echo_with_our_secret_proves_the_send(place: Place, ingest: Ingest, status: str) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    if status == "unknown":
        await place.mark(item["queue_id"], "unknown")
    [stored] = await ingest.submit([place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"]))])
    assert stored.duplicate
    assert stored.message_id == item["message_id"]
    assert await place.states(item["queue_id"]) == ("sent", "sent", SENT_ID)
    assert len(await place.rows()) == 1
    assert await place.value("SELECT handled_by FROM et_threads") == "agent"


async def test_an_echo_proves_a_send_whose_id_is_known(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "unknown", SENT_ID)
    # The echo names the chat by its LID, which nobody has linked to the phone number yet.
    [stored] = await ingest.submit([place.typed(SENT_ID, "our text", person=Person(lid(1)))])
    assert stored.message_id == item["message_id"]
    assert await place.states(item["queue_id"]) == ("sent", "sent", SENT_ID)
    assert len(await place.rows()) == 1
    assert await place.value("SELECT count(*) FROM et_leads") == 1


async def test_a_short_id_proves_a_send_only_to_the_same_person(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "unknown", "57")
    # Another chat counts its messages too.
    [other] = await ingest.submit([place.typed("57", "else", person=Person(lid(1)))])
    assert not other.duplicate
    assert (await place.states(item["queue_id"]))[0] == "unknown"
    [same] = await ingest.submit([place.typed("57", "our text")])
    assert (same.duplicate, same.message_id) == (True, item["message_id"])
    assert (await place.states(item["queue_id"]))[:2] == ("sent", "sent")


async def test_an_echo_of_a_sent_item_changes_nothing(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "sent", SENT_ID)
    [stored] = await ingest.submit([place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"]))])
    assert stored.duplicate
    assert await place.states(item["queue_id"]) == ("sent", "sent", SENT_ID)
    assert len(await place.rows()) == 1
    assert await place.value("SELECT handled_by FROM et_threads") == "agent"


async def test_an_item_put_back_by_mistake_is_not_sent_again(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "queued")
    await ingest.submit([place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"]))])
    assert await place.states(item["queue_id"]) == ("sent", "sent", SENT_ID)


async def test_an_echo_stored_first_becomes_one_row_with_the_marked_one(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue(content="our text")
    await place.claim(item["queue_id"])
    # Not recognised: no secret, id not known yet. It carries our own text, so nobody took the thread over.
    [echo] = await ingest.submit([place.typed(SENT_ID, "our text")])
    assert not echo.duplicate
    assert await place.value("SELECT handled_by FROM et_threads") == "agent"
    await ingest.apply_status([place.receipt("read", SENT_ID)])
    await place.mark(item["queue_id"], "sent")
    async with place.db.worker() as conn, conn.transaction():
        await store.merge_echo(conn, item["message_id"], SENT_ID)
    [row] = await place.rows()
    assert row["id"] == item["message_id"]
    assert await place.states(item["queue_id"]) == ("sent", "read", SENT_ID)


async def test_an_echo_with_our_secret_takes_in_the_row_stored_first(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue(content="our text")
    await place.claim(item["queue_id"])
    await ingest.submit([place.typed(SENT_ID, "our text")])
    await ingest.submit([place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"]))])
    [row] = await place.rows()
    assert row["id"] == item["message_id"]
    assert await place.states(item["queue_id"]) == ("sent", "sent", SENT_ID)


async def test_a_receipt_that_waited_is_applied_when_the_echo_brings_the_id(
    place: Place, ingest: Ingest
) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "unknown")
    await ingest.apply_status([place.receipt("delivered", SENT_ID)])
    await ingest.submit([place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"]))])
    assert await place.states(item["queue_id"]) == ("sent", "delivered", SENT_ID)
    assert await place.value("SELECT count(*) FROM et_parked_receipts") == 0


async def test_a_final_item_is_left_as_it_is_and_makes_no_second_row(
    place: Place, ingest: Ingest, capsys: pytest.CaptureFixture[str]
) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "failed")
    [stored] = await ingest.submit([place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"]))])
    assert stored.message_id == item["message_id"]
    assert (await place.states(item["queue_id"]))[0] == "failed"
    assert len(await place.rows()) == 1
    assert "send.contradicted" in capsys.readouterr().out


async def test_a_secret_of_another_tenants_item_proves_nothing(database: Database, ingest: Ingest) -> None:
    theirs, ours = await make_place(database), await make_place(database)
    item = await theirs.enqueue()
    await theirs.claim(item["queue_id"])
    [stored] = await ingest.submit([ours.typed(SENT_ID, raw_payload=secret(item["queue_id"]))])
    assert not stored.duplicate
    assert (await theirs.states(item["queue_id"]))[0] == "dispatching"


async def test_a_mixed_batch_settles_every_message(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    outcomes = await ingest.submit(
        [
            place.message("M1"),
            place.typed(SENT_ID, "our text", raw_payload=secret(item["queue_id"])),
            place.typed("P1", "by hand"),
            place.message("M2"),
            place.message("M1"),
        ]
    )
    assert [o.duplicate for o in outcomes] == [False, True, False, False, True]
    assert [r["channel_message_id"] for r in await place.rows()] == [SENT_ID, "M1", "P1", "M2"]
