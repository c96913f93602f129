"""Tenants, their workspaces and agents: what an operator sets up, and whose any object is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from asyncpg import Record

from core.store.audit import Conn

OwnedTable = Literal[
    "et_agents",
    "et_api_keys",
    "et_channel_sessions",
    "et_imports",
    "et_leads",
    "et_messages",
    "et_outbound_queue",
    "et_tenants",
    "et_threads",
    "et_workspaces",
]
Status = Literal["active", "suspended"]


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose an object is; `tenant_id` None: the platform's own (a key)."""

    tenant_id: int | None
    status: str | None


async def status(conn: Conn, tenant_id: int) -> str | None:
    found: str | None = await conn.fetchval("SELECT status FROM et_tenants WHERE id = $1", tenant_id)
    return found


async def owner_of(conn: Conn, table: OwnedTable, object_id: int) -> Owner | None:
    """Across all tenants, so only for the caller's identity check. A merged lead's old id is its survivor's."""
    if table == "et_tenants":
        row = await conn.fetchrow("SELECT id AS tenant_id, status FROM et_tenants WHERE id = $1", object_id)
    else:
        row = await conn.fetchrow(
            f"""
            SELECT o.tenant_id, t.status
            FROM {table} o
            LEFT JOIN et_tenants t ON t.id = o.tenant_id
            WHERE o.id = $1
            """,  # noqa: S608  (one of the names above)
            object_id,
        )
    if row is None and table == "et_leads":
        row = await conn.fetchrow(
            """
            SELECT m.tenant_id, t.status
            FROM et_lead_merges m
            JOIN et_tenants t ON t.id = m.tenant_id
            WHERE m.old_id = $1
            """,
            object_id,
        )
    return None if row is None else Owner(row["tenant_id"], row["status"])


# ---- tenants: the platform's alone, so run as worker ----


async def create_tenant(conn: Conn, name: str, settings: dict[str, Any]) -> Record:
    row = await conn.fetchrow(
        """
        INSERT INTO et_tenants (name, settings)
        VALUES ($1, $2)
        RETURNING id, name, status, settings, created_at
        """,
        name,
        settings,
    )
    assert row is not None
    return row


async def list_tenants(conn: Conn, after: int | None, limit: int) -> list[Record]:
    return await conn.fetch(
        """
        SELECT id, name, status, settings, created_at
        FROM et_tenants
        WHERE id > coalesce($1, 0)
        ORDER BY id
        LIMIT $2
        """,
        after,
        limit,
    )


async def read_tenant(conn: Conn, tenant_id: int) -> Record | None:
    return await conn.fetchrow(
        """
        SELECT id, name, status, settings, created_at
        FROM et_tenants
        WHERE id = $1
        """,
        tenant_id,
    )


async def update_tenant(
    conn: Conn, tenant_id: int, *, name: str | None, status: Status | None, settings: dict[str, Any] | None
) -> Record | None:
    return await conn.fetchrow(
        """
        UPDATE et_tenants
        SET name = coalesce($2, name),
            status = coalesce($3, status),
            settings = coalesce($4, settings)
        WHERE id = $1
        RETURNING id, name, status, settings, created_at
        """,
        tenant_id,
        name,
        status,
        settings,
    )


async def live_sessions(conn: Conn, tenant_id: int) -> int:
    """How many of the tenant's sessions somebody wants connected."""
    count = await conn.fetchval(
        """
        SELECT count(*)
        FROM et_session_runtime
        WHERE tenant_id = $1
          AND wanted = 'connected'
        """,
        tenant_id,
    )
    assert isinstance(count, int)
    return count


async def delete_tenant(conn: Conn, tenant_id: int) -> bool:
    """Everything of the tenant goes with it. Children first: keys between them carry no cascade."""
    for table in ("et_outbound_queue", "et_messages", "et_threads", "et_channel_sessions"):
        await conn.execute(f"DELETE FROM {table} WHERE tenant_id = $1", tenant_id)  # noqa: S608
    done = await conn.execute("DELETE FROM et_tenants WHERE id = $1", tenant_id)
    return done.endswith(" 1")


# ---- workspaces ----


async def create_workspace(
    conn: Conn, tenant_id: int, *, name: str, timezone: str, agent_id: int | None
) -> Record:
    row = await conn.fetchrow(
        """
        INSERT INTO et_workspaces (tenant_id, name, timezone, agent_id)
        VALUES ($1, $2, $3, $4)
        RETURNING id, tenant_id, name, timezone, agent_id, created_at
        """,
        tenant_id,
        name,
        timezone,
        agent_id,
    )
    assert row is not None
    return row


async def list_workspaces(conn: Conn, tenant_id: int, after: int | None, limit: int) -> list[Record]:
    return await conn.fetch(
        """
        SELECT id, tenant_id, name, timezone, agent_id, created_at
        FROM et_workspaces
        WHERE tenant_id = $1
          AND id > coalesce($2, 0)
        ORDER BY id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
    )


async def read_workspace(conn: Conn, tenant_id: int, workspace_id: int) -> Record | None:
    return await conn.fetchrow(
        """
        SELECT id, tenant_id, name, timezone, agent_id, created_at
        FROM et_workspaces
        WHERE tenant_id = $1
          AND id = $2
        """,
        tenant_id,
        workspace_id,
    )


async def update_workspace(
    conn: Conn,
    tenant_id: int,
    workspace_id: int,
    *,
    name: str | None,
    timezone: str | None,
    agent_given: bool,
    agent_id: int | None,
) -> Record | None:
    """`agent_given` with None takes the agent away: nobody answers by itself any more."""
    return await conn.fetchrow(
        """
        UPDATE et_workspaces
        SET name = coalesce($3, name),
            timezone = coalesce($4, timezone),
            agent_id = CASE WHEN $5 THEN $6 ELSE agent_id END
        WHERE tenant_id = $1
          AND id = $2
        RETURNING id, tenant_id, name, timezone, agent_id, created_at
        """,
        tenant_id,
        workspace_id,
        name,
        timezone,
        agent_given,
        agent_id,
    )


async def delete_workspace(conn: Conn, tenant_id: int, workspace_id: int) -> bool:
    done = await conn.execute(
        "DELETE FROM et_workspaces WHERE tenant_id = $1 AND id = $2", tenant_id, workspace_id
    )
    return done.endswith(" 1")


# ---- agents ----


async def create_agent(
    conn: Conn,
    tenant_id: int,
    *,
    name: str,
    instructions: str,
    decider: str,
    model: str | None,
    settings: dict[str, Any],
) -> Record:
    row = await conn.fetchrow(
        """
        INSERT INTO et_agents (tenant_id, name, instructions, decider, model, settings)
        VALUES ($1, $2, $3, $4, $5, $6)
        RETURNING id, tenant_id, name, instructions, decider, model, settings, created_at, updated_at
        """,
        tenant_id,
        name,
        instructions,
        decider,
        model,
        settings,
    )
    assert row is not None
    return row


async def list_agents(conn: Conn, tenant_id: int, after: int | None, limit: int) -> list[Record]:
    return await conn.fetch(
        """
        SELECT id, tenant_id, name, instructions, decider, model, settings, created_at, updated_at
        FROM et_agents
        WHERE tenant_id = $1
          AND id > coalesce($2, 0)
        ORDER BY id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
    )


async def read_agent(conn: Conn, tenant_id: int, agent_id: int) -> Record | None:
    return await conn.fetchrow(
        """
        SELECT id, tenant_id, name, instructions, decider, model, settings, created_at, updated_at
        FROM et_agents
        WHERE tenant_id = $1
          AND id = $2
        """,
        tenant_id,
        agent_id,
    )


async def update_agent(
    conn: Conn,
    tenant_id: int,
    agent_id: int,
    *,
    name: str | None,
    instructions: str | None,
    decider: str | None,
    model_given: bool,
    model: str | None,
    settings: dict[str, Any] | None,
) -> Record | None:
    return await conn.fetchrow(
        """
        UPDATE et_agents
        SET name = coalesce($3, name),
            instructions = coalesce($4, instructions),
            decider = coalesce($5, decider),
            model = CASE WHEN $6 THEN $7 ELSE model END,
            settings = coalesce($8, settings),
            updated_at = now()
        WHERE tenant_id = $1
          AND id = $2
        RETURNING id, tenant_id, name, instructions, decider, model, settings, created_at, updated_at
        """,
        tenant_id,
        agent_id,
        name,
        instructions,
        decider,
        model_given,
        model,
        settings,
    )


async def delete_agent(conn: Conn, tenant_id: int, agent_id: int) -> bool:
    done = await conn.execute("DELETE FROM et_agents WHERE tenant_id = $1 AND id = $2", tenant_id, agent_id)
    return done.endswith(" 1")
