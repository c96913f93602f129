"""Two ways into the queue, by function and by plain SQL, and one meaning."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

CALL = "SELECT * FROM et_enqueue_outbound($1, $2, $3, $4, $5, $6, $7)"


def call(world: Any, **changes: object) -> tuple[object, ...]:
    values = {
        "tenant": world.a.id, "session": world.a.session, "recipient": "+60111222999", "content": "hi",
        "type": "text", "media": None, "key": None,
    } | changes  # fmt: skip
    return tuple(values.values())


async def test_it_creates_lead_thread_message_and_queue_row(world: Any) -> None:
    workspace = await world.owner.fetchval(
        "INSERT INTO et_workspaces (tenant_id, name) VALUES ($1, 'w') RETURNING id", world.a.id
    )
    await world.owner.execute(
        "UPDATE et_channel_sessions SET metadata = jsonb_build_object('default_workspace_id', $2::BIGINT) WHERE id = $1",
        world.a.session, workspace,
    )  # fmt: skip
    ids = await world.owner.fetchrow(CALL, *call(world))
    row = await world.owner.fetchrow(
        """
        SELECT l.external_id, l.workspace_id, l.kind, t.id AS thread_id,
               q.id AS queue_id, q.recipient, q.status, q.thread_id AS queue_thread,
               m.direction, m.delivery_status, m.channel, m.role, m.content
        FROM et_messages m
        JOIN et_leads l ON l.id = m.lead_id
        JOIN et_threads t ON t.id = m.thread_id
        JOIN et_outbound_queue q ON q.message_id = m.id
        WHERE m.id = $1
        """,
        ids["message_id"],
    )
    assert row["external_id"] == "whatsapp:+60111222999"
    assert (row["workspace_id"], row["kind"]) == (workspace, "person")
    assert (row["thread_id"], row["queue_id"], row["queue_thread"]) == (
        ids["thread_id"], ids["queue_id"], ids["thread_id"],
    )  # fmt: skip
    assert (row["recipient"], row["status"], row["delivery_status"]) == ("+60111222999", "queued", "queued")
    assert (row["direction"], row["role"], row["channel"], row["content"]) == (
        "outbound", "assistant", "whatsapp", "hi",
    )  # fmt: skip


async def test_it_takes_the_published_names(world: Any) -> None:
    row = await world.owner.fetchrow(
        "SELECT message_id, queue_id, thread_id FROM et_enqueue_outbound(tenant_id => $1, channel_session_id => $2, "
        "recipient => '+60111222333', content => 'hi', message_type => 'text', media_url => NULL, dedupe_key => 'k')",
        world.a.id, world.a.session,
    )  # fmt: skip
    assert all(row)


async def test_a_workspace_that_does_not_exist_becomes_null(world: Any) -> None:
    await world.owner.execute(
        "UPDATE et_channel_sessions SET metadata = '{\"default_workspace_id\": 424242}'"
    )
    warnings: list[Any] = []
    world.owner.add_log_listener(lambda _conn, message: warnings.append(message))
    await world.owner.fetchrow(CALL, *call(world))
    assert await world.owner.fetchval(
        "SELECT workspace_id FROM et_leads WHERE external_id = 'whatsapp:+60111222999'"
    ) is None  # fmt: skip
    await asyncio.sleep(0)
    assert "424242" in str(warnings[0])


@pytest.mark.parametrize(
    ("recipient", "external", "address"),
    [
        ("60111222999", "whatsapp:+60111222999", "+60111222999"),
        ("+60 11-122 2999", "whatsapp:+60111222999", "+60111222999"),
        ("60111222999:4@s.whatsapp.net", "whatsapp:+60111222999", "+60111222999"),
        ("whatsapp:+60111222999", "whatsapp:+60111222999", "+60111222999"),
        ("120363000000000001@g.us", "whatsapp-group:120363000000000001@g.us", "120363000000000001@g.us"),
        ("whatsapp-group:1203@g.us", "whatsapp-group:1203@g.us", "1203@g.us"),
        ("100000000000002@lid", "whatsapp-lid:100000000000002", "whatsapp-lid:100000000000002"),
    ],
)
async def test_every_way_to_write_a_recipient(
    world: Any, recipient: str, external: str, address: str
) -> None:
    ids = await world.owner.fetchrow(CALL, *call(world, recipient=recipient))
    row = await world.owner.fetchrow(
        "SELECT l.external_id, l.kind, q.recipient, m.chat_identifier FROM et_messages m JOIN "
        "et_leads l ON l.id = m.lead_id "
        "JOIN et_outbound_queue q ON q.message_id = m.id WHERE m.id = $1",
        ids["message_id"],
    )
    assert (row["external_id"], row["recipient"]) == (external, address)
    assert row["kind"] == ("group" if "group" in external else "person")
    assert row["chat_identifier"] == (address if "group" in external else None)


@pytest.mark.parametrize(
    ("channel", "recipient", "external", "address"),
    [
        ("email", "John@Example.com", "email:john@example.com", "john@example.com"),
        ("telegram", "-1001", "telegram:-1001", "telegram:-1001"),
        ("discord", "abc", "discord:abc", "discord:abc"),
    ],
)
async def test_other_channels_need_no_schema_change(
    world: Any, channel: str, recipient: str, external: str, address: str
) -> None:
    session = await world.owner.fetchval(
        "INSERT INTO et_channel_sessions (tenant_id, channel_type) VALUES ($1, $2) RETURNING id",
        world.a.id,
        channel,
    )
    ids = await world.owner.fetchrow(CALL, *call(world, session=session, recipient=recipient))
    row = await world.owner.fetchrow(
        "SELECT l.external_id, q.recipient FROM et_messages m JOIN et_leads l ON l.id = m.lead_id "
        "JOIN et_outbound_queue q ON q.message_id = m.id WHERE m.id = $1",
        ids["message_id"],
    )
    assert tuple(row) == (external, address)


async def test_a_repeated_key_returns_the_first_ids_and_stores_nothing(world: Any) -> None:
    first = await world.owner.fetchrow(CALL, *call(world, key="k"))
    again = await world.owner.fetchrow(CALL, *call(world, key="k", content="other", recipient="+60111222777"))
    assert again == first
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 1
    other = await world.owner.fetchrow(
        CALL, *call(world, key="k", tenant=world.b.id, session=world.b.session)
    )
    assert other["queue_id"] != first["queue_id"]


async def test_a_repeated_key_waits_for_a_first_call_that_is_still_running(world: Any) -> None:
    one, two = await world.connect(), await world.connect()
    running = one.transaction()
    await running.start()
    first = await one.fetchrow(CALL, *call(world, key="k"))
    waiting = asyncio.create_task(two.fetchrow(CALL, *call(world, key="k", recipient="+60111222777")))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await running.commit()
    assert await asyncio.wait_for(waiting, 10) == first
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 1
    assert await world.owner.fetchval("SELECT count(*) FROM et_leads WHERE external_id LIKE '%777'") == 0


async def test_many_callers_with_one_key_get_one_item(world: Any) -> None:
    connections = [await world.connect() for _ in range(8)]
    rows = await asyncio.gather(*(c.fetchrow(CALL, *call(world, key="k")) for c in connections))
    assert len({tuple(r) for r in rows}) == 1
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 1


async def test_many_callers_with_one_new_recipient_make_one_lead(world: Any) -> None:
    connections = [await world.connect() for _ in range(8)]
    rows = await asyncio.gather(*(c.fetchrow(CALL, *call(world)) for c in connections))
    assert len({r["queue_id"] for r in rows}) == 8
    assert len({r["thread_id"] for r in rows}) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"session": 424242}, asyncpg.ForeignKeyViolationError, "session 424242 does not exist"),
        ({"tenant": 424242}, asyncpg.ForeignKeyViolationError, "tenant 424242 does not exist"),
        ({"content": "  "}, asyncpg.InvalidParameterValueError, "content is empty"),
        ({"content": None}, asyncpg.InvalidParameterValueError, "content is empty"),
        ({"type": "smell"}, asyncpg.InvalidParameterValueError, "'smell' cannot be sent"),
        ({"type": "unsupported"}, asyncpg.InvalidParameterValueError, "cannot be sent"),
        ({"type": "image"}, asyncpg.InvalidParameterValueError, "media_url is empty"),
        ({"type": "location"}, asyncpg.InvalidParameterValueError, "payload is empty"),
        ({"type": "reaction"}, asyncpg.InvalidParameterValueError, "reply_to_message_id is empty"),
        ({"recipient": "Siti"}, asyncpg.InvalidParameterValueError, "'Siti' is not an address on whatsapp"),
        ({"recipient": None}, asyncpg.InvalidParameterValueError, "recipient is empty"),
    ],
)
async def test_what_cannot_be_sent_is_refused_in_words(
    world: Any, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await world.owner.fetchrow(CALL, *call(world, **changes))
    assert await world.owner.fetchval("SELECT count(*) FROM et_messages") == 0


async def test_another_tenants_session_does_not_exist(world: Any) -> None:
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="does not exist in tenant"):
        await world.owner.fetchrow(CALL, *call(world, session=world.b.session))


async def test_a_suspended_tenant_sends_nothing_and_still_receives(world: Any) -> None:
    item = (await world.enqueue(world.a))["queue_id"]
    await world.move(item, "failed")
    await world.owner.execute("UPDATE et_tenants SET status = 'suspended' WHERE id = $1", world.a.id)
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="suspended"):
        await world.owner.fetchrow(CALL, *call(world))
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="suspended"):
        await world.owner.execute("SELECT et_retry_outbound($1)", item)
    assert await world.inbound(world.a, "m1")


async def test_the_further_arguments(world: Any) -> None:
    ids = await world.owner.fetchrow(
        """
        SELECT * FROM et_enqueue_outbound($1, $2, NULL, NULL, 'location', lead_id => $3,
            payload => '{"latitude": 3.1, "longitude": 101.7}', send_at => now() + INTERVAL '3 days', priority => 5,
            expires_in => INTERVAL '15 minutes', reply_to_message_id => 'q1', raw_payload => '{"origin": "agent"}',
            llm => '{"provider": "p", "model": "m", "total_tokens": 12, "estimated_cost_usd": 0.01}')
        """,
        world.a.id, world.a.session, world.a.lead,
    )  # fmt: skip
    row = await world.owner.fetchrow(
        "SELECT q.*, m.raw_payload::TEXT AS raw, m.reply_to_message_id, m.llm_model, "
        "m.llm_total_tokens, m.lead_id FROM et_outbound_queue q "
        "JOIN et_messages m ON m.id = q.message_id WHERE q.id = $1",
        ids["queue_id"],
    )
    assert row["recipient"] is None
    assert (row["lead_id"], row["priority"], row["reply_to_message_id"]) == (world.a.lead, 5, "q1")
    assert row["next_attempt_at"] == row["send_at"]
    assert row["expires_at"] - row["send_at"] == timedelta(minutes=15)
    assert '"origin": "agent"' in row["raw"]
    assert '"latitude": 3.1' in row["raw"]
    assert (row["llm_model"], row["llm_total_tokens"]) == ("m", 12)


async def test_plain_sql_needs_only_what_it_knows(world: Any) -> None:
    async with world.owner.transaction():
        message = await world.owner.fetchval(
            "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, delivery_status, content) "
            "VALUES ($1, $2, $3, 'outbound', 'queued', 'hi') RETURNING id",
            world.a.id, world.a.lead, world.a.session,
        )  # fmt: skip
        queue = await world.owner.fetchrow(
            "INSERT INTO et_outbound_queue (message_id) VALUES ($1) RETURNING *", message
        )
    assert (queue["tenant_id"], queue["channel"], queue["channel_session_id"]) == (
        world.a.id, "whatsapp", world.a.session,
    )  # fmt: skip
    assert (queue["recipient"], queue["status"], queue["retry_count"], queue["claim_epoch"]) == (
        None,
        "queued",
        0,
        0,
    )
    assert queue["expires_at"] - queue["created_at"] == timedelta(hours=24)


async def test_a_send_date_also_moves_the_default_expiry(world: Any) -> None:
    message = await world.owner.fetchval(
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, content) "
        "VALUES ($1, $2, $3, 'outbound', 'hi') RETURNING id",
        world.a.id, world.a.lead, world.a.session,
    )  # fmt: skip
    row = await world.owner.fetchrow(
        "INSERT INTO et_outbound_queue (message_id, send_at) VALUES ($1, now() + INTERVAL '7 days') RETURNING *",
        message,
    )
    assert row["next_attempt_at"] == row["send_at"]
    assert row["expires_at"] - row["send_at"] == timedelta(hours=24)


async def test_queue_row_and_message_name_one_session_and_tenant(world: Any) -> None:
    message = await world.owner.fetchval(
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, content) "
        "VALUES ($1, $2, $3, 'outbound', 'hi') RETURNING id",
        world.a.id, world.a.lead, world.a.session,
    )  # fmt: skip
    with pytest.raises(asyncpg.CheckViolationError, match="different sessions"):
        await world.owner.execute(
            "INSERT INTO et_outbound_queue (message_id, channel_session_id) VALUES ($1, $2)",
            message,
            world.a.other_session,
        )
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="does not exist in this tenant"):
        await world.owner.execute(
            "INSERT INTO et_outbound_queue (message_id, tenant_id) VALUES ($1, $2)", message, world.b.id
        )
