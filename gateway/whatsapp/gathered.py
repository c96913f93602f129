"""Blocking work that is cheaper for many than for each: what is asked for while a round is under way makes the next one.

Used for what must be on the disk before something happens. It never begins a round for what nobody has asked for, and never
answers before its round is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Gathered(Generic[T, R]):
    def __init__(self, work: Callable[[list[T]], list[R]]) -> None:
        """`work` runs in a thread, one round at a time, and gives a result for each item in its order."""
        self._work = work
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._task: asyncio.Task[None] | None = None

    async def do(self, item: T) -> R:
        """Raises whatever the item's round raised. Who is cancelled leaves the round as it is."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await asyncio.to_thread(self._work, [item for item, _ in batch])
            except BaseException as error:
                self._fail(batch, error)
                if not isinstance(error, Exception):  # cancelled: nobody else would answer those that wait
                    self._fail(self._waiting, error)
                    self._waiting = []
                    raise
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)

    @staticmethod
    def _fail(batch: list[tuple[T, asyncio.Future[R]]], error: BaseException) -> None:
        for _, future in batch:
            if future.done():
                continue
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.cancel()
