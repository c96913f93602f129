"""Audit rows that cannot wait for the database: written now, or kept on disk while it is away and written later.

For denials above all: whoever is refused during an outage is in the log afterwards. Never raises for an outage.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from core import log as logs
from core.database import Database, is_transient
from core.errors import JournalError
from core.journal import Entry, Journal
from core.store import audit

log = logs.get(part="audit")

KIND = "audit"
BATCH = 100
WRITE_SECONDS = 2.0
"""Whoever is being refused does not wait longer than this for the row."""
POLL_SECONDS = 1.0
PRUNE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Happened:
    """One row, with the time at which it happened."""

    event: audit.Event
    tenant_id: int | None
    actor: str
    subject_type: str
    subject_id: str | None
    detail: dict[str, Any]
    at: datetime


class AuditTrail:
    """`await start()`, `await stop()`, `healthy`. Without a journal it only writes, and raises when it cannot."""

    def __init__(self, db: Database, journal: Journal | None = None) -> None:
        self._db = db
        self._journal = journal
        self._look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._look.set()  # what an earlier life left
        self._task = asyncio.create_task(self._replay_forever(), name="audit-trail")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=2)
            self._task = None

    @property
    def healthy(self) -> bool:
        """False when the replaying task has died."""
        return self._task is not None and not self._task.done()

    async def write(
        self,
        event: audit.Event,
        *,
        tenant_id: int | None,
        actor: str,
        subject_type: str,
        subject_id: int | str | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """As `core.store.audit.write`; durable when it returns."""
        subject = None if subject_id is None else str(subject_id)
        happened = Happened(event, tenant_id, actor, subject_type, subject, detail or {}, datetime.now(UTC))
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._insert(happened)
        except Exception as error:
            if self._journal is None or not is_transient(error):
                raise
            await self._keep(self._journal, happened)

    async def _insert(self, happened: Happened, *, again: bool = False) -> None:
        async with self._db.worker() as conn:
            await audit.write_past(conn, **asdict(happened), again=again)

    async def _keep(self, journal: Journal, happened: Happened) -> None:
        try:
            await asyncio.to_thread(journal.append, KIND, happened.event, orjson.dumps(asdict(happened)))
        except JournalError as error:
            # Neither database nor disk: the log line is all there is.
            log.error(
                "audit.unwritten", action=happened.event, error=error.detail, tenant_id=happened.tenant_id
            )
            return
        log.info("audit.kept", action=happened.event, result="written when the database is back")
        self._look.set()

    async def _replay_forever(self) -> None:
        waiting = True
        pruned = 0.0
        clock = asyncio.get_running_loop().time
        while True:
            if not waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PRUNE_SECONDS):
                        await self._look.wait()
            self._look.clear()
            try:
                if self._journal is not None and self._db.connected:
                    waiting = await self._replay(self._journal)
                    if clock() - pruned > PRUNE_SECONDS:
                        pruned = clock()
                        await asyncio.to_thread(self._journal.prune)
                else:
                    waiting = self._journal is not None
            except Exception as error:
                waiting = True
                (log.warning if is_transient(error) else log.error)("audit.replay_failed", error=repr(error))
            if waiting:
                await asyncio.sleep(POLL_SECONDS)

    async def _replay(self, journal: Journal) -> bool:
        """One batch; whether there may be more."""
        entries = await asyncio.to_thread(journal.pending, 0, BATCH)
        for entry in entries:
            await self._replay_one(entry)
            await asyncio.to_thread(journal.release, [entry.number])
        if entries:
            log.info("audit.replayed", count=len(entries))
        return len(entries) == BATCH

    async def _replay_one(self, entry: Entry) -> None:
        try:
            kept = orjson.loads(entry.payload)
            happened = Happened(**{**kept, "at": datetime.fromisoformat(kept["at"])})
            # The first try may have got through without our hearing of it.
            await self._insert(happened, again=True)
        except Exception as error:
            if is_transient(error):
                raise
            # Its tenant is gone, say. Once more would end the same.
            log.error("audit.dropped", action=entry.key, error=repr(error)[:300])
