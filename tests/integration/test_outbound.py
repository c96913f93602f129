"""The outbound worker on a real database: rows in by plain SQL, calls out to a scripted channel."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from core.database import Database
from core.dispatch import Timings
from core.errors import NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from core.metrics import Metrics
from tests.support.fake_channel import FakeDispatcher, FakePlatform
from tests.support.outbound import (
    QUICK,
    all_reached,
    enqueue,
    eventually,
    fetch,
    give_lease,
    item,
    make_place,
    reached,
    running,
    value,
)


@pytest.fixture
def platform() -> FakePlatform:
    return FakePlatform()


async def test_a_row_is_sent_and_says_so_everywhere(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    metrics = Metrics()
    async with running(database, FakeDispatcher(platform, [place.session_id]), metrics=metrics):
        queue_id = await enqueue(database, place, "hello", payload={"a": 1})
        row = await reached(database, queue_id, "sent")
    assert row["delivery_status"] == "sent"
    assert row["channel_message_id"] == platform.delivered[queue_id, 1]
    assert (row["claimed_by"], row["claim_epoch"], row["retry_count"]) == ("gw-1", 1, 0)
    (call,) = platform.calls
    assert call.message.content == "hello"
    assert call.message.payload == {"a": 1}
    assert call.message.first_contact
    assert not call.message.automatic
    assert call.attempt.recipient == "fake:alice"
    assert metrics.sends.labels("fake", "sent")._value.get() == 1


async def test_a_hundred_rows_of_a_separate_backend_are_handed_over_within_a_second(
    database: Database, platform: FakePlatform, migrated_url: str
) -> None:
    place = await make_place(database)
    committed: dict[int, datetime] = {}
    async with running(database, FakeDispatcher(platform, [place.session_id]), timings=Timings()):
        conn = await asyncpg.connect(migrated_url)
        try:
            await conn.execute("SET ROLE et_worker")
            for n in range(100):
                row = await conn.fetchrow(
                    "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, $4)",
                    place.tenant_id, place.session_id, f"person{n % 40}", f"text {n}",
                )  # fmt: skip
                committed[row["queue_id"]] = datetime.now(UTC)
        finally:
            await conn.close()
        await all_reached(database, list(committed), "sent")
    late = [call.at - committed[int(call.attempt.queue_id)] for call in platform.calls]
    assert len(late) == 100
    assert max(late) < timedelta(seconds=1)


async def test_plain_inserts_into_the_two_tables_are_enough(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await value(
            database,
            """
            WITH lead AS (INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, 'fake:bob') RETURNING id),
            m AS (INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, role, content,
                                           delivery_status, occurred_at)
                  SELECT $1, id, $2, 'fake', 'outbound', 'assistant', 'by hand', 'queued', now() FROM lead RETURNING id)
            SELECT id FROM m
            """,
            place.tenant_id,
            place.session_id,
        )
        queue_id = await value(
            database,
            "INSERT INTO et_outbound_queue (tenant_id, message_id, channel, channel_session_id) "
            "VALUES ($1, $2, 'fake', $3) RETURNING id",
            place.tenant_id,
            queue_id,
            place.session_id,
        )
        await reached(database, queue_id, "sent")
    assert platform.calls[0].attempt.recipient == "fake:bob", "without a recipient: the lead's own address"


async def test_without_a_recipient_the_last_inbound_address_is_used(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    lead = await value(
        database,
        "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, 'fake:old') RETURNING id",
        place.tenant_id,
    )
    for n, sender in enumerate(("first", "latest")):
        await value(
            database,
            "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, role, content, "
            "channel_message_id, sender_identifier, occurred_at, delivery_status) VALUES ($1, $2, $3, 'fake', 'inbound', "
            "'user', 'hi', $4, $5, now() - make_interval(mins => 10 - $6), 'received') RETURNING id",
            place.tenant_id, lead, place.session_id, f"in{n}", sender, n,
        )  # fmt: skip
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await value(
            database,
            "SELECT queue_id FROM et_enqueue_outbound($1, $2, NULL, 'hello', lead_id => $3)",
            place.tenant_id,
            place.session_id,
            lead,
        )
        await reached(database, queue_id, "sent")
    (call,) = platform.calls
    assert call.attempt.recipient == "fake:latest"
    assert not call.message.first_contact


async def test_a_quoted_reply_carries_what_it_quotes(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    lead = await value(
        database,
        "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, 'fake:amy') RETURNING id",
        place.tenant_id,
    )
    await value(
        database,
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, role, content, "
        "channel_message_id, sender_identifier, occurred_at, delivery_status) "
        "VALUES ($1, $2, $3, 'fake', 'inbound', 'user', 'how much?', 'Q1', 'amy', now(), 'received') RETURNING id",
        place.tenant_id, lead, place.session_id,
    )  # fmt: skip
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "ten", to="amy", reply_to_message_id="Q1")
        await reached(database, queue_id, "sent")
    quoted = platform.calls[0].message.quoted
    assert quoted is not None
    assert (quoted.channel_message_id, quoted.content, quoted.from_me) == ("Q1", "how much?", False)


# --- order


async def test_a_thread_goes_out_in_order_one_at_a_time(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.delay = 0.01
    ids = [await enqueue(database, place, f"{n}", to=f"p{n % 3}", priority=n) for n in range(30)]
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await all_reached(database, ids, "sent")
    for person in range(3):
        mine = [int(t or 0) for t in platform.texts if int(t or 0) % 3 == person]
        assert mine == sorted(mine), "priority orders between threads, never inside one"


async def test_only_a_started_retry_holds_back_its_thread(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    later = await enqueue(database, place, "tomorrow", send_at=datetime.now(UTC) + timedelta(days=1))
    platform.script(NotSentError("not yet"))
    slow = Timings(**{**_fields(QUICK), "backoff": (0.6,)})
    first = await enqueue(database, place, "first")
    async with running(database, FakeDispatcher(platform, [place.session_id]), timings=slow):
        await eventually(lambda: _is(database, first, retry_count=1))
        second = await enqueue(database, place, "second")
        other = await enqueue(database, place, "other thread", to="bob")
        await reached(database, other, "sent")
        assert (await item(database, second))["status"] == "queued", "the retry of `first` holds it back"
        await all_reached(database, [first, second], "sent")
    assert platform.texts == ["first", "other thread", "first", "second"]
    assert (await item(database, later))["status"] == "queued"


async def test_an_unknown_item_holds_back_nothing(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.script("sent_then_lost", "sent")
    first, second = [await enqueue(database, place, text) for text in ("a", "b")]
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await reached(database, second, "sent")
    assert (await item(database, first))["status"] == "unknown"


async def test_priority_goes_first_between_threads(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    for n in range(5):
        await enqueue(database, place, "campaign", to=f"c{n}")
    reply = await enqueue(database, place, "reply", to="waiting", priority=10)
    dispatcher = FakeDispatcher(platform, [place.session_id])
    async with running(database, dispatcher):
        await reached(database, reply, "sent")
    assert platform.texts[0] == "reply"


# --- outcomes


async def test_a_retry_then_success(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    metrics = Metrics()
    platform.script(NotSentError("websocket not connected", code="websocket_not_connected"))
    async with running(database, FakeDispatcher(platform, [place.session_id]), metrics=metrics):
        queue_id = await enqueue(database, place, "hello")
        row = await reached(database, queue_id, "sent")
    assert row["retry_count"] == 1
    assert (row["error_code"], row["last_error"]) == (None, None)
    assert row["claim_epoch"] == 2
    assert metrics.retries.labels("fake")._value.get() == 1


async def test_three_definite_failures_end_it_with_the_reason(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    platform.script(*[NotSentError("websocket not connected", code="websocket_not_connected")] * 3)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "hello")
        row = await reached(database, queue_id, "failed")
    assert row["retry_count"] == 3
    assert row["error_code"] == "websocket_not_connected"
    assert row["last_error"] == "gave up after 3 attempts: websocket not connected"
    assert row["delivery_status"] == "failed"
    audit = await fetch(database, "SELECT * FROM et_audit_log WHERE event = 'send_failure' ORDER BY id")
    assert [a["detail"]["attempt"] for a in audit] == [1, 2, 3]
    assert {a["subject_id"] for a in audit} == {str(queue_id)}
    assert len(platform.calls) == 3


async def test_a_refusal_is_final_at_once(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.script(RefusedError("this number is not on WhatsApp", code="not_on_whatsapp"))
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "hello")
        row = await reached(database, queue_id, "failed")
    assert (row["error_code"], row["last_error"]) == ("not_on_whatsapp", "this number is not on WhatsApp")
    assert len(platform.calls) == 1


@pytest.mark.parametrize(
    "step",
    [UnknownOutcomeError("cut off", channel_message_id="MAYBE1"), "sent_then_lost", OSError("broken pipe")],
    ids=["said so", "unexpected error", "os error"],
)
async def test_an_unknown_outcome_is_never_sent_again(
    database: Database, platform: FakePlatform, step: BaseException | str
) -> None:
    place = await make_place(database)
    platform.script(step)
    async with running(database, FakeDispatcher(platform, [place.session_id])) as worker:
        queue_id = await enqueue(database, place, "hello")
        row = await reached(database, queue_id, "unknown")
        await asyncio.sleep(0.5)
        assert worker.in_flight == 0
    assert len(platform.calls) == 1
    assert row["delivery_status"] == "unknown"
    if isinstance(step, UnknownOutcomeError):
        assert row["channel_message_id"] == "MAYBE1", "so that a receipt can settle it"
        moved = await value(
            database,
            "SELECT et_apply_receipt($1, $2, 'MAYBE1', 'delivered')",
            place.tenant_id,
            place.session_id,
        )
        assert moved == "applied"
        assert (await item(database, queue_id))["status"] == "sent"


async def test_throttling_costs_no_attempt(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.script(*[ThrottledError("slow down", retry_after=0.1)] * 5)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "hello")
        row = await reached(database, queue_id, "sent")
    assert row["retry_count"] == 0
    assert len(platform.calls) == 6


async def test_a_reachout_limit_holds_back_first_contacts_only(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    lead = await value(
        database,
        "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, 'fake:known') RETURNING id",
        place.tenant_id,
    )
    await value(
        database,
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, role, content, "
        "channel_message_id, sender_identifier, occurred_at, delivery_status) VALUES ($1, $2, $3, 'fake', 'inbound', "
        "'user', 'hi', 'i1', 'known', now(), 'received') RETURNING id",
        place.tenant_id, lead, place.session_id,
    )  # fmt: skip
    platform.script(
        ThrottledError("no more strangers", retry_after=60, first_contacts_only=True, code="reachout_limit"),
        to="fake:stranger1",
    )
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        first = await enqueue(database, place, "cold", to="stranger1")
        await eventually(lambda: _is(database, first, error_code="reachout_limit"))
        second = await enqueue(database, place, "cold too", to="stranger2")
        reply = await enqueue(database, place, "warm", to="known")
        await reached(database, reply, "sent")
        await asyncio.sleep(0.3)
        assert (await item(database, second))["status"] == "queued"
    assert platform.texts == ["cold", "warm"]


async def test_a_row_with_an_impossible_address_fails_in_words(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database, channel="whatsapp")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "hello", to="+60123456789")
        await reached(database, queue_id, "sent")
        bad = await value(
            database,
            "WITH m AS (INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, content, channel, role, "
            "occurred_at, delivery_status) SELECT tenant_id, lead_id, channel_session_id, 'outbound', 'x', channel, role, "
            "now(), 'queued' FROM et_messages LIMIT 1 RETURNING id) SELECT id FROM m",
        )
        bad = await value(
            database,
            "INSERT INTO et_outbound_queue (tenant_id, message_id, recipient) VALUES ($1, $2, 'nobody') RETURNING id",
            place.tenant_id,
            bad,
        )
        row = await reached(database, bad, "failed")
    assert row["error_code"] == "invalid"
    assert "nobody" in row["last_error"]


# --- not to be sent


async def test_an_expired_row_fails_and_a_sleeping_session_changes_nothing(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    queue_id = await enqueue(database, place, "stale", expires_in=timedelta(milliseconds=1))
    async with running(database, FakeDispatcher(platform, [])):
        row = await reached(database, queue_id, "failed")
    assert row["error_code"] == "expired"
    assert row["delivery_status"] == "failed"
    assert not platform.calls
    assert await value(database, "SELECT count(*) FROM et_audit_log WHERE event = 'send_failure'") == 1


async def test_a_suspended_tenant_sends_nothing_until_it_is_active_again(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    queue_id = await enqueue(database, place, "hello")
    await fetch(database, "UPDATE et_tenants SET status = 'suspended' WHERE id = $1", place.tenant_id)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await asyncio.sleep(0.5)
        assert not platform.calls
        await fetch(database, "UPDATE et_tenants SET status = 'active' WHERE id = $1", place.tenant_id)
        await reached(database, queue_id, "sent")


async def test_who_opted_out_hears_only_from_a_person(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    campaign = await enqueue(database, place, "campaign")
    automatic = await enqueue(database, place, "automatic", dedupe_key="reply:1")
    manual = await enqueue(database, place, "by hand", raw_payload={"origin": "operator"})
    await fetch(database, "UPDATE et_leads SET opted_out_at = now()")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await reached(database, manual, "sent")
        for queue_id in (campaign, automatic):
            row = await reached(database, queue_id, "cancelled")
            assert (row["error_code"], row["delivery_status"]) == ("opted_out", "cancelled")
    assert platform.texts == ["by hand"]


async def test_after_a_takeover_no_automatic_reply_goes_out(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    automatic = await enqueue(database, place, "automatic", dedupe_key="reply:1")
    manual = await enqueue(database, place, "by hand")
    await fetch(database, "UPDATE et_threads SET handled_by = 'human'")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await reached(database, manual, "sent")
        row = await reached(database, automatic, "cancelled")
    assert row["error_code"] == "human_takeover"
    assert platform.texts == ["by hand"]


async def test_a_cancelled_row_is_not_sent(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    queue_id = await enqueue(database, place, "never mind")
    await fetch(database, "UPDATE et_outbound_queue SET status = 'cancelled' WHERE id = $1", queue_id)
    other = await enqueue(database, place, "this")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await reached(database, other, "sent")
    assert platform.texts == ["this"]


async def test_a_repeated_dedupe_key_sends_once(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        first = await enqueue(database, place, "once", dedupe_key="k")
        await reached(database, first, "sent")
        assert await enqueue(database, place, "once", dedupe_key="k") == first
        await asyncio.sleep(0.3)
    assert platform.texts == ["once"]


# --- fairness


async def test_a_big_campaign_does_not_delay_another_tenants_reply(
    database: Database, platform: FakePlatform
) -> None:
    big, small = await make_place(database, name="big"), await make_place(database, name="small")
    for first in range(0, 3000, 300):
        await fetch(
            database,
            "SELECT et_enqueue_outbound($1, $2, 'c' || n, 'campaign') FROM generate_series($3::INT, $3 + 299) n",
            big.tenant_id,
            big.session_id,
            first,
        )
    platform.delay = 0.02
    async with running(database, FakeDispatcher(platform, [big.session_id, small.session_id])):
        await eventually(_true(lambda: len(platform.calls) > 100))
        began = time.monotonic()
        await reached(database, await enqueue(database, small, "reply"), "sent")
        assert time.monotonic() - began < 1
        left = await value(database, "SELECT count(*) FROM et_outbound_queue WHERE status = 'queued'")
        assert left > 500, "the campaign was still going on"


async def test_sessions_of_one_tenant_share_its_turns(database: Database, platform: FakePlatform) -> None:
    one = await make_place(database)
    two = await make_place(database, tenant_id=one.tenant_id)
    for n in range(300):
        await enqueue(database, one, "one", to=f"a{n}")
    last = [await enqueue(database, two, "two", to=f"b{n}") for n in range(5)]
    platform.delay = 0.01
    async with running(database, FakeDispatcher(platform, [one.session_id, two.session_id])):
        await all_reached(database, last, "sent")
        assert platform.texts.count("one") < 200


# --- the API's part


async def test_many_callers_wait_for_their_outcomes(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.script(RefusedError("no", code="no"), to="fake:p3")
    async with running(database, FakeDispatcher(platform, [place.session_id])) as worker:
        ids = [await enqueue(database, place, "x", to=f"p{n}") for n in range(20)]
        outcomes = await asyncio.gather(*(worker.wait_outcome(queue_id, 10) for queue_id in ids))
        assert [o.status for o in outcomes if o] == ["sent"] * 3 + ["failed"] + ["sent"] * 16
        assert outcomes[0] is not None
        assert outcomes[0].channel_message_id == platform.delivered[ids[0], 1]
        assert outcomes[0].sent_at is not None
        assert await worker.wait_outcome(999_999, 0.05) is None


async def test_an_outcome_of_another_gateway_is_found_too(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database, owner="gw-2")
    async with (
        running(database, FakeDispatcher(FakePlatform(), []), owner="gw-1") as here,
        running(database, FakeDispatcher(platform, [place.session_id]), owner="gw-2"),
    ):
        outcome = await here.wait_outcome(await enqueue(database, place, "x"), 5)
    assert outcome is not None
    assert outcome.status == "sent"


async def test_dispatch_next_sends_one_and_says_what_became_of_it(
    database: Database, platform: FakePlatform
) -> None:
    place, other = await make_place(database), await make_place(database, name="other")
    dispatcher = FakeDispatcher(platform, [])
    patient = Timings(**{**_fields(QUICK), "backoff": (60.0,)})  # no second try while we look
    async with running(database, dispatcher, timings=patient) as worker:
        assert await worker.dispatch_next(place.tenant_id) is None
        queue_id = await enqueue(database, place, "x")
        await enqueue(database, other, "not mine")
        dispatcher._sessions = dict.fromkeys([place.session_id])  # type: ignore[assignment]
        platform.script(NotSentError("later"))
        result = await worker.dispatch_next(place.tenant_id)
        assert result is not None
        assert (result.queue_id, result.status, result.retry_count, result.detail) == (
            queue_id,
            "queued",
            1,
            "later",
        )


# --- fencing


async def test_without_the_lease_in_the_database_nothing_is_claimed(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    await give_lease(database, place, "gw-2")
    async with running(database, FakeDispatcher(platform, [place.session_id]), owner="gw-1"):
        queue_id = await enqueue(database, place, "x")
        await asyncio.sleep(0.4)
    assert (await item(database, queue_id))["status"] == "queued"
    await give_lease(database, place, "gw-1", seconds=-1)
    async with running(database, FakeDispatcher(platform, [place.session_id]), owner="gw-1"):
        await asyncio.sleep(0.4)
    assert not platform.calls


async def test_a_proof_that_ends_before_the_call_means_no_call(
    database: Database, platform: FakePlatform
) -> None:
    """The process was stopped between claim and call, longer than the lease lives."""
    place = await make_place(database)
    now = [100.0]
    dispatcher = FakeDispatcher(platform, [place.session_id], until=110.0)
    async with running(database, dispatcher, clock=lambda: now[0]) as worker:
        take_up = worker._take_up

        def slow(row: asyncpg.Record, proven_until: float) -> None:
            take_up(row, proven_until)
            now[0] = 200.0

        worker._take_up = slow  # type: ignore[method-assign]
        queue_id = await enqueue(database, place, "x")
        await eventually(lambda: _is(database, queue_id, status="queued", claim_epoch=1))
        assert not platform.calls
        assert (await item(database, queue_id))["retry_count"] == 0
        dispatcher.until = 300.0
        await reached(database, queue_id, "sent")
    assert len(platform.calls) == 1


async def test_two_workers_on_the_same_rows_send_each_once(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    ids = [await enqueue(database, place, f"{n}", to=f"p{n}") for n in range(200)]
    dispatcher = FakeDispatcher(platform, [place.session_id])
    async with running(database, dispatcher), running(database, dispatcher):
        await all_reached(database, ids, "sent")
    assert set(platform.calls_per_item().values()) == {1}
    assert len(platform.calls) == 200


def _fields(timings: Timings) -> dict[str, object]:
    return {name: getattr(timings, name) for name in Timings.__dataclass_fields__}


async def _is(db: Database, queue_id: int, **expected: object) -> bool:
    row = await item(db, queue_id)
    return all(row[name] == wanted for name, wanted in expected.items())


def _true(check: object) -> object:
    async def ask() -> bool:
        return bool(check())  # type: ignore[operator]

    return ask
