"""Micro-batches with a zero flush window: what queued while the last batch was in flight is the next batch.

Knows no SQL: it decides what an error of the write means (try again, give up for now, find the one bad item) and
tells every submitter the outcome of its own item. It never reorders the items of a lane.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import asyncpg

from core import log as logs
from core.database_errors import is_transient, is_unavailable
from core.errors import DatabaseUnavailable, GatewayError, Invalid

log = logs.get(part="batcher")

T = TypeVar("T")
R = TypeVar("R")

FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
TRANSIENT_LIMIT = 50
"""Deadlocks and the like in a row for one batch before its rows are tried one by one."""


@dataclass(slots=True)
class _Item(Generic[T, R]):
    value: T
    future: asyncio.Future[R]


@dataclass(slots=True)
class _Lane(Generic[T, R]):
    waiting: deque[_Item[T, R]] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    busy: int = 0


class Batcher(Generic[T, R]):
    """`write(values)` stores a batch and returns one result per value, in order. It may raise anything; it must be
    safe to repeat. After `patience` seconds without a database everything waiting in the lane is refused, so that
    no later item of a session overtakes one that its submitter has to bring again."""

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], Awaitable[list[R]]],
        *,
        lanes: int = 2,
        size: int = 100,
        patience: float = 15.0,
        max_waiting: int = 20_000,
    ) -> None:
        self.name = name
        self._write = write
        self._lanes: list[_Lane[T, R]] = [_Lane() for _ in range(lanes)]
        self._size = size
        self._patience = patience
        self._max_waiting = max_waiting
        self._running = False

    # ---- life ----

    async def start(self) -> None:
        self._running = True
        for number, lane in enumerate(self._lanes):
            if lane.task is None or lane.task.done():
                lane.task = asyncio.create_task(self._run(lane), name=f"{self.name}-{number}")

    async def stop(self, limit: float = 5.0) -> None:
        """Take nothing new, write what waits for at most `limit` seconds, refuse the rest. Idempotent."""
        self._running = False
        tasks = [lane.task for lane in self._lanes if lane.task is not None]
        for lane in self._lanes:
            lane.wake.set()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=limit)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes:
            lane.task = None
            self._refuse(
                lane.waiting, DatabaseUnavailable("the gateway is stopping; bring the message again")
            )
            lane.waiting.clear()

    @property
    def healthy(self) -> bool:
        """False when a writing task has died, or was never started."""
        return all(lane.task is not None and not lane.task.done() for lane in self._lanes)

    @property
    def depth(self) -> int:
        """Items that were submitted and have no outcome yet."""
        depth = 0
        for lane in self._lanes:
            depth += len(lane.waiting) + lane.busy
        return depth

    # ---- in ----

    def submit(self, lane_key: int, value: T) -> asyncio.Future[R]:
        """Queue one item; the same key always meets the same lane, in order. The future gets the result,
        DatabaseUnavailable, or Invalid. Raises DatabaseUnavailable when nothing more can be taken."""
        lane = self._lanes[lane_key % len(self._lanes)]
        if not self._running or lane.task is None or lane.task.done():
            raise DatabaseUnavailable(f"{self.name} is not running; bring the message again")
        if self.depth >= self._max_waiting:
            raise DatabaseUnavailable(f"{self.name}: {self._max_waiting} items already wait for the database")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        lane.waiting.append(_Item(value, future))
        lane.wake.set()
        return future

    # ---- the loop ----

    async def _run(self, lane: _Lane[T, R]) -> None:
        while True:
            while not lane.waiting:
                if not self._running:
                    return
                lane.wake.clear()
                await lane.wake.wait()
            batch = [lane.waiting.popleft() for _ in range(min(self._size, len(lane.waiting)))]
            lane.busy = len(batch)
            try:
                await self._settle(batch, time.monotonic() + self._patience)
            except DatabaseUnavailable as error:
                log.warning(f"{self.name}.refused", count=lane.busy + len(lane.waiting), error=str(error))
                self._refuse(batch, error)
                self._refuse(lane.waiting, error)
                lane.waiting.clear()
            finally:
                # Only a cancelled stop leaves futures open here.
                self._refuse(batch, DatabaseUnavailable("the gateway is stopping; bring the message again"))
                lane.busy = 0

    async def _settle(self, batch: list[_Item[T, R]], deadline: float) -> None:
        """Give every item of the batch its outcome. Raises DatabaseUnavailable when there is none to be had now."""
        error = await self._try(batch, deadline)
        if error is None:
            return
        if is_unavailable(error) or (len(batch) == 1 and is_transient(error)):
            raise DatabaseUnavailable(f"the database cannot be used now ({reason(error)})") from error
        if len(batch) == 1:
            self._refuse(batch, error if isinstance(error, GatewayError) else _invalid(error))
            return
        # One of them is bad. Halves find it in few steps and keep the order.
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            await self._settle(half, deadline)

    async def _try(self, batch: list[_Item[T, R]], deadline: float) -> Exception | None:
        """Write the batch, unchanged, until it succeeds, is refused, or time is up; returns what stands in the way."""
        pause = FIRST_PAUSE
        transient = 0
        while True:
            try:
                results = await self._write([item.value for item in batch])
            except Exception as error:
                gone = is_unavailable(error)
                transient += not gone
                if not gone and (not is_transient(error) or transient > TRANSIENT_LIMIT):
                    return error
                if time.monotonic() > deadline:
                    return error if gone else DatabaseUnavailable(reason(error))
                log.info(f"{self.name}.retried", count=len(batch), error=reason(error))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  (spread, no secret)
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                for item, result in zip(batch, results, strict=True):
                    if not item.future.done():
                        item.future.set_result(result)
                return None

    @staticmethod
    def _refuse(items: Sequence[_Item[T, R]] | deque[_Item[T, R]], error: GatewayError) -> None:
        for item in items:
            if not item.future.done():
                item.future.set_exception(error)
                # Whoever submitted it may be gone, and keeps or gets its message again: nobody's error to complain of.
                item.future.exception()


def _invalid(error: Exception) -> Invalid:
    invalid = Invalid(f"the database refuses it: {reason(error)}")
    invalid.__cause__ = error
    return invalid


def reason(error: BaseException) -> str:
    """An error in one line. Of a refused row only what cannot quote the row: details and arguments hold what people
    wrote, and this line is logged."""
    if isinstance(error, asyncpg.PostgresError):
        text = f"{getattr(error, 'message', None) or type(error).__name__} ({error.sqlstate})"
    elif is_unavailable(error) or isinstance(error, GatewayError):
        text = str(error)
    else:
        text = type(error).__name__
    return " ".join(text.split())[:300] or type(error).__name__
