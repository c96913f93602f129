"""Bulk import of history: messages of the past, in chunks, beside live traffic and behind it. Answers and re-opens nothing.

Counts exactly, also over crashes: each chunk is one small transaction that stores rows and moves the import's own row
`et_imports`. Never reads a format: sources are iterators of messages (see core.history_lines for JSON lines).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import asyncpg

from core import faults
from core import log as logs
from core.batcher import reason
from core.channel import InboundMessage, SessionId, TenantId
from core.database import Database, connect, is_transient, is_unavailable
from core.database_check import WORKER_ROLE
from core.errors import Conflict, DatabaseUnavailable, GatewayError, Invalid, NotFound
from core.leads import LeadCache, Resolved, resolve
from core.prepare import Prepared, prepare
from core.store import history as store
from core.store.audit import Conn

log = logs.get(part="history")

CHUNK_SECONDS = 0.06
"""How long a chunk's transaction should take: somebody who writes just now may wait for its end."""
FIRST_CHUNK, SMALLEST_CHUNK, LARGEST_CHUNK = 250, 100, 1000
CHUNK_BYTES = 4 << 20
REST = 0.1
"""Of the time a chunk took, this share passes before the next: other writers of the database get their turn."""
CROWD = 10
"""More live messages than this waiting, and history waits too, for at most `LONGEST_WAIT` seconds a chunk."""
LONGEST_WAIT = 2.0
LOOK_SECONDS = 0.01
BREATH = 50
"""After so many messages of a source that never waits, the event loop gets a turn."""
ROUNDS = 6
WRONG_NAMED = 100
"""How many wrong lines are named; all are counted."""
PATIENCE = 60.0
FINISH_SECONDS = 5.0

_SESSION = {
    "application_name": "channel-gateway import",
    "statement_timeout": "30000",
    "lock_timeout": "5000",
    "idle_in_transaction_session_timeout": "60000",
    "timezone": "UTC",
    # Plans made while a table is small stay: by index, whatever its size.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}


class Entry(NamedTuple):
    """A message and where in its source it stands, so that it can be named."""

    line: int
    message: InboundMessage


@dataclass(frozen=True, slots=True)
class Wrong:
    """A line that cannot be stored, and why."""

    line: int
    detail: str


Item: TypeAlias = InboundMessage | Entry | Wrong


@dataclass(frozen=True, slots=True)
class Counts:
    """How far an import is: what is committed, nothing else. `lines = stored + duplicates + wrong`. What somebody said
    before they were erased counts as a duplicate: it was here once, and stays away."""

    lines: int = 0
    stored: int = 0
    duplicates: int = 0
    wrong: int = 0

    def plus(self, stored: int, duplicates: int, wrong: int) -> Counts:
        return Counts(
            self.lines + stored + duplicates + wrong,
            self.stored + stored,
            self.duplicates + duplicates,
            self.wrong + wrong,
        )


class Interrupted(GatewayError):
    """A source broke off. What was stored before stays; importing it all again stores only the rest."""

    code = "interrupted"


class _Refused(Exception):
    """The database will not have one of these rows."""


class _Moved(Exception):
    """The import's row is not where this chunk begins: it was counted already, or the row is gone."""


_OF_A_ROW = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
"""Errors that one row can be the reason of. Others are nobody's line."""


class _Ready(NamedTuple):
    line: int
    prepared: Prepared


class HistoryImport:
    """One import: `await HistoryImport(db, …).run(source)`, once. `counts` and `wrong` say how it stands at any time."""

    def __init__(
        self,
        db: Database,
        *,
        tenant_id: int,
        session_id: int,
        kind: str = "file",
        actor: str = "system",
        total: int | None = None,
        live_depth: Callable[[], int] = lambda: 0,
        progress: Callable[[Counts], None] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """`kind`: where it comes from (`file`, `sync`, `span`). `live_depth`: live messages that wait for the database in
        this process (`ingest.depth`). `patience`: seconds a chunk is tried while the database is away."""
        self._db = db
        self._tenant_id = TenantId(tenant_id)
        self._session_id = SessionId(session_id)
        self._kind = kind
        self._actor = actor
        self._total = total
        self._live_depth = live_depth
        self._progress = progress
        self._patience = patience
        self._cache = LeadCache()
        self._conn: asyncpg.Connection[asyncpg.Record] | None = None
        self._size = FIRST_CHUNK
        self._log = log.bind(tenant_id=tenant_id, session_id=session_id)
        self.import_id = 0
        self.counts = Counts()
        self.wrong: list[Wrong] = []

    async def run(self, source: AsyncIterable[Item]) -> Counts:
        """Store all of it. Raises NotFound (no such session), DatabaseUnavailable, Conflict (somebody removed the import
        or its session), and whatever the source raises; `et_imports` then says how far it came."""
        await self._begin()
        started = time.monotonic()
        try:
            await self._chunks(source)
        except BaseException as error:
            await self._end_badly(error)
            raise
        else:
            await self._finish("finished", None)
        finally:
            await self._disconnect()
            self._log.info(
                "import.ended",
                import_id=self.import_id,
                count=self.counts.stored,
                duplicates=self.counts.duplicates,
                wrong=self.counts.wrong,
                duration_ms=round((time.monotonic() - started) * 1000),
            )
        return self.counts

    # ---- the import's own row ----

    async def _begin(self) -> None:
        async with self._db.worker() as conn:
            try:
                self.import_id = await store.begin(
                    conn,
                    self._tenant_id,
                    self._session_id,
                    kind=self._kind,
                    actor=self._actor,
                    total=self._total,
                )
            except asyncpg.ForeignKeyViolationError:
                raise NotFound(
                    f"session {self._session_id} does not exist in tenant {self._tenant_id}"
                ) from None
        self._log.info("import.started", import_id=self.import_id, action=self._kind)

    async def _end_badly(self, error: BaseException) -> None:
        status: store.Status = "interrupted"
        match error:
            case Interrupted() | DatabaseUnavailable():
                text = error.detail
            case GatewayError():
                status, text = "failed", error.detail
            case Exception():
                status, text = "failed", f"a fault ended it ({reason(error)}); what is stored stays"
            case _:
                text = "it was stopped; begin again to go on"
        try:
            await self._finish(status, text)
        except Exception as also:
            # Whoever reads the row sees that nothing comes any more.
            self._log.warning("import.end_unsaid", import_id=self.import_id, error=reason(also))

    async def _finish(self, status: store.Status, error: str | None) -> None:
        async with asyncio.timeout(FINISH_SECONDS), self._db.worker() as conn:
            await store.finish(conn, self.import_id, status, error)

    # ---- reading ----

    async def _chunks(self, source: AsyncIterable[Item]) -> None:
        ready: list[_Ready] = []
        wrong: list[Wrong] = []
        size = number = 0
        async for item in source:
            number += 1
            if number % BREATH == 0:
                await asyncio.sleep(0)
            checked = self._checked(item, number)
            if isinstance(checked, Wrong):
                wrong.append(checked)
            else:
                ready.append(checked)
                size += _weight(checked.prepared)
            if len(ready) + len(wrong) >= self._size or size >= CHUNK_BYTES:
                await self._write(ready, wrong)
                ready, wrong, size = [], [], 0
        if ready or wrong:
            await self._write(ready, wrong)

    def _checked(self, item: Item, number: int) -> _Ready | Wrong:
        if isinstance(item, Wrong):
            return item
        line, message = item if isinstance(item, Entry) else (number, item)
        if (message.tenant_id, message.session_id) != (self._tenant_id, self._session_id):
            return Wrong(line, "it is of another session than the import")
        try:
            return _Ready(line, prepare(message if message.is_history else replace(message, is_history=True)))
        except Invalid as error:
            return Wrong(line, error.detail)

    # ---- writing ----

    async def _write(self, ready: list[_Ready], wrong: list[Wrong]) -> None:
        started = time.monotonic()
        await self._settle(ready, wrong)
        took = time.monotonic() - started
        wanted = len(ready) * CHUNK_SECONDS / max(took, 0.001)
        self._size = max(SMALLEST_CHUNK, min(LARGEST_CHUNK, self._size * 2, int(wanted)))
        if self._progress is not None:
            self._progress(self.counts)
        await self._give_way(took)

    async def _give_way(self, took: float) -> None:
        await asyncio.sleep(took * REST)
        for _ in range(round(LONGEST_WAIT / LOOK_SECONDS)):
            if self._live_depth() <= CROWD:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _settle(self, ready: Sequence[_Ready], wrong: Sequence[Wrong]) -> None:
        """Commit them, whatever it takes: a row the database refuses is found by halves and becomes a wrong line."""
        try:
            await self._commit(ready, wrong)
        except _Refused as refused:
            if len(ready) == 1:
                detail = f"the database refuses it: {reason(refused.__cause__ or refused)}"
                await self._commit([], [*wrong, Wrong(ready[0].line, detail)])
                return
            middle = len(ready) // 2
            await self._settle(ready[:middle], wrong)
            await self._settle(ready[middle:], [])

    async def _commit(self, ready: Sequence[_Ready], wrong: Sequence[Wrong]) -> None:
        """One transaction, tried until it is committed. Raises _Refused, DatabaseUnavailable, Conflict."""
        deadline = time.monotonic() + self._patience
        pause, rounds, unsure = 0.02, 0, False
        while True:
            try:
                conn = await self._connected()
                if unsure and await self._counted(conn, len(ready) + len(wrong), wrong):
                    return
                await self._transaction(conn, ready, wrong)
                return
            except _Moved:
                if await self._counted(conn, len(ready) + len(wrong), wrong):
                    return
                raise self._removed() from None
            except (
                asyncpg.ForeignKeyViolationError,
                asyncpg.UniqueViolationError,
                asyncpg.NoDataFoundError,
            ) as error:
                if "session" in (getattr(error, "constraint_name", None) or ""):
                    raise self._removed() from error
                # Leads or threads of this chunk were merged, erased or taken meanwhile.
                self._cache.forget(one.prepared.wanted for one in ready)
                rounds += 1
                if rounds >= ROUNDS:
                    raise _Refused from error
            except Exception as error:
                if not is_transient(error):
                    if ready and isinstance(error, _OF_A_ROW):
                        raise _Refused from error
                    raise
                if is_unavailable(error):
                    unsure = True
                    await self._disconnect()
                if time.monotonic() > deadline:
                    raise DatabaseUnavailable(
                        f"the database cannot be used now ({reason(error)}); what is stored stays, import it again later"
                    ) from error
                self._log.info("import.retried", import_id=self.import_id, error=reason(error))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  (spread, no secret)
                pause = min(pause * 2, 1.0)

    async def _counted(self, conn: Conn, lines: int, wrong: Sequence[Wrong]) -> bool:
        """Whether the commit whose answer got lost had happened: the import's row moved on with it."""
        row = await store.read(conn, self.import_id)
        if row is None:
            raise self._removed()
        if row["lines"] != self.counts.lines + lines:
            return False
        self.counts = Counts(row["lines"], row["stored"], row["duplicates"], row["wrong"])
        self._name(wrong)
        return True

    async def _transaction(self, conn: Conn, ready: Sequence[_Ready], wrong: Sequence[Wrong]) -> None:
        started = time.monotonic()
        resolved: dict[tuple[int, str], Resolved] = {}
        inserted = store.Inserted(0, None, None)
        async with conn.transaction():
            if ready:
                leads, resolved = await self._leads(conn, ready)
                inserted = await self._store(conn, ready, leads)
            faults.point("history.before_count")
            counted = await store.add(
                conn,
                self.import_id,
                after=self.counts.lines,
                stored=inserted.count,
                duplicates=len(ready) - inserted.count,
                wrong=len(wrong),
                named=[
                    {"line": one.line, "detail": one.detail} for one in wrong[: WRONG_NAMED - len(self.wrong)]
                ],
            )
            if not counted:
                raise _Moved
            faults.point("history.before_commit")
        faults.point("history.after_commit")
        self._cache.remember(resolved)
        self.counts = self.counts.plus(inserted.count, len(ready) - inserted.count, len(wrong))
        self._name(wrong)
        self._log.info(
            "history.stored",
            import_id=self.import_id,
            count=inserted.count,
            duplicates=len(ready) - inserted.count,
            wrong=len(wrong),
            first_message_id=inserted.first_id,
            last_message_id=inserted.last_id,
            duration_ms=round((time.monotonic() - started) * 1000, 1),
        )

    async def _leads(
        self, conn: Conn, ready: Sequence[_Ready]
    ) -> tuple[list[int], dict[tuple[int, str], Resolved]]:
        """The lead of each, in order, 0 for what was said before its person was erased; and what had to be asked, to be
        remembered once it is committed."""
        found = [self._cache.get(one.prepared.wanted) for one in ready]
        unknown = [one.prepared.wanted for one, lead in zip(ready, found, strict=True) if lead is None]
        resolved = await resolve(conn, unknown) if unknown else {}
        leads = []
        for one, lead in zip(ready, found, strict=True):
            if lead is None:
                entry = resolved[one.prepared.wanted.keys[0]]
                lead = 0 if entry.erased(one.prepared.wanted) else entry.lead_id
            leads.append(lead)
        return leads, resolved

    async def _store(self, conn: Conn, ready: Sequence[_Ready], leads: Sequence[int]) -> store.Inserted:
        first: dict[tuple[int, str], int] = {}
        for n, (one, lead) in enumerate(zip(ready, leads, strict=True)):
            if lead:
                first.setdefault((lead, one.prepared.row.channel_message_id), n)
        if not first:
            return store.Inserted(0, None, None)
        # By lead, as live writers do: two writers then wait for each other instead of deadlocking.
        order = sorted(first.values(), key=lambda n: (leads[n], n))
        rows = [ready[n].prepared.row for n in order]
        lead_ids = [leads[n] for n in order]
        threads = await store.threads_of(conn, self._tenant_id, self._session_id, sorted(set(lead_ids)))
        faults.point("history.before_insert")
        return await store.insert(conn, rows, lead_ids, [threads.get(lead) for lead in lead_ids])

    def _name(self, wrong: Sequence[Wrong]) -> None:
        self.wrong += wrong[: WRONG_NAMED - len(self.wrong)]

    def _removed(self) -> Conflict:
        return Conflict(f"import {self.import_id} or its session was removed while it was running")

    # ---- the connection ----

    async def _connected(self) -> Conn:
        """One of its own: live traffic never waits for it in the pool."""
        if self._conn is None or self._conn.is_closed():
            self._conn = await connect(self._db.url, command_timeout=32, server_settings=_SESSION)
            await self._conn.execute(f"SET ROLE {WORKER_ROLE}")
        return self._conn

    async def _disconnect(self) -> None:
        conn, self._conn = self._conn, None
        if conn is None:
            return
        try:
            await conn.close(timeout=1)
        except Exception:
            conn.terminate()


def _weight(prepared: Prepared) -> int:
    return len(prepared.row.raw_payload) + len(prepared.row.content or "") + 500
