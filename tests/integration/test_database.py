"""The database layer on a real server with a schema of two tables: roles, walls, errors, outages, notifications."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest

from core import ownership
from core.database import Database, is_transient, is_unavailable, open_owner
from core.errors import DatabaseError, DatabaseRoleError, DatabaseUnavailable, SettingsError
from tests.support.postgres import PostgresServer

ROLES = """
CREATE ROLE et_worker;
CREATE ROLE et_api;
GRANT et_worker, et_api TO gateway;
"""
TABLES = """
CREATE TABLE et_messages (tenant_id BIGINT NOT NULL, body TEXT, raw JSONB);
ALTER TABLE et_messages OWNER TO gateway;
ALTER TABLE et_messages ENABLE ROW LEVEL SECURITY;
ALTER TABLE et_messages FORCE ROW LEVEL SECURITY;
CREATE POLICY worker ON et_messages TO et_worker USING (true);
CREATE POLICY api ON et_messages TO et_api
    USING (tenant_id = nullif(current_setting('app.tenant_id', true), '')::BIGINT);
GRANT SELECT, INSERT ON et_messages TO et_worker, et_api;
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Roles belong to a whole server, and these tests bend them: a server of their own."""
    server = PostgresServer()
    try:
        server.start()
        server.superuser_sql(ROLES)
        yield server
    finally:
        server.close()


@pytest.fixture
def url(server: PostgresServer) -> Iterator[str]:
    url = server.create_database()
    server.superuser_sql(TABLES, url.split("?")[0].rsplit("/", 1)[-1])
    yield url
    server.drop_database(url)


@pytest.fixture
async def db(url: str) -> AsyncIterator[Database]:
    database = await Database.open(url)
    yield database
    await database.close()


@asynccontextmanager
async def outage_database(server: PostgresServer, **options: Any) -> AsyncIterator[Database]:
    """A database on a server that the test will kill or freeze."""
    server.superuser_sql(ROLES)
    url = server.create_database()
    server.superuser_sql(TABLES, url.split("?")[0].rsplit("/", 1)[-1])
    database = await Database.open(url, ping_seconds=0.2, **options)
    try:
        yield database
    finally:
        await database.close()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# ---- roles and walls ----


async def test_worker_sees_every_tenant_and_a_tenant_only_its_own(db: Database) -> None:
    async with db.worker() as conn:
        await conn.execute("INSERT INTO et_messages VALUES (1, 'one'), (2, 'two')")
        assert await conn.fetchval("SELECT current_user") == "et_worker"
        assert await conn.fetchval("SELECT count(*) FROM et_messages") == 2
    for tenant, body in ((1, "one"), (2, "two")):
        async with db.tenant(tenant) as conn:
            assert await conn.fetchval("SELECT current_user") == "et_api"
            assert [row["body"] for row in await conn.fetch("SELECT body FROM et_messages")] == [body]


async def test_tenant_cannot_write_another_tenants_row(db: Database) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with db.tenant(1) as conn:
            await conn.execute("INSERT INTO et_messages VALUES (2, 'intruder')")
    async with db.worker() as conn:
        assert await conn.fetchval("SELECT count(*) FROM et_messages") == 0


async def test_role_and_tenant_survive_reuse_of_connections_without_leaking(url: str) -> None:
    db = await Database.open(url, worker_connections=1, api_connections=1)
    try:
        async with db.worker() as conn:
            await conn.execute("INSERT INTO et_messages VALUES (1, 'one'), (2, 'two')")
        for tenant in (1, 2, 1):
            async with db.tenant(tenant) as conn:
                assert await conn.fetchval("SELECT tenant_id FROM et_messages") == tenant
        pool = db._api
        async with pool.acquire() as conn:  # the same connection, no tenant bound
            assert await conn.fetchval("SELECT current_user") == "et_api"
            assert await conn.fetchval("SELECT count(*) FROM et_messages") == 0
            async with conn.transaction():
                assert await conn.fetchval("SELECT count(*) FROM et_messages") == 0
        for _ in range(3):
            async with db.worker() as conn:
                assert await conn.fetchval("SELECT current_user") == "et_worker"
                await conn.execute("RESET ALL")  # asyncpg's own reset; it must not lead out of the role
                assert await conn.fetchval("SELECT current_user") == "et_worker"
    finally:
        await db.close()


async def test_a_tenants_queries_are_planned_for_the_values_they_have_however_often_they_run(
    url: str,
) -> None:
    """A list with filters that may be NULL: planned for any value it would read the whole table from the sixth call on."""
    db = await Database.open(url, api_connections=1)
    query = "SELECT 1 FROM pg_class WHERE ($1::oid IS NULL OR oid = $1)"
    try:
        async with db.tenant(1) as conn:
            for _ in range(10):
                await conn.fetch(query, None)
            plans = await conn.fetchrow(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1", query
            )
        assert tuple(plans) == (0, 10)
    finally:
        await db.close()


async def test_tenant_is_one_transaction_with_savepoints_inside(db: Database) -> None:
    async with db.tenant(1) as conn:
        await conn.execute("INSERT INTO et_messages VALUES (1, 'kept')")
        with suppress(asyncpg.InsufficientPrivilegeError):
            async with conn.transaction():
                await conn.execute("INSERT INTO et_messages VALUES (2, 'refused')")
        assert await conn.fetchval("SELECT current_setting('app.tenant_id')") == "1"
    with suppress(RuntimeError):
        async with db.tenant(1) as conn:
            await conn.execute("INSERT INTO et_messages VALUES (1, 'rolled back')")
            raise RuntimeError
    async with db.worker() as conn:
        assert [row["body"] for row in await conn.fetch("SELECT body FROM et_messages")] == ["kept"]


async def test_tenant_id_that_is_no_number_never_reaches_the_server(db: Database) -> None:
    bad: Any = "1'; RESET ROLE; --"
    with pytest.raises(TypeError):
        async with db.tenant(bad):
            raise AssertionError
    async with db.tenant(1) as conn:
        assert await conn.fetchval("SELECT current_user") == "et_api"


async def test_worker_connection_left_in_a_transaction_is_rolled_back(url: str) -> None:
    db = await Database.open(url, worker_connections=1)
    try:
        async with db.worker() as conn:
            await conn.execute("BEGIN; INSERT INTO et_messages VALUES (1, 'left open')")
        async with db.worker() as conn:
            assert await conn.fetchval("SELECT count(*) FROM et_messages") == 0
    finally:
        await db.close()


# ---- JSON ----


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ({"a": [1, None, "ü"]}, {"a": [1, None, "ü"]}),
        ("text", "text"),
        ({"nul": "a\0b", "k\0": 1}, {"nul": "a\ufffdb", "k\ufffd": 1}),
        ({"half": "x\ud83d"}, {"half": "x\ufffd"}),
        ({"literal": "\\u0000"}, {"literal": "\\u0000"}),
        ({1: 2}, {"1": 2}),
    ],
)
async def test_jsonb_goes_in_and_out_as_python_objects(db: Database, value: Any, stored: Any) -> None:
    async with db.worker() as conn:
        assert await conn.fetchval("SELECT $1::jsonb", value) == stored


async def test_integers_over_64_bits_keep_their_digits(db: Database) -> None:
    async with db.worker() as conn:
        assert await conn.fetchval("SELECT ($1::jsonb)->>'n'", {"n": 2**70}) == str(2**70)


# ---- what stands in the way at the start ----


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("mysql://u@h/d", "starts with"),
        ("postgresql://u@h:notaport/d", "DATABASE_URL"),
        ("postgresql:///d", "names no host"),
        ("postgresql://u@h", "names no database"),
        ("postgresql://u@/d?host=/nowhere/at/all", "nothing answers"),
        ("postgresql://u:hunter2@no-such-host.invalid/d", "unknown"),
    ],
)
async def test_wrong_url_is_one_clear_line_without_the_password(bad: str, words: str) -> None:
    with pytest.raises((SettingsError, DatabaseUnavailable)) as caught:
        await Database.open(bad, connect_seconds=5)
    text = str(caught.value)
    assert words in text
    assert "DATABASE_URL" in text
    assert "\n" not in text
    assert "hunter2" not in text


async def test_refused_port_says_where_nothing_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(DatabaseUnavailable, match=f"nothing answers at u@127.0.0.1:{port}"):
            await Database.open(f"postgresql://u:p@127.0.0.1:{port}/d")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
async def test_something_else_than_postgresql_is_named(reply: bytes) -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(reply)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(other, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises(DatabaseUnavailable, match="does not speak PostgreSQL"):
            await Database.open(f"postgresql://u:p@127.0.0.1:{port}/d", connect_seconds=5)
    finally:
        server.close()
        await server.wait_closed()


async def test_a_mute_server_is_given_up_after_the_time_limit() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        with pytest.raises(DatabaseUnavailable, match=r"within 0\.3 s"):
            await Database.open(f"postgresql://u:p@127.0.0.1:{port}/d", connect_seconds=0.3)


async def test_unknown_database_and_login_are_named(server: PostgresServer) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.*create it first"):
        await Database.open(server.url("nowhere"))
    with pytest.raises(SettingsError, match="refused the login"):
        await Database.open(server.url("postgres", "nobody_at_all"))


async def test_migrating_works_as_the_login_itself_and_refuses_a_superuser(
    server: PostgresServer, url: str
) -> None:
    async with open_owner(url) as conn:
        assert await conn.fetchval("SELECT current_user::text") == "gateway"
    with pytest.raises(DatabaseRoleError, match=r"postgres is a superuser.*CREATE ROLE"):
        async with open_owner(server.superuser_url(url)):
            raise AssertionError


async def test_missing_roles_say_to_migrate(private_postgres: PostgresServer) -> None:
    url = private_postgres.create_database()
    with pytest.raises(DatabaseRoleError, match=r"et_worker does not exist.*migrate"):
        await Database.open(url)


async def test_missing_schema_says_to_migrate(server: PostgresServer) -> None:
    url = server.create_database()
    try:
        with pytest.raises(DatabaseRoleError, match=r"schema is missing.*migrate"):
            await Database.open(url)
    finally:
        server.drop_database(url)


@pytest.mark.parametrize(
    ("bend", "mend", "words"),
    [
        ("ALTER ROLE et_api BYPASSRLS", "ALTER ROLE et_api NOBYPASSRLS", "et_api bypasses"),
        ("ALTER ROLE et_worker SUPERUSER", "ALTER ROLE et_worker NOSUPERUSER", "et_worker bypasses"),
        ("ALTER ROLE gateway BYPASSRLS", "ALTER ROLE gateway NOBYPASSRLS", "a role with BYPASSRLS"),
        ("ALTER ROLE gateway SUPERUSER", "ALTER ROLE gateway NOSUPERUSER", "is a superuser"),
        ("REVOKE et_api FROM gateway", "GRANT et_api TO gateway", "may not act as et_api: GRANT"),
        ("GRANT et_worker TO et_api", "REVOKE et_worker FROM et_api", "is a member of et_worker"),
    ],
)
async def test_roles_that_bypass_the_walls_are_refused(
    server: PostgresServer, url: str, bend: str, mend: str, words: str
) -> None:
    server.superuser_sql(bend)
    try:
        with pytest.raises(DatabaseRoleError, match=words):
            await Database.open(url)
    finally:
        server.superuser_sql(mend)
    await (await Database.open(url)).close()


async def test_table_without_forced_policies_is_named(server: PostgresServer, url: str) -> None:
    name = url.split("?")[0].rsplit("/", 1)[-1]
    server.superuser_sql("ALTER TABLE et_messages NO FORCE ROW LEVEL SECURITY", name)
    with pytest.raises(DatabaseRoleError, match="not forced on et_messages"):
        await Database.open(url)


async def test_login_that_does_not_wait_for_the_disk_is_refused(server: PostgresServer, url: str) -> None:
    server.superuser_sql("ALTER ROLE gateway SET synchronous_commit = off")
    try:
        with pytest.raises(DatabaseError, match="synchronous_commit = off"):
            await Database.open(url)
    finally:
        server.superuser_sql("ALTER ROLE gateway RESET synchronous_commit")


async def test_server_without_fsync_is_refused() -> None:
    server = PostgresServer("fsync=off")
    try:
        server.start()
        with pytest.raises(DatabaseError, match="fsync = off"):
            await Database.open(server.create_database())
    finally:
        server.close()


# ---- notifications ----


async def test_notification_wakes_its_own_channel_only(db: Database) -> None:
    inbound, outbound = db.hub.subscribe("et_inbound"), db.hub.subscribe("et_outbound")
    assert await inbound.wait(5)  # the LISTEN is in force: look once
    assert await outbound.wait(5)
    async with db.worker() as conn:
        await conn.execute("SELECT pg_notify('et_inbound', '')")
    assert await inbound.wait(5)
    assert not await outbound.wait(0.05)
    assert not await inbound.wait(0.05)  # many notifications, one wake-up; none left over


async def test_two_subscriptions_of_one_channel_are_both_woken_and_a_closed_one_is_not(db: Database) -> None:
    first, second, closed = (db.hub.subscribe("et_inbound") for _ in range(3))
    for subscription in (first, second, closed):
        assert await subscription.wait(5)
    closed.close()
    async with db.worker() as conn:
        await conn.execute("SELECT pg_notify('et_inbound', '')")
    assert await first.wait(5)
    assert await second.wait(5)
    assert not await closed.wait(0.05)


async def test_channel_name_is_checked(db: Database) -> None:
    with pytest.raises(ValueError, match="channel name"):
        db.hub.subscribe('x"; DROP TABLE et_messages; --')


async def test_hub_that_dies_is_noticed(db: Database) -> None:
    assert db.healthy
    assert db.hub._task is not None
    db.hub._task.cancel()
    await until(lambda: not db.healthy)
    assert not db.connected


# ---- outages ----


async def test_killed_server_comes_back_and_wakes_every_subscription(
    private_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with outage_database(private_postgres) as db:
        subscription = db.hub.subscribe("et_inbound")
        assert await subscription.wait(5)
        assert db.connected
        private_postgres.kill()
        await until(lambda: not db.connected)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            async with db.worker() as conn:
                await conn.fetchval("SELECT 1")
        assert is_unavailable(caught.value)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            async with db.tenant(1) as conn:
                await conn.fetchval("SELECT 1")
        assert is_unavailable(caught.value)
        await asyncio.to_thread(private_postgres.restart)
        assert await subscription.wait(10)  # whatever was missed meanwhile: look
        await until(lambda: db.connected)
        async with db.worker() as conn:
            await conn.execute("INSERT INTO et_messages VALUES (1, 'after')")
            await conn.execute("SELECT pg_notify('et_inbound', '')")
        assert await subscription.wait(5)
        async with db.tenant(1) as conn:
            assert await conn.fetchval("SELECT current_user") == "et_api"
    noise = [record for record in caplog.records if record.name.startswith("asyncpg")]
    assert noise == []  # no tracebacks of its own attempts either


async def test_statements_in_flight_during_a_kill_are_all_unavailable(
    private_postgres: PostgresServer,
) -> None:
    async with outage_database(private_postgres) as db:
        started = 0

        async def write(number: int) -> BaseException:
            nonlocal started
            try:
                while True:
                    async with db.worker() as conn:
                        started += 1
                        await conn.execute("INSERT INTO et_messages VALUES ($1, 'x')", number)
            except Exception as error:
                return error

        writers = [asyncio.create_task(write(number)) for number in range(8)]
        await until(lambda: started > 50)
        private_postgres.kill()
        async with asyncio.timeout(10):
            errors = await asyncio.gather(*writers)
        assert [error for error in errors if not is_unavailable(error)] == []


async def test_frozen_server_is_noticed_and_nothing_hangs(private_postgres: PostgresServer) -> None:
    async with outage_database(private_postgres, statement_seconds=0.5, connect_seconds=1) as db:
        db.hub._ping_timeout = 0.5
        private_postgres.freeze()
        try:
            await until(lambda: not db.connected)
            async with asyncio.timeout(15):
                with pytest.raises(Exception) as caught:  # noqa: PT011
                    async with db.worker() as conn:
                        await conn.fetchval("SELECT 1")
            assert is_unavailable(caught.value)
        finally:
            private_postgres.thaw()
        await until(lambda: db.connected)
        async with db.worker() as conn:
            assert await conn.fetchval("SELECT 1") == 1


async def test_statement_past_its_time_limit_is_cancelled_and_the_connection_still_good(url: str) -> None:
    db = await Database.open(url, worker_connections=1, statement_seconds=0.2)
    try:
        with pytest.raises(asyncpg.QueryCanceledError) as caught:
            async with db.worker() as conn:
                await conn.execute("SELECT pg_sleep(5)")
        assert is_unavailable(caught.value)
        async with db.worker() as conn:
            assert await conn.fetchval("SELECT 1") == 1
        await until(lambda: db.connected)
    finally:
        await db.close()


async def test_mistakes_are_not_taken_for_an_outage(db: Database) -> None:
    errors: list[BaseException] = []
    for statement, arguments in (
        ("SELECT nonsense", ()),
        ("SELECT 1 / 0", ()),
        ("SELECT $1::int", ("not a number",)),
        ("INSERT INTO et_messages VALUES (NULL)", ()),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            async with db.worker() as conn:
                await conn.fetchval(statement, *arguments)
        errors.append(caught.value)
    assert [error for error in errors if is_unavailable(error) or is_transient(error)] == []
    assert db.connected
    assert is_transient(asyncpg.DeadlockDetectedError("x"))
    assert not is_unavailable(asyncpg.DeadlockDetectedError("x"))


async def test_close_does_not_wait_for_ever_and_may_be_repeated(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.database.CLOSE_SECONDS", 0.2)
    db = await Database.open(url)
    held = asyncio.Event()

    async def hold() -> None:
        with suppress(Exception):
            async with db.worker() as conn:
                held.set()
                await conn.execute("SELECT pg_sleep(20)")

    task = asyncio.create_task(hold())
    await held.wait()
    async with asyncio.timeout(5):
        await db.close()
        await task
        await db.close()


async def test_a_stopped_gateway_holds_no_rows_past_its_leases(database: Database) -> None:
    """Whoever takes its sessions over would wait for its open transaction."""
    async with database.worker() as conn:
        seconds = await conn.fetchval(
            "SELECT extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::INTERVAL)"
        )
    assert 0 < seconds < ownership.TTL
