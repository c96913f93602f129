"""Fair and paced: nobody waits behind another's campaign, and what may not go yet says why and when it will."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from core.channel import SessionId
from core.database import Database
from core.errors import ThrottledError
from core.metrics import Metrics
from core.sending import FirstContacts, QuietHours, Sending
from core.store import claiming, dispatching
from core.store.claiming import Due
from tests.support.fake_channel import FakeDispatcher, FakePlatform
from tests.support.outbound import (
    Place,
    all_reached,
    enqueue,
    eventually,
    fetch,
    item,
    make_place,
    reached,
    running,
    value,
)
from tests.support.postgres import PostgresServer

CAMPAIGN = 100_000
AT_ONCE = 5.0
"""Seconds within which a reply must be out while a campaign runs, on a machine that several tests share."""


@pytest.fixture
def platform() -> FakePlatform:
    return FakePlatform()


@dataclass
class Wall:
    """A wall clock that stands where it is put."""

    at: datetime = field(default_factory=lambda: datetime(2036, 3, 10, 12, tzinfo=UTC))

    def __call__(self) -> datetime:
        return self.at


async def pace(db: Database, place: Place, **sending: Any) -> None:
    await value(
        db,
        "UPDATE et_channel_sessions SET metadata = metadata || jsonb_build_object('settings', "
        "jsonb_build_object('sending', $2::JSONB)) WHERE id = $1 RETURNING id",
        place.session_id,
        sending,
    )


async def wrote(db: Database, place: Place, who: str, *, ago: timedelta = timedelta()) -> None:
    """This person wrote to the session."""
    lead = await value(
        db, "SELECT et_find_or_create_lead($1, $2, $3)", place.tenant_id, f"fake:{who}", place.session_id
    )
    await value(
        db,
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, role, content, "
        "channel_message_id, sender_identifier, occurred_at, delivery_status) VALUES ($1, $2, $3, 'fake', 'inbound', "
        "'user', 'hi', gen_random_uuid()::TEXT, $4, now() - $5::INTERVAL, 'received') RETURNING id",
        place.tenant_id, lead, place.session_id, who, ago,
    )  # fmt: skip


async def campaign(url: str, place: Place, rows: int, *, people: int = 1000) -> None:
    """Rows as the triggers would leave them, made without: a hundred thousand calls of each are not what is tested.
    `url` is a superuser's."""
    conn = await asyncpg.connect(url)
    try:
        await conn.execute("SET session_replication_role = replica")
        await conn.execute(
            "INSERT INTO et_leads (id, tenant_id, external_id) "
            "SELECT 1000000 + n, $1, 'fake:c' || n FROM generate_series(1, $2::INT) n",
            place.tenant_id, people,
        )  # fmt: skip
        await conn.execute(
            "INSERT INTO et_threads (id, tenant_id, lead_id, channel, channel_session_id) "
            "SELECT 1000000 + n, $1, 1000000 + n, 'fake', $2 FROM generate_series(1, $3::INT) n",
            place.tenant_id, place.session_id, people,
        )  # fmt: skip
        await conn.execute(
            "INSERT INTO et_messages (id, tenant_id, lead_id, thread_id, channel_session_id, channel, direction, role, "
            "channel_message_id, content, occurred_at, delivery_status) "
            "SELECT 1000000 + n, $1, 1000000 + 1 + n % $4, 1000000 + 1 + n % $4, $2, 'fake', 'outbound', 'assistant', "
            "'out_' || n, 'campaign', now(), 'queued' FROM generate_series(1, $3::INT) n",
            place.tenant_id, place.session_id, rows, people,
        )  # fmt: skip
        await conn.execute(
            "INSERT INTO et_outbound_queue (id, tenant_id, message_id, thread_id, channel, channel_session_id, recipient) "
            "SELECT m.id, m.tenant_id, m.id, m.thread_id, 'fake', $1, 'c' || m.thread_id - 1000000 FROM et_messages m "
            "WHERE m.id > 1000000",
            place.session_id,
        )
        await conn.execute("ANALYZE et_outbound_queue, et_messages")
    finally:
        await conn.close()


# --- fair


async def test_a_reply_does_not_wait_behind_a_hundred_thousand_rows(
    database: Database, platform: FakePlatform, postgres_server: PostgresServer
) -> None:
    big = await make_place(database, name="big")
    same = await make_place(database, tenant_id=big.tenant_id)
    other = await make_place(database, name="other")
    await campaign(postgres_server.superuser_url(database.url), big, CAMPAIGN)
    platform.delay = 0.05
    places = [big.session_id, same.session_id, other.session_id]
    async with running(database, FakeDispatcher(platform, places)):
        await eventually(_count(platform, 64), seconds=30, what="the campaign")
        for place, what in (
            (other, "another tenant"),
            (same, "another session"),
            (big, "the campaign's own session"),
        ):
            await wrote(database, place, "customer")
            began = time.monotonic()
            await reached(database, await enqueue(database, place, what, to="customer"), "sent", seconds=30)
            assert time.monotonic() - began < AT_ONCE, what
        left = await value(database, "SELECT count(*) FROM et_outbound_queue WHERE status = 'queued'")
        assert left > CAMPAIGN / 2, "the campaign was still going on"

    # Nor does a claim read the campaign: the plan touches a few pages for each row that it takes.
    due = Due(SessionId(big.session_id), 20)
    async with database.worker() as conn:
        transaction = conn.transaction()
        await transaction.start()
        await conn.execute(dispatching.ALONE)
        plan = await conn.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + claiming._CLAIM,
            big.owner, [due.session_id], [20], [0], [1_000_000], [None], 20, None,
        )  # fmt: skip
        await transaction.rollback()
    top = plan[0]["Plan"]
    assert top["Actual Rows"] == 20
    assert top["Shared Hit Blocks"] + top["Shared Read Blocks"] < 20_000, plan


def _count(platform: FakePlatform, calls: int) -> Any:
    async def check() -> bool:
        return len(platform.calls) >= calls

    return check


async def test_replies_go_before_a_campaign_and_strangers_last(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    await wrote(database, place, "regular", ago=timedelta(days=3))
    await wrote(database, place, "asking")
    await enqueue(database, place, "stranger", to="nobody", priority=9)
    await enqueue(database, place, "newsletter", to="regular")
    await enqueue(database, place, "answer of a backend", to="asking")
    await enqueue(database, place, "answer of the agent", to="third", dedupe_key="reply:1")
    await enqueue(database, place, "by hand", to="fourth", raw_payload={"origin": "person"}, priority=1)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await eventually(_count(platform, 5))
    assert platform.texts == [
        "by hand",
        "answer of a backend",
        "answer of the agent",
        "newsletter",
        "stranger",
    ]


# --- paced


async def test_a_rate_spaces_messages_and_lets_replies_by(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    await pace(database, place, per_minute=600, jitter=0.5)
    for n in range(6):
        await enqueue(database, place, f"n{n}", to=f"p{n}")
    chances = iter([0.0, 1.0] * 50)
    metrics = Metrics()
    async with running(
        database, FakeDispatcher(platform, [place.session_id]), chance=lambda: next(chances), metrics=metrics
    ):
        await eventually(_count(platform, 2))
        await enqueue(database, place, "reply", to="x", dedupe_key="reply:7")
        await eventually(_count(platform, 7))
    at = [call.at for call in platform.calls]
    assert platform.texts.index("reply") < 6, "it went past what waited"
    # A tenth of a second each, half of it more or less; two may go at once after a pause.
    assert (at[-1] - at[0]).total_seconds() > 0.4
    assert metrics.registry.get_sample_value(
        "gateway_sends_held_total", {"channel": "fake", "reason": "rate"}
    )


async def test_first_contacts_of_a_day_are_counted_in_the_database(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    wall = Wall()
    defaults = {"fake": Sending(first_contacts=FirstContacts(first=2, growth=2, most=100))}
    sessions = FakeDispatcher(platform, [place.session_id])
    await wrote(database, place, "regular", ago=timedelta(days=3))
    strangers = [await enqueue(database, place, f"s{n}", to=f"stranger{n}") for n in range(8)]
    metrics = Metrics()
    async with running(database, sessions, sending=defaults, today=wall, metrics=metrics):
        await all_reached(database, strangers[:2], "sent")
        held = await eventually(
            lambda: _code(database, strangers[2], "first_contacts_used_up"), what="the reason"
        )
        await reached(database, await enqueue(database, place, "news", to="regular"), "sent")
    assert held["next_attempt_at"] == datetime(2036, 3, 11, tzinfo=UTC)
    assert held["last_error"].startswith(
        "today's 2 messages to people who never wrote to this session are used up"
    )
    labels = {"channel": "fake", "reason": "first_contacts"}
    assert metrics.registry.get_sample_value("gateway_sends_held_total", labels) == 6

    # Another worker, the same day: it knows. The next day there are twice as many.
    async with running(database, sessions, sending=defaults, today=wall) as worker:
        fresh = await enqueue(database, place, "fresh", to="stranger9")
        await eventually(lambda: _code(database, fresh, "first_contacts_used_up"), what="the reason")
        await value(
            database,
            "UPDATE et_outbound_queue SET next_attempt_at = now() WHERE status = 'queued' RETURNING id",
        )
        wall.at += timedelta(days=1)
        worker.kick()
        await all_reached(database, strangers[2:6], "sent")
        await eventually(lambda: _code(database, strangers[6], "first_contacts_used_up"), what="the reason")
    assert platform.texts.count("fresh") == 0
    days = await fetch(database, "SELECT day::TEXT, strangers FROM et_sending_days ORDER BY day")
    assert [tuple(row) for row in days] == [("2036-03-10", 2), ("2036-03-11", 4)]


async def test_a_cap_that_is_taken_away_lets_its_rows_go(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    await pace(database, place, first_contacts={"first": 0, "most": 0})
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "hello", to="stranger")
        await eventually(lambda: _code(database, queue_id, "first_contacts_used_up"), what="the reason")
        await pace(database, place, first_contacts=None)
        row = await reached(database, queue_id, "sent", seconds=30)
    assert row["error_code"] is None


async def test_quiet_hours_hold_campaigns_and_not_replies(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    workspace = await value(
        database,
        "INSERT INTO et_workspaces (tenant_id, name, timezone) VALUES ($1, 'Berlin', 'Europe/Berlin') RETURNING id",
        place.tenant_id,
    )
    await value(
        database,
        "UPDATE et_channel_sessions SET metadata = jsonb_build_object('default_workspace_id', $2::BIGINT) "
        "WHERE id = $1 RETURNING id",
        place.session_id,
        workspace,
    )
    wall = Wall(datetime(2036, 3, 10, 21, 30, tzinfo=UTC))  # 22:30 in Berlin
    defaults = {"fake": Sending(quiet_hours=QuietHours(start="22:00", end="08:00"))}
    await wrote(database, place, "regular", ago=timedelta(days=3))
    async with running(
        database, FakeDispatcher(platform, [place.session_id]), sending=defaults, today=wall
    ) as worker:
        news = await enqueue(database, place, "news", to="regular")
        held = await eventually(lambda: _code(database, news, "quiet_hours"), what="the reason")
        # A reply to the same person is not held up by what waits for the morning.
        reply = await enqueue(database, place, "reply", to="regular", dedupe_key="reply:1")
        await reached(database, reply, "sent")
        assert held["next_attempt_at"] == datetime(2036, 3, 11, 7, tzinfo=UTC)
        assert "until 08:00 (Europe/Berlin)" in held["last_error"]
        wall.at = datetime(2036, 3, 11, 7, tzinfo=UTC)
        await value(
            database, "UPDATE et_outbound_queue SET next_attempt_at = now() WHERE id = $1 RETURNING id", news
        )
        worker.kick()
        await reached(database, news, "sent")


async def test_a_channels_refusal_of_strangers_outlives_the_gateway(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    refusal = ThrottledError(
        "no more strangers", retry_after=600, first_contacts_only=True, code="reachout_limit"
    )
    platform.script(refusal, to="fake:stranger1")
    sessions = FakeDispatcher(platform, [place.session_id])
    async with running(database, sessions):
        first = await enqueue(database, place, "cold", to="stranger1")
        await eventually(lambda: _code(database, first, "reachout_limit"), what="the refusal")
    give = await make_place(database, tenant_id=place.tenant_id)
    async with running(database, FakeDispatcher(platform, [place.session_id, give.session_id])):
        second = await enqueue(database, place, "cold too", to="stranger2")
        held = await eventually(lambda: _code(database, second, "reachout_limit"), what="the reason")
        # The agent answers somebody whose cold message waits: nothing in the thread holds it back. Another session goes on.
        await wrote(database, place, "stranger1")
        await reached(database, await enqueue(database, place, "reply", to="stranger1"), "sent")
        await reached(database, await enqueue(database, give, "other session", to="stranger1"), "sent")
    assert platform.texts == ["cold", "reply", "other session"]
    wait = held["next_attempt_at"] - datetime.now(UTC)
    assert timedelta(minutes=8) < wait < timedelta(minutes=11)
    assert held["retry_count"] == 0


async def test_send_at_waits_for_its_time(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    later = await enqueue(database, place, "later", send_at=datetime.now(UTC) + timedelta(hours=1))
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        soon = await enqueue(database, place, "soon", send_at=datetime.now(UTC) + timedelta(milliseconds=400))
        await reached(database, await enqueue(database, place, "now"), "sent")
        await reached(database, soon, "sent")
    assert platform.texts == ["now", "soon"]
    row = await item(database, later)
    assert row["status"] == "queued"
    assert row["expires_at"] - row["send_at"] == timedelta(hours=24)


async def test_a_held_row_that_runs_out_of_time_says_for_what_it_waited(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    await pace(database, place, first_contacts={"first": 0, "most": 0})
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        queue_id = await enqueue(database, place, "hello", to="stranger")
        await eventually(lambda: _code(database, queue_id, "first_contacts_used_up"), what="the reason")
        await value(
            database, "UPDATE et_outbound_queue SET expires_at = now() WHERE id = $1 RETURNING id", queue_id
        )
        row = await reached(database, queue_id, "failed")
    assert row["error_code"] == "expired"
    assert row["last_error"].startswith("its time ran out while it waited: today's")


async def _code(db: Database, queue_id: int, code: str) -> Any:
    row = await item(db, queue_id)
    return row if row["error_code"] == code and row["status"] == "queued" else None


async def test_a_session_that_waits_for_its_rate_keeps_no_thread_busy(
    database: Database, platform: FakePlatform
) -> None:
    """A rate of one an hour: the second message waits, and the loop is not spinning meanwhile."""
    place = await make_place(database)
    await pace(database, place, per_minute=1 / 60)
    for n in range(3):
        await enqueue(database, place, f"n{n}", to=f"p{n}")
    async with running(database, FakeDispatcher(platform, [place.session_id])) as worker:
        await eventually(_count(platform, 1))
        claims = 0
        claim = worker._claim

        async def counted(**more: Any) -> Any:
            nonlocal claims
            claims += 1
            return await claim(**more)

        worker._claim = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.5)
        assert claims < 20
    assert len(platform.calls) == 1
