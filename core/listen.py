"""One connection that LISTENs for every part of the process, and the process's idea of whether the database is there.

It reconnects by itself for ever. A notification is only a hint: nobody may rely on one, everybody polls too. It must be
a direct connection: LISTEN does not work through a pooler in transaction mode.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from core import log as logs
from core.database_errors import is_unavailable

log = logs.get(part="database")

PING_SECONDS = 5.0
"""How often a quiet connection is asked whether it is still there (a cut cable says nothing by itself)."""
PING_TIMEOUT = 5.0
BACKOFF_FIRST = 0.1
BACKOFF_MOST = 5.0

_CHANNEL = re.compile(r"[a-z_][a-z0-9_]{0,62}")


class Subscription:
    """Wakes its holder after a notification, and after every (re)connect, when anything may have been missed."""

    def __init__(self, hub: ListenHub, channel: str) -> None:
        self._hub = hub
        self.channel = channel
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Make the pending or next `wait` return True. What happened in between is remembered once."""
        self._event.set()

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """True when there may be something to look for, False after `timeout` seconds. Either way: poll the table."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True

    def close(self) -> None:
        self._hub.forget(self)


class ListenHub:
    """Owns the connection and the task that keeps it. `connect` opens one direct connection."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[asyncpg.Connection[Any]]],
        *,
        on_reconnect: Callable[[], Awaitable[None]] | None = None,
        ping_seconds: float = PING_SECONDS,
        ping_timeout: float = PING_TIMEOUT,
    ) -> None:
        self._connect = connect
        self._on_reconnect = on_reconnect
        self._ping_seconds = ping_seconds
        self._ping_timeout = ping_timeout
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._look = asyncio.Event()
        self._connected = False
        self._ever_connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Cheap: no I/O. Brought up to date by the hub's own connection and by what other connections report."""
        return self._connected

    @property
    def healthy(self) -> bool:
        """False once the hub's task has died, which nothing but a bug can cause."""
        return self._task is not None and not self._task.done()

    def subscribe(self, channel: str) -> Subscription:
        """From now on `channel` wakes the subscription; it wakes once at once when the LISTEN is in force."""
        if not _CHANNEL.fullmatch(channel):
            raise ValueError(f"not a channel name: {channel!r}")
        subscription = Subscription(self, channel)
        self._subscriptions.setdefault(channel, []).append(subscription)
        self._look.set()
        return subscription

    def forget(self, subscription: Subscription) -> None:
        """The channel stays listened to until the next reconnect; nobody is woken by it any more."""
        held = self._subscriptions.get(subscription.channel, [])
        if subscription in held:
            held.remove(subscription)
        if not held:
            self._subscriptions.pop(subscription.channel, None)

    def suspect(self) -> None:
        """Somebody's connection failed: believe it until the hub's own connection has answered."""
        self._connected = False
        self._look.set()

    async def start(self, timeout: float) -> None:  # noqa: ASYNC109
        """Start the task and wait until it is connected. Raises TimeoutError."""
        self._task = asyncio.create_task(self._run(), name="database.listen")
        self._task.add_done_callback(self._ended)
        async with asyncio.timeout(timeout):
            await self._ever_connected.wait()

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.remove_done_callback(self._ended)
            task.cancel()
            await asyncio.wait([task], timeout=self._ping_timeout + 1)
        self._connected = False

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connected = False
        error = None if task.cancelled() else task.exception()
        log.error("listen.died", error=repr(error))

    async def _run(self) -> None:
        delay = BACKOFF_FIRST
        while True:
            try:
                conn = await self._connect()
            except Exception as error:
                if self._connected or delay == BACKOFF_FIRST:
                    log.warning("database.unreachable", error=str(error) or repr(error))
                self._connected = False
            else:
                try:
                    delay = BACKOFF_FIRST
                    await self._keep(conn)
                except Exception as error:
                    if not is_unavailable(error):
                        log.error("listen.failed", error=repr(error))
                    else:
                        log.warning("database.lost", error=str(error) or repr(error))
                finally:
                    self._connected = False
                    conn.terminate()
            # Jitter, so that several gateways do not come back in the same instant.
            await asyncio.sleep(delay * random.uniform(0.75, 1.25))  # noqa: S311
            delay = min(delay * 2, BACKOFF_MOST)

    async def _keep(self, conn: asyncpg.Connection[Any]) -> None:
        """Stay until the connection is gone, which raises."""
        listening: set[str] = set()
        conn.add_termination_listener(self._terminated)
        again = self._ever_connected.is_set()
        if again and self._on_reconnect is not None:
            await self._on_reconnect()
        while True:
            self._look.clear()
            for channel in set(self._subscriptions) - listening:
                async with asyncio.timeout(self._ping_timeout):
                    await conn.add_listener(channel, self._notified)
                listening.add(channel)
                self._wake(channel)
            async with asyncio.timeout(self._ping_timeout):
                await conn.execute("SELECT 1")
            if not self._connected:
                self._connected = True
                log.info("database.connected", again=again)
            self._ever_connected.set()
            try:
                async with asyncio.timeout(self._ping_seconds):
                    await self._look.wait()
            except TimeoutError:
                pass

    def _terminated(self, _conn: Any) -> None:
        self._connected = False
        self._look.set()

    def _notified(self, _conn: Any, _pid: int, channel: str, _payload: object) -> None:
        self._wake(channel)

    def _wake(self, channel: str) -> None:
        for subscription in self._subscriptions.get(channel, ()):
            subscription.wake()
