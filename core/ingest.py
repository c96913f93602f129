"""The one way in: messages of every channel, in micro-batches, into et_messages. Committed or duplicate when it returns.

Never acknowledges and never forgets by itself: whoever gets DatabaseUnavailable keeps the message and brings it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import asyncpg
from asyncpg import Record

from core import faults
from core import log as logs
from core.batcher import Batcher, reason
from core.channel import Cursor, InboundMessage, LeadId, MessageId, SessionId, StatusUpdate, Stored, ThreadId
from core.database import Database
from core.errors import DatabaseUnavailable, GatewayError, Invalid
from core.leads import LeadCache, Resolved, resolve
from core.metrics import Metrics
from core.prepare import Prepared, prepare
from core.receipts import Receipts
from core.store import messages as store
from core.store import threads
from core.store.audit import Conn
from core.store.leads import Key
from core.store.messages import Echo, MessageKey

log = logs.get(part="ingest")

CHUNK = 1000
"""Of a long list (imported history) only so many wait at once, so that what people write now is not behind all of it."""
ROUNDS = 6
"""How often a batch meets leads that changed under it before it is put down to something else."""
ERASED = Stored(MessageId(0), ThreadId(0), LeadId(0), duplicate=True, erased=True)


@dataclass(frozen=True, slots=True)
class CursorMove:
    """A pull channel continues elsewhere, without a message."""

    session_id: int
    cursor: Cursor


Work: TypeAlias = Prepared | CursorMove


@dataclass(slots=True)
class _Written:
    """What one transaction did, told to the log and the metrics once it is committed."""

    outcomes: list[Stored | None]
    fresh: set[int] = field(default_factory=set)
    """Positions of what was new, or filled a placeholder."""
    filled: int = 0
    echoes: int = 0
    handed_over: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)


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
        self._metrics = metrics
        self._count = _Counters(metrics)
        self._cache = LeadCache(cache_size)
        self._batcher: Batcher[Work, Stored | None] = Batcher(
            "ingest", self._write, lanes=flushers, size=batch_size, patience=patience
        )
        self._receipts = Receipts(db, patience=patience)

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
        self._count.received(message.tenant_id)
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
        self._failed(message, error)
        return error

    async def advance(self, session_id: SessionId, cursor: Cursor) -> None:
        """Move a pull channel's cursor without a message, after everything its session has submitted.

        Raises DatabaseUnavailable, or Invalid when the session does not exist."""
        await self._batcher.submit(session_id, CursorMove(session_id, cursor))

    async def apply_status(self, updates: Sequence[StatusUpdate]) -> None:
        """Receipts: move our messages forward. Raises DatabaseUnavailable. See core.receipts."""
        await self._receipts.apply(updates)

    def _failed(self, message: InboundMessage, error: GatewayError) -> None:
        kind = error.code if error.__cause__ is None or isinstance(error, DatabaseUnavailable) else None
        self._metrics.write_errors.labels(
            str(message.tenant_id), kind or type(error.__cause__).__name__
        ).inc()
        if not isinstance(error, DatabaseUnavailable):
            log.error(
                "message.refused",
                tenant_id=message.tenant_id,
                session_id=message.session_id,
                error=error.detail,
                result="refused",
                action="the original stays in the journal",
            )

    # ---- a batch ----

    async def _write(self, batch: Sequence[Work]) -> list[Stored | None]:
        """Store a batch, completely. Safe to repeat."""
        outcomes: list[Stored | None] = [None] * len(batch)
        todo = list(range(len(batch)))
        for _ in range(ROUNDS):
            works = [batch[n] for n in todo]
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
                if outcome is None and isinstance(batch[n], Prepared):
                    left.append(n)
            self._tell(works, written)
            if not left:
                return outcomes
            # Neither new nor found: its lead was merged between our two statements.
            self._forget([batch[n] for n in left])
            todo = left
            last = asyncpg.SerializationError("neither new nor found")
        raise last

    def _forget(self, works: Iterable[Work]) -> None:
        self._cache.forget(work.wanted for work in works if isinstance(work, Prepared))

    async def _write_once(self, works: Sequence[Work]) -> _Written:
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
                written = _Written([None] * len(works))
                await self._store(conn, works, [lead or 0 for lead in leads], written)
                faults.point("ingest.after_commit")
            else:
                written = await self._transaction(conn, works)
        log.debug(
            "batch.written", count=len(works), duration_ms=round((time.monotonic() - started) * 1000, 1)
        )
        return written

    async def _transaction(self, conn: Conn, works: Sequence[Work]) -> _Written:
        written = _Written([None] * len(works))
        async with conn.transaction():
            await self._recognise(conn, works, written)
            people = [
                work.wanted
                for work, outcome in zip(works, written.outcomes, strict=True)
                if isinstance(work, Prepared) and outcome is None
            ]
            resolved = await resolve(conn, people) if people else {}
            lead_ids = self._leads(works, resolved, written)
            faults.point("ingest.before_insert")
            await self._store(conn, works, lead_ids, written)
            await self._hand_over(conn, works, written)
            await self._move_cursors(conn, works)
            faults.point("ingest.before_commit")
        faults.point("ingest.after_commit")
        self._cache.remember(resolved)
        if written.echoes:
            # Receipts may have come before anybody knew the id; a fresh transaction, see core.receipts.
            await self._receipts.sweep(conn)
        return written

    @staticmethod
    def _leads(works: Sequence[Work], resolved: dict[Key, Resolved], written: _Written) -> list[int]:
        """The lead of each; what was said before its person was erased has its outcome now."""
        lead_ids = [0] * len(works)
        for n, work in enumerate(works):
            if isinstance(work, Prepared) and written.outcomes[n] is None:
                entry = resolved[work.wanted.keys[0]]
                lead_ids[n] = entry.lead_id
                if entry.erased(work.wanted):
                    written.outcomes[n] = ERASED
        return lead_ids

    async def _recognise(self, conn: Conn, works: Sequence[Work], written: _Written) -> None:
        """Echoes of our own queue items: the item moves on, no second row is made."""
        seen = [
            (n, work.echo)
            for n, work in enumerate(works)
            if isinstance(work, Prepared) and work.seen_outbound
        ]
        if not seen:
            return
        for position, item in (await store.own(conn, [echo for _, echo in seen])).items():
            n, echo = seen[position]
            await self._settle(conn, item, echo)
            written.outcomes[n] = Stored(
                MessageId(item["id"]), ThreadId(item["thread_id"]), LeadId(item["lead_id"]), duplicate=True
            )
            written.echoes += 1

    @staticmethod
    async def _settle(conn: Conn, item: Record, echo: Echo) -> None:
        if item["status"] in ("failed", "cancelled"):
            log.warning(
                "send.contradicted",
                tenant_id=echo.tenant_id,
                session_id=echo.session_id,
                queue_id=item["queue_id"],
                message_id=item["id"],
                result=item["status"],
                action="it went out all the same; do not send it again",
            )
            return
        if item["status"] == "queued":
            if echo.queue_id != item["queue_id"]:
                return  # an id alone does not prove which try it was
            await store.claim_proven(conn, item["queue_id"])
        await store.prove_sent(conn, [item["id"]])
        if item["channel_message_id"].startswith("out_"):
            await store.merge_echo(conn, item["id"], echo.channel_message_id)

    async def _store(
        self, conn: Conn, works: Sequence[Work], lead_ids: Sequence[int], written: _Written
    ) -> None:
        """Insert what has no outcome yet, then look up what was there already."""
        same: dict[MessageKey, list[int]] = {}
        for n, work in enumerate(works):
            if isinstance(work, Prepared) and written.outcomes[n] is None:
                row = work.row
                key = (row.tenant_id, row.session_id, lead_ids[n], row.channel_message_id)
                same.setdefault(key, []).append(n)
        if not same:
            return
        # Twice in one batch: what can be read goes before a placeholder, else the first.
        chosen = {
            key: min(ns, key=lambda n: (_prepared(works[n]).row.placeholder, n)) for key, ns in same.items()
        }
        # By tenant, session, lead, so that two gateways lock threads and keys in one order; by arrival inside a thread.
        ordered = sorted(same, key=lambda key: (key[:3], same[key][0]))
        rows = [_prepared(works[chosen[key]]).row for key in ordered]
        for record in await store.insert(conn, rows, [key[2] for key in ordered]):
            key = _key(record)
            self._outcome(written, same[key], chosen[key], record, fresh=True)
        missing = [key for key, n in chosen.items() if written.outcomes[n] is None]
        if not missing:
            return
        for record in await store.find(conn, missing):
            key = _key(record)
            row = _prepared(works[chosen[key]]).row
            filled = (
                record["placeholder"] and not row.placeholder and await store.fill(conn, record["id"], row)
            )
            if row.direction == "outbound" and record["delivery_status"] in ("dispatching", "unknown"):
                written.echoes += await store.prove_sent(conn, [record["id"]])
            written.filled += bool(filled)
            self._outcome(written, same[key], chosen[key], record, fresh=bool(filled))

    @staticmethod
    def _outcome(
        written: _Written, positions: list[int], chosen: int, record: Record, *, fresh: bool
    ) -> None:
        for n in positions:
            new = fresh and n == chosen
            written.outcomes[n] = Stored(
                MessageId(record["id"]),
                ThreadId(record["thread_id"]),
                LeadId(record["lead_id"]),
                duplicate=not new,
            )
            if new:
                written.fresh.add(n)

    async def _hand_over(self, conn: Conn, works: Sequence[Work], written: _Written) -> None:
        """Somebody answered on the phone: the thread is theirs."""
        typed = [
            (outcome.thread_id, work.row.content)
            for n, (work, outcome) in enumerate(zip(works, written.outcomes, strict=True))
            if n in written.fresh
            and isinstance(work, Prepared)
            and work.typed_on_phone
            and outcome is not None
        ]
        if not typed:
            return
        ours = await threads.awaiting_same_text(conn, typed)
        written.handed_over = sorted({thread_id for thread_id, _ in typed} - ours)
        if written.handed_over:
            written.cancelled = await threads.hand_to_person(conn, written.handed_over)

    @staticmethod
    async def _move_cursors(conn: Conn, works: Sequence[Work]) -> None:
        moves = [
            (work.session_id if isinstance(work, CursorMove) else work.row.session_id, work.cursor)
            for work in works
            if work.cursor is not None
        ]
        if not moves:
            return
        existing = await store.set_cursors(conn, moves)
        if len(works) == 1 and moves[0][0] not in existing:
            raise Invalid(f"session {moves[0][0]} does not exist")

    # ---- after the commit ----

    def _tell(self, works: Sequence[Work], written: _Written) -> None:
        now = time.time()
        fresh: list[Stored] = []
        duplicates = erased = 0
        for n, (work, outcome) in enumerate(zip(works, written.outcomes, strict=True)):
            if not isinstance(work, Prepared) or outcome is None:
                continue
            if n in written.fresh:
                fresh.append(outcome)
                self._count.written(work.row, max(0.0, now - work.message.arrived_at))
            elif outcome.erased:
                erased += 1
            else:
                duplicates += 1
                self._metrics.duplicates.labels(work.row.channel).inc()
        if not fresh and not duplicates and not erased:
            return
        sessions = sorted({work.row.session_id for work in works if isinstance(work, Prepared)})
        tenants = sorted({work.row.tenant_id for work in works if isinstance(work, Prepared)})
        first = next(work for work in works if isinstance(work, Prepared))
        fields: dict[str, object] = {
            "count": len(fresh),
            "duplicates": duplicates,
            "message_ids": [stored.message_id for stored in fresh],
            "duration_ms": round((now - first.message.arrived_at) * 1000, 1),
            "result": "stored",
        }
        if len(tenants) == 1:
            fields["tenant_id"] = tenants[0]
        else:
            fields["tenant_ids"] = tenants
        if len(sessions) == 1:
            fields["session_id"] = sessions[0]
        else:
            fields["session_ids"] = sessions
        if erased:
            fields["erased"] = erased
        if written.filled:
            fields["filled"] = written.filled
        if written.echoes:
            fields["own_echoes"] = written.echoes
        log.info("messages.stored", **fields)
        if written.handed_over:
            log.info(
                "threads.handed_over",
                thread_ids=written.handed_over,
                cancelled_queue_ids=written.cancelled,
                result="a person answered on the phone",
            )


class _Counters:
    """The metrics of the hot path, with their labels looked up once per tenant instead of four times a message."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._received: dict[int, Callable[[], None]] = {}
        self._written: dict[
            tuple[int, str, str], tuple[Callable[[], None], Callable[[], None], Callable[[float], None]]
        ]
        self._written = {}

    def received(self, tenant_id: int) -> None:
        count = self._received.get(tenant_id)
        if count is None:
            count = self._received[tenant_id] = self._metrics.received.labels(str(tenant_id)).inc
        count()

    def written(self, row: store.Row, seconds: float) -> None:
        key = (row.tenant_id, row.channel, row.direction)
        counts = self._written.get(key)
        if counts is None:
            tenant = str(row.tenant_id)
            counts = self._written[key] = (
                self._metrics.written.labels(tenant).inc,
                self._metrics.messages.labels(row.channel, row.direction).inc,
                self._metrics.write_latency.labels(tenant).observe,
            )
        counts[0]()
        counts[1]()
        counts[2](seconds)


def _prepared(work: Work) -> Prepared:
    assert isinstance(work, Prepared)
    return work


def _key(record: Record) -> MessageKey:
    return (
        record["tenant_id"],
        record["channel_session_id"],
        record["lead_id"],
        record["channel_message_id"],
    )


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
