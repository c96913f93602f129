"""Administration without HTTP: tenants, keys and sessions as rows, for the person who runs the server.

Speaks to the database alone; a running gateway sees the rows and acts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from core import log_in
from core.channel import ChannelKind, Json, SessionId, SessionStatus, TenantId
from core.database import Database, open_owner
from core.embedded import EmbeddedPostgres, running_url
from core.errors import NotFound
from core.legacy import LegacyCounts, migrate_legacy
from core.metrics import Metrics
from core.migrate import migrate
from core.secrets import KeyRing
from core.settings import Settings
from core.store import audit, keys, sessions, tenants
from gateway.api.auth import new_key
from gateway.app import registry

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


async def add_session(
    settings: Settings,
    tenant_id: int,
    channel: str,
    given: Json,
    *,
    name: str | None,
    workspace_id: int | None,
    connect: bool,
) -> sessions.SessionRow:
    """A new session; its credentials are checked by logging in once. Raises InvalidField, NotFound, Conflict."""
    kind = channel_kind(settings, channel)
    metadata: Json = {} if workspace_id is None else {"default_workspace_id": workspace_id}
    async with database(settings) as db:
        async with db.worker() as conn:
            if await tenants.status(conn, tenant_id) is None:
                raise NotFound(f"there is no tenant {tenant_id}: see `python -m gateway tenant list`")
            if (
                workspace_id is not None
                and await tenants.read_workspace(conn, tenant_id, workspace_id) is None
            ):
                raise NotFound(f"tenant {tenant_id} has no workspace {workspace_id}")
        found = await log_in.check(kind, given, metadata) if kind.check_credentials is not None else None
        async with db.worker() as conn, conn.transaction():
            if found is None:
                row = await sessions.create(
                    conn, tenant_id, channel, name=name, metadata=metadata, status=SessionStatus.PAIRING
                )
            else:
                row = await log_in.create(
                    conn,
                    KeyRing.from_settings(settings),
                    tenant_id=tenant_id,
                    kind=kind,
                    found=found,
                    name=name,
                    metadata=metadata,
                )
                if connect:
                    await sessions.want(conn, row.id, "connected")
            await _audit_session(conn, row, "session_created")
            return row


async def session_of(settings: Settings, session_id: int) -> sessions.SessionRow:
    """Whosever it is. Raises NotFound."""
    async with database(settings) as db, db.worker() as conn:
        return await sessions.find(conn, session_id)


async def change_credentials(settings: Settings, session_id: int, given: Json) -> sessions.SessionRow:
    """New credentials, checked; the session is connected with them if somebody wants it connected."""
    async with database(settings) as db:
        async with db.worker() as conn:
            row = await sessions.find(conn, session_id)
        found = await log_in.check(channel_kind(settings, row.channel_type), given, row.metadata)
        async with db.worker() as conn, conn.transaction():
            await log_in.renew(conn, KeyRing.from_settings(settings), row, found)
            await _audit_session(conn, row, "session_credentials_changed")
        return row


def channel_kind(settings: Settings, channel: str) -> ChannelKind:
    """The registry's line. Raises NotFound with the channels there are."""
    kinds = registry(settings, Metrics())
    if channel not in kinds:
        raise NotFound(f"there is no channel {channel!r}; there are: {', '.join(sorted(kinds))}")
    return kinds[channel]


async def _audit_session(conn: audit.Conn, row: sessions.SessionRow, event: audit.Event) -> None:
    await audit.write(
        conn, event, tenant_id=row.tenant_id, actor=ACTOR, subject_type="session", subject_id=row.id
    )


async def want_session(settings: Settings, session_id: int, wanted: sessions.Wanted) -> None:
    async with database(settings) as db, db.worker() as conn:
        await sessions.want(conn, SessionId(session_id), wanted)
