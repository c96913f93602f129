"""Lets many callers wait for the end of queue rows with one query for all of them.

In-process outcomes wake it at once; a short poll finds what other gateways did. Never changes a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from asyncpg import Record

from core import log as logs
from core.database import Database, is_transient
from core.store import dispatching

log = logs.get(part="outbound")

POLL = 0.25
FINAL = ("sent", "failed", "unknown", "cancelled")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a queue row stands."""

    queue_id: int
    message_id: int
    channel: str
    status: str
    retry_count: int
    error_code: str | None
    last_error: str | None
    channel_message_id: str | None
    sent_at: datetime | None


@dataclass(eq=False, slots=True)
class _Waiter:
    future: asyncio.Future[Outcome]
    retried: int | None
    """Also an end: the row is queued again after more failures than this."""


class OutcomeWaiter:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: dict[int, list[_Waiter]] = {}
        self._look = asyncio.Event()

    async def wait(self, queue_id: int, timeout: float, *, retried: int | None = None) -> Outcome | None:  # noqa: ASYNC109
        """The row's end, or None after `timeout` seconds (also for a row that does not exist).

        With `retried`, being back in the queue counts as an end: `dispatch_next` waits for one attempt, not for all.
        """
        waiter = _Waiter(asyncio.get_running_loop().create_future(), retried)
        self._waiting.setdefault(queue_id, []).append(waiter)
        self._look.set()
        try:
            async with asyncio.timeout(timeout):
                return await waiter.future
        except TimeoutError:
            return None
        finally:
            held = self._waiting[queue_id]
            held.remove(waiter)
            if not held:
                del self._waiting[queue_id]

    def nudge(self, queue_ids: Iterable[int]) -> None:
        """These rows have moved."""
        if self._waiting and any(queue_id in self._waiting for queue_id in queue_ids):
            self._look.set()

    async def run(self) -> None:
        while True:
            if not self._waiting:
                await self._look.wait()
            else:
                try:
                    async with asyncio.timeout(POLL):
                        await self._look.wait()
                except TimeoutError:
                    pass
            self._look.clear()
            if self._waiting:
                try:
                    await self._read()
                except Exception as error:
                    if not is_transient(error):
                        log.error("outcome.read_failed", error=repr(error))
                    await asyncio.sleep(POLL)

    def close(self) -> None:
        """Whoever still waits gets no answer any more, at once."""
        for waiters in self._waiting.values():
            for waiter in waiters:
                if not waiter.future.done():
                    waiter.future.set_exception(TimeoutError())

    async def _read(self) -> None:
        async with self._db.worker() as conn:
            rows = await dispatching.outcomes(conn, self._waiting)
        for row in rows:
            for waiter in self._waiting.get(row["id"], ()):
                if not waiter.future.done() and _ended(row, waiter.retried):
                    waiter.future.set_result(_outcome(row))


def _ended(row: Record, retried: int | None) -> bool:
    return row["status"] in FINAL or (retried is not None and row["status"] == "queued")


def _outcome(row: Record) -> Outcome:
    return Outcome(
        queue_id=row["id"],
        message_id=row["message_id"],
        channel=row["channel"],
        status=row["status"],
        retry_count=row["retry_count"],
        error_code=row["error_code"],
        last_error=row["last_error"],
        channel_message_id=row["channel_message_id"],
        sent_at=row["sent_at"],
    )
