"""An append-only list that can be awaited: what happened, in order, with a way to wait for what has not happened yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Pulse:
    """A counter that can be awaited: something has changed, look again."""

    def __init__(self) -> None:
        self.count = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def touch(self) -> None:
        self.count += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self, seen: int, timeout: float) -> int:
        """The count as soon as it differs from `seen`, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self.count == seen:
                    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiters.add(waiter)
                    try:
                        await waiter
                    finally:
                        self._waiters.discard(waiter)
        except TimeoutError:
            pass
        return self.count


class Ledger(Generic[T]):
    def __init__(self) -> None:
        self.items: list[T] = []
        self._cursor = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __getitem__(self, index: int) -> T:
        return self.items[index]

    def add(self, item: T) -> None:
        self.items.append(item)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_for(
        self, match: Callable[[T], bool] = lambda _: True, *, start: int = 0, timeout: float = 10
    ) -> T:
        """The first item from `start` on that matches, waiting for it up to `timeout` seconds.

        Raises TimeoutError.
        """
        index = await self._index_of(match, start, timeout)
        return self.items[index]

    async def next(self, timeout: float = 10) -> T:
        """The first item that no earlier `next` has returned. Raises TimeoutError."""
        index = await self._index_of(lambda _: True, self._cursor, timeout)
        self._cursor = index + 1
        return self.items[index]

    async def _index_of(self, match: Callable[[T], bool], start: int, timeout: float) -> int:
        async with asyncio.timeout(timeout):
            at = start
            while True:
                while at < len(self.items):
                    if match(self.items[at]):
                        return at
                    at += 1
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiters.add(waiter)
                try:
                    await waiter
                finally:
                    self._waiters.discard(waiter)
