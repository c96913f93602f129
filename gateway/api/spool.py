"""Webhook bodies that arrived while the database was away: on disk before the sender is told, stored when it is back.

Bodies of one session are stored in the order they came. Nothing is released before its commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import orjson

from core import log as logs
from core.channel import ChannelKind, Converted, SessionContext, SessionId, Stored, TenantId
from core.database import Database, is_transient
from core.errors import DatabaseUnavailable, JournalError, NotFound
from core.journal import KEEP_SECONDS, Entry, Journal
from core.metrics import Metrics
from core.store import sessions
from gateway.api.services import Ingesting

log = logs.get(part="spool")

KIND = "webhook"
BATCH = 200
"""Bodies that are stored together: later ones queue up behind them, so they must go quicker than new ones come."""
POLL_SECONDS = 1.0
RETRY_SECONDS = 1.0
SUBMIT_SECONDS = 5.0
"""After this long a body is spooled instead: senders do not wait much longer. The rows are idempotent."""
REPLAY_SECONDS = 30.0
FAILURE_SECONDS = 60.0
"""How long one failed write keeps `writable` false when nothing has succeeded since."""
PRUNE_SECONDS = 3600.0
MAX_TRIES = 5


class WebhookSpool:
    """`await start()`, `await stop()`, `healthy`, `writable`."""

    def __init__(
        self,
        journal: Journal,
        db: Database,
        ingest: Ingesting,
        registry: Mapping[str, ChannelKind],
        metrics: Metrics,
    ) -> None:
        self._journal = journal
        self._db = db
        self._ingest = ingest
        self._registry = registry
        self._metrics = metrics
        self._waiting: dict[str, int] = {}
        """How many bodies of each session wait on disk: later ones queue up behind them."""
        self._writing = 0
        self._appends = 0
        self._failed_at: float | None = None
        self._tries: dict[int, int] = {}
        self._look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises JournalError when the disk takes no writes: a gateway that cannot spool must not say "received"."""
        await asyncio.to_thread(self._look_back)
        self._task = asyncio.create_task(self._replay_forever(), name="webhook-spool")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    @property
    def healthy(self) -> bool:
        """False when the replaying task has died."""
        return self._task is not None and not self._task.done()

    @property
    def writable(self) -> bool:
        """False when a message could not be made durable a moment ago."""
        return self._failed_at is None or time.monotonic() - self._failed_at > FAILURE_SECONDS

    @property
    def depth(self) -> int:
        """Bodies that wait."""
        return sum(self._waiting.values())

    def holds(self, tenant_id: int, session_id: int) -> bool:
        """Whether earlier bodies of this session wait: a later one must not overtake them."""
        return _key(tenant_id, session_id) in self._waiting

    async def append(self, tenant_id: int, session_id: int, body: object) -> None:
        """Durable when this returns. Raises JournalError."""
        key = _key(tenant_id, session_id)
        # Counted before it is written, so that the next request sees it whichever is quicker.
        self._waiting[key] = self._waiting.get(key, 0) + 1
        self._writing += 1
        self._appends += 1
        work = asyncio.ensure_future(asyncio.to_thread(self._journal.append, KIND, key, orjson.dumps(body)))
        work.add_done_callback(lambda done: self._written(key, done))
        try:
            # A sender that goes away must not leave us in doubt of what its thread still writes.
            await asyncio.shield(work)
        except JournalError as error:
            self._failed_at = time.monotonic()
            log.error("spool.write_failed", tenant_id=tenant_id, session_id=session_id, error=error.detail)
            raise
        self._failed_at = None
        self._gauge()
        self._look.set()
        log.info("spool.appended", tenant_id=tenant_id, session_id=session_id, result=self.depth)

    def _written(self, key: str, done: asyncio.Future[int]) -> None:
        self._writing -= 1
        if done.cancelled() or done.exception() is not None:
            self._forget(key)

    async def store(self, converted: Converted, *, within: float = SUBMIT_SECONDS) -> list[Stored]:
        """Into the database, messages first. Raises DatabaseUnavailable (also after too long: the rows are idempotent)."""
        try:
            async with asyncio.timeout(within):
                stored = await self._ingest.submit(converted.messages) if converted.messages else []
                if converted.updates:
                    await self._ingest.apply_status(converted.updates)
        except Exception as error:
            if is_transient(error):
                raise DatabaseUnavailable("the database cannot be reached right now") from error
            raise
        self._failed_at = None
        return stored

    async def context(self, tenant_id: int, session_id: int) -> SessionContext:
        """What a converter needs to know of the session. Raises NotFound."""
        async with self._db.worker() as conn:
            return context_of(await sessions.get(conn, tenant_id, session_id))

    # ---- replaying ----

    async def _replay_forever(self) -> None:
        pruned = time.monotonic()
        while True:
            wait = POLL_SECONDS
            try:
                if self._waiting and self._db.connected:
                    while await self._replay():
                        pass
                if time.monotonic() - pruned > PRUNE_SECONDS:
                    pruned = time.monotonic()
                    await asyncio.to_thread(self._journal.prune)
            except JournalError as error:
                log.error("spool.read_failed", error=error.detail)
                wait = RETRY_SECONDS
            except Exception as error:
                # Whatever it is, the entries are still on disk: an owner that gives up would lose them.
                (log.warning if is_transient(error) else log.error)(
                    "spool.replay_failed", error=repr(error)[:300]
                )
                wait = RETRY_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._look.wait()
            self._look.clear()

    def _look_back(self) -> None:
        """Everything of the last day once more, also what was stored already: a database that was set back to before that
        gets it again, any other one knows it by its key. Blocking."""
        self._journal.prune()
        again = self._journal.replay(time.time() - KEEP_SECONDS)
        self._waiting = self._on_disk()
        self._gauge()
        if self._waiting:
            log.info("spool.found", count=self.depth, result=f"{again} of them were stored before")

    async def _replay(self) -> bool:
        """Everything that waits; whether there may be more."""
        after, done = 0, 0
        while True:
            entries = await asyncio.to_thread(self._journal.pending, after, BATCH)
            # Those that failed too often are set aside until the next start; the depth keeps telling.
            batch = [entry for entry in entries if self._tries.get(entry.number, 0) < MAX_TRIES]
            if not await self._replay_together(batch):
                for entry in batch:
                    done += await self._replay_one(entry)
            else:
                done += len(batch)
            if len(entries) < BATCH:
                break
            after = entries[-1].number
        await self._recount()
        return done > 0 and self.depth > len([n for n in self._tries.values() if n >= MAX_TRIES])

    async def _replay_together(self, batch: list[Entry]) -> bool:
        """Store many bodies as one; False when one of them stands in the way, so that they are tried one by one."""
        contexts: dict[str, SessionContext] = {}
        found: list[Converted] = []
        try:
            for entry in batch:
                if entry.key not in contexts:
                    tenant_id, _, session_id = entry.key.partition("/")
                    contexts[entry.key] = await self.context(int(tenant_id), int(session_id))
                found.append(convert(self._registry, contexts[entry.key], orjson.loads(entry.payload)))
            stored = await self.store(
                Converted(
                    tuple(message for one in found for message in one.messages),
                    tuple(update for one in found for update in one.updates),
                ),
                within=REPLAY_SECONDS,
            )
        except Exception as error:
            if is_transient(error):
                raise
            return False
        await self._let_go(batch)
        duplicates = sum(one.duplicate for one in stored)
        if batch:
            log.info(
                "spool.replayed", count=len(batch), result=len(stored) - duplicates, duplicates=duplicates
            )
        return True

    async def _replay_one(self, entry: Entry) -> bool:
        tenant_id, _, session_id = entry.key.partition("/")
        ids = {"tenant_id": int(tenant_id), "session_id": int(session_id)}
        try:
            context = await self.context(int(tenant_id), int(session_id))
            converted = convert(self._registry, context, orjson.loads(entry.payload))
            stored = await self.store(converted, within=REPLAY_SECONDS)
        except NotFound:
            log.error(
                "spool.dropped", **ids, result="no such session", action="nothing can store these messages"
            )
        except Exception as error:
            if is_transient(error):
                raise
            self._tries[entry.number] = tries = self._tries.get(entry.number, 0) + 1
            log.error(
                "spool.entry_failed", **ids, result=f"try {tries} of {MAX_TRIES}", error=repr(error)[:300]
            )
            return False
        else:
            duplicates = sum(one.duplicate for one in stored)
            log.info("spool.replayed", **ids, result=len(stored) - duplicates, duplicates=duplicates)
        await self._let_go([entry])
        return True

    async def _let_go(self, entries: list[Entry]) -> None:
        """They are committed."""
        await asyncio.to_thread(self._journal.release, [entry.number for entry in entries])
        for entry in entries:
            self._tries.pop(entry.number, None)
            self._forget(entry.key)
        self._gauge()

    async def _recount(self) -> None:
        """Put right what the counting may have missed. Not beside an append: the disk would be read without it, and a body
        that is on the disk and not in the count is looked at by nobody."""
        if self._writing:
            return
        before = self._appends
        waiting = await asyncio.to_thread(self._on_disk)
        if self._appends == before:
            self._waiting = waiting
            self._gauge()

    def _on_disk(self) -> dict[str, int]:
        """What waits, read from the disk. Blocking."""
        waiting: dict[str, int] = {}
        after = 0
        while True:
            entries = self._journal.pending(after, 500)
            for entry in entries:
                waiting[entry.key] = waiting.get(entry.key, 0) + 1
                after = entry.number
            if len(entries) < 500:
                return waiting

    def _forget(self, key: str) -> None:
        left = self._waiting.get(key, 0) - 1
        if left > 0:
            self._waiting[key] = left
        else:
            self._waiting.pop(key, None)

    def _gauge(self) -> None:
        self._metrics.journal_depth.labels("spool").set(self.depth)


def convert(registry: Mapping[str, ChannelKind], context: SessionContext, body: object) -> Converted:
    """The channel's own converter over one body. A channel without one takes nothing."""
    kind = registry.get(context.channel)
    if kind is None or kind.webhook is None:
        return Converted(errors=((0, f"channel {context.channel} takes no webhooks"),))
    return kind.webhook(body, context)


def context_of(session: sessions.SessionRow) -> SessionContext:
    """For converting alone: without credentials and folder, which a converter never needs."""
    return SessionContext(
        tenant_id=TenantId(session.tenant_id),
        session_id=SessionId(session.id),
        channel=session.channel_type,
        identifier=session.identifier,
        name=session.name,
        metadata=session.metadata,
        credentials={},
        folder=Path(),
    )


def _key(tenant_id: int, session_id: int) -> str:
    return f"{tenant_id}/{session_id}"
