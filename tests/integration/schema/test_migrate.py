"""Applying the schema: once, together, on an empty database, and never over an edited file."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import asyncpg
import pytest

from core.errors import DatabaseRoleError, MigrationError
from core.migrate import migrate, read_migrations, schema_directory
from tests.support.postgres import PostgresServer


async def test_every_file_is_applied_once_and_recorded(database_url: str) -> None:
    names = [path.name for path in sorted(schema_directory().glob("*.sql"))]
    assert await migrate(database_url) == names
    assert await migrate(database_url) == []
    conn = await asyncpg.connect(database_url)
    rows = await conn.fetch("SELECT name, checksum FROM et_schema_migrations ORDER BY version")
    await conn.close()
    assert [(r["name"], r["checksum"]) for r in rows] == [
        (m.name, m.checksum) for m in read_migrations(schema_directory())
    ]


async def test_every_file_is_idempotent(migrated_url: str) -> None:
    conn = await asyncpg.connect(migrated_url)
    for migration in read_migrations(schema_directory()):
        await conn.execute(migration.sql)
    await conn.close()


async def test_the_login_is_no_superuser(database_url: str) -> None:
    conn = await asyncpg.connect(database_url)
    row = await conn.fetchrow("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
    await conn.close()
    assert (row[0], row[1]) == (False, False)


async def test_two_starters_apply_everything_once(database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(database_url) for _ in range(3)))
    assert sorted(map(len, applied)) == [0, 0, len(read_migrations(schema_directory()))]


async def test_two_databases_of_one_server_migrate_at_the_same_time(private_postgres: PostgresServer) -> None:
    urls = [private_postgres.create_database() for _ in range(3)]
    applied = await asyncio.gather(*(migrate(url) for url in urls))
    assert all(applied)


async def test_an_edited_file_is_named(database_url: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(schema_directory(), tmp_path / "schema"))
    await migrate(database_url, folder)
    with (folder / "003_indexes.sql").open("a") as file:
        file.write("-- one more thought\n")
    with pytest.raises(MigrationError, match=r"003_indexes\.sql was changed"):
        await migrate(database_url, folder)


async def test_a_newer_database_is_refused(database_url: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(schema_directory(), tmp_path / "schema"))
    (folder / "099_future.sql").write_text("SELECT 1;")
    await migrate(database_url, folder)
    with pytest.raises(MigrationError, match=r"099_future\.sql.*newer"):
        await migrate(database_url)


async def test_a_failing_file_leaves_nothing_behind(database_url: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(schema_directory(), tmp_path / "schema"))
    (folder / "099_broken.sql").write_text("CREATE TABLE et_x (id INT); SELECT nonsense;")
    with pytest.raises(MigrationError, match=r"099_broken\.sql.*nothing was changed"):
        await migrate(database_url, folder)
    conn = await asyncpg.connect(database_url)
    assert await conn.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await conn.close()


async def test_two_files_with_one_number_are_refused(tmp_path: Path) -> None:
    (tmp_path / "001_a.sql").write_text("SELECT 1;")
    (tmp_path / "001_b.sql").write_text("SELECT 1;")
    with pytest.raises(MigrationError, match="same number"):
        read_migrations(tmp_path)


async def test_a_login_that_may_not_create_roles_gets_the_script(private_postgres: PostgresServer) -> None:
    private_postgres.superuser_sql("CREATE ROLE plain LOGIN;")
    name = private_postgres.create_database().split("?")[0].rsplit("/", 1)[-1]
    private_postgres.superuser_sql(f"ALTER DATABASE {name} OWNER TO plain;")
    private_postgres.superuser_sql("ALTER SCHEMA public OWNER TO plain;", name)
    url = private_postgres.url(name, "plain")
    with pytest.raises(DatabaseRoleError, match="CREATE ROLE et_worker NOLOGIN") as caught:
        await migrate(url)
    script = str(caught.value).split("must run:", 1)[1]
    private_postgres.superuser_sql(script)
    assert await migrate(url)


async def test_a_login_that_owns_nothing_is_told_what_to_do(private_postgres: PostgresServer) -> None:
    private_postgres.superuser_sql("CREATE ROLE guest LOGIN;")
    name = private_postgres.create_database().split("?")[0].rsplit("/", 1)[-1]
    with pytest.raises(MigrationError, match="may not create tables"):
        await migrate(private_postgres.url(name, "guest"))


async def test_every_tenant_owned_table_is_walled_and_leads_to_its_tenant(migrated_url: str) -> None:
    conn = await asyncpg.connect(migrated_url)
    rows = await conn.fetch(
        """
        SELECT c.relname, c.relrowsecurity AND c.relforcerowsecurity AS walled,
               EXISTS (SELECT 1 FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'f'
                       AND k.confrelid = 'et_tenants'::regclass AND k.confdeltype = 'c') AS owned
        FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id'
        WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
        """
    )
    await conn.close()
    assert len(rows) > 20
    assert [r["relname"] for r in rows if not (r["walled"] and r["owned"])] == []


async def test_functions_are_closed_to_the_public_and_definers_have_a_fixed_path(migrated_url: str) -> None:
    conn = await asyncpg.connect(migrated_url)
    rows = await conn.fetch(
        """
        SELECT p.proname, has_function_privilege('public', p.oid, 'EXECUTE') AS open,
               p.prosecdef AND NOT coalesce(p.proconfig::TEXT LIKE '%search_path=pg_catalog, pg_temp%', false) AS loose
        FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace
        """
    )
    await conn.close()
    assert len(rows) > 20
    assert [r["proname"] for r in rows if r["open"] or r["loose"]] == []
