"""Other queues that cannot be installed or run are a line in the table, never an end of the benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from bench.rivals import __main__ as rivals
from bench.rivals import places


async def test_what_a_program_prints_comes_back() -> None:
    assert await places.output([sys.executable, "-c", "print('here')"], seconds=30) == "here\n"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["no-such-program-anywhere"], "no-such-program-anywhere: No such file"),
        ([sys.executable, "-c", "raise SystemExit('there is no network')"], "there is no network"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "it ended with 3"),
    ],
)
async def test_a_program_that_fails_says_why(command: list[str], why: str) -> None:
    with pytest.raises(places.NotHad, match=why):
        await places.output(command, seconds=30)


async def test_a_program_that_hangs_is_ended() -> None:
    with pytest.raises(places.NotHad, match=r"not done within 0 s"):
        await places.output([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)


async def test_without_npm_the_rest_is_still_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.shutil, "which", lambda name: None)

    async def nobody() -> Path:
        raise places.NotHad("no index could be reached")

    async def ours(*_: object) -> float:
        return 1000.0

    monkeypatch.setattr(places, "python", nobody)
    monkeypatch.setattr(rivals, "ours", ours)
    options = argparse.Namespace(rounds=2, items=1, threads=1, sessions=1)
    found = await rivals.compare("postgresql://nowhere/", options)
    assert [line.value for line in found] == [
        "1,000/s (1,000 to 1,000)",
        *["could not be had here: no index could be reached"] * 3,
        *["could not be had here: node and npm are not installed"] * 2,
    ]
