"""Wake-ups, events, claims and receipts: what the workers build on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest


class Ears:
    """Collects notifications on a connection of its own."""

    def __init__(self, conn: asyncpg.Connection[Any]) -> None:
        self.conn = conn
        self.heard: list[tuple[str, str]] = []

    async def listen(self) -> Ears:
        for channel in ("et_inbound", "et_outbound", "et_events", "et_sessions"):
            await self.conn.add_listener(channel, self._hear)
        return self

    def _hear(self, _conn: Any, _pid: int, channel: str, payload: object) -> None:
        self.heard.append((channel, str(payload)))

    async def after(self, action: Callable[[], Any]) -> list[str]:
        """What one action said. A notification precedes the answer to a later statement of the listener."""
        self.heard.clear()
        await action()
        await self.conn.execute("SELECT 1")
        await asyncio.sleep(0)
        assert all(payload == "" for _, payload in self.heard)
        return sorted(channel for channel, _ in self.heard)


async def test_one_wake_up_per_statement_and_none_for_nothing(world: Any) -> None:
    ears = await Ears(await world.connect()).listen()
    insert = (
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel_message_id, direction, is_history) "
        "SELECT $1, $2, $3, 'm' || g, $4, $5 FROM generate_series(1, 50) g ON CONFLICT DO NOTHING"
    )
    known = (world.a.id, world.a.lead, world.a.session)
    assert await ears.after(lambda: world.owner.execute(insert, *known, "inbound", False)) == [
        "et_events",
        "et_inbound",
    ]
    assert await ears.after(lambda: world.owner.execute(insert, *known, "inbound", False)) == []
    other = (world.a.id, world.a.other_lead, world.a.session)
    assert await ears.after(lambda: world.owner.execute(insert, *other, "inbound", True)) == []
    third = (world.a.id, world.a.lead, world.a.other_session)
    assert await ears.after(lambda: world.owner.execute(insert, *third, "outbound", False)) == ["et_events"]


async def test_the_queue_wakes_its_worker_for_new_and_for_returned_rows_only(world: Any) -> None:
    ears = await Ears(await world.connect()).listen()
    assert await ears.after(lambda: world.enqueue(world.a)) == ["et_events", "et_outbound"]
    item = await world.owner.fetchval("SELECT id FROM et_outbound_queue")
    snooze = "UPDATE et_outbound_queue SET next_attempt_at = now() + INTERVAL '1 minute'"
    assert await ears.after(lambda: world.owner.execute(snooze)) == []
    assert await ears.after(lambda: world.move(item, "dispatching")) == ["et_events"]
    assert await ears.after(lambda: world.move(item, "queued")) == ["et_events", "et_outbound"]


async def test_wishes_and_session_states_wake_the_owners(world: Any) -> None:
    ears = await Ears(await world.connect()).listen()
    wish = "INSERT INTO et_session_runtime (session_id, tenant_id, wanted) VALUES ($1, $2, 'connected')"
    assert await ears.after(lambda: world.owner.execute(wish, world.a.session, world.a.id)) == ["et_sessions"]
    assert await ears.after(
        lambda: world.owner.execute(
            "UPDATE et_channel_sessions SET status = 'connecting' WHERE id = $1", world.a.session
        )
    ) == ["et_events", "et_sessions"]


async def test_events_tell_what_happened_in_which_tenant(world: Any) -> None:
    await world.owner.execute("DELETE FROM et_events")
    message = await world.inbound(world.a, "m1")
    await world.inbound(world.a, "h1", is_history=True)
    thread = await world.owner.fetchval("SELECT thread_id FROM et_messages WHERE id = $1", message)
    await world.owner.execute(
        "UPDATE et_messages SET delivery_status = 'inbound_processing' WHERE id = $1", message
    )
    await world.owner.execute("UPDATE et_messages SET content = 'x' WHERE id = $1", message)
    decision = await world.owner.fetchval(
        "INSERT INTO et_decisions (tenant_id, message_id, thread_id, action) VALUES ($1, $2, $3, 'ignore') RETURNING id",
        world.a.id, message, thread,
    )  # fmt: skip
    insight = await world.owner.fetchval(
        "INSERT INTO et_thread_insights (tenant_id, thread_id, lead_id) VALUES ($1, $2, $3) RETURNING id",
        world.a.id, thread, world.a.lead,
    )  # fmt: skip
    await world.owner.execute(
        "UPDATE et_channel_sessions SET status_reason = 'x' WHERE id = $1", world.a.session
    )
    rows = await world.owner.fetch("SELECT tenant_id, kind, ref_id FROM et_events ORDER BY xid, id")
    assert [tuple(r) for r in rows] == [
        (world.a.id, "message", message),
        (world.a.id, "status", message),
        (world.a.id, "decision", decision),
        (world.a.id, "insight", insight),
        (world.a.id, "session", world.a.session),
    ]


async def test_old_events_go(world: Any) -> None:
    await world.inbound(world.a, "m1")
    await world.owner.execute(
        "UPDATE et_events SET created_at = now() - INTERVAL '25 hours' WHERE kind = 'session'"
    )
    assert await world.owner.fetchval("SELECT et_prune_events()") == 4
    assert await world.owner.fetchval("SELECT count(*) FROM et_events") == 1


# --- claims ---


async def claim(conn: asyncpg.Connection[Any], owner: str, limit: int = 20) -> list[int]:
    return [r["id"] for r in await conn.fetch("SELECT * FROM et_claim_inbound($1, $2)", owner, limit)]


async def status(world: Any, message: int) -> str:
    found: str = await world.owner.fetchval("SELECT delivery_status FROM et_messages WHERE id = $1", message)
    return found


async def test_messages_of_one_thread_are_claimed_together_and_once(world: Any) -> None:
    ids = [await world.inbound(world.a, f"m{n}") for n in range(3)]
    assert await claim(world.owner, "w1") == ids
    assert await claim(world.owner, "w2") == []
    assert await status(world, ids[0]) == "inbound_processing"


async def test_two_workers_never_claim_the_same_message(world: Any) -> None:
    await world.owner.execute(
        "INSERT INTO et_leads (tenant_id, external_id) SELECT $1, 'whatsapp:+6012' || g FROM generate_series(1, 60) g",
        world.a.id,
    )
    await world.owner.execute(
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel_message_id, direction) "
        "SELECT $1, l.id, $2, 'm' || g, 'inbound' FROM et_leads l, generate_series(1, 3) g WHERE l.tenant_id = $1",
        world.a.id, world.a.session,
    )  # fmt: skip
    workers = [await world.connect(role="et_worker") for _ in range(5)]

    async def work(name: str, conn: asyncpg.Connection[Any]) -> list[int]:
        mine: list[int] = []
        empty = 0
        while empty < 3:
            got = await claim(conn, name, 4)
            empty = 0 if got else empty + 1
            mine += got
        return mine

    taken = await asyncio.gather(*(work(f"w{n}", conn) for n, conn in enumerate(workers)))
    everything = [message for mine in taken for message in mine]
    assert len(everything) == len(set(everything)) == 62 * 3


async def test_a_thread_that_is_being_answered_is_left_alone_until_it_is_done(world: Any) -> None:
    first = await world.inbound(world.a, "m1")
    await claim(world.owner, "w1")
    second = await world.inbound(world.a, "m2")
    assert await claim(world.owner, "w2") == []
    await world.owner.execute(
        "UPDATE et_messages SET delivery_status = 'inbound_ignored' WHERE id = $1", first
    )
    assert await world.owner.fetchval("SELECT count(*) FROM et_inbound_claims") == 0
    assert await claim(world.owner, "w2") == [second]


async def test_history_placeholders_and_suspended_tenants_are_not_claimed(world: Any) -> None:
    await world.inbound(world.a, "h", is_history=True)
    hidden = await world.inbound(world.a, "p", placeholder=True, message_type="unsupported")
    await world.inbound(world.b, "m", lead_id=world.b.lead)
    await world.owner.execute("UPDATE et_tenants SET status = 'suspended' WHERE id = $1", world.b.id)
    assert await claim(world.owner, "w1") == []
    ears = await Ears(await world.connect()).listen()
    filled = "UPDATE et_messages SET placeholder = false, content = 'now' WHERE id = $1"
    assert await ears.after(lambda: world.owner.execute(filled, hidden)) == ["et_inbound"]
    assert await claim(world.owner, "w1") == [hidden]


async def test_only_a_claim_that_ran_out_is_given_back(world: Any) -> None:
    message = await world.inbound(world.a, "m1")
    await claim(world.owner, "w1")
    assert await world.owner.fetchval("SELECT et_release_inbound()") == 0
    assert await world.owner.fetchval("SELECT et_renew_inbound('w1', INTERVAL '1 second')") == 1
    assert await world.owner.fetchval("SELECT et_renew_inbound('w2')") == 0
    with pytest.raises(asyncpg.CheckViolationError, match="et_release_inbound"):
        await world.owner.execute(
            "UPDATE et_messages SET delivery_status = 'received' WHERE id = $1", message
        )
    await world.owner.execute("UPDATE et_inbound_claims SET expires_at = now() - INTERVAL '1 second'")
    assert await world.owner.fetchval("SELECT et_release_inbound()") == 1
    assert await status(world, message) == "received"
    assert await claim(world.owner, "w2") == [message]


async def test_a_worker_gives_its_own_claims_back_when_it_stops(world: Any) -> None:
    mine = await world.inbound(world.a, "m1")
    await claim(world.owner, "w1")
    theirs = await world.inbound(world.a, "m1", lead_id=world.a.other_lead)
    await claim(world.owner, "w2")
    assert await world.owner.fetchval("SELECT et_release_inbound('w1')") == 1
    assert (await status(world, mine), await status(world, theirs)) == ("received", "inbound_processing")


# --- receipts ---


async def receipt(world: Any, channel_id: str, what: str) -> str:
    found: str = await world.owner.fetchval(
        "SELECT et_apply_receipt($1, $2, $3, $4)", world.a.id, world.a.session, channel_id, what
    )
    return found


async def sent(world: Any, channel_id: str) -> int:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], "dispatching", "sent")
    await world.owner.execute(
        "UPDATE et_messages SET channel_message_id = $2 WHERE id = $1", ids["message_id"], channel_id
    )
    queue: int = ids["queue_id"]
    return queue


async def test_receipts_move_the_message_in_any_order(world: Any) -> None:
    one, two = await sent(world, "A"), await sent(world, "B")
    assert await receipt(world, "A", "delivered") == "applied"
    assert await receipt(world, "A", "delivered") == "late"
    assert await receipt(world, "A", "read") == "applied"
    assert await receipt(world, "B", "read") == "applied"
    assert await receipt(world, "B", "delivered") == "late"
    assert await world.statuses(one) == await world.statuses(two) == ("sent", "read")


async def test_a_receipt_settles_an_unknown_send(world: Any) -> None:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], "dispatching", "unknown")
    await world.owner.execute(
        "UPDATE et_messages SET channel_message_id = 'A' WHERE id = $1", ids["message_id"]
    )
    assert await receipt(world, "A", "delivered") == "applied"
    assert await world.statuses(ids["queue_id"]) == ("sent", "delivered")


async def test_a_receipt_that_comes_before_the_send_is_parked_and_applied_later(world: Any) -> None:
    for what in ("read", "delivered", "delivered"):
        assert await receipt(world, "A", what) == "parked"
    assert await world.owner.fetchval("SELECT et_apply_parked_receipts()") == 0
    item = await sent(world, "A")
    assert await world.owner.fetchval("SELECT et_apply_parked_receipts()") == 2
    assert await world.statuses(item) == ("sent", "read")
    assert await world.owner.fetchval("SELECT count(*) FROM et_parked_receipts") == 0


async def test_a_receipt_touches_only_its_own_session(world: Any) -> None:
    item = await sent(world, "A")
    other = "SELECT et_apply_receipt($1, $2, 'A', 'read')"
    assert await world.owner.fetchval(other, world.a.id, world.a.other_session) == "parked"
    assert await world.owner.fetchval(other, world.b.id, world.b.session) == "parked"
    assert await world.statuses(item) == ("sent", "sent")


async def test_a_thread_that_somebody_is_writing_to_is_claimed_all_the_same(world: Any) -> None:
    message = await world.inbound(world.a, "m1")
    writing = await world.connect()
    open_ = writing.transaction()
    await open_.start()
    await writing.execute("UPDATE et_threads SET handled_by = 'human'")
    assert await claim(world.owner, "w1") == [message]
    await open_.rollback()


async def test_a_second_worker_cannot_enter_a_thread_while_the_first_has_not_committed(world: Any) -> None:
    first, second = await world.connect(role="et_worker"), await world.connect(role="et_worker")
    await world.inbound(world.a, "m1")
    open_ = first.transaction()
    await open_.start()
    assert len(await claim(first, "w1")) == 1
    await world.inbound(world.a, "m2")
    assert await claim(second, "w2") == []
    await open_.commit()
    assert await claim(second, "w2") == []
