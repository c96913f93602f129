"""A migrated database with two tenants in it, as the schema's tests need it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from tests.support.postgres import PostgresServer


@dataclass(frozen=True)
class Tenant:
    id: int
    session: int
    other_session: int
    lead: int
    other_lead: int


@dataclass
class World:
    """`owner` is a connection of the login that owns the schema; `connect` opens more."""

    url: str
    owner: asyncpg.Connection[Any]
    connect: Callable[..., Any]
    a: Tenant
    b: Tenant

    async def inbound(self, tenant: Tenant, channel_id: str, **columns: object) -> int:
        """Store one inbound message and return its id."""
        row = {
            "tenant_id": tenant.id,
            "lead_id": tenant.lead,
            "channel_session_id": tenant.session,
            "channel": "whatsapp",
            "channel_message_id": channel_id,
            "direction": "inbound",
            "content": "hello",
        } | columns
        names = ", ".join(row)
        places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
        found: int = await self.owner.fetchval(
            f"INSERT INTO et_messages ({names}) VALUES ({places}) RETURNING id", *row.values()
        )
        return found

    async def enqueue(
        self, tenant: Tenant, recipient: str = "+60111222333", key: str | None = None
    ) -> asyncpg.Record:
        return await self.owner.fetchrow(
            "SELECT * FROM et_enqueue_outbound($1, $2, $3, 'hi', 'text', NULL, $4)",
            tenant.id, tenant.session, recipient, key,
        )  # fmt: skip

    async def move(self, queue_id: int, *statuses: str) -> None:
        for status in statuses:
            await self.owner.execute(
                "UPDATE et_outbound_queue SET status = $2 WHERE id = $1", queue_id, status
            )

    async def statuses(self, queue_id: int) -> tuple[str, str]:
        """Of the queue row and of its message."""
        row = await self.owner.fetchrow(
            "SELECT q.status, m.delivery_status FROM et_outbound_queue q JOIN et_messages m ON m.id = q.message_id "
            "WHERE q.id = $1",
            queue_id,
        )
        return row[0], row[1]


async def _tenant(conn: asyncpg.Connection[Any], name: str) -> Tenant:
    tenant = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ($1) RETURNING id", name)
    sessions = [
        await conn.fetchval(
            "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
            "VALUES ($1, 'whatsapp', $2, 'active') RETURNING id",
            tenant, number,
        )
        for number in ("+60100000001", "+60100000002")
    ]  # fmt: skip
    leads = [
        await conn.fetchval(
            "INSERT INTO et_leads (tenant_id, external_id) VALUES ($1, $2) RETURNING id", tenant, who
        )
        for who in ("whatsapp:+60111222333", "whatsapp:+60111222444")
    ]
    return Tenant(tenant, *sessions, *leads)


@pytest.fixture
async def world(migrated_url: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:

        async def connect(url: str = migrated_url, role: str | None = None) -> asyncpg.Connection[Any]:
            conn = await asyncpg.connect(url, timeout=10, command_timeout=30)
            stack.push_async_callback(conn.close, timeout=5)
            if role:
                await conn.execute(f"SET ROLE {role}")
            return conn

        owner = await connect()
        yield World(migrated_url, owner, connect, await _tenant(owner, "a"), await _tenant(owner, "b"))


@pytest.fixture
def backend_url(world: World, postgres_server: PostgresServer) -> str:
    """A backend's login of tenant A."""
    name = world.url.split("?")[0].rsplit("/", 1)[-1]
    login = f"backend_{name}"
    postgres_server.superuser_sql(f"CREATE ROLE {login} LOGIN; GRANT et_backend TO {login};", name)
    postgres_server.superuser_sql(
        f"INSERT INTO et_db_roles (role, tenant_id) VALUES ('{login}', {world.a.id});", name
    )
    return postgres_server.url(name, login)
