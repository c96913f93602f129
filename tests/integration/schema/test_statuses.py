"""Statuses follow the published graph from plain SQL too, and queue row and message never part."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

INBOUND = ["received", "inbound_processing", "inbound_ai_replied", "inbound_follow_up", "inbound_human_takeover",
           "inbound_ignored", "inbound_error"]  # fmt: skip
OUTBOUND = ["queued", "dispatching", "sent", "delivered", "read", "failed", "unknown", "cancelled"]

ALLOWED = {
    *(("inbound_processing", final) for final in INBOUND[2:]),
    ("received", "inbound_processing"),
    ("queued", "dispatching"), ("queued", "cancelled"), ("queued", "failed"),
    ("dispatching", "sent"), ("dispatching", "queued"), ("dispatching", "failed"), ("dispatching", "unknown"),
    ("sent", "delivered"), ("sent", "failed"), ("delivered", "read"), ("delivered", "failed"),
    ("unknown", "sent"), ("unknown", "delivered"), ("unknown", "read"), ("unknown", "failed"),
}  # fmt: skip
SILENT = {("read", "delivered")}

QUEUE = ["queued", "dispatching", "sent", "failed", "unknown", "cancelled"]
QUEUE_ALLOWED = {
    ("queued", "dispatching"), ("queued", "cancelled"), ("queued", "failed"),
    ("dispatching", "sent"), ("dispatching", "queued"), ("dispatching", "failed"), ("dispatching", "unknown"),
    ("sent", "failed"), ("unknown", "sent"), ("unknown", "failed"),
}  # fmt: skip

# How an item gets to each status.
WAY = {
    "queued": (), "dispatching": ("dispatching",), "sent": ("dispatching", "sent"), "failed": ("failed",),
    "unknown": ("dispatching", "unknown"), "cancelled": ("cancelled",),
}  # fmt: skip


@pytest.mark.parametrize("direction", ["inbound", "outbound"])
async def test_messages_move_along_the_graph_and_nowhere_else(world: Any, direction: str) -> None:
    statuses = INBOUND if direction == "inbound" else OUTBOUND
    wrong: list[tuple[str, str, str]] = []
    for was in statuses:
        for becomes in statuses:
            message = await world.inbound(
                world.a, f"{was}-{becomes}", direction=direction, delivery_status=was, is_history=True
            )
            update = "UPDATE et_messages SET delivery_status = $2 WHERE id = $1 RETURNING delivery_status"
            try:
                result = await world.owner.fetchval(update, message, becomes)
            except asyncpg.CheckViolationError as error:
                assert "cannot go from" in str(error)  # noqa: PT017
                result = "refused"
            pair = (was, becomes)
            expected = was if pair in SILENT else becomes if was == becomes or pair in ALLOWED else "refused"
            if result != expected:
                wrong.append((was, becomes, result))
    assert wrong == []


async def test_queue_rows_move_along_the_graph_and_nowhere_else(world: Any) -> None:
    wrong: list[tuple[str, str, str]] = []
    for was in QUEUE:
        for becomes in QUEUE:
            item = (await world.enqueue(world.a))["queue_id"]
            await world.move(item, *WAY[was])
            try:
                await world.move(item, becomes)
                result = (await world.statuses(item))[0]
            except asyncpg.CheckViolationError:
                result = "refused"
            expected = becomes if was == becomes or (was, becomes) in QUEUE_ALLOWED else "refused"
            if result != expected:
                wrong.append((was, becomes, result))
    assert wrong == []


@pytest.mark.parametrize("status", QUEUE)
async def test_the_message_follows_its_queue_row(world: Any, status: str) -> None:
    item = (await world.enqueue(world.a))["queue_id"]
    await world.move(item, *WAY[status])
    assert await world.statuses(item) == (status, status)


@pytest.mark.parametrize(
    ("start", "message", "queue"),
    [
        ("queued", "cancelled", "cancelled"),
        ("unknown", "delivered", "sent"),
        ("unknown", "read", "sent"),
        ("unknown", "failed", "failed"),
        ("sent", "delivered", "sent"),
        ("sent", "failed", "failed"),
    ],
)
async def test_the_queue_row_follows_its_message(world: Any, start: str, message: str, queue: str) -> None:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], *WAY[start])
    await world.owner.execute(
        "UPDATE et_messages SET delivery_status = $2 WHERE id = $1", ids["message_id"], message
    )
    assert await world.statuses(ids["queue_id"]) == (queue, message)


async def test_many_rows_of_one_statement_move_together(world: Any) -> None:
    items = [(await world.enqueue(world.a, f"+6011122{n:04}"))["queue_id"] for n in range(20)]
    await world.owner.execute(
        "UPDATE et_outbound_queue SET status = CASE WHEN id % 2 = 0 THEN 'cancelled' ELSE 'dispatching' END "
        "WHERE id = ANY ($1)",
        items,
    )
    for item in items:
        queue, message = await world.statuses(item)
        assert queue == message == ("cancelled" if item % 2 == 0 else "dispatching")


async def test_both_can_be_moved_in_one_statement_with_the_channels_id(world: Any) -> None:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], "dispatching")
    await world.owner.execute(
        "WITH q AS (UPDATE et_outbound_queue SET status = 'sent' WHERE id = $1 RETURNING message_id) "
        "UPDATE et_messages m SET delivery_status = 'sent', channel_message_id = '3EB0' FROM q WHERE m.id = q.message_id",
        ids["queue_id"],
    )
    assert await world.statuses(ids["queue_id"]) == ("sent", "sent")


@pytest.mark.parametrize("status", ["failed", "unknown"])
async def test_an_operator_sends_again(world: Any, status: str) -> None:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], *WAY[status])
    await world.owner.execute(
        "UPDATE et_outbound_queue SET retry_count = 3, last_error = 'no', error_code = 'x', "
        "claimed_by = 'w', claim_epoch = 4, "
        "expires_at = now() - INTERVAL '1 hour' WHERE id = $1",
        ids["queue_id"],
    )
    await world.owner.execute(
        "UPDATE et_messages SET channel_message_id = '3EB0' WHERE id = $1", ids["message_id"]
    )
    await world.owner.execute("SELECT et_retry_outbound($1)", ids["queue_id"])
    assert await world.statuses(ids["queue_id"]) == ("queued", "queued")
    row = await world.owner.fetchrow(
        "SELECT retry_count, last_error, error_code, claimed_by, claim_epoch, expires_at > now() AS "
        "fresh, next_attempt_at <= now() AS due, "
        "m.channel_message_id LIKE 'out%' AS own_id FROM et_outbound_queue q JOIN et_messages m ON "
        "m.id = q.message_id WHERE q.id = $1",
        ids["queue_id"],
    )
    assert tuple(row) == (0, None, None, None, 4, True, True, True)


@pytest.mark.parametrize("status", ["queued", "dispatching", "sent", "cancelled"])
async def test_nothing_else_can_be_sent_again(world: Any, status: str) -> None:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], *WAY[status])
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="only a failed or unknown"):
        await world.owner.execute("SELECT et_retry_outbound($1)", ids["queue_id"])


async def test_the_way_back_cannot_be_had_by_a_setting_or_a_comment(world: Any) -> None:
    ids = await world.enqueue(world.a)
    await world.move(ids["queue_id"], "failed")
    for statement in (
        "UPDATE et_outbound_queue SET status = 'queued'",
        "UPDATE et_messages SET delivery_status = 'queued'",
        "/* et_retry_outbound(bigint) */ UPDATE et_outbound_queue SET status = 'queued'",
    ):
        with pytest.raises(asyncpg.CheckViolationError, match=r"et_retry_outbound|cannot go"):
            await world.owner.execute(statement)


async def test_a_queue_row_needs_a_queued_outbound_message(world: Any) -> None:
    inbound = await world.inbound(world.a, "m1")
    cancelled = await world.inbound(world.a, "m2", direction="outbound", delivery_status="cancelled")
    insert = "INSERT INTO et_outbound_queue (message_id) VALUES ($1)"
    for message in (inbound, cancelled):
        with pytest.raises(asyncpg.CheckViolationError, match="only an outbound message that is queued"):
            await world.owner.execute(insert, message)
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="does not exist"):
        await world.owner.execute(insert, 999_999)
