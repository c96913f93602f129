"""Brings a database to this program's schema: `schema/*.sql` in order, each once, all or nothing.

Never changes a file that was applied, and never starts when something stands in the way: that is listed instead.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from core import log as logs
from core.database import connect
from core.errors import DatabaseRoleError, MigrationError
from core.preflight import obstacles

log = logs.get(part="migrate")

# Any number that nothing else takes: the lock is this program's own.
ADVISORY_LOCK = 7_301_945_512
# Two gateways that start together: the second waits for the first, not for ever.
LOCK_SECONDS = 120
MINIMUM_SERVER = 150000

_NAME = re.compile(r"^(\d{3})_([a-z0-9_]+)\.sql$")


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. `checksum` is the SHA-256 of its bytes, in hex."""

    version: int
    name: str
    sql: str
    checksum: str


def schema_directory() -> Path:
    """The folder of SQL files: beside `core` in the source tree, and there as well in an installed wheel."""
    folder = Path(__file__).resolve().parent.parent / "schema"
    if not any(folder.glob("*.sql")):
        raise MigrationError(f"no SQL files in {folder}: the installation is incomplete, install it again")
    return folder


def read_migrations(directory: Path) -> list[Migration]:
    """The numbered files of a folder in order. Raises MigrationError for two with one number."""
    found: dict[int, Migration] = {}
    for path in sorted(directory.glob("*.sql")):
        match = _NAME.match(path.name)
        if match is None:
            raise MigrationError(f"{path.name}: a migration is named like 001_tables.sql")
        version = int(match[1])
        if version in found:
            raise MigrationError(f"{found[version].name} and {path.name} have the same number")
        content = path.read_bytes()
        found[version] = Migration(version, path.name, content.decode(), hashlib.sha256(content).hexdigest())
    return [found[version] for version in sorted(found)]


async def migrate(target: asyncpg.Connection[Any] | str, directory: Path | None = None) -> list[str]:
    """Apply what is missing, in one transaction, and return the names of the files applied (none: up to date).

    `target` is a connection of the login that owns the schema, or a database URL. Raises MigrationError when an applied
    file was edited, when the database is newer than the program, or with the list of what stands in the way;
    DatabaseRoleError with the SQL for an administrator when the roles cannot be made.
    """
    if isinstance(target, str):
        conn = await connect(target)
        try:
            return await migrate(conn, directory)
        finally:
            await conn.close(timeout=5)
    migrations = read_migrations(directory or schema_directory())
    if await target.fetchval("SELECT current_setting('server_version_num')::INT") < MINIMUM_SERVER:
        raise MigrationError("the server is older than PostgreSQL 15: use 15 or newer")
    try:
        async with target.transaction():
            return await _apply(target, migrations)
    except asyncpg.LockNotAvailableError as error:
        raise MigrationError(
            f"another migration of this database has not ended within {LOCK_SECONDS} s: "
            "look for it in pg_stat_activity, then start again"
        ) from error


async def _apply(conn: asyncpg.Connection[Any], migrations: list[Migration]) -> list[str]:
    await conn.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
    await conn.execute("SET LOCAL statement_timeout = 0")
    # Names without a schema mean public, whatever the login's own search_path says.
    await conn.execute("SET LOCAL search_path = public, pg_catalog")
    await conn.execute("SET LOCAL client_min_messages = warning")
    await conn.execute("SELECT pg_advisory_xact_lock($1)", ADVISORY_LOCK)
    login = await conn.fetchval("SELECT current_user::TEXT")
    try:
        await conn.execute(
            """
            CREATE TABLE IF NOT EXISTS et_schema_migrations (
                version    INTEGER PRIMARY KEY,
                name       TEXT NOT NULL,
                checksum   TEXT NOT NULL,
                applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
            )
            """
        )
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationError(
            f"the login {login} may not create tables in this database's schema public: "
            f'make it the owner, ALTER DATABASE … OWNER TO "{login}"; ALTER SCHEMA public OWNER TO "{login}"'
        ) from error
    applied = {
        row["version"]: row
        for row in await conn.fetch("SELECT version, name, checksum FROM et_schema_migrations")
    }
    _compare(migrations, applied)
    pending = [m for m in migrations if m.version not in applied]
    if pending and not applied:
        found = await obstacles(conn)
        if found:
            listed = "\n".join(f"  - {line}" for line in found)
            raise MigrationError(f"the database cannot be migrated as it is; nothing was changed:\n{listed}")
    for migration in pending:
        await _run(conn, migration)
    for migration in pending:
        log.info("migration.applied", name=migration.name)
    return [m.name for m in pending]


def _compare(migrations: list[Migration], applied: dict[int, Any]) -> None:
    known = {m.version: m for m in migrations}
    for version, row in sorted(applied.items()):
        migration = known.get(version)
        if migration is None:
            raise MigrationError(
                f"the database has {row['name']}, which this program does not know: it is newer, update the program"
            )
        if migration.checksum != row["checksum"]:
            raise MigrationError(
                f"{migration.name} was changed after it had been applied: restore the file and put the change "
                "into a new one with the next number"
            )


async def _run(conn: asyncpg.Connection[Any], migration: Migration) -> None:
    try:
        await conn.execute(migration.sql)
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseRoleError(f"{migration.name}: {_sentence(error)}") from error
    except asyncpg.PostgresError as error:
        raise MigrationError(f"{migration.name}: {_sentence(error)}; nothing was changed") from error
    await conn.execute(
        "INSERT INTO et_schema_migrations (version, name, checksum) VALUES ($1, $2, $3)",
        migration.version,
        migration.name,
        migration.checksum,
    )


def _sentence(error: asyncpg.PostgresError) -> str:
    hint = getattr(error, "hint", None)
    return f"{error.args[0]}. {hint}" if hint else str(error.args[0])
