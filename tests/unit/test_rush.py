"""What counts as a rush, and how long it is waited for."""

from __future__ import annotations

import asyncio

import pytest

from core.rush import FADE_SECONDS, Rush


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _pour(rush: Rush, clock: Clock, *, a_second: float, seconds: float) -> None:
    for _ in range(round(a_second * seconds)):
        clock.now += 1 / a_second
        rush.note(1)


@pytest.mark.parametrize(("a_second", "lasts"), [(1000 / 60, False), (100, True), (500, True)])
def test_a_thousand_a_minute_is_no_rush_and_a_hundred_a_second_is_one(
    clock: Clock, a_second: float, lasts: bool
) -> None:
    rush = Rush(clock=clock)
    _pour(rush, clock, a_second=a_second, seconds=5)
    assert (rush.lasts > 0) is lasts


def test_it_is_over_soon_after_the_last_message(clock: Clock) -> None:
    rush = Rush(clock=clock)
    _pour(rush, clock, a_second=500, seconds=5)
    left = rush.lasts
    assert 0 < left < 4 * FADE_SECONDS
    clock.now += left + 0.001
    assert rush.lasts == 0


async def test_waiting_ends_with_the_rush_or_when_the_patience_does(clock: Clock) -> None:
    rush = Rush()
    async with asyncio.timeout(5):
        await rush.over(within=60)  # there is none
        rush.note(10)
        await rush.over(within=60)
        assert rush.lasts == 0
        rush.note(10**9)
        await rush.over(within=0.01)
    assert rush.lasts > 0
