"""Connections to PostgreSQL: two pools by role over one login, and the LISTEN hub. Everything that talks SQL starts here.

Never migrates and holds no SQL of the product. Session state is never used: inside a transaction say SET LOCAL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from core import log as logs
from core.database_check import API_ROLE, WORKER_ROLE, check_roles, check_server
from core.database_errors import check_url, describe, explain, is_transient, is_unavailable
from core.database_json import set_codecs
from core.listen import ListenHub, Subscription

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
    Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
    _Base: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    _Base = asyncpg.Connection  # generic for the type checker alone

__all__ = ["Database", "ListenHub", "Subscription", "connect", "is_transient", "is_unavailable", "open_owner"]

log = logs.get(part="database")

CONNECT_SECONDS = 10.0
STARTING_UP_SECONDS = 15.0
STATEMENT_SECONDS = 30.0
IDLE_IN_TRANSACTION_SECONDS = 20.0
"""A gateway that is stopped in the middle of a transaction keeps the rows it has locked, and whoever takes its sessions over
waits for them: the server ends the transaction before the leases run out. None of ours stands idle for a second."""
ACQUIRE_SECONDS = 10.0
RELEASE_SECONDS = 5.0
CLOSE_SECONDS = 5.0


class _TenantConnection(_Base):
    """Binds the tenant in the same round trip as BEGIN: round trips are half the price of row-level security."""

    __slots__ = ("_tenant",)

    def bind_tenant(self, tenant_id: int | None) -> None:
        self._tenant = tenant_id

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:  # noqa: ASYNC109
        tenant = getattr(self, "_tenant", None)
        if tenant is not None and not args and query.startswith("BEGIN"):
            # SET LOCAL takes no parameters; `%d` makes sure that nothing but a number gets in.
            query += " SET LOCAL app.tenant_id = '%d';" % tenant  # noqa: UP031
        return await super().execute(query, *args, timeout=timeout)


class Database:
    """Open it with `await Database.open(url)`, end it with `await close()`."""

    def __init__(self, url: str, workers: Pool, api: Pool, hub: ListenHub) -> None:
        self.url = url
        self.hub = hub
        self._workers = workers
        self._api = api

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        application_name: str = "channel-gateway",
        worker_connections: int = 12,
        api_connections: int = 8,
        statement_seconds: float = STATEMENT_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
        ping_seconds: float = 5.0,
        allow_superuser: bool = False,
    ) -> Database:
        """Check server, login, roles and policies, then open the pools and the hub.

        A statement that takes longer than `statement_seconds` is cancelled by the server; a server that says nothing
        at all is given two seconds more. Raises SettingsError, DatabaseUnavailable, DatabaseRoleError or
        DatabaseError, each with one line that says what to do.
        """
        check_url(url)
        settings = {
            "application_name": application_name,
            "statement_timeout": f"{int(statement_seconds * 1000)}",
            "idle_in_transaction_session_timeout": f"{int(IDLE_IN_TRANSACTION_SECONDS * 1000)}",
            "lock_timeout": f"{int(statement_seconds * 500)}",
            "timezone": "UTC",
        }
        common: dict[str, Any] = {
            "timeout": connect_seconds,
            "command_timeout": statement_seconds + 2,
            "server_settings": settings,
        }
        conn = await connect(url, **common)
        try:
            await check_server(conn, allow_superuser=allow_superuser)
            await check_roles(conn)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise explain(error, url, seconds=connect_seconds) from error
        finally:
            await _close_quietly(conn)

        def pool(role: str, size: int, kind: type[_Base], **more: str) -> Pool:
            # No minimum: asyncpg would rebuild it behind our back during an outage, with a traceback for every try.
            return asyncpg.create_pool(
                url,
                min_size=0,
                max_size=size,
                init=_become(role),
                reset=_no_reset,
                connection_class=kind,
                **{**common, "server_settings": {**settings, **more}},
            )

        workers = pool(WORKER_ROLE, worker_connections, asyncpg.Connection)
        # Lists have filters and cursors that may be NULL. A plan for any value reads every thread of the tenant to find
        # the latest fifty, and the server changes to one by itself at the sixth call.
        api = pool(API_ROLE, api_connections, _TenantConnection, plan_cache_mode="force_custom_plan")

        async def listener() -> asyncpg.Connection[Any]:
            listening = {
                **common,
                "server_settings": {**settings, "application_name": f"{application_name} listen"},
            }
            conn: asyncpg.Connection[Any] = await asyncpg.connect(url, **listening)
            return conn

        async def expire() -> None:
            # What these pools still hold may be sockets to a server that is no more.
            await workers.expire_connections()
            await api.expire_connections()

        hub = ListenHub(listener, on_reconnect=expire, ping_seconds=ping_seconds)
        database = cls(url, workers, api, hub)
        try:
            for opened in (workers, api):
                await opened
                async with opened.acquire(timeout=connect_seconds):
                    pass  # the first connection now, not with the first message
            await hub.start(connect_seconds)
        except BaseException as error:
            await database.close()
            if isinstance(error, Exception):
                raise explain(error, url, seconds=connect_seconds) from error
            raise
        return database

    async def close(self) -> None:
        """Give what is running a few seconds, then cut it off. Safe to call twice."""
        await self.hub.stop()
        for pool in (self._workers, self._api):
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await pool.close()
            except Exception as error:
                # A connection still in use, or a server that is gone: nothing to say goodbye to.
                log.warning("pool.terminated", error=str(error) or repr(error))
                pool.terminate()

    @property
    def connected(self) -> bool:
        """Whether the database answered last time anybody asked. Costs nothing; may be some seconds old."""
        return self.hub.connected

    @property
    def healthy(self) -> bool:
        """False when a task of this layer has died (`connected` may be False in good health)."""
        return self.hub.healthy

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Connection]:
        """A connection as `et_worker`: everything in every tenant. No transaction is opened."""
        async with self._held(self._workers) as conn:
            yield conn

    @asynccontextmanager
    async def tenant(self, tenant_id: int) -> AsyncIterator[Connection]:
        """A transaction as `et_api` that sees and touches this tenant's rows alone. An error rolls back."""
        async with self._held(self._api) as conn:
            bind: Callable[[int | None], None] = getattr(conn, "bind_tenant")  # noqa: B009  (the proxy hands it on)
            bind(tenant_id)
            try:
                async with conn.transaction():
                    yield conn
            finally:
                bind(None)

    @asynccontextmanager
    async def _held(self, pool: Pool) -> AsyncIterator[Connection]:
        try:
            conn = await pool.acquire(timeout=ACQUIRE_SECONDS)
        except Exception as error:
            self._saw(error)
            raise
        try:
            yield conn
        except Exception as error:
            self._saw(error)
            raise
        finally:
            try:
                await pool.release(conn, timeout=RELEASE_SECONDS)
            except Exception as error:
                # The pool has dropped the connection; what the caller did has its own outcome.
                self._saw(error)
                if not is_unavailable(error):
                    raise

    def _saw(self, error: Exception) -> None:
        if is_unavailable(error):
            self.hub.suspect()


async def connect(url: str, **options: Any) -> asyncpg.Connection[Any]:
    """One plain connection as the login itself (migrations, tools), with the JSON codecs. Errors are one line each.

    A server that is still starting up is waited for.
    """
    check_url(url)
    options.setdefault("timeout", CONNECT_SECONDS)
    deadline = time.monotonic() + STARTING_UP_SECONDS
    while True:
        try:
            conn: asyncpg.Connection[Any] = await asyncpg.connect(url, **options)
            break
        except asyncpg.CannotConnectNowError as error:
            if time.monotonic() > deadline:
                raise explain(error, url, seconds=options["timeout"]) from error
            await asyncio.sleep(0.1)
        except Exception as error:
            raise explain(error, url, seconds=options["timeout"]) from error
    await set_codecs(conn)
    log.debug("database.opened", address=describe(url))
    return conn


@asynccontextmanager
async def open_owner(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """One connection as the login itself, which owns the schema: for migrating, nothing else. The server and the login
    are checked first, so that nothing is migrated that `Database.open` would refuse.
    """
    conn = await connect(url, command_timeout=None)
    try:
        await check_server(conn)
        yield conn
    finally:
        await _close_quietly(conn)


def _become(role: str) -> Any:
    async def init(conn: asyncpg.Connection[Any]) -> None:
        await conn.execute(f"SET ROLE {role}")
        await set_codecs(conn)

    return init


async def _no_reset(_conn: Any) -> None:
    """asyncpg has already rolled back an open transaction and dropped listeners. Its default would spend one more round
    trip on RESET ALL (which leaves the role alone), for session state that nobody here uses.
    """


async def _close_quietly(conn: asyncpg.Connection[Any]) -> None:
    try:
        await conn.close(timeout=CLOSE_SECONDS)
    except Exception:
        conn.terminate()
