"""Writes the outcomes of calls: in batches, repeated until they are committed.

What a channel has accepted is remembered here until the database knows it. Never calls a channel.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
from asyncpg import Record

from core import faults
from core import log as logs
from core.database import Database, is_transient
from core.dispatch import Claimed, Key, Verdict
from core.store import dispatching, echoes
from core.store.audit import Conn

log = logs.get(part="outbound")

BATCH = 250
RETRY_FIRST, RETRY_MOST = 0.05, 2.0
STUCK_SECONDS = 15.0
GATHER = 0.01
"""Seconds in which the outcomes of calls that are open make one batch: a commit for each would cost as much as the send."""
RACES = 5
"""An own echo that is stored between our look and our write costs one repeat; more than a few are something else."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One try and what became of it."""

    claimed: Claimed
    verdict: Verdict
    recipient: str | None = None


class Marker:
    """`put` outcomes, `run` writes them. `on_done` hears of every batch after its commit."""

    def __init__(
        self,
        db: Database,
        *,
        actor: str,
        on_done: Callable[[Sequence[Ended], Sequence[Record]], None],
        more_to_come: Callable[[], bool],
    ) -> None:
        """`more_to_come`: whether calls are open whose outcomes are worth waiting a moment for."""
        self._db = db
        self._actor = actor
        self._on_done = on_done
        self._more_to_come = more_to_come
        self._waiting: deque[Ended] = deque()
        self._pending: dict[Key, int] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._timers: set[asyncio.TimerHandle] = set()

    def holds(self, key: Key) -> bool:
        """Whether an outcome of this try still waits for its commit."""
        return key in self._pending

    def __len__(self) -> int:
        return sum(self._pending.values())

    def put(self, ended: Ended) -> None:
        key = ended.claimed.key
        self._pending[key] = self._pending.get(key, 0) + 1
        self._idle.clear()
        self._requeue(ended)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until everything is committed; False when that took too long."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        while True:
            await self._work.wait()
            if len(self._waiting) < BATCH and self._more_to_come():
                await asyncio.sleep(GATHER)
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if not self._waiting:
                self._work.clear()
            if batch:
                await self._write(batch)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _requeue(self, ended: Ended) -> None:
        self._waiting.append(ended)
        self._work.set()

    def _done(self, batch: Sequence[Ended], rows: Sequence[Record]) -> None:
        for ended in batch:
            key = ended.claimed.key
            self._pending[key] -= 1
            if not self._pending[key]:
                del self._pending[key]
        if not self._pending:
            self._idle.set()
        self._on_done(batch, rows)

    async def _write(self, batch: list[Ended]) -> None:
        """Until it is committed; only an error that is about the rows themselves splits the batch."""
        # One statement cannot move a row twice: a call that came back after the watchdog waits for its own turn.
        seen: set[Key] = set()
        for ended in batch[:]:
            if ended.claimed.key in seen:
                batch.remove(ended)
                self._requeue(ended)
            seen.add(ended.claimed.key)
        delay, races = RETRY_FIRST, 0
        while True:
            try:
                rows = await self._commit(batch)
                break
            except Exception as error:
                race = isinstance(error, asyncpg.UniqueViolationError) and races < RACES
                if not race and not is_transient(error):
                    await self._one_by_one(batch, error)
                    return
                races += race
                log.warning(
                    "send.mark_retried",
                    error=repr(error),
                    count=len(batch),
                    result="kept in memory, tried again",
                )
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_MOST)
        faults.point("outbound.mark.after_commit")
        self._done(batch, rows)

    async def _commit(self, batch: Sequence[Ended]) -> list[Record]:
        async with self._db.worker() as conn, conn.transaction():
            await conn.execute(dispatching.ALONE)
            rows = await dispatching.mark(conn, [ended.verdict.mark for ended in batch])
            echoed = [row for row in rows if row["echo_id"] is not None]
            if echoed:
                await conn.execute(dispatching.APART)
            for row in echoed:
                await echoes.merge(conn, message_id=row["message_id"], echo_id=row["echo_id"])
            await self._audit(conn, batch, rows)
            faults.point("outbound.mark.before_commit")
        return rows

    async def _one_by_one(self, batch: Sequence[Ended], first: Exception) -> None:
        if len(batch) > 1:
            for ended in batch:
                await self._write([ended])
            return
        (ended,) = batch
        mark = ended.verdict.mark
        log.error(
            "send.mark_failed",
            queue_id=mark.queue_id,
            message_id=ended.claimed.message_id,
            tenant_id=ended.claimed.tenant_id,
            error=repr(first),
        )
        if mark.channel_message_id is not None:
            # Better sent without the channel's id than not known to be sent.
            await self._write([replace(ended, verdict=replace(ended.verdict, mark=_without_id(mark)))])
            return
        # It stays `dispatching` and ours; nobody sends it meanwhile.
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def again() -> None:
            if timer is not None:
                self._timers.discard(timer)
            self._requeue(ended)

        timer = loop.call_later(STUCK_SECONDS, again)
        self._timers.add(timer)

    async def _audit(self, conn: Conn, batch: Sequence[Ended], rows: Sequence[Record]) -> None:
        moved = {row["id"] for row in rows}
        failures = [ended for ended in batch if ended.verdict.audited and ended.claimed.queue_id in moved]
        if not failures:
            return
        details: list[dict[str, Any]] = [
            {
                "outcome": ended.verdict.outcome,
                "code": ended.verdict.mark.error_code,
                "attempt": ended.claimed.retry_count + 1,
                "message_id": ended.claimed.message_id,
                "session_id": ended.claimed.session_id,
                "channel": ended.claimed.channel,
            }
            for ended in failures
        ]
        await dispatching.audit_failures(
            conn,
            self._actor,
            [
                (f.claimed.tenant_id, f.claimed.queue_id, detail)
                for f, detail in zip(failures, details, strict=True)
            ],
        )


def _without_id(mark: dispatching.Mark) -> dispatching.Mark:
    return replace(mark, channel_message_id=None)
