"""Which sessions this gateway runs: bids for what is wanted, starts it, stops it, and is the outbound worker's way to it.

A wish is a row and so is every answer: any gateway takes an intent, the owner of the session acts on it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from core import log as logs
from core.channel import (
    Attempt,
    ChannelKind,
    NotSent,
    OutboundMessage,
    PairingUpdate,
    Sent,
    SessionId,
    SessionState,
    SessionStatus,
    TenantId,
    Unknown,
)
from core.database import Database, is_transient
from core.dispatch import NotReady
from core.metrics import Metrics
from core.ownership import Ownership
from core.secrets import KeyRing
from core.settings import Settings
from core.store import audit
from core.store import sessions as store
from core.store.leases import Bid
from core.store.sessions import SessionRow
from gateway import session_folders as folders
from gateway.session_identity import Identity
from gateway.session_runner import Ingesting, Runner, RunnerTimings
from gateway.session_secrets import SessionSecrets
from gateway.session_sinks import SessionStore
from gateway.session_writer import StateWriter

log = logs.get(part="sessions")
T = TypeVar("T")

WRONG_NUMBER = "wrong_number"
JOURNAL_FAILED = "journal_failed"
"""A channel's reason for being disconnected: its journal takes nothing, so it acknowledges nothing."""


@dataclass(frozen=True, slots=True)
class ManagerTimings:
    """Seconds. Tests shorten them."""

    poll: float = 2.0
    bury: float = 5.0
    ttl: float = 30.0
    renew: float = 10.0
    margin: float = 3.0
    stop: float = 5.0
    starting: int = 4
    """Channels that are started at the same time."""
    runner: RunnerTimings = field(default_factory=RunnerTimings)


class SessionManager:
    """`await start()`, `await stop()`, `healthy`; keeps `core.dispatch.Dispatcher`."""

    def __init__(
        self,
        db: Database,
        ingest: Ingesting,
        metrics: Metrics,
        registry: Mapping[str, ChannelKind],
        settings: Settings,
        *,
        owner: str,
        keys: KeyRing | None = None,
        prepare: Callable[[OutboundMessage], Awaitable[OutboundMessage]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        timings: ManagerTimings | None = None,
    ) -> None:
        """`prepare` completes a message just before its channel is called: it brings the file that `media_url` names."""
        self.owner = owner
        self._prepare = prepare
        self.changed = asyncio.Event()
        self._db = db
        self._ingest = ingest
        self._metrics = metrics
        self._kinds = {
            name: kind for name, kind in registry.items() if kind.live and kind.factory is not None
        }
        self._settings = settings
        self._keys = keys or KeyRing.from_settings(settings)
        self._clock = clock
        self._timings = timings or ManagerTimings()
        self._runners: dict[SessionId, Runner] = {}
        self._ending: dict[SessionId, asyncio.Task[None]] = {}
        self._starting = asyncio.Semaphore(self._timings.starting)
        self._kick = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._counted: set[TenantId] = set()
        self.quiet = asyncio.Lock()
        """Held by each look at the wishes, and by whoever moves a session meanwhile."""
        self.ownership = Ownership(
            db,
            owner,
            settings.data_dir,
            on_lost=self._lost,
            ttl=self._timings.ttl,
            renew=self._timings.renew,
            margin=self._timings.margin,
            clock=clock,
        )
        self._writer = StateWriter(db, owner)
        self._store = SessionStore(db, lambda: int(getattr(ingest, "depth", 0)))
        self._identity = Identity(self, db, self._keys, self._writer, clock)

    # --- life

    async def start(self) -> None:
        """Become known, free what a dead predecessor held, and start what is wanted."""
        self._stopping = False
        await self.ownership.start()
        await self._identity.finish_moves()
        self._run("sessions.write", self._writer.run())
        self._run("sessions.listen", self._listen())
        self._run("sessions.reconcile", self._reconcile_loop())
        self._run("sessions.bury", self._bury_loop())

    async def stop(self) -> None:
        """Disconnect everything, write down how it stands, free the leases. Within ten seconds."""
        self._stopping = True
        began = time.monotonic()
        for task in self._tasks:
            if task.get_name() != "sessions.write":
                task.cancel()
        ending = list(self._ending.values())
        runners, self._runners = self._runners, {}
        stops = [asyncio.create_task(runner.stop()) for runner in runners.values()]
        if stops or ending:
            await asyncio.wait([*stops, *ending], timeout=self._timings.stop)
        for runner in runners.values():
            if runner.state.status in (SessionStatus.ACTIVE, SessionStatus.CONNECTING):
                self._writer.state(
                    runner.session_id, SessionState(SessionStatus.DISCONNECTED, "gateway_stopped")
                )
        await self._writer.flush(max(0.5, self._timings.stop + 1 - (time.monotonic() - began)))
        await self.ownership.stop()
        leftover = [t for t in (*self._tasks, *stops, *ending) if not t.done()]
        self._tasks = []
        for task in leftover:
            task.cancel()
        if leftover:
            await asyncio.wait(leftover, timeout=1)
        self._count_active()
        log.info("sessions.stopped", count=len(runners), duration_ms=round((time.monotonic() - began) * 1000))

    @property
    def healthy(self) -> bool:
        """False when a task of the manager has died."""
        return bool(self._tasks) and not any(t.done() for t in self._tasks) and self.ownership.healthy

    @property
    def durable(self) -> bool:
        """False while what comes in at a session of ours cannot be made durable."""
        return not any(runner.state.reason == JOURNAL_FAILED for runner in self._runners.values())

    # --- what the outbound worker needs

    def sendable(self) -> dict[SessionId, float]:
        now = self._clock()
        proofs = {s: self.ownership.until(s) for s, runner in self._runners.items() if runner.active}
        return {s: until for s, until in proofs.items() if until > now}

    def owned(self) -> frozenset[SessionId]:
        return self.ownership.held

    async def send(self, message: OutboundMessage) -> Sent:
        runner = self._runners.get(message.attempt.session_id)
        if runner is None or not runner.active or runner.channel is None:
            raise NotReady("the session is not connected here at the moment")
        if self._prepare is not None:  # nothing has been sent yet, so a failure here is a definite not-sent
            message = await self._prepare(message)
        # Asked last: fetching a file may outlast the proof.
        if self.ownership.until(message.attempt.session_id) <= self._clock():
            raise NotReady("this gateway cannot prove that the session is its own at the moment")
        return await runner.channel.send(message)

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        runner = self._runners.get(attempt.session_id)
        if runner is None or runner.channel is None or runner.dismissed:
            raise NotReady("the session's channel is not running here at the moment")
        if self.ownership.until(attempt.session_id) <= self._clock():
            raise NotReady("this gateway cannot prove that the session is its own at the moment")
        return await runner.channel.resolve(attempt)

    # --- what the API needs

    def capability(self, session_id: SessionId, kind: type[T]) -> T | None:
        """The live channel, when this process runs the session and the channel has the capability."""
        runner = self._runners.get(session_id)
        channel: Any = runner.channel if runner is not None and not runner.dismissed else None
        return channel if channel is not None and isinstance(channel, kind) else None

    def kick(self) -> None:
        """Look at the wishes now."""
        self._kick.set()

    # --- wishes

    async def _reconcile_loop(self) -> None:
        while True:
            self._kick.clear()
            try:
                async with self.quiet:
                    await self._reconcile()
            except Exception as error:
                if is_transient(error):
                    log.warning("sessions.reconcile_failed", error=repr(error), result="trying again")
                else:
                    log.error("sessions.reconcile_failed", error=repr(error), exc_info=error)
                await asyncio.sleep(0.5)
                continue
            try:
                async with asyncio.timeout(self._timings.poll):
                    await self._kick.wait()
            except TimeoutError:
                pass

    async def _reconcile(self) -> None:
        """One look at every session that is wanted or ours."""
        ours = self.ownership.held | set(self._runners)
        async with self._db.worker() as conn:
            rows = await store.all_wanted(conn, list(ours), list(self._kinds))
        seen = {row.id: row for row, _ in rows}
        bids = [
            bid
            for row, holder in rows
            if holder is None and row.id not in self.ownership.held and (bid := self._bid(row)) is not None
        ]
        await self.ownership.take(bids)
        for row, holder in rows:
            if row.id in self._ending:
                continue
            if row.id in self.ownership.held:
                if holder not in (None, self.owner):
                    # Another gateway has it, which the next renewal would tell us too.
                    self.ownership.drop(row.id)
                    self._lost([row.id])
                    continue
                await self._obey(row)
        for session_id in ours - set(seen):
            # The row is gone, and everything with it.
            self.ownership.drop(session_id)
            self._lost([session_id])

    def _bid(self, row: SessionRow) -> Bid | None:
        """What we offer for a session nobody has; None when it is not wanted or its files are elsewhere."""
        kind = self._kinds.get(row.channel_type)
        if kind is None or row.wanted == "disconnected":
            return None
        if not kind.files:
            return Bid(row.id)
        if row.data_dir_id not in (None, self.ownership.data_dir_id):
            return None
        return Bid(row.id, self.ownership.data_dir_id)

    async def _obey(self, row: SessionRow) -> None:
        runner = self._runners.get(row.id)
        if runner is not None and runner.dismissed and row.wanted == "connected":
            if not runner.over or row.wanted_at == runner.row.wanted_at:
                return
            runner = None
        if row.wanted == "connected":
            if runner is None:
                runner = await self._begin(row)
            elif self._needs_restart(runner, row):
                runner.row = row
                runner.restart()
            elif not row.pending or runner.row.pending:
                runner.row = row
            if row.status_reason == store.ORPHANED and runner.state.status is not SessionStatus.DISCONNECTED:
                # After an outage longer than a lease we were taken for gone before we could renew it. We are not.
                self.state_changed(runner, runner.state)
            runner.pair(row)
        elif row.wanted == "deleted":
            self._end(row.id, self._delete(row, runner))
        else:
            self._end(row.id, self._disconnect(row, runner))

    async def _begin(self, row: SessionRow) -> Runner:
        folder = await asyncio.to_thread(folders.make, self._settings.whatsapp_dir, row.id)
        runner = self._runner(row, folder)
        self._runners[row.id] = runner
        runner.start()
        log.info("session.starting", session_id=row.id, tenant_id=row.tenant_id, action=row.channel_type)
        return runner

    def _runner(self, row: SessionRow, folder: Any) -> Runner:
        return Runner(
            row,
            self._kinds[row.channel_type],
            folder,
            ingest=self._ingest,
            metrics=self._metrics,
            manager=self,
            secrets=SessionSecrets(self._db, self._keys, row),
            starting=self._starting,
            timings=self._timings.runner,
            store=self._store,
            clock=self._clock,
        )

    @staticmethod
    def _needs_restart(runner: Runner, row: SessionRow) -> bool:
        """Settings the channel reads were changed, or somebody said "connect" to a session that stands still."""

        def of_channel(metadata: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in metadata.items() if name != "default_workspace_id"}

        if of_channel(runner.row.metadata) != of_channel(row.metadata):
            return True
        still = runner.state.status in (
            SessionStatus.DISCONNECTED,
            SessionStatus.SUSPENDED,
            SessionStatus.LOGGED_OUT,
        )
        return still and row.wanted_at != runner.row.wanted_at and row.login_method is None

    # --- ending

    def _end(self, session_id: SessionId, work: Coroutine[Any, Any, None]) -> None:
        """Stopping takes seconds: it goes on beside the loop, one at a time for each session."""
        task = asyncio.create_task(work, name=f"session.{session_id}.end")
        self._ending[session_id] = task

        def done(finished: asyncio.Task[None]) -> None:
            self._ending.pop(session_id, None)
            self._kick.set()
            if not finished.cancelled() and finished.exception() is not None:
                log.error("session.end_failed", session_id=session_id, error=repr(finished.exception()))

        task.add_done_callback(done)

    async def _disconnect(self, row: SessionRow, runner: Runner | None) -> None:
        if runner is not None:
            self._runners.pop(row.id, None)
            await runner.stop()
            final = runner.state.status in (SessionStatus.LOGGED_OUT, SessionStatus.SUSPENDED)
            said_why = runner.state.status is SessionStatus.DISCONNECTED and runner.state.reason is not None
            if not final and not said_why:
                self._writer.state(row.id, SessionState(SessionStatus.DISCONNECTED))
            self._count_active()
        await self._writer.settled(row.id)
        await self.ownership.give_up([row.id])

    async def _delete(self, row: SessionRow, runner: Runner | None) -> None:
        """Log out on the channel, forget keys and credentials. The channel not answering does not stop it."""
        if runner is None:
            folder = await asyncio.to_thread(folders.make, self._settings.whatsapp_dir, row.id)
            runner = self._runner(row, folder)
        self._runners.pop(row.id, None)
        problem: str | None = None
        try:
            await runner.logout()
        except Exception as error:
            problem = type(error).__name__
            log.warning("session.logout_failed", session_id=row.id, tenant_id=row.tenant_id, error=repr(error),
                        action="remove the linked device on the phone if it is still listed")  # fmt: skip
        await asyncio.to_thread(folders.remove, self._settings.whatsapp_dir, row.id)
        self._count_active()
        async with self._db.worker() as conn, conn.transaction():
            await store.finish_delete(conn, row.id)
            await audit.write(conn, "session_logged_out", tenant_id=row.tenant_id, actor=f"session:{row.id}",
                              subject_type="session", subject_id=row.id,
                              detail={"reason": "deleted", "problem": problem})  # fmt: skip
            await audit.write(conn, "session_deleted", tenant_id=row.tenant_id, actor=f"session:{row.id}",
                              subject_type="session", subject_id=row.id)  # fmt: skip
        await self.ownership.give_up([row.id])

    def _lost(self, sessions: Collection[SessionId]) -> None:
        """Somebody else's now: let go, and write nothing."""
        for session_id in sessions:
            runner = self._runners.pop(session_id, None)
            if runner is not None:
                log.warning("session.released", session_id=session_id, tenant_id=runner.row.tenant_id)
                self._end(session_id, runner.stop())
        self._count_active()

    # --- what runners say

    def state_changed(self, runner: Runner, before: SessionState) -> None:
        state = runner.state
        if runner.active or state.status is not SessionStatus.ACTIVE:
            self._writer.state(runner.session_id, state)
        if state.status is not before.status or state.reason != before.reason:
            log.info("session.state", session_id=runner.session_id, tenant_id=runner.row.tenant_id,
                     result=state.status.value, error=state.reason, action=state.action)  # fmt: skip
        if state.status is SessionStatus.LOGGED_OUT and before.status is not SessionStatus.LOGGED_OUT:
            self._writer.audit(runner.row, "session_logged_out", {"reason": state.reason})
            if state.reason == WRONG_NUMBER and runner.row.pending:
                update = PairingUpdate("failed", reason=WRONG_NUMBER)
                self._writer.pairing(runner.session_id, update, stop=True)
        if runner.active:
            self.changed.set()
        self._count_active()

    def pairing_changed(self, runner: Runner, update: PairingUpdate) -> None:
        log.info("session.pairing", session_id=runner.session_id, tenant_id=runner.row.tenant_id,
                 result=update.kind, error=update.reason)  # fmt: skip
        # A pairing that ended without a phone is not begun again by itself.
        over = update.kind in ("timeout", "failed") and runner.row.pending
        # Stopped now, a stranger's phone would keep its link: the channel logs it out first, and says so in its state.
        over = over and update.reason != WRONG_NUMBER
        self._writer.pairing(runner.session_id, update, stop=over)

    def identified(self, runner: Runner, identifier: str, *, paired: bool) -> None:
        self._identity.begin(runner, identifier, paired=paired)

    # --- what Identity needs

    def runner_of(self, session_id: SessionId) -> Runner | None:
        return self._runners.get(session_id)

    async def retire(self, runner: Runner) -> None:
        """Stop a runner whose session becomes part of another one."""
        self._runners.pop(runner.session_id, None)
        await runner.stop()

    async def move_folder(self, old_id: SessionId, new_id: SessionId) -> None:
        await asyncio.to_thread(folders.move, self._settings.whatsapp_dir, old_id, new_id)

    def folders_here(self) -> list[int]:
        return folders.numbered(self._settings.whatsapp_dir)

    def settled(self, runner: Runner, identifier: str) -> None:
        """It is settled that this session has this number: from now on it stores and sends."""
        runner.row = replace(runner.row, identifier=identifier)
        runner.known.set()
        self._writer.state(runner.session_id, runner.state)
        if runner.active:
            self.changed.set()
        self._count_active()

    # --- small things

    def _count_active(self) -> None:
        active = Counter(
            runner.row.tenant_id
            for runner in self._runners.values()
            if runner.kind.name == "whatsapp" and runner.active
        )
        known = {runner.row.tenant_id for runner in self._runners.values() if runner.kind.name == "whatsapp"}
        self._counted |= known
        for tenant_id in self._counted:
            self._metrics.sessions_active.labels(tenant_id).set(active[tenant_id])

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not self._stopping and not task.cancelled():
            log.error("sessions.task_died", action=task.get_name(), error=repr(task.exception()))

    async def _listen(self) -> None:
        subscription = self._db.hub.subscribe("et_sessions")
        try:
            while True:
                if await subscription.wait(30):
                    self._kick.set()
        finally:
            subscription.close()

    async def _bury_loop(self) -> None:
        """Gateways that died beside us, and sessions that nobody runs although their rows say so."""
        while True:
            await asyncio.sleep(self._timings.bury)
            try:
                if await self.ownership.bury_dead():
                    self._kick.set()
                async with self._db.worker() as conn:
                    await store.mark_orphans(conn)
            except Exception as error:
                level = log.warning if is_transient(error) else log.error
                level("sessions.bury_failed", error=repr(error))
