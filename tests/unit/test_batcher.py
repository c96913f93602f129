"""Micro-batches: order, sizes, and what every submitter hears when the write fails."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import asyncpg
import pytest

from core.batcher import Batcher, reason
from core.errors import DatabaseUnavailable, Invalid


class Store:
    """Remembers batches; `fail` may raise before one is written."""

    def __init__(self, fail: Callable[[Sequence[int]], None] = lambda batch: None) -> None:
        self.batches: list[list[int]] = []
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()
        self._fail = fail

    async def __call__(self, batch: Sequence[int]) -> list[int]:
        self.calls += 1
        self.called.set()
        await self.gate.wait()
        self._fail(batch)
        self.batches.append(list(batch))
        return [value * 10 for value in batch]

    @property
    def written(self) -> list[int]:
        return [value for batch in self.batches for value in batch]


@asynccontextmanager
async def batcher(store: Store, **options: float) -> AsyncIterator[Batcher[int, int]]:
    defaults: dict[str, float] = {"lanes": 1, "size": 10, "patience": 0.2}
    started: Batcher[int, int] = Batcher("test", store, **(defaults | options))  # type: ignore[arg-type]
    await started.start()
    try:
        yield started
    finally:
        await started.stop(0.5)


async def test_what_queued_during_a_write_is_the_next_batch() -> None:
    store = Store()
    async with batcher(store) as batches:
        store.gate.clear()
        first = batches.submit(0, 1)
        await asyncio.wait_for(store.called.wait(), 10)
        rest = [batches.submit(0, n) for n in range(2, 26)]
        assert batches.depth == 25
        store.gate.set()
        assert [await future for future in (first, *rest)] == [n * 10 for n in range(1, 26)]
    assert [len(batch) for batch in store.batches] == [1, 10, 10, 4]
    assert store.written == list(range(1, 26))


async def test_one_bad_item_is_found_and_the_others_keep_their_order() -> None:
    def fail(batch: Sequence[int]) -> None:
        if 7 in batch:
            raise asyncpg.DataError("secret text")

    store = Store(fail)
    async with batcher(store, size=16) as batches:
        futures = [batches.submit(0, n) for n in range(16)]
        results = await asyncio.gather(*futures, return_exceptions=True)
    assert [n for n, r in enumerate(results) if isinstance(r, Invalid)] == [7]
    assert store.written == [n for n in range(16) if n != 7]


@pytest.mark.parametrize(
    "error", [asyncpg.DeadlockDetectedError("x"), ConnectionResetError("x"), TimeoutError("x")]
)
async def test_what_passes_is_tried_again_unchanged(error: Exception) -> None:
    def fail(batch: Sequence[int]) -> None:
        if store.calls < 4:
            raise error

    store = Store(fail)
    async with batcher(store, patience=10) as batches:
        assert await asyncio.gather(*(batches.submit(0, n) for n in range(3))) == [0, 10, 20]
    assert store.batches == [[0, 1, 2]]


async def test_a_long_outage_refuses_everything_that_waits_in_the_lane() -> None:
    down = True

    def fail(batch: Sequence[int]) -> None:
        if down:
            raise ConnectionRefusedError("nobody there")

    store = Store(fail)
    async with batcher(store) as batches:
        results = await asyncio.gather(*(batches.submit(0, n) for n in range(25)), return_exceptions=True)
        assert all(isinstance(result, DatabaseUnavailable) for result in results)
        down = False
        assert await batches.submit(0, 99) == 990
        assert batches.healthy
    assert store.written == [99]


async def test_a_refusal_that_nobody_waits_for_is_nobodys_error() -> None:
    """A channel that was stopped meanwhile has its messages still; the loop must not complain of each of them."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: complaints.append(str(context["message"]))
    )

    def away(_: Sequence[int]) -> None:
        raise ConnectionResetError

    async with batcher(Store(away), patience=0.01) as batches:
        await asyncio.wait([batches.submit(0, n) for n in range(5)], timeout=10)
    gc.collect()
    assert complaints == []


async def test_an_endless_deadlock_is_no_fault_of_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Sequence[int]) -> None:
        raise asyncpg.DeadlockDetectedError("again")

    monkeypatch.setattr("core.batcher.TRANSIENT_LIMIT", 2)
    async with batcher(Store(fail), patience=30) as batches:
        with pytest.raises(DatabaseUnavailable):
            await batches.submit(0, 1)


async def test_an_error_nobody_thought_of_reaches_its_submitter_and_the_loop_lives() -> None:
    def fail(batch: Sequence[int]) -> None:
        if batch == [1]:
            raise RuntimeError("a bug")

    async with batcher(Store(fail)) as batches:
        with pytest.raises(Invalid, match="RuntimeError"):
            await batches.submit(0, 1)
        assert await batches.submit(0, 2) == 20
        assert batches.healthy


async def test_no_more_than_max_waiting_is_held() -> None:
    store = Store()
    async with batcher(store, max_waiting=5) as batches:
        store.gate.clear()
        futures = [batches.submit(0, n) for n in range(5)]
        with pytest.raises(DatabaseUnavailable, match="already wait"):
            batches.submit(0, 6)
        store.gate.set()
        await asyncio.gather(*futures)


def test_a_reason_never_quotes_what_people_wrote() -> None:
    assert "secret" not in reason(
        asyncpg.exceptions.DataError("invalid input for query argument $1: 'secret'")
    )
    assert "secret" not in reason(ValueError("secret"))
    assert reason(ConnectionResetError("peer went away")) == "peer went away"
