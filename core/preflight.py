"""What stands in the way of migrating a database that already holds tables of ours. Only reads; returns sentences.

A backend's older tables are adopted as they are (see schema/001_tables.sql), so what the keys and checks of
schema/002_constraints.sql would trip over is looked for here, all at once.
"""

from __future__ import annotations

from typing import Any

import asyncpg

_INTEGER = ("smallint", "integer", "bigint")
_TEXT = ("text", "character varying")
_TIME = ("timestamp without time zone", "timestamp with time zone")
_JSON = ("jsonb",)
_ARRAY = ("text[]", "character varying[]")

# Tables that may be there already, with the types each column may have. "!": it must be there, and no row may be NULL;
# "+": it may be missing, but where it exists no row may be NULL.
ADOPTED: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "et_tenants": {
        "id": ("!", _INTEGER),
        "name": ("!", _TEXT),
        "status": ("+", _TEXT),
        "settings": ("+", _JSON),
        "created_at": ("+", _TIME),
    },
    "et_agents": {
        "id": ("!", _INTEGER),
        "tenant_id": ("!", _INTEGER),
        "name": ("!", _TEXT),
        "instructions": ("+", _TEXT),
        "decider": ("+", _TEXT),
        "model": ("", _TEXT),
        "settings": ("+", _JSON),
        "created_at": ("+", _TIME),
        "updated_at": ("+", _TIME),
    },
    "et_workspaces": {
        "id": ("!", _INTEGER),
        "tenant_id": ("!", _INTEGER),
        "name": ("!", _TEXT),
        "timezone": ("+", _TEXT),
        "agent_id": ("", _INTEGER),
        "created_at": ("+", _TIME),
    },
    "et_leads": {
        "id": ("!", _INTEGER),
        "tenant_id": ("!", _INTEGER),
        "workspace_id": ("", _INTEGER),
        "external_id": ("!", _TEXT),
        "kind": ("+", _TEXT),
        "name": ("", _TEXT),
        "timezone": ("", _TEXT),
        "tags": ("+", _ARRAY),
        "opted_out_at": ("", _TIME),
        "created_at": ("+", _TIME),
        "updated_at": ("+", _TIME),
    },
    "et_channel_sessions": {
        "id": ("!", _INTEGER),
        "tenant_id": ("!", _INTEGER),
        "channel_type": ("!", _TEXT),
        "session_identifier": ("!", _TEXT),
        "session_name": ("", _TEXT),
        "status": ("+", _TEXT),
        "status_reason": ("", _TEXT),
        "metadata": ("", _JSON),
        "created_at": ("+", _TIME),
        "updated_at": ("+", _TIME),
        "last_connected_at": ("", _TIME),
    },
}

UNIQUE: dict[str, list[tuple[str, ...]]] = {
    "et_tenants": [("id",)],
    "et_agents": [("id",)],
    "et_workspaces": [("id",)],
    "et_leads": [("id",), ("tenant_id", "external_id")],
    "et_channel_sessions": [("id",), ("tenant_id", "channel_type", "session_identifier")],
}

# (table, column, target): the row and its target must be of one tenant.
REFERENCES = [
    ("et_workspaces", "agent_id", "et_agents"),
    ("et_leads", "workspace_id", "et_workspaces"),
]

VALUES = [
    ("et_tenants", "status", "status IN ('active', 'suspended')", "'active' or 'suspended'"),
    ("et_agents", "decider", "decider IN ('rules', 'llm')", "'rules' or 'llm'"),
    ("et_leads", "kind", "kind IN ('person', 'group')", "'person' or 'group'"),
    ("et_leads", "external_id", "external_id <> ''", "not empty"),
    (
        "et_channel_sessions",
        "channel_type",
        "channel_type ~ '^[a-z][a-z0-9_]{1,31}$'",
        "lower-case letters, digits and _",
    ),
    (
        "et_channel_sessions",
        "status",
        "status IN ('pairing', 'connecting', 'active', 'disconnected', 'logged_out', 'suspended')",
        "pairing, connecting, active, disconnected, logged_out or suspended",
    ),
    ("et_channel_sessions", "session_identifier", "session_identifier <> ''", "not empty"),
]

# Tables that only these migrations make. One that is there without our record of it is somebody else's.
OWN = [
    "et_lead_identities", "et_lead_merges", "et_suppressions", "et_session_runtime", "et_session_leases",
    "et_session_credentials", "et_session_cursors", "et_gateways", "et_threads", "et_messages", "et_inbound_claims",
    "et_outbound_queue", "et_parked_receipts", "et_thread_insights", "et_decisions", "et_audit_log", "et_api_keys",
    "et_events", "et_db_roles", "et_legacy_threads",
]  # fmt: skip

SHOWN = 5


async def obstacles(conn: asyncpg.Connection[Any]) -> list[str]:
    """All of it at once, so that it can be mended in one go. Empty: migrate."""
    found: list[str] = []
    present = {
        row["name"]: row
        for row in await conn.fetch(
            """
            SELECT c.relname::TEXT AS name, c.relkind::TEXT AS kind, pg_get_userbyid(c.relowner)::TEXT AS owner,
                   pg_has_role(current_user, c.relowner, 'USAGE') AS ours
            FROM pg_class c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
              AND c.relname = ANY ($1)
            ORDER BY c.relname
            """,
            [*ADOPTED, *OWN],
        )
    }
    for name, row in present.items():
        if name in OWN:
            found.append(f"{name} exists but was not made by these migrations: rename or drop it")
        elif row["kind"] != "r":
            found.append(f"{name} is not a plain table")
        elif not row["ours"]:
            found.append(f"{name} belongs to {row['owner']}: ALTER TABLE {name} OWNER TO this login")
    readable = {name for name, row in present.items() if row["kind"] == "r" and row["ours"]}
    for table in ADOPTED:
        if table in readable:
            found += await _table(conn, table)
    for table, column, target in REFERENCES:
        if table in readable and (target in readable or target not in present):
            found += await _reference(conn, table, column, target)
    return found


async def _columns(conn: asyncpg.Connection[Any], table: str) -> dict[str, Any]:
    rows = await conn.fetch(
        """
        SELECT a.attname::TEXT AS name, format_type(a.atttypid, NULL) AS type, a.attnotnull AS not_null,
               a.atthasdef OR a.attidentity <> '' AS has_default,
               (SELECT array_agg(DISTINCT v.relname::TEXT)
                FROM pg_depend d
                JOIN pg_rewrite r ON r.oid = d.objid
                JOIN pg_class v ON v.oid = r.ev_class
                WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
                  AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum) AS views
        FROM pg_attribute a
        WHERE a.attrelid = to_regclass('public.' || $1) AND a.attnum > 0 AND NOT a.attisdropped
        """,
        table,
    )
    return {row["name"]: row for row in rows}


async def _table(conn: asyncpg.Connection[Any], table: str) -> list[str]:
    found: list[str] = []
    columns = await _columns(conn, table)
    sound: set[str] = set()
    for name, (need, types) in ADOPTED[table].items():
        column = columns.get(name)
        if column is None:
            if need == "!":
                found.append(f"{table} has no column {name}")
            continue
        if column["type"] not in types:
            found.append(f"{table}.{name} is {column['type']}, it must be {' or '.join(types)}")
            continue
        sound.add(name)
        if column["type"] == "timestamp without time zone" and column["views"]:
            found.append(
                f"{table}.{name} gets a time zone, but is used by {', '.join(column['views'])}: "
                "drop the view and make it again afterwards"
            )
        if need and not column["not_null"]:
            nulls = await conn.fetchval(f"SELECT count(*) FROM public.{table} WHERE {name} IS NULL")  # noqa: S608
            if nulls:
                found.append(f"{table}.{name} is NULL in {nulls} rows")
    for name, column in columns.items():
        if name not in ADOPTED[table] and column["not_null"] and not column["has_default"]:
            found.append(
                f"{table}.{name} must be given in every new row: "
                f"ALTER TABLE {table} ALTER COLUMN {name} DROP NOT NULL, or give it a default"
            )
    for key in UNIQUE[table]:
        if sound.issuperset(key):
            found += await _duplicates(conn, table, key)
    for subject, name, rule, allowed in VALUES:
        if subject == table and name in sound:
            wrong = await conn.fetch(
                f"SELECT DISTINCT {name}::TEXT FROM public.{table} WHERE NOT ({rule}) ORDER BY 1 LIMIT {SHOWN}"  # noqa: S608
            )
            if wrong:
                listed = ", ".join(repr(row[0]) for row in wrong)
                found.append(f"{table}.{name} holds {listed}; allowed is: {allowed}")
    if table != "et_tenants" and "tenant_id" in sound:
        found += await _orphans(conn, table)
    return found


async def _duplicates(conn: asyncpg.Connection[Any], table: str, key: tuple[str, ...]) -> list[str]:
    listed = ", ".join(key)
    rows = await conn.fetch(
        f"SELECT concat_ws(', ', {listed}) AS value, count(*) AS times FROM public.{table} "  # noqa: S608
        f"GROUP BY {listed} HAVING count(*) > 1 ORDER BY 1 LIMIT {SHOWN}"
    )
    if not rows:
        return []
    shown = "; ".join(f"({row['value']}) {row['times']} times" for row in rows)
    return [f"{table} has duplicates of ({listed}): {shown}"]


async def _orphans(conn: asyncpg.Connection[Any], table: str) -> list[str]:
    if await conn.fetchval("SELECT to_regclass('public.et_tenants') IS NULL"):
        # Its rows will be missing: the table is about to be made, empty.
        count = await conn.fetchval(f"SELECT count(*) FROM public.{table}")  # noqa: S608
    elif not await conn.fetchval(
        "SELECT has_table_privilege('public.et_tenants', 'SELECT')"
    ) or "id" not in await _columns(conn, "et_tenants"):
        return []  # said already
    else:
        count = await conn.fetchval(
            f"SELECT count(*) FROM public.{table} x WHERE x.tenant_id IS NOT NULL "  # noqa: S608
            "AND NOT EXISTS (SELECT 1 FROM public.et_tenants t WHERE t.id = x.tenant_id)"
        )
    return [f"{table}: {count} rows name a tenant that does not exist"] if count else []


async def _reference(conn: asyncpg.Connection[Any], table: str, column: str, target: str) -> list[str]:
    here = await _columns(conn, table)
    if column not in here or "tenant_id" not in here or here[column]["type"] not in _INTEGER:
        return []
    there = await _columns(conn, target)
    if there and not {"id", "tenant_id"} <= there.keys():
        return []
    missing = (
        "true"
        if not there
        else f"NOT EXISTS (SELECT 1 FROM public.{target} t WHERE t.id = x.{column} AND t.tenant_id = x.tenant_id)"  # noqa: S608
    )
    count = await conn.fetchval(
        f"SELECT count(*) FROM public.{table} x WHERE x.{column} IS NOT NULL AND {missing}"  # noqa: S608
    )
    if not count:
        return []
    return [f"{table}.{column}: {count} rows name a row of {target} that does not exist in their tenant"]
