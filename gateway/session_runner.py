"""One running session: its channel, its sink, and the task that starts the channel again when it dies.

Decides nothing about ownership or adoption; it tells the manager, which does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from core import log as logs
from core.channel import (
    Attempt,
    Channel,
    ChannelKind,
    Cursor,
    InboundMessage,
    MessageId,
    Pairable,
    PairingUpdate,
    Quoted,
    SessionContext,
    SessionId,
    SessionState,
    SessionStatus,
    StatusUpdate,
    Stored,
)
from core.errors import DatabaseUnavailable, GatewayError
from core.history import Counts, Item
from core.metrics import Metrics
from core.sinks import Written
from core.store.sessions import SessionRow
from gateway.session_secrets import SessionSecrets
from gateway.session_sinks import SessionStore

log = logs.get(part="sessions")


@runtime_checkable
class Watched(Protocol):
    """A channel that can tell that it has died (a child process gone for good, a task with a bug)."""

    @property
    def healthy(self) -> bool: ...


class Ingesting(Protocol):
    async def submit(self, messages: Sequence[InboundMessage]) -> list[Stored]: ...
    async def apply_status(self, updates: Sequence[StatusUpdate]) -> object: ...
    async def advance(self, session_id: SessionId, cursor: Cursor) -> None: ...


class Reporting(Protocol):
    """What a runner tells its manager. Neither call waits for the database."""

    def state_changed(self, runner: Runner, before: SessionState) -> None: ...
    def pairing_changed(self, runner: Runner, update: PairingUpdate) -> None: ...
    def identified(self, runner: Runner, identifier: str, *, paired: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class RunnerTimings:
    """Seconds. Tests shorten them."""

    start: float = 30.0
    disconnect: float = 10.0
    logout: float = 20.0
    backoff_first: float = 1.0
    backoff_most: float = 60.0
    settled: float = 60.0
    """A channel that lived this long starts over with the shortest wait."""
    watch: float = 1.0


class Runner:
    def __init__(
        self,
        row: SessionRow,
        kind: ChannelKind,
        folder: Path,
        *,
        ingest: Ingesting,
        metrics: Metrics,
        manager: Reporting,
        secrets: SessionSecrets,
        starting: asyncio.Semaphore,
        timings: RunnerTimings,
        store: SessionStore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.row = row
        self.kind = kind
        self.folder = folder
        self.channel: Channel | None = None
        self.state = SessionState(SessionStatus.DISCONNECTED)
        self.login_seen: Any = None
        """`wanted_at` of the pairing wish that was acted on last."""
        self.dismissed = False
        """It has no say any more: the session is being moved or is somebody else's."""
        self.over = False
        """Dismissed and done: a new wish gets a new runner."""
        self.barred = False
        """Another number than this session's was paired: nothing of it is stored or sent."""
        self.known = asyncio.Event()
        """Set once it is settled which session this is: nothing is stored or sent before that."""
        if not row.pending:
            self.known.set()
        self._ingest = ingest
        self._store = store
        self._metrics = metrics
        self._manager = manager
        self._secrets = secrets
        self._starting = starting
        self._timings = timings
        self._clock = clock
        self._restart = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._pairings: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"Runner({self.session_id}, {self.kind.name}, {self.state.status})"

    @property
    def session_id(self) -> SessionId:
        return self.row.id

    @property
    def active(self) -> bool:
        """May send, as far as the channel goes."""
        return (
            self.state.status is SessionStatus.ACTIVE
            and self.channel is not None
            and self.known.is_set()
            and not self.dismissed
            and not self.barred
        )

    @property
    def healthy(self) -> bool:
        return self._task is not None and not self._task.done()

    # --- life

    def start(self) -> None:
        self._task = asyncio.create_task(self._live(), name=f"session.{self.session_id}")

    def restart(self) -> None:
        """Make the channel anew: its settings or credentials have changed."""
        self._restart.set()

    async def stop(self) -> None:
        """Disconnect within the channel's ten seconds and say nothing more."""
        self.dismissed = True
        tasks = [t for t in (self._task, *self._pairings) if t is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1)
        await self._put_down()
        # Not 0: it is no longer ours to tell. One that is still wanted and that nobody has is told by `/metrics`.
        self._metrics.session_up.remove(self.row.tenant_id, self.session_id, self.kind.name)

    async def logout(self) -> None:
        """End the session on the channel's side. Raises what the channel raises, or TimeoutError."""
        self.dismissed = True
        tasks = [
            t for t in (self._task, *self._pairings) if t is not None and t is not asyncio.current_task()
        ]
        for task in tasks:
            task.cancel()
        channel = self.channel or self.kind_factory()(await self._context(), Sink(self))
        try:
            async with asyncio.timeout(self._timings.logout):
                await channel.logout()
        finally:
            self.channel = channel
            await self._put_down()

    async def _live(self) -> None:
        delay = self._timings.backoff_first
        while True:
            self._restart.clear()
            began = self._clock()
            try:
                await self._raise_up()
                await self._watch()
                log.warning("session.restarting", session_id=self.session_id, tenant_id=self.row.tenant_id)
            except Exception as error:
                self._failed(error)
            await self._put_down()
            if self._clock() - began > self._timings.settled:
                delay = self._timings.backoff_first
            self._metrics.reconnects.labels(self.kind.name).inc()
            try:
                async with asyncio.timeout(delay):
                    await self._restart.wait()
                delay = self._timings.backoff_first
            except TimeoutError:
                delay = min(delay * 2, self._timings.backoff_most)

    def kind_factory(self) -> Callable[[SessionContext, Sink], Channel]:
        assert self.kind.factory is not None, "only channels with a factory are run"
        return self.kind.factory

    async def _context(self) -> SessionContext:
        row = self.row
        return SessionContext(
            tenant_id=row.tenant_id,
            session_id=row.id,
            channel=row.channel_type,
            identifier=row.identifier,
            name=row.name,
            metadata=row.metadata,
            credentials=await self._secrets.read(),
            folder=self.folder,
        )

    async def _raise_up(self) -> None:
        context = await self._context()
        async with self._starting:
            self.channel = self.kind_factory()(context, Sink(self))
            async with asyncio.timeout(self._timings.start):
                await self.channel.connect()
        self.pair(self.row)

    async def _watch(self) -> None:
        """Until the channel has died or must be made anew."""
        while not self._restart.is_set():
            channel = self.channel
            if isinstance(channel, Watched) and not channel.healthy:
                log.error("session.channel_died", session_id=self.session_id, tenant_id=self.row.tenant_id)
                return
            try:
                async with asyncio.timeout(self._timings.watch):
                    await self._restart.wait()
            except TimeoutError:
                pass

    async def _put_down(self) -> None:
        channel, self.channel = self.channel, None
        if channel is None:
            return
        try:
            async with asyncio.timeout(self._timings.disconnect):
                await channel.disconnect()
        except Exception as error:
            log.warning("session.disconnect_failed", session_id=self.session_id, error=repr(error))

    def _failed(self, error: Exception) -> None:
        code = error.code if isinstance(error, GatewayError) else "start_failed"
        log.error(
            "session.start_failed",
            session_id=self.session_id,
            tenant_id=self.row.tenant_id,
            error=repr(error),
        )
        action = error.action if isinstance(error, GatewayError) else None
        self.report(SessionState(SessionStatus.DISCONNECTED, code, action=action))

    # --- pairing

    def pair(self, row: SessionRow) -> None:
        """Act on a pairing wish, once."""
        if self.channel is None or row.login_method is None or row.wanted_at == self.login_seen:
            return
        self.login_seen = row.wanted_at
        if self.state.status is SessionStatus.ACTIVE:
            return  # an old wish: it is paired
        if not isinstance(self.channel, Pairable):
            self._manager.pairing_changed(self, PairingUpdate("failed", reason="not_pairable"))
            return
        by_code = row.login_method == "code"
        step = self.channel.pair_code(row.login_phone or "") if by_code else self.channel.pair_qr()
        task = asyncio.create_task(self._pair(step), name=f"session.{self.session_id}.pair")
        self._pairings.add(task)
        task.add_done_callback(self._pairings.discard)

    async def _pair(self, step: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._timings.start):
                await step
        except Exception as error:
            log.warning("session.pairing_failed", session_id=self.session_id, error=repr(error))
            reason = error.code if isinstance(error, GatewayError) else "pairing_failed"
            self._manager.pairing_changed(self, PairingUpdate("failed", reason=reason))

    # --- what the channel says

    def report(self, state: SessionState) -> None:
        if self.dismissed:
            return
        before, self.state = self.state, state
        up = 1 if state.status is SessionStatus.ACTIVE else 0
        self._metrics.session_up.labels(self.row.tenant_id, self.session_id, self.kind.name).set(up)
        if state.identifier and self.row.pending:
            self._manager.identified(self, state.identifier, paired=False)
        self._manager.state_changed(self, before)

    def heard(self) -> None:
        self._metrics.session_last_event.labels(self.row.tenant_id, self.session_id).set(time.time())


class Sink:
    """What the channel gets. `received` and `status` return after the commit."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    async def received(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        runner = self._runner
        runner.heard()
        # A number that turns out to be an older session's: its messages belong there.
        await runner.known.wait()
        self._check()
        return await runner._ingest.submit(messages)

    async def status(self, updates: Sequence[StatusUpdate]) -> None:
        runner = self._runner
        runner.heard()
        await runner.known.wait()
        self._check()
        await runner._ingest.apply_status(updates)

    async def history(
        self, source: AsyncIterable[Item], committed: Callable[[int], None], *, kind: str = "sync"
    ) -> Counts:
        runner = self._runner
        await runner.known.wait()
        self._check()
        return await runner._store.history(runner.row.tenant_id, runner.session_id, source, committed, kind)

    async def again(self, messages: Sequence[InboundMessage], updates: Sequence[StatusUpdate]) -> int:
        runner = self._runner
        await runner.known.wait()
        self._check()
        missing, behind = await runner._store.lost(runner.row.tenant_id, runner.session_id, messages, updates)
        stored = await runner._ingest.submit(missing) if missing else []
        if behind:
            await runner._ingest.apply_status(behind)
        return sum(not one.duplicate for one in stored)

    async def names(self, names: Mapping[str, str]) -> None:
        await self._runner.known.wait()
        self._check()
        await self._runner._store.names(self._runner.row.tenant_id, names)

    async def automatic_reply(
        self, recipient: str, text: str, *, purpose: str, at_most_every: timedelta
    ) -> bool:
        runner = self._runner
        await runner.known.wait()
        self._check()
        return await runner._store.automatic_reply(
            runner.row.tenant_id, runner.session_id, recipient, text, purpose, at_most_every
        )

    async def credential_renewed(self, path: Sequence[str], old: str, new: str) -> bool:
        return await self._runner._secrets.renewed(path, old, new)

    async def cursors(self) -> Mapping[str, Cursor]:
        await self._runner.known.wait()
        return await self._runner._store.cursors(self._runner.session_id)

    async def advance(self, cursor: Cursor) -> None:
        await self._runner.known.wait()
        self._check()
        await self._runner._ingest.advance(self._runner.session_id, cursor)

    async def written(self, channel_message_ids: Sequence[str]) -> Mapping[str, Written]:
        runner = self._runner
        return await runner._store.written(runner.row.tenant_id, runner.session_id, channel_message_ids)

    async def last_said(self, message_id: MessageId) -> Quoted | None:
        return await self._runner._store.last_said(self._runner.row.tenant_id, message_id)

    async def intend(self, attempt: Attempt) -> bool:
        return await self._runner._store.intend(attempt)

    async def never_called(self, attempt: Attempt) -> bool:
        return await self._runner._store.never_called(attempt)

    async def state(self, state: SessionState) -> None:
        self._runner.heard()
        self._runner.report(state)

    async def pairing(self, update: PairingUpdate) -> None:
        runner = self._runner
        runner.heard()
        if runner.dismissed:
            return
        if update.kind == "paired" and update.identifier:
            runner._manager.identified(runner, update.identifier, paired=True)
        else:
            runner._manager.pairing_changed(runner, update)

    def _check(self) -> None:
        if self._runner.row.pending or self._runner.barred:
            raise DatabaseUnavailable(
                "it is not settled whose number this is: keep what came, it is stored then"
            )
