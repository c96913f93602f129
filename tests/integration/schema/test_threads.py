"""Every message has a thread: found or created without a race, and none for a duplicate."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

BULK = """
INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, channel_message_id, direction, is_history)
SELECT $1, lead_id, $2, 'whatsapp', id, 'inbound', $5 FROM unnest($3::BIGINT[], $4::TEXT[]) AS n(lead_id, id)
ON CONFLICT DO NOTHING
RETURNING id
"""


async def threads(world: Any) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await world.owner.fetch("SELECT * FROM et_threads ORDER BY id")
    return rows


async def test_the_first_message_makes_the_thread_and_the_next_joins_it(world: Any) -> None:
    first = await world.inbound(world.a, "m1")
    second = await world.inbound(world.a, "m2")
    queued = await world.enqueue(world.a)
    rows = await world.owner.fetch(
        "SELECT DISTINCT thread_id FROM et_messages WHERE id = ANY ($1)", [first, second]
    )
    assert [r[0] for r in rows] == [queued["thread_id"]]
    (thread,) = await threads(world)
    assert (thread["lead_id"], thread["channel_session_id"], thread["status"], thread["handled_by"]) == (
        world.a.lead, world.a.session, "active", "agent",
    )  # fmt: skip


async def test_another_session_or_lead_has_a_thread_of_its_own(world: Any) -> None:
    await world.inbound(world.a, "m1")
    await world.inbound(world.a, "m1", channel_session_id=world.a.other_session)
    await world.inbound(world.a, "m1", lead_id=world.a.other_lead)
    assert len(await threads(world)) == 3
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 3


async def test_two_first_messages_at_the_same_instant_share_one_thread(world: Any) -> None:
    first, second = await world.connect(), await world.connect()
    arguments = (world.a.id, world.a.session, [world.a.lead])
    one = first.transaction()
    await one.start()
    await first.fetch(BULK, *arguments, ["m1"], False)
    waiting = asyncio.create_task(second.fetch(BULK, *arguments, ["m2"], False))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await one.commit()
    assert len(await asyncio.wait_for(waiting, 10)) == 1
    assert len(await threads(world)) == 1


async def test_many_racing_writers_make_one_thread_per_lead(world: Any) -> None:
    connections = [await world.connect() for _ in range(6)]
    leads = [world.a.lead, world.a.other_lead]
    await asyncio.gather(
        *(
            conn.fetch(
                BULK, world.a.id, world.a.session, leads * 5, [f"{n}-{i // 2}" for i in range(10)], False
            )
            for n, conn in enumerate(connections)
        )
    )
    assert len(await threads(world)) == 2
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 60


async def test_a_duplicate_is_dropped_and_makes_no_thread(world: Any) -> None:
    await world.inbound(world.a, "m1")
    await world.owner.execute("UPDATE et_threads SET status = 'archived'")
    again = await world.owner.fetch(BULK, world.a.id, world.a.session, [world.a.lead], ["m1"], False)
    assert again == []
    assert len(await threads(world)) == 1
    with pytest.raises(asyncpg.UniqueViolationError):
        await world.inbound(world.a, "m1")
    assert len(await threads(world)) == 1


async def test_after_archiving_the_next_message_opens_a_new_thread(world: Any) -> None:
    await world.inbound(world.a, "m1")
    await world.owner.execute("UPDATE et_threads SET status = 'archived'")
    await world.inbound(world.a, "m2")
    assert [t["status"] for t in await threads(world)] == ["archived", "active"]


async def test_history_neither_revives_nor_reorders(world: Any) -> None:
    await world.inbound(world.a, "m1")
    await world.owner.execute("UPDATE et_threads SET status = 'archived'")
    before = await threads(world)
    await world.owner.fetch(BULK, world.a.id, world.a.session, [world.a.lead] * 2, ["h1", "h2"], True)
    assert await threads(world) == before
    assert await world.owner.fetchval("SELECT count(DISTINCT thread_id) FROM et_messages") == 1


async def test_a_thread_of_history_alone_carries_the_time_of_its_newest_message(world: Any) -> None:
    past = datetime(2025, 5, 1, tzinfo=UTC)
    for days in (1, 3, 2):
        at = past + timedelta(days=days)
        await world.inbound(
            world.a, f"h{days}", is_history=True, channel_timestamp=int(at.timestamp() * 1000)
        )
    (thread,) = await threads(world)
    assert thread["last_message_at"] == past + timedelta(days=3)
    await world.inbound(world.a, "live")
    (thread,) = await threads(world)
    assert datetime.now(UTC) - thread["last_message_at"] < timedelta(minutes=1)
    live = thread["last_message_at"]
    await world.inbound(world.a, "h9", is_history=True)
    assert (await threads(world))[0]["last_message_at"] == live


async def test_last_message_at_never_goes_back(world: Any) -> None:
    await world.inbound(world.a, "m1")
    latest = (await threads(world))[0]["last_message_at"]
    await world.inbound(world.a, "m0", channel_timestamp=1_700_000_000_000)
    assert (await threads(world))[0]["last_message_at"] == latest


async def test_a_burst_leaves_the_indexes_of_the_threads_alone(world: Any) -> None:
    """A message moves last_message_at; were an index on it, every index of et_threads would get an entry a message."""
    await world.inbound(world.a, "m0")
    async with world.owner.transaction():
        for n in range(20):
            # All in one of the steps of recent_at, as messages that come at once are.
            at = datetime(2030, 1, 1, 0, 0, 0, n, tzinfo=UTC)
            await world.owner.execute("UPDATE et_threads SET last_message_at = $1", at)
        everything, in_place = await world.owner.fetchrow(
            "SELECT pg_stat_get_xact_tuples_updated(t), pg_stat_get_xact_tuples_hot_updated(t) "
            "FROM (SELECT 'et_threads'::regclass::oid AS t) x"
        )
    assert (everything, in_place) == (20, 19)  # the first one moves it into its step


async def test_recent_at_sorts_as_last_message_at_does(world: Any) -> None:
    await world.inbound(world.a, "m0")
    at = datetime(2026, 3, 1, 12, 0, 2, tzinfo=UTC)
    before = None
    for step in range(9):
        await world.owner.execute(
            "UPDATE et_threads SET last_message_at = $1", at + timedelta(seconds=step * 1.5)
        )
        (thread,) = await threads(world)
        assert timedelta(0) <= thread["last_message_at"] - thread["recent_at"] < timedelta(seconds=4)
        assert before is None or before <= thread["recent_at"]
        before = thread["recent_at"]


async def test_occurred_at_is_the_channels_time_and_never_in_the_future(world: Any) -> None:
    past = await world.inbound(world.a, "m1", channel_timestamp=1_700_000_000_123)
    future = await world.inbound(world.a, "m2", channel_timestamp=4_000_000_000_000)
    at = "SELECT occurred_at FROM et_messages WHERE id = $1"
    assert await world.owner.fetchval(at, past) == datetime.fromtimestamp(1_700_000_000.123, UTC)
    assert await world.owner.fetchval(at, future) <= datetime.now(UTC) + timedelta(seconds=1)


async def test_what_a_writer_need_not_say_is_filled_in(world: Any) -> None:
    row = await world.owner.fetchrow(
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, content) "
        "VALUES ($1, $2, $3, 'outbound', 'hi') RETURNING *",
        world.a.id, world.a.lead, world.a.session,
    )  # fmt: skip
    assert row["channel"] == "whatsapp"
    assert row["sender_identifier"] == "+60100000001"
    assert row["channel_message_id"].startswith("out_")
    assert (row["role"], row["delivery_status"], row["message_type"]) == ("assistant", "queued", "text")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("direction", "sideways"),
        ("delivery_status", "sent"),
        ("role", "boss"),
        ("message_type", "smell"),
        ("channel", "Whats App"),
    ],
)
async def test_values_outside_the_contract_are_refused(world: Any, column: str, value: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await world.inbound(world.a, "m1", **{column: value})


@pytest.mark.parametrize("column", ["lead_id", "channel_session_id"])
async def test_a_row_cannot_point_into_another_tenant(world: Any, column: str) -> None:
    foreign = {"lead_id": world.b.lead, "channel_session_id": world.b.session}[column]
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await world.inbound(world.a, "m1", **{column: foreign})


async def test_a_tenant_can_be_deleted_with_everything(world: Any) -> None:
    await world.inbound(world.a, "m1")
    await world.enqueue(world.a)
    await world.owner.execute("DELETE FROM et_tenants WHERE id = $1", world.a.id)
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 0
    assert await world.owner.fetchval("SELECT count(*) FROM et_leads WHERE tenant_id = $1", world.b.id) == 2


async def test_an_agent_may_go_and_its_threads_stay(world: Any) -> None:
    await world.inbound(world.a, "m1")
    agent = await world.owner.fetchval(
        "INSERT INTO et_agents (tenant_id, name) VALUES ($1, 'x') RETURNING id", world.a.id
    )
    await world.owner.execute("UPDATE et_threads SET agent_id = $1", agent)
    await world.owner.execute("DELETE FROM et_agents")
    (thread,) = await threads(world)
    assert (thread["agent_id"], thread["tenant_id"]) == (None, world.a.id)


async def test_a_lead_has_its_first_identity_and_keeps_it_when_the_phone_is_learned(world: Any) -> None:
    lead = await world.owner.fetchval(
        "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, 'whatsapp-lid:77') RETURNING id",
        world.a.id,
    )
    await world.owner.execute("UPDATE et_leads SET external_id = 'whatsapp:+6077' WHERE id = $1", lead)
    rows = await world.owner.fetch(
        "SELECT external_id FROM et_lead_identities WHERE lead_id = $1 ORDER BY 1", lead
    )
    assert [r[0] for r in rows] == ["whatsapp-lid:77", "whatsapp:+6077"]
    with pytest.raises(asyncpg.UniqueViolationError):
        await world.owner.execute(
            "UPDATE et_leads SET external_id = 'whatsapp-lid:77' WHERE id = $1", world.a.lead
        )
    with pytest.raises(asyncpg.UniqueViolationError):
        await world.owner.execute(
            "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, 'whatsapp-lid:77')", world.a.id
        )
