"""Administration without HTTP: tenants, keys and sessions as rows, for the person who runs the server.

Speaks to the database alone; a running gateway sees the rows and acts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from core.channel import SessionId, TenantId
from core.database import Database, open_owner
from core.embedded import EmbeddedPostgres, running_url
from core.errors import NotFound
from core.legacy import LegacyCounts, migrate_legacy
from core.migrate import migrate
from core.settings import Settings
from core.store import audit, keys, sessions, tenants
from gateway.api.auth import new_key

PAGE = 200
ACTOR = "operator"


@asynccontextmanager
async def database_url(settings: Settings) -> AsyncIterator[str]:
    """`DATABASE_URL`, else the embedded server: the one a gateway runs just now, or one for the length of this command."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    folder = settings.data_dir.resolve() / "postgres"
    url = running_url(folder)
    if url is not None:
        yield url
        return
    embedded = EmbeddedPostgres(folder)
    try:
        yield await embedded.start()
    finally:
        await embedded.stop()


@asynccontextmanager
async def database(settings: Settings) -> AsyncIterator[Database]:
    """The migrated database, open for one command."""
    async with database_url(settings) as url:
        async with open_owner(url) as owner:
            await migrate(owner)
        opened = await Database.open(url, application_name="channel-gateway cli")
        try:
            yield opened
        finally:
            await opened.close()


async def apply_migrations(settings: Settings) -> list[str]:
    """The names of the files applied now."""
    async with database_url(settings) as url, open_owner(url) as owner:
        return await migrate(owner)


async def copy_legacy(settings: Settings) -> LegacyCounts:
    """Copy the legacy tables' conversations as history, after migrating."""
    async with database_url(settings) as url, open_owner(url) as owner:
        await migrate(owner)
        return await migrate_legacy(owner)


async def create_tenant(settings: Settings, name: str) -> int:
    async with database(settings) as db, db.worker() as conn:
        row = await tenants.create_tenant(conn, name, {})
        return int(row["id"])


async def list_tenants(settings: Settings) -> list[dict[str, Any]]:
    async with database(settings) as db, db.worker() as conn:
        return [dict(row) for row in await tenants.list_tenants(conn, None, PAGE)]


async def create_key(settings: Settings, tenant_id: int | None, name: str, scopes: list[str]) -> str:
    """The key itself: shown this once, only its hash is stored."""
    async with database(settings) as db, db.worker() as conn, conn.transaction():
        if tenant_id is not None and await tenants.status(conn, tenant_id) is None:
            raise NotFound(f"there is no tenant {tenant_id}: see `python -m gateway tenant list`")
        key, prefix, key_hash = new_key()
        row = await keys.create(
            conn,
            tenant_id=tenant_id,
            name=name,
            prefix=prefix,
            key_hash=key_hash,
            scopes=scopes,
            expires_at=None,
        )
        await audit.write(
            conn, "key_created", tenant_id=tenant_id, actor=ACTOR, subject_type="key", subject_id=row["id"]
        )
        return key


async def list_keys(settings: Settings, tenant_id: int | None) -> list[dict[str, Any]]:
    """The keys of one tenant; without one, of the platform."""
    async with database(settings) as db, db.worker() as conn:
        rows = await keys.listed(
            conn, tenant_id=tenant_id, after=None, limit=PAGE, platform=tenant_id is None
        )
        return [dict(row) for row in rows]


async def revoke_key(settings: Settings, key_id: int) -> None:
    async with database(settings) as db, db.worker() as conn, conn.transaction():
        row = await keys.revoke(conn, key_id)
        if row is None:
            raise NotFound(f"there is no key {key_id}: see `python -m gateway key list`")
        await audit.write(
            conn,
            "key_revoked",
            tenant_id=row["tenant_id"],
            actor=ACTOR,
            subject_type="key",
            subject_id=key_id,
        )


async def list_sessions(settings: Settings, tenant_id: int) -> list[sessions.SessionRow]:
    async with database(settings) as db, db.worker() as conn:
        return await sessions.list_all(conn, TenantId(tenant_id))


async def want_session(settings: Settings, session_id: int, wanted: sessions.Wanted) -> None:
    async with database(settings) as db, db.worker() as conn:
        await sessions.want(conn, SessionId(session_id), wanted)
