"""Intents of sends that begin together are written together, and none is called written before it is."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from gateway.whatsapp.gathered import Gathered
from gateway.whatsapp.intents import Intent, Intents

SECONDS = 5


def test_many_are_there_when_the_write_returns(tmp_path: Path) -> None:
    intents, reader = Intents(tmp_path / "intents.db"), Intents(tmp_path / "intents.db")
    rows = [(number.to_bytes(32, "big"), Intent(number, 1, "device")) for number in range(200)]
    intents.write(rows)
    assert [reader.find(secret) for secret, _ in rows] == [intent for _, intent in rows]
    intents.close()
    reader.close()


def test_what_cannot_be_written_raises_and_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "intents.db"
    intents = Intents(path)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE intents")
    with pytest.raises(sqlite3.Error):
        intents.write([(b"a" * 32, Intent(1, 1, "device"))])
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE intents (secret BLOB PRIMARY KEY, queue_id, claim_epoch, device, at)")
    intents.write([(b"b" * 32, Intent(2, 1, "device"))])
    assert intents.find(b"a" * 32) is None
    assert intents.find(b"b" * 32) == Intent(2, 1, "device")
    intents.close()
    other.close()


async def test_what_is_asked_for_during_a_round_makes_the_next_one() -> None:
    rounds: list[list[int]] = []
    first, go_on = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        rounds.append(items)
        first.set()
        assert go_on.wait(SECONDS)
        return [item * 10 for item in items]

    gathered = Gathered(work)
    early = [asyncio.create_task(gathered.do(number)) for number in (1, 2)]
    await asyncio.to_thread(first.wait, SECONDS)
    late = [asyncio.create_task(gathered.do(number)) for number in (3, 4, 5)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in early), "answered before its round was over"
    go_on.set()
    assert await asyncio.gather(*early, *late) == [10, 20, 30, 40, 50]
    assert rounds == [[1, 2], [3, 4, 5]]


async def test_a_round_that_fails_fails_for_each_of_it_and_for_no_other() -> None:
    def work(items: list[int]) -> list[int]:
        if 0 in items:
            raise OSError("disk full")
        return items

    gathered = Gathered(work)
    found = await asyncio.gather(gathered.do(0), gathered.do(1), return_exceptions=True)
    assert [str(error) for error in found] == ["disk full", "disk full"]
    assert await gathered.do(2) == 2


async def test_who_gives_up_leaves_the_others_their_answer() -> None:
    first, go_on = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        first.set()
        assert go_on.wait(SECONDS)
        return items

    gathered = Gathered(work)
    leaving, staying = asyncio.create_task(gathered.do(1)), asyncio.create_task(gathered.do(2))
    await asyncio.to_thread(first.wait, SECONDS)
    leaving.cancel()
    go_on.set()
    assert await staying == 2
    assert leaving.cancelled() or leaving.cancelling()
