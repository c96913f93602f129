"""The one way in: messages of every channel, in micro-batches, into et_messages. Committed or duplicate when it returns.

Never acknowledges and never forgets by itself: whoever gets DatabaseUnavailable keeps the message and brings it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import asyncpg

from core import faults
from core import ingest_batch as batch
from core import log as logs
from core.batcher import Batcher, reason
from core.channel import Cursor, InboundMessage, SessionId, StatusUpdate, Stored
from core.database import Database
from core.errors import DatabaseUnavailable, GatewayError, Invalid
from core.ingest_batch import CursorMove, Work, Written
from core.ingest_report import Report
from core.leads import LeadCache, resolve
from core.metrics import Metrics
from core.prepare import Prepared, prepare
from core.receipts import Receipts
from core.rush import Rush
from core.store.audit import Conn

log = logs.get(part="ingest")

ROUNDS = 6
"""How often a batch meets leads that changed under it before it is put down to something else."""


class Ingest:
    """`start`, `submit` from any number of tasks, `stop`. A session's messages are stored in the order submitted."""

    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        *,
        flushers: int = 2,
        batch_size: int = 100,
        patience: float = 15.0,
        cache_size: int = 50_000,
    ) -> None:
        """`patience`: seconds a batch is repeated while the database is away before its submitters are told."""
        self._db = db
        self._report = Report(metrics)
        self._cache = LeadCache(cache_size)
        self._batcher: Batcher[Work, Stored | None] = Batcher(
            "ingest", self._write, lanes=flushers, size=batch_size, patience=patience
        )
        self._receipts = Receipts(db, patience=patience)
        self.rush = Rush()
        """How many come in at once: what can wait lets them pass."""

    # ---- life ----

    async def start(self) -> None:
        await self._batcher.start()
        await self._receipts.start()

    async def stop(self, limit: float = 5.0) -> None:
        """Write what waits for at most `limit` seconds; the rest is refused with DatabaseUnavailable."""
        await asyncio.gather(self._batcher.stop(limit), self._receipts.stop(limit))

    @property
    def healthy(self) -> bool:
        """False when a flusher has died. A database that is away does not make it unhealthy."""
        return self._batcher.healthy and self._receipts.healthy

    @property
    def depth(self) -> int:
        """Messages submitted and not committed yet."""
        return self._batcher.depth

    # ---- in ----

    async def submit(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        """Store them; one result per message, in order. Raises DatabaseUnavailable when any could not be stored now
        (bring all of them again: those that were stored are duplicates then), else Invalid for the first bad one."""
        outcomes = await self.submit_each(messages)
        errors = [outcome for outcome in outcomes if isinstance(outcome, GatewayError)]
        if errors:
            raise next((e for e in errors if isinstance(e, DatabaseUnavailable)), errors[0])
        return [outcome for outcome in outcomes if isinstance(outcome, Stored)]

    async def submit_each(self, messages: Sequence[InboundMessage]) -> list[Stored | GatewayError]:
        """As `submit`, but every message has its own outcome: Stored, Invalid or DatabaseUnavailable."""
        futures = [self._enqueue(message) for message in messages]
        return [
            await self._settled(message, future) for message, future in zip(messages, futures, strict=True)
        ]

    def _enqueue(self, message: InboundMessage) -> asyncio.Future[Stored | None] | GatewayError:
        self._report.received(message.tenant_id)
        try:
            return self._batcher.submit(message.session_id, prepare(message))
        except GatewayError as error:
            return error

    async def _settled(
        self, message: InboundMessage, future: asyncio.Future[Stored | None] | GatewayError
    ) -> Stored | GatewayError:
        if isinstance(future, GatewayError):
            error = future
        else:
            try:
                stored = await future
                assert stored is not None
                return stored
            except GatewayError as raised:
                error = raised
        self._report.failed(message, error)
        return error

    async def advance(self, session_id: SessionId, cursor: Cursor) -> None:
        """Move a pull channel's cursor without a message, after everything its session has submitted.

        Raises DatabaseUnavailable, or Invalid when the session does not exist."""
        await self._batcher.submit(session_id, CursorMove(session_id, cursor))

    async def apply_status(self, updates: Sequence[StatusUpdate]) -> None:
        """Receipts: move our messages forward. Raises DatabaseUnavailable. See core.receipts."""
        await self._receipts.apply(updates)

    # ---- a batch ----

    async def _write(self, everything: Sequence[Work]) -> list[Stored | None]:
        """Store a batch, completely. Safe to repeat."""
        self.rush.note(len(everything))
        outcomes: list[Stored | None] = [None] * len(everything)
        todo = list(range(len(everything)))
        for _ in range(ROUNDS):
            works = [everything[n] for n in todo]
            try:
                written = await self._write_once(works)
            except (
                asyncpg.ForeignKeyViolationError,
                asyncpg.UniqueViolationError,
                asyncpg.NoDataFoundError,
            ) as error:
                # A lead was merged, erased or taken meanwhile. A session that is gone stays gone.
                if _names_session(error):
                    if len(works) > 1:
                        raise
                    raise _no_session(works[0], error) from error
                # Others who keep changing the same leads are a reason to wait, not to refuse the message.
                gone = isinstance(error, asyncpg.ForeignKeyViolationError)
                last: Exception = error if gone else asyncpg.SerializationError(reason(error))
                self._forget(works)
                continue
            left = []
            for n, outcome in zip(todo, written.outcomes, strict=True):
                outcomes[n] = outcome
                if outcome is None and isinstance(everything[n], Prepared):
                    left.append(n)
            self._report.stored(works, written)
            if not left:
                return outcomes
            # Neither new nor found: its lead was merged between our two statements.
            self._forget([everything[n] for n in left])
            todo = left
            last = asyncpg.SerializationError("neither new nor found")
        raise last

    def _forget(self, works: Iterable[Work]) -> None:
        self._cache.forget(work.wanted for work in works if isinstance(work, Prepared))

    async def _write_once(self, works: Sequence[Work]) -> Written:
        started = time.monotonic()
        leads = [self._cache.get(work.wanted) if isinstance(work, Prepared) else None for work in works]
        plain = all(
            lead is not None and isinstance(work, Prepared) and work.cursor is None and not work.seen_outbound
            for work, lead in zip(works, leads, strict=True)
        )
        async with self._db.worker() as conn:
            if plain:
                # Nothing but messages of known leads: one statement, one round trip, its own commit.
                faults.point("ingest.before_insert")
                written = Written([None] * len(works))
                await batch.store_rows(conn, works, [lead or 0 for lead in leads], written)
                faults.point("ingest.after_commit")
            else:
                written = await self._transaction(conn, works)
        log.debug(
            "batch.written", count=len(works), duration_ms=round((time.monotonic() - started) * 1000, 1)
        )
        return written

    async def _transaction(self, conn: Conn, works: Sequence[Work]) -> Written:
        written = Written([None] * len(works))
        async with conn.transaction():
            await batch.recognise(conn, works, written)
            people = batch.people_of(works, written)
            resolved = await resolve(conn, people) if people else {}
            lead_ids = batch.leads_of(works, resolved, written)
            faults.point("ingest.before_insert")
            await batch.store_rows(conn, works, lead_ids, written)
            await batch.hand_over(conn, works, written)
            await batch.move_cursors(conn, works)
            faults.point("ingest.before_commit")
        faults.point("ingest.after_commit")
        self._cache.remember(resolved)
        if written.echoes:
            # Receipts may have come before anybody knew the id; a fresh transaction, see core.receipts.
            await self._receipts.sweep(conn)
        return written


def _names_session(error: asyncpg.PostgresError) -> bool:
    return "session" in (getattr(error, "constraint_name", None) or "")


def _no_session(work: Work, error: asyncpg.PostgresError) -> Invalid:
    if isinstance(work, CursorMove):
        return Invalid(f"session {work.session_id} does not exist")
    invalid = Invalid(
        f"session {work.row.session_id} does not exist in tenant {work.row.tenant_id} ({reason(error)})"
    )
    invalid.__cause__ = error
    return invalid
