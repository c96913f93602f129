"""A backend that only speaks SQL: every row it inserts is handed to WhatsApp within a second, and its ticks appear on it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.support.postgres import PostgresServer
from tests.support.stack import Stack

ROWS = 100


async def psql(url: str, sql: str) -> str:
    """Run one statement in a `psql` of its own, as a backend's cron job would."""
    process = await asyncio.create_subprocess_exec(
        "psql",
        url,
        "--no-psqlrc",
        "--quiet",
        "--tuples-only",
        "--no-align",
        "-v",
        "ON_ERROR_STOP=1",
        "-c",
        sql,
        env={**os.environ, "PGCONNECT_TIMEOUT": "10"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


async def test_every_row_is_handed_over_within_a_second_and_gets_its_ticks(
    tmp_path: Path, migrated_url: str, postgres_server: PostgresServer
) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        people = [
            stack.sandbox.person(f"+6017{i:07}", f"P{i}", auto_receipts="read") for i in range(ROWS // 5)
        ]
        backend = await backend_login(stack, postgres_server, migrated_url)
        committed: dict[int, float] = {}

        # Two ways of plain SQL: the function, and the two rows inserted by hand. Five rows a second and person.
        for number in range(ROWS):
            person = people[number % len(people)]
            if number < len(people) or number % 2:
                sql = (
                    f"SELECT queue_id FROM et_enqueue_outbound({stack.tenant}, {stack.session}, '{person.number}',"
                    f" 'offer {number}', 'text', NULL, 'offer-{number}')"
                )
            else:
                sql = (
                    f"DO $$ DECLARE m BIGINT; BEGIN"
                    f" INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, content,"
                    f" delivery_status) SELECT tenant_id, id, {stack.session}, 'whatsapp', 'outbound', 'offer {number}',"
                    f" 'queued' FROM et_leads WHERE external_id = 'whatsapp:{person.number}' RETURNING id INTO m;"
                    f" INSERT INTO et_outbound_queue (tenant_id, message_id, channel, channel_session_id)"
                    f" VALUES ({stack.tenant}, m, 'whatsapp', {stack.session}); END $$"
                )
            await psql(backend, sql)
            committed[number] = asyncio.get_running_loop().time()

        async def all_read() -> bool:
            return (
                await stack.db.fetchval(
                    "SELECT count(*) FROM et_messages WHERE direction = 'outbound' AND delivery_status = 'read'"
                )
                == ROWS
            )

        await stack.until(all_read, "every row is sent, delivered and read", within=30)
        rows = await stack.db.fetch(
            """
            SELECT m.content, m.channel_message_id, q.status, q.retry_count
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            """
        )
        arrivals = {message.text: message for person in people for message in person.received if message.text}
        for row in rows:
            assert (row["status"], row["retry_count"]) == ("sent", 0)
            assert arrivals[row["content"]].id == row["channel_message_id"]
        calls = [call for call in stack.sandbox.calls if not call.repeat]
        assert len(calls) == len({call.id for call in calls}) == ROWS
        late = {
            number: round(arrivals[f"offer {number}"].monotonic - committed[number], 3)
            for number in range(ROWS)
            if arrivals[f"offer {number}"].monotonic - committed[number] > 1.0
        }
        assert not late, f"handed over more than a second after the commit: {late}"

        # The same dedupe key again sends nothing.
        await psql(
            backend,
            f"SELECT queue_id FROM et_enqueue_outbound({stack.tenant}, {stack.session}, '{people[0].number}',"
            " 'offer 0', 'text', NULL, 'offer-0')",
        )
        assert await stack.db.fetchval("SELECT count(*) FROM et_outbound_queue") == ROWS


async def backend_login(stack: Stack, server: PostgresServer, url: str) -> str:
    """The URL of a login that a tenant's own backend would have: bound to its tenant by `et_db_roles`."""
    role = f"backend_{stack.tenant}_{os.urandom(3).hex()}"
    server.superuser_sql(f"CREATE ROLE {role} LOGIN IN ROLE et_backend")
    await stack.db.execute("INSERT INTO et_db_roles (role, tenant_id) VALUES ($1, $2)", role, stack.tenant)
    return url.replace("//gateway@", f"//{role}@")
