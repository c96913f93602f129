"""A database that a backend used before: adopted as it is, refused as one list, its conversations copied once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.errors import MigrationError
from core.legacy import migrate_legacy
from core.migrate import migrate

LEGACY = (Path(__file__).parents[2] / "fixtures" / "legacy.sql").read_text()


@pytest.fixture
async def legacy(database_url: str) -> Any:
    conn = await asyncpg.connect(database_url, timeout=10, command_timeout=30)
    await conn.execute(LEGACY)
    yield conn
    await conn.close(timeout=5)


async def test_the_older_tables_are_adopted_with_their_ids(legacy: Any) -> None:
    before = await legacy.fetch("SELECT id, tenant_id, external_id FROM et_leads ORDER BY id")
    await migrate(legacy)
    assert await legacy.fetch("SELECT id, tenant_id, external_id FROM et_leads ORDER BY id") == before
    types = await legacy.fetch(
        "SELECT attrelid::regclass::TEXT || '.' || attname, format_type(atttypid, NULL) FROM pg_attribute "
        "WHERE attrelid IN ('et_leads'::regclass, 'et_channel_sessions'::regclass) AND attname IN "
        "('id', 'created_at', 'tags', 'status_reason')"
    )
    assert dict(tuple(r) for r in types) == {
        "et_leads.id": "integer",
        "et_leads.created_at": "timestamp with time zone",
        "et_leads.tags": "text[]",
        "et_channel_sessions.id": "integer",
        "et_channel_sessions.created_at": "timestamp with time zone",
        "et_channel_sessions.status_reason": "text",
    }
    at = await legacy.fetchval("SELECT created_at AT TIME ZONE 'UTC' FROM et_leads WHERE id = 10")
    assert str(at) == "2026-01-02 09:00:00"
    assert await legacy.fetchval("SELECT count(*) FROM et_lead_identities") == 3


async def test_adopted_tables_work_like_new_ones(legacy: Any) -> None:
    await migrate(legacy)
    ids = await legacy.fetchrow(
        "SELECT * FROM et_enqueue_outbound(1, 7, '+60111222333', 'hi', 'text', NULL, NULL)"
    )
    assert await legacy.fetchval("SELECT lead_id FROM et_messages WHERE id = $1", ids["message_id"]) == 10
    new = await legacy.fetchrow(
        "SELECT * FROM et_enqueue_outbound(1, 7, '+60199', 'hi', 'text', NULL, NULL)".replace(
            "+60199", "+60199999999"
        )
    )
    assert await legacy.fetchval(
        "SELECT l.workspace_id FROM et_leads l JOIN et_messages m ON m.lead_id = l.id WHERE m.id = $1", new["message_id"]
    ) == 3  # fmt: skip
    await legacy.execute("SET ROLE et_api")
    await legacy.execute("SET app.tenant_id = '2'")
    assert await legacy.fetchval("SELECT count(*) FROM et_leads") == 1
    await legacy.execute("INSERT INTO et_leads (tenant_id, external_id) VALUES (2, 'whatsapp:+60100')")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await legacy.execute("INSERT INTO et_leads (tenant_id, external_id) VALUES (1, 'whatsapp:+60100')")


async def test_no_key_is_there_twice(legacy: Any) -> None:
    await migrate(legacy)
    twice = await legacy.fetch(
        "SELECT indrelid::regclass::TEXT, indkey::TEXT FROM pg_index WHERE indisunique AND indpred IS NULL "
        "GROUP BY 1, 2 HAVING count(*) > 1"
    )
    assert twice == []
    references = await legacy.fetch(
        "SELECT conrelid::regclass::TEXT, conkey FROM pg_constraint WHERE contype = 'f' GROUP BY 1, "
        "2, confrelid HAVING count(*) > 1"
    )
    assert references == []


async def test_everything_that_stands_in_the_way_is_one_list(legacy: Any) -> None:
    await legacy.execute(
        """
        INSERT INTO et_leads (id, tenant_id, workspace_id, external_id) VALUES
            (50, 1, 3, 'whatsapp:+60111222333'),
            (51, 2, 3, 'whatsapp:+60555');
        ALTER TABLE et_leads ALTER COLUMN external_id DROP NOT NULL;
        INSERT INTO et_leads (id, tenant_id, workspace_id) VALUES (52, 1, 3);
        UPDATE et_channel_sessions SET status = 'open';
        ALTER TABLE et_agents ALTER COLUMN name TYPE BYTEA USING name::BYTEA;
        ALTER TABLE et_workspaces ADD COLUMN colour TEXT NOT NULL DEFAULT 'red';
        ALTER TABLE et_workspaces ALTER COLUMN colour DROP DEFAULT;
        CREATE VIEW lead_days AS SELECT created_at::DATE FROM et_leads;
        CREATE TABLE et_messages (id INT);
        """
    )
    with pytest.raises(MigrationError) as caught:
        await migrate(legacy)
    text = str(caught.value)
    for part in (
        "et_messages exists but was not made by these migrations",
        "et_leads has duplicates of (tenant_id, external_id): (1, whatsapp:+60111222333) 2 times",
        "et_leads.external_id is NULL in 1 rows",
        "et_leads.workspace_id: 1 rows name a row of et_workspaces that does not exist in their tenant",
        "et_channel_sessions.status holds 'open'",
        "et_agents.name is bytea, it must be text",
        "et_workspaces.colour must be given in every new row",
        "et_leads.created_at gets a time zone, but is used by lead_days",
    ):
        assert part in text
    assert len(text.splitlines()) == 9
    assert await legacy.fetchval("SELECT to_regclass('et_threads')") is None
    assert await legacy.fetchval("SELECT to_regclass('et_schema_migrations')") is None


async def test_a_table_of_somebody_else_is_named(
    legacy: Any, postgres_server: Any, database_url: str
) -> None:
    name = database_url.split("?")[0].rsplit("/", 1)[-1]
    postgres_server.superuser_sql("ALTER TABLE et_leads OWNER TO postgres;", name)
    with pytest.raises(MigrationError, match="et_leads belongs to postgres"):
        await migrate(legacy)


async def test_conversations_become_history_once(legacy: Any) -> None:
    await migrate(legacy)
    counts = await migrate_legacy(legacy)
    assert (counts.sessions, counts.threads, counts.messages, counts.duplicates) == (2, 5, 8, 1)
    threads = await legacy.fetch(
        "SELECT c.legacy_id, t.lead_id, s.session_identifier, s.status AS session, t.status FROM et_threads t "
        "JOIN et_legacy_threads c ON c.thread_id = t.id JOIN et_channel_sessions s ON s.id = t.channel_session_id ORDER BY 1"
    )
    assert [tuple(r) for r in threads] == [
        (100, 10, "legacy", "disconnected", "archived"),
        (101, 10, "legacy", "disconnected", "active"),
        (102, 11, "legacy", "disconnected", "active"),
        (103, 10, "+60123456789", "active", "active"),
        (200, 20, "legacy", "disconnected", "active"),
    ]
    messages = await legacy.fetch(
        "SELECT channel_message_id, direction, role, message_type, channel_timestamp, content FROM et_messages ORDER BY id"
    )
    assert tuple(messages[1]) == (
        "legacy_1001",
        "outbound",
        "assistant",
        "text",
        1767344405000,
        "Yes, from nine.",
    )
    assert tuple(messages[5])[:5] == ("3EB0A1", "inbound", "user", "text", 1771322400123)
    assert tuple(messages[7]) == ("3EB0A3", "inbound", "user", "image", 1771322460000, None)
    assert await legacy.fetchval("SELECT bool_and(is_history) FROM et_messages")
    assert await legacy.fetch("SELECT * FROM et_claim_inbound('w')") == []
    again = await migrate_legacy(legacy)
    assert (again.sessions, again.threads, again.messages, again.duplicates) == (0, 0, 0, 9)


async def test_live_messages_since_the_migration_keep_their_thread(legacy: Any) -> None:
    await migrate(legacy)
    live = await legacy.fetchval(
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel_message_id, direction) "
        "VALUES (1, 10, 7, '3EB0A1', 'inbound') RETURNING thread_id"
    )
    counts = await migrate_legacy(legacy)
    assert (counts.messages, counts.duplicates) == (7, 2)
    active = await legacy.fetch(
        "SELECT id FROM et_threads WHERE lead_id = 10 AND channel_session_id = 7 AND status = 'active'"
    )
    assert [r[0] for r in active] == [live]


async def test_afterwards_the_legacy_tables_are_closed(legacy: Any) -> None:
    await migrate(legacy)
    await migrate_legacy(legacy)
    for statement in (
        "INSERT INTO et_conversation_threads (tenant_id, lead_id) VALUES (1, 10)",
        "UPDATE et_chat_messages SET content = 'x'",
        "DELETE FROM et_chat_messages",
        "TRUNCATE et_chat_messages",
    ):
        with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="is closed"):
            await legacy.execute(statement)


async def test_a_merge_and_an_erased_tenant_still_reach_them(legacy: Any) -> None:
    await migrate(legacy)
    await migrate_legacy(legacy)
    assert await legacy.fetchval("SELECT et_merge_leads(1, 10, 11)") == 10
    assert await legacy.fetchval("SELECT lead_id FROM et_conversation_threads WHERE id = 102") == 10
    await legacy.execute("DELETE FROM et_tenants WHERE id = 2")
    assert await legacy.fetchval("SELECT count(*) FROM et_chat_messages WHERE tenant_id = 2") == 0


async def test_rows_that_cannot_be_placed_are_listed_and_nothing_is_copied(legacy: Any) -> None:
    await legacy.execute("INSERT INTO et_conversation_threads (id, tenant_id, lead_id) VALUES (300, 2, 10)")
    await migrate(legacy)
    with pytest.raises(
        MigrationError, match="et_conversation_threads 300: lead 10 does not exist in its tenant"
    ):
        await migrate_legacy(legacy)
    assert await legacy.fetchval("SELECT count(*) FROM et_messages") == 0


async def test_without_legacy_tables_it_says_so(migrated_url: str) -> None:
    conn = await asyncpg.connect(migrated_url)
    with pytest.raises(MigrationError, match="nothing to copy"):
        await migrate_legacy(conn)
    await conn.close()


async def test_older_tables_without_the_plans_columns_are_copied_too(database_url: str) -> None:
    conn = await asyncpg.connect(database_url)
    await conn.execute(LEGACY.split("-- Step 1:")[0])
    await migrate(conn)
    counts = await migrate_legacy(conn)
    assert (counts.threads, counts.messages) == (4, 5)
    row = await conn.fetchrow("SELECT * FROM et_messages ORDER BY id LIMIT 1")
    assert (row["channel_message_id"], row["direction"], row["channel_timestamp"]) == (
        "legacy_1000",
        "inbound",
        1767344400000,
    )
    await conn.close()
