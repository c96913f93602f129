"""Receipts on a real PostgreSQL: forward only, whatever their order, and never lost against a send that commits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.channel import Person
from core.database import Database
from core.ingest import Ingest
from core.store import receipts as store
from tests.support.inbound import Place, make_place, running


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@pytest.fixture
async def ingest(database: Database) -> AsyncIterator[Ingest]:
    async with running(database) as started:
        yield started


async def sent(place: Place, channel_message_id: str) -> int:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "sent", channel_message_id)
    queue_id: int = item["queue_id"]
    return queue_id


async def test_delivered_and_read_move_the_message(place: Place, ingest: Ingest) -> None:
    queue_id = await sent(place, "A1")
    await ingest.apply_status([place.receipt("delivered", "A1")])
    assert (await place.states(queue_id))[:2] == ("sent", "delivered")
    await ingest.apply_status([place.receipt("read", "A1")])
    assert (await place.states(queue_id))[:2] == ("sent", "read")


async def test_read_without_delivered_gets_there_too(place: Place, ingest: Ingest) -> None:
    queue_id = await sent(place, "A1")
    await ingest.apply_status([place.receipt("read", "A1")])
    assert (await place.states(queue_id))[:2] == ("sent", "read")


async def test_late_receipts_are_dropped_silently(place: Place, ingest: Ingest) -> None:
    queue_id = await sent(place, "A1")
    await ingest.apply_status([place.receipt("read", "A1")])
    for status in ("delivered", "sent", "read", "failed"):
        await ingest.apply_status([place.receipt(status, "A1")])
    assert (await place.states(queue_id))[:2] == ("sent", "read")
    assert await place.value("SELECT count(*) FROM et_parked_receipts") == 0


async def test_one_receipt_about_many_messages(place: Place, ingest: Ingest) -> None:
    items = [await sent(place, f"A{i}") for i in range(5)]
    await ingest.apply_status([place.receipt("delivered", *(f"A{i}" for i in range(5)), "A1", "")])
    assert {(await place.states(item))[1] for item in items} == {"delivered"}


async def test_a_bounce_fails_the_message_and_says_why(place: Place, ingest: Ingest) -> None:
    queue_id = await sent(place, "A1")
    await ingest.apply_status([place.receipt("failed", "A1", reason="mailbox does not exist")])
    assert (await place.states(queue_id))[:2] == ("failed", "failed")
    assert await place.value("SELECT last_error FROM et_outbound_queue") == "mailbox does not exist"


async def test_a_bounce_of_what_was_typed_on_the_phone(place: Place, ingest: Ingest) -> None:
    await ingest.submit([place.typed("P1")])
    await ingest.apply_status([place.receipt("failed", "P1")])
    assert (await place.rows())[0]["delivery_status"] == "failed"


@pytest.mark.parametrize("status", ["dispatching", "unknown"])
@pytest.mark.parametrize("receipt", ["sent", "delivered", "read"])
async def test_a_receipt_is_evidence_that_an_open_send_went_out(
    place: Place, ingest: Ingest, status: str, receipt: str
) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], status, "A1")
    await place.value("UPDATE et_outbound_queue SET last_error = 'cut off', error_code = 'outcome_unknown'")
    await ingest.apply_status([place.receipt(receipt, "A1")])
    assert await place.states(item["queue_id"]) == ("sent", receipt, "A1")
    assert await place.value("SELECT last_error FROM et_outbound_queue") is None


async def test_a_receipt_before_the_send_is_known_waits_for_it(place: Place, ingest: Ingest) -> None:
    item = await place.enqueue()
    await place.claim(item["queue_id"])
    await ingest.apply_status([place.receipt("delivered", "A1"), place.receipt("read", "A1")])
    assert await place.value("SELECT count(*) FROM et_parked_receipts") == 1
    await place.mark(item["queue_id"], "sent", "A1")
    async with place.db.worker() as conn:
        assert await store.apply_parked(conn) == 1
    assert (await place.states(item["queue_id"]))[:2] == ("sent", "read")


async def test_a_receipt_and_a_send_that_commit_together_are_both_there(place: Place, ingest: Ingest) -> None:
    async def send(n: int, queue_id: int) -> None:
        """As the outbound worker marks: id and status in one transaction, then a look at what was parked."""
        async with place.db.worker() as conn:
            async with conn.transaction():
                await conn.execute("UPDATE et_outbound_queue SET status = 'sent' WHERE id = $1", queue_id)
                await conn.execute(
                    "UPDATE et_messages m SET channel_message_id = $2 FROM et_outbound_queue q"
                    " WHERE q.id = $1 AND m.id = q.message_id",
                    queue_id,
                    f"A{n}",
                )
                await asyncio.sleep(0)
            await store.apply_parked(conn)

    items = []
    for n in range(40):
        item = await place.enqueue(recipient=f"+60110000{n:04d}")
        await place.claim(item["queue_id"])
        items.append(item["queue_id"])
    await asyncio.gather(
        *(send(n, queue_id) for n, queue_id in enumerate(items)),
        *(ingest.apply_status([place.receipt("delivered", f"A{n}")]) for n in range(40)),
    )
    assert [(await place.states(item))[1] for item in items] == ["delivered"] * 40
    assert await place.value("SELECT count(*) FROM et_parked_receipts") == 0


async def test_parked_receipts_are_forgotten_after_a_day(place: Place, ingest: Ingest) -> None:
    await ingest.apply_status([place.receipt("delivered", "OLD")])
    await place.value("UPDATE et_parked_receipts SET parked_at = now() - INTERVAL '25 hours'")
    await ingest.apply_status([place.receipt("delivered", "NEW", occurred_at=datetime.now(UTC))])
    rows = await place.fetch("SELECT channel_message_id FROM et_parked_receipts")
    assert [r["channel_message_id"] for r in rows] == ["NEW"]


async def test_a_receipt_of_a_session_that_is_gone_harms_nobody(place: Place, ingest: Ingest) -> None:
    queue_id = await sent(place, "A1")
    await ingest.apply_status(
        [place.receipt("read", "X1", session_id=4242), place.receipt("delivered", "A1")]
    )
    assert (await place.states(queue_id))[1] == "delivered"


async def test_another_tenants_receipt_moves_nothing(
    database: Database, place: Place, ingest: Ingest
) -> None:
    queue_id = await sent(place, "A1")
    other = await make_place(database)
    await ingest.apply_status([place.receipt("read", "A1", tenant_id=other.tenant_id)])
    assert (await place.states(queue_id))[1] == "sent"


async def test_where_ids_are_counted_per_chat_the_chat_decides(place: Place, ingest: Ingest) -> None:
    queue_ids = []
    for n in (1, 2):
        item = await place.enqueue(recipient=f"+6011{n:08d}")
        await place.claim(item["queue_id"])
        await place.mark(item["queue_id"], "sent", "57")
        queue_ids.append(item["queue_id"])
    await ingest.apply_status([place.receipt("read", "57", chat=Person("whatsapp:+601100000002"))])
    assert [(await place.states(q))[1] for q in queue_ids] == ["sent", "read"]


@given(order=st.lists(st.sampled_from(["sent", "delivered", "read"]), min_size=1, max_size=6))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_furthest_receipt_wins_in_any_order(order: list[str], place_sync: PlaceInLoop) -> None:
    assert place_sync.play(order) == max(order, key=["sent", "delivered", "read"].index)


class PlaceInLoop:
    """Hypothesis calls plain functions: one loop of their own for all examples."""

    def __init__(self, runner: asyncio.Runner, place: Place, ingest: Ingest) -> None:
        self._runner, self._place, self._ingest = runner, place, ingest
        self._count = 0

    def play(self, order: list[str]) -> str:
        return self._runner.run(self._play(order))

    async def _play(self, order: list[str]) -> str:
        self._count += 1
        name = f"H{self._count}"
        queue_id = await sent(self._place, name)
        for status in order:
            await self._ingest.apply_status([self._place.receipt(status, name)])
        return (await self._place.states(queue_id))[1]


@pytest.fixture
def place_sync(migrated_url: str) -> Iterator[PlaceInLoop]:
    with asyncio.Runner() as runner:
        database = runner.run(Database.open(migrated_url))
        place = runner.run(make_place(database))
        manager = running(database)
        ingest = runner.run(manager.__aenter__())
        yield PlaceInLoop(runner, place, ingest)
        runner.run(manager.__aexit__(None, None, None))
        runner.run(database.close())
