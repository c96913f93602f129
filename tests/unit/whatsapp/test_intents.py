"""Intents of sends that begin together are written together, and none is called written before it is."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.whatsapp.intents import Intent, Intents


def test_many_at_once_are_all_there_when_they_return(tmp_path: Path) -> None:
    intents, reader = Intents(tmp_path / "intents.db"), Intents(tmp_path / "intents.db")

    def write(number: int) -> bool:
        secret = number.to_bytes(32, "big")
        intents.write(secret, Intent(number, 1, "device"))
        return reader.find(secret) == Intent(number, 1, "device")

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(write, range(200)))
    intents.close()
    reader.close()


def test_what_cannot_be_written_raises_and_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "intents.db"
    intents = Intents(path)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE intents")
    with pytest.raises(sqlite3.Error):
        intents.write(b"a" * 32, Intent(1, 1, "device"))
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE intents (secret BLOB PRIMARY KEY, queue_id, claim_epoch, device, at)")
    intents.write(b"b" * 32, Intent(2, 1, "device"))
    assert intents.find(b"a" * 32) is None
    assert intents.find(b"b" * 32) == Intent(2, 1, "device")
    intents.close()
    other.close()
