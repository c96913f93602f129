"""Two leads turn out to be one person: everything of both is kept, nothing twice."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

LID = "whatsapp-lid:100000000000002"


async def lead(world: Any, external_id: str) -> int:
    found: int = await world.owner.fetchval(
        "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, $2) RETURNING id", world.a.id, external_id
    )
    return found


async def merge(world: Any, one: int, other: int) -> int:
    found: int = await world.owner.fetchval("SELECT et_merge_leads($1, $2, $3)", world.a.id, one, other)
    return found


async def test_the_lower_id_survives_with_the_phone_and_both_identities(world: Any) -> None:
    lid = await lead(world, LID)
    phone = await lead(world, "whatsapp:+60199")
    assert await merge(world, phone, lid) == lid
    assert (
        await world.owner.fetchval("SELECT external_id FROM et_leads WHERE id = $1", lid) == "whatsapp:+60199"
    )
    rows = await world.owner.fetch("SELECT external_id FROM et_lead_identities WHERE lead_id = $1", lid)
    assert {r[0] for r in rows} == {LID, "whatsapp:+60199"}
    assert await world.owner.fetchval("SELECT count(*) FROM et_leads WHERE id = $1", phone) == 0
    assert await world.owner.fetchval("SELECT new_id FROM et_lead_merges WHERE old_id = $1", phone) == lid
    audit = await world.owner.fetchrow("SELECT * FROM et_audit_log WHERE event = 'lead_merged'")
    assert (audit["tenant_id"], audit["subject_id"]) == (world.a.id, str(lid))


async def test_it_can_be_repeated_and_chains_stay_flat(world: Any) -> None:
    one, two, three = [await lead(world, f"whatsapp:+6010{n}") for n in range(3)]
    assert await merge(world, two, three) == two
    assert await merge(world, three, one) == one
    assert await merge(world, three, two) == one
    rows = await world.owner.fetch("SELECT old_id, new_id FROM et_lead_merges ORDER BY 1")
    assert [tuple(r) for r in rows] == [(two, one), (three, one)]
    assert await world.owner.fetchval("SELECT et_current_lead($1, $2)", world.a.id, three) == one


async def test_what_both_knew_is_united(world: Any) -> None:
    early, late = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    one, two = await lead(world, "whatsapp:+60101"), await lead(world, LID)
    set_ = "UPDATE et_leads SET tags = $2, opted_out_at = $3, name = $4 WHERE id = $1"
    await world.owner.execute(set_, one, ["b", "a"], late, None)
    await world.owner.execute(set_, two, ["c", "a"], early, "Siti")
    await merge(world, one, two)
    row = await world.owner.fetchrow("SELECT * FROM et_leads WHERE id = $1", one)
    assert (row["tags"], row["opted_out_at"], row["name"]) == (["a", "b", "c"], early, "Siti")


async def test_active_threads_of_one_session_are_joined_and_a_person_stays_in_charge(world: Any) -> None:
    one, two = world.a.lead, world.a.other_lead
    first = await world.inbound(world.a, "m1", lead_id=one)
    second = await world.inbound(world.a, "m2", lead_id=two)
    elsewhere = await world.inbound(world.a, "m3", lead_id=two, channel_session_id=world.a.other_session)
    item = await world.enqueue(world.a, "+60111222444")
    threads = await world.owner.fetch(
        "SELECT id, lead_id FROM et_threads WHERE lead_id = ANY ($1) ORDER BY id", [one, two]
    )
    await world.owner.execute("UPDATE et_threads SET handled_by = 'human' WHERE id = $1", threads[1]["id"])
    await world.owner.execute(
        "INSERT INTO et_thread_insights (tenant_id, thread_id, lead_id, label) SELECT tenant_id, id, "
        "lead_id, 'x' FROM et_threads"
    )
    await merge(world, one, two)
    rows = await world.owner.fetch("SELECT id, thread_id, lead_id FROM et_messages ORDER BY id")
    joined, other = threads[0]["id"], threads[2]["id"]
    assert [tuple(r) for r in rows] == [
        (first, joined, one), (second, joined, one), (elsewhere, other, one), (item["message_id"], joined, one),
    ]  # fmt: skip
    assert await world.owner.fetchval("SELECT thread_id FROM et_outbound_queue") == joined
    kept = await world.owner.fetch(
        "SELECT id, handled_by, status FROM et_threads WHERE lead_id = $1 ORDER BY id", one
    )
    assert [tuple(r) for r in kept] == [(joined, "human", "active"), (other, "agent", "active")]
    insights = await world.owner.fetch("SELECT thread_id, lead_id FROM et_thread_insights")
    assert [tuple(r) for r in insights] == [(other, one)]


async def test_the_same_message_under_both_is_one_and_its_decision_and_item_follow(world: Any) -> None:
    one, two = world.a.lead, world.a.other_lead
    kept = await world.inbound(world.a, "same", lead_id=one)
    gone = await world.inbound(world.a, "same", lead_id=two)
    await world.owner.execute(
        "UPDATE et_messages SET delivery_status = 'inbound_processing' WHERE id = $1", gone
    )
    await world.owner.execute(
        "UPDATE et_messages SET delivery_status = 'inbound_ai_replied' WHERE id = $1", gone
    )
    # Our own message: the echo came first and was stored under the other form of the address.
    echo = await world.inbound(world.a, "OUT", lead_id=one, direction="outbound", delivery_status="sent")
    ids = await world.enqueue(world.a, "+60111222444")
    await world.move(ids["queue_id"], "dispatching", "unknown")
    await world.owner.execute(
        "UPDATE et_messages SET channel_message_id = 'OUT' WHERE id = $1", ids["message_id"]
    )
    await world.owner.execute(
        "INSERT INTO et_decisions (tenant_id, message_id, thread_id, action, reply_message_id) "
        "VALUES ($1, $2, $3, 'auto_reply', $4)",
        world.a.id, gone, ids["thread_id"], ids["message_id"],
    )  # fmt: skip
    await merge(world, one, two)
    rows = await world.owner.fetch("SELECT id, delivery_status FROM et_messages ORDER BY id")
    assert [tuple(r) for r in rows] == [(kept, "inbound_ai_replied"), (echo, "sent")]
    decision = await world.owner.fetchrow("SELECT message_id, reply_message_id FROM et_decisions")
    assert tuple(decision) == (kept, echo)
    assert await world.owner.fetchval("SELECT message_id FROM et_outbound_queue") == echo
    assert await world.statuses(ids["queue_id"]) == ("sent", "sent")


async def test_a_backends_own_tables_follow(world: Any) -> None:
    await world.owner.execute("CREATE TABLE orders (lead_id BIGINT REFERENCES et_leads (id))")
    await world.owner.execute("INSERT INTO orders VALUES ($1)", world.a.other_lead)
    await merge(world, world.a.lead, world.a.other_lead)
    assert await world.owner.fetchval("SELECT lead_id FROM orders") == world.a.lead


async def test_groups_strangers_and_nobody_are_refused(world: Any) -> None:
    group = await world.owner.fetchval(
        "INSERT INTO et_leads (tenant_id, external_id, kind) VALUES ($1, 'whatsapp-group:1@g.us', 'group') RETURNING id",
        world.a.id,
    )
    with pytest.raises(asyncpg.InvalidParameterValueError, match="group"):
        await merge(world, world.a.lead, group)
    for other in (world.b.lead, 424242):
        with pytest.raises(asyncpg.NoDataFoundError):
            await merge(world, world.a.lead, other)


async def test_merging_the_same_pair_at_once_is_one_merge(world: Any) -> None:
    connections = [await world.connect() for _ in range(4)]
    pairs = [(world.a.lead, world.a.other_lead), (world.a.other_lead, world.a.lead)] * 2
    rows = await asyncio.gather(
        *(
            c.fetchval("SELECT et_merge_leads($1, $2, $3)", world.a.id, *pair)
            for c, pair in zip(connections, pairs, strict=True)
        )
    )
    assert set(rows) == {world.a.lead}
    assert await world.owner.fetchval("SELECT count(*) FROM et_audit_log WHERE event = 'lead_merged'") == 1


async def test_a_message_that_arrives_during_the_merge_fails_cleanly_and_can_be_repeated(world: Any) -> None:
    merging, writing = await world.connect(), await world.connect()
    running = merging.transaction()
    await running.start()
    await merging.execute("SELECT et_merge_leads($1, $2, $3)", world.a.id, world.a.lead, world.a.other_lead)
    insert = (
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel_message_id, direction) "
        "VALUES ($1, $2, $3, 'm1', 'inbound')"
    )
    waiting = asyncio.create_task(writing.execute(insert, world.a.id, world.a.other_lead, world.a.session))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await running.commit()
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await asyncio.wait_for(waiting, 10)
    survivor = await writing.fetchval("SELECT et_current_lead($1, $2)", world.a.id, world.a.other_lead)
    await writing.execute(insert, world.a.id, survivor, world.a.session)


async def test_linking_two_forms_of_one_person(world: Any) -> None:
    link = "SELECT et_link_identities($1, $2, $3)"
    assert await world.owner.fetchval(link, world.a.id, LID, "whatsapp:+60177") is None
    only_lid = await lead(world, LID)
    assert await world.owner.fetchval(link, world.a.id, LID, "whatsapp:+60177") == only_lid
    assert (
        await world.owner.fetchval("SELECT external_id FROM et_leads WHERE id = $1", only_lid)
        == "whatsapp:+60177"
    )
    assert await world.owner.fetchval(link, world.a.id, "whatsapp:+60177", LID) == only_lid
    assert await world.owner.fetchval(link, world.a.id, LID, "whatsapp:+60111222333") == world.a.lead
    assert await world.owner.fetchval("SELECT external_id FROM et_leads WHERE id = $1", world.a.lead) == (
        "whatsapp:+60111222333"
    )
