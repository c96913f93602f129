"""No tenant sees or touches another's rows, whatever SQL is sent and whatever is set."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from tests.support.postgres import PostgresServer

REFUSED = (asyncpg.InsufficientPrivilegeError,)
# Tables in which the fixture puts rows of both tenants. Later migrations may bring more tables; those must be walled too.
FURNISHED = {
    "et_tenants", "et_agents", "et_workspaces", "et_leads", "et_lead_identities", "et_lead_merges", "et_suppressions",
    "et_channel_sessions", "et_session_runtime", "et_session_leases", "et_session_credentials", "et_session_cursors",
    "et_threads", "et_messages", "et_inbound_claims", "et_outbound_queue", "et_parked_receipts", "et_thread_insights",
    "et_decisions", "et_audit_log", "et_api_keys", "et_events",
}  # fmt: skip
SEND = "SELECT * FROM et_enqueue_outbound($1, $2, '+60111222333', 'hi', 'text', NULL, NULL)"


@pytest.fixture
async def furnished(world: Any) -> Any:
    """Rows of both tenants in the tables that hold secrets and conversations."""
    for tenant in (world.a, world.b):
        message = await world.inbound(tenant, "m1")
        thread = await world.owner.fetchval("SELECT thread_id FROM et_messages WHERE id = $1", message)
        await world.enqueue(tenant)
        own = {
            "et_agents": "(tenant_id, name) VALUES ($1, 'x')",
            "et_workspaces": "(tenant_id, name) VALUES ($1, 'x')",
            "et_api_keys": "(tenant_id, name, prefix, key_hash)"
            " VALUES ($1, 'x', 'p' || $1::BIGINT, sha256($1::BIGINT::TEXT::BYTEA))",
            "et_audit_log": "(tenant_id, event) VALUES ($1, 'access_denied')",
            "et_suppressions": "(tenant_id, identity_hash, reason) VALUES ($1, '\\x00', 'erased')",
        }
        for table, rest in own.items():
            await world.owner.execute(f"INSERT INTO {table} {rest}", tenant.id)
        of_session = {
            "et_session_runtime": "(tenant_id, session_id) VALUES ($1, $2)",
            "et_session_leases": "(tenant_id, session_id, owner, expires_at) VALUES ($1, $2, 'g', now())",
            "et_session_credentials": "(tenant_id, session_id, ciphertext, key_id) VALUES ($1, $2, '\\x00', 'k')",
            "et_session_cursors": "(tenant_id, session_id, name, value) VALUES ($1, $2, 'c', '{}')",
            "et_parked_receipts": "(tenant_id, channel_session_id, channel_message_id, status) VALUES ($1, $2, 'x', 'read')",
        }
        for table, rest in of_session.items():
            await world.owner.execute(f"INSERT INTO {table} {rest}", tenant.id, tenant.session)
        await world.owner.execute(
            "INSERT INTO et_lead_merges (tenant_id, old_id, new_id) VALUES ($1, 999, $2)",
            tenant.id,
            tenant.lead,
        )
        await world.owner.execute(
            "INSERT INTO et_decisions (tenant_id, message_id, thread_id, action) VALUES ($1, $2, $3, 'ignore')",
            tenant.id, message, thread,
        )  # fmt: skip
        await world.owner.execute(
            "INSERT INTO et_thread_insights (tenant_id, thread_id, lead_id) VALUES ($1, $2, $3)",
            tenant.id,
            thread,
            tenant.lead,
        )
        await world.owner.execute(
            "INSERT INTO et_inbound_claims (tenant_id, message_id, thread_id, owner, expires_at) "
            "VALUES ($1, $2, $3, 'w', now())",
            tenant.id, message, thread,
        )  # fmt: skip
    await world.owner.execute("INSERT INTO et_db_roles (role, tenant_id) VALUES ('somebody', $1)", world.b.id)
    return world


async def tables(world: Any) -> list[tuple[str, str]]:
    rows = await world.owner.fetch(
        "SELECT c.relname, CASE WHEN c.relname = 'et_tenants' THEN 'id' ELSE 'tenant_id' END FROM pg_class c "
        "WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace "
        "AND (c.relname = 'et_tenants' OR EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = "
        "c.oid AND a.attname = 'tenant_id')) "
        "ORDER BY 1"
    )
    return [(r[0], r[1]) for r in rows]


async def seen(world: Any, conn: asyncpg.Connection[Any]) -> dict[str, set[int]]:
    """Which tenants' rows each readable table shows on this connection."""
    shown: dict[str, set[int]] = {}
    for table, column in await tables(world):
        try:
            shown[table] = {r[0] for r in await conn.fetch(f"SELECT DISTINCT {column} FROM {table}")}
        except REFUSED:
            continue
    return shown


async def test_every_table_has_rows_of_both_tenants_to_be_found(furnished: Any) -> None:
    shown = await seen(furnished, furnished.owner)
    both = {furnished.a.id, furnished.b.id}
    assert {t for t in FURNISHED if not shown[t] >= both} == set()


async def test_the_worker_sees_every_tenant(furnished: Any) -> None:
    worker = await furnished.connect(role="et_worker")
    assert await seen(furnished, worker) == await seen(furnished, furnished.owner)
    assert await worker.fetchrow(SEND, furnished.b.id, furnished.b.session)


async def test_the_api_sees_its_own_tenant_alone(furnished: Any) -> None:
    api = await furnished.connect(role="et_api")
    await api.execute("SELECT set_config('app.tenant_id', $1, false)", str(furnished.a.id))
    shown = await seen(furnished, api)
    assert {t: ids for t, ids in shown.items() if not ids <= {furnished.a.id}} == {}
    assert {t for t in FURNISHED & shown.keys() if not shown[t]} == set()
    assert {"et_messages", "et_leads", "et_outbound_queue", "et_events", "et_audit_log"} <= shown.keys()
    assert not shown.keys() & {
        "et_session_credentials",
        "et_db_roles",
        "et_inbound_claims",
        "et_session_cursors",
    }


@pytest.mark.parametrize("setting", [None, ""])
async def test_the_api_without_a_tenant_sees_nothing(furnished: Any, setting: str | None) -> None:
    api = await furnished.connect(role="et_api")
    if setting is not None:
        await api.execute("SELECT set_config('app.tenant_id', $1, false)", setting)
    shown = await seen(furnished, api)
    assert len(shown) > 10
    assert {t: ids for t, ids in shown.items() if ids} == {}
    with pytest.raises(REFUSED):
        await api.fetchrow(SEND, furnished.a.id, furnished.a.session)


async def test_the_api_writes_in_its_own_tenant_alone(furnished: Any) -> None:
    a, b = furnished.a, furnished.b
    api = await furnished.connect(role="et_api")
    await api.execute("SELECT set_config('app.tenant_id', $1, false)", str(a.id))
    assert await api.fetchrow(SEND, a.id, a.session)
    with pytest.raises(REFUSED):
        await api.fetchrow(SEND, b.id, b.session)
    with pytest.raises(REFUSED):
        await api.execute("INSERT INTO et_agents (tenant_id, name) VALUES ($1, 'spy')", b.id)
    with pytest.raises(REFUSED):
        await api.execute("UPDATE et_threads SET tenant_id = $1", b.id)
    for table in ("et_messages", "et_leads", "et_threads", "et_outbound_queue", "et_channel_sessions"):
        assert await api.execute(f"DELETE FROM {table} WHERE tenant_id = $1", b.id) == "DELETE 0"
    theirs = await furnished.owner.fetchval("SELECT id FROM et_outbound_queue WHERE tenant_id = $1", b.id)
    await furnished.move(theirs, "failed")
    with pytest.raises(asyncpg.NoDataFoundError):
        await api.execute("SELECT et_retry_outbound($1)", theirs)
    with pytest.raises(REFUSED):
        await api.execute("SELECT et_merge_leads($1, $2, $3)", b.id, b.lead, b.other_lead)
    with pytest.raises(asyncpg.NoDataFoundError):
        await api.execute("SELECT et_merge_leads($1, $2, $3)", a.id, a.lead, b.other_lead)
    for call in (
        "et_claim_inbound('x')",
        "et_release_inbound()",
        "et_prune_events()",
        "et_apply_parked_receipts()",
    ):
        with pytest.raises(REFUSED):
            await api.execute(f"SELECT {call}")


async def test_the_api_never_reads_a_key_hash(furnished: Any) -> None:
    api = await furnished.connect(role="et_api")
    await api.execute("SELECT set_config('app.tenant_id', $1, false)", str(furnished.a.id))
    assert await api.fetchval("SELECT prefix FROM et_api_keys") == f"p{furnished.a.id}"
    for what in ("key_hash", "*"):
        with pytest.raises(REFUSED):
            await api.fetch(f"SELECT {what} FROM et_api_keys")
    await api.execute(
        "INSERT INTO et_api_keys (tenant_id, name, prefix, key_hash) VALUES ($1, 'n', 'q', '\\x01')",
        furnished.a.id,
    )


# --- a backend's login ---

ATTACKS = [
    "SET ROLE et_worker",
    "SET ROLE et_api",
    "SET ROLE gateway",
    "SET SESSION AUTHORIZATION gateway",
    "SELECT set_config('role', 'et_worker', false)",
    "ALTER TABLE et_messages DISABLE ROW LEVEL SECURITY",
    "DROP POLICY et_backend_reads ON et_messages",
    "CREATE POLICY spy ON et_messages TO et_backend USING (true)",
    "GRANT et_worker TO CURRENT_USER",
    "INSERT INTO et_db_roles (role) VALUES (session_user)",
    "UPDATE et_db_roles SET tenant_id = NULL",
    "SELECT * FROM et_session_credentials",
    "SELECT * FROM et_session_runtime",
    "SELECT * FROM et_session_leases",
    "SELECT name FROM et_api_keys",
    "SELECT * FROM et_audit_log",
    "SELECT * FROM et_db_roles",
    "SELECT * FROM et_gateways",
    "SELECT * FROM et_lead_merges",
    "SELECT et_retry_outbound(1)",
    "SELECT et_claim_inbound('x')",
    "SELECT et_release_inbound()",
    "SELECT et_merge_leads(1, 1, 2)",
    "SELECT et_find_or_create_lead(1, 'whatsapp:+1', 1)",
    "SELECT et_may_act(1)",
    "UPDATE et_messages SET content = 'x'",
    "UPDATE et_outbound_queue SET status = 'sent'",
    "DELETE FROM et_messages",
    "TRUNCATE et_messages CASCADE",
    "INSERT INTO et_leads (tenant_id, external_id) VALUES (1, 'x')",
    "INSERT INTO et_threads (tenant_id, lead_id, channel, channel_session_id) VALUES (1, 1, 'whatsapp', 1)",
    "UPDATE et_channel_sessions SET status = 'active'",
    "CREATE TABLE spy (x INT)",
]


@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_backend_gets_through_no_wall(furnished: Any, backend_url: str, attack: str) -> None:
    conn = await furnished.connect(backend_url)
    # GRANT by a member without the admin option is an error of another class before PostgreSQL 16.
    with pytest.raises((*REFUSED, asyncpg.InvalidGrantOperationError)):
        await conn.execute(attack)


@pytest.mark.parametrize("setting", ["none", "theirs", "set role"])
async def test_a_backend_sees_its_own_tenant_alone_whatever_it_sets(
    furnished: Any, backend_url: str, setting: str
) -> None:
    conn = await furnished.connect(backend_url)
    if setting == "theirs":
        await conn.execute("SELECT set_config('app.tenant_id', $1, false)", str(furnished.b.id))
    elif setting == "set role":
        await conn.execute("SET ROLE et_backend")
    shown = await seen(furnished, conn)
    assert {t: ids for t, ids in shown.items() if ids != {furnished.a.id}} == {}
    assert shown.keys() == {
        "et_tenants", "et_agents", "et_workspaces", "et_leads", "et_lead_identities", "et_channel_sessions", "et_threads",
        "et_messages", "et_outbound_queue", "et_thread_insights", "et_decisions", "et_events",
    }  # fmt: skip


async def test_a_backend_sends_for_its_own_tenant_alone(furnished: Any, backend_url: str) -> None:
    a, b = furnished.a, furnished.b
    conn = await furnished.connect(backend_url)
    await conn.execute("SELECT set_config('app.tenant_id', $1, false)", str(b.id))
    assert await conn.fetchrow(SEND, a.id, a.session)
    for tenant, session in ((b.id, b.session), (b.id, a.session)):
        with pytest.raises(REFUSED, match="may not send for tenant"):
            await conn.fetchrow(SEND, tenant, session)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await conn.fetchrow(SEND, a.id, b.session)

    message = (
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction, delivery_status, content) "
        "VALUES ($1, $2, $3, $4, $5, 'hi') RETURNING id"
    )
    async with conn.transaction():
        own = await conn.fetchval(message, a.id, a.lead, a.session, "outbound", "queued")
        await conn.execute("INSERT INTO et_outbound_queue (message_id) VALUES ($1)", own)
    for row in (
        (b.id, b.lead, b.session, "outbound", "queued"),
        (a.id, a.lead, a.session, "inbound", "received"),
        (a.id, a.lead, a.session, "outbound", "sent"),
    ):
        with pytest.raises(REFUSED):
            await conn.fetchval(message, *row)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await conn.fetchval(message, a.id, b.lead, a.session, "outbound", "queued")
    theirs = await furnished.owner.fetchval(
        "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, direction) VALUES ($1, $2, "
        "$3, 'outbound') RETURNING id",
        b.id, b.lead, b.session,
    )  # fmt: skip
    with pytest.raises(REFUSED):
        await conn.execute("INSERT INTO et_outbound_queue (message_id) VALUES ($1)", theirs)
    for column, value in (("claim_epoch", "5"), ("claimed_by", "'me'"), ("id", "1")):
        with pytest.raises(REFUSED):
            await conn.execute(
                f"INSERT INTO et_outbound_queue (message_id, {column}) VALUES ($1, {value})", own
            )
    with pytest.raises(REFUSED):
        await conn.execute(
            "INSERT INTO et_messages (id, tenant_id, lead_id, channel_session_id, direction) VALUES "
            "(5, $1, $2, $3, 'outbound')",
            a.id, a.lead, a.session,
        )  # fmt: skip


async def test_a_backend_can_listen(furnished: Any, backend_url: str) -> None:
    conn = await furnished.connect(backend_url)
    await conn.execute("LISTEN et_events")


async def test_a_login_that_nobody_named_sees_nothing(
    furnished: Any, postgres_server: PostgresServer
) -> None:
    name = furnished.url.split("?")[0].rsplit("/", 1)[-1]
    postgres_server.superuser_sql(f"CREATE ROLE nobody_{name} LOGIN; GRANT et_backend TO nobody_{name};")
    conn = await furnished.connect(postgres_server.url(name, f"nobody_{name}"))
    shown = await seen(furnished, conn)
    assert shown
    assert {t: ids for t, ids in shown.items() if ids} == {}
    with pytest.raises(REFUSED):
        await conn.fetchrow(SEND, furnished.a.id, furnished.a.session)


async def test_a_platform_backend_sees_every_tenant(
    furnished: Any, backend_url: str, postgres_server: PostgresServer
) -> None:
    await furnished.owner.execute("UPDATE et_db_roles SET tenant_id = NULL WHERE role LIKE 'backend%'")
    conn = await furnished.connect(backend_url)
    shown = await seen(furnished, conn)
    assert shown["et_messages"] >= {furnished.a.id, furnished.b.id}
    assert await conn.fetchrow(SEND, furnished.b.id, furnished.b.session)


async def test_a_members_own_function_cannot_pose_as_ours(furnished: Any, backend_url: str) -> None:
    """A search path that starts with the backend's own objects changes nothing inside our functions."""
    conn = await furnished.connect(backend_url)
    await conn.execute("CREATE TEMP TABLE et_db_roles (role TEXT, tenant_id BIGINT)")
    await conn.execute("INSERT INTO pg_temp.et_db_roles VALUES (session_user, NULL)")
    await conn.execute("SET search_path = pg_temp, public")
    assert {r[0] for r in await conn.fetch("SELECT tenant_id FROM public.et_messages")} == {furnished.a.id}
    with pytest.raises(REFUSED):
        await conn.fetchrow(SEND, furnished.b.id, furnished.b.session)
