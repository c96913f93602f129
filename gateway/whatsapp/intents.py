"""What was handed to WhatsApp for which queue item: written before a send, read when an echo or a crash asks. Blocking.

One small SQLite file per session. It proves two things: which item an own echo belongs to, and that a send never began.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEEP_SECONDS = 60 * 24 * 3600.0
"""Longer than any queue item or any echo waits."""
BUSY_SECONDS = 5.0

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS intents (
        secret      BLOB PRIMARY KEY,
        queue_id    INTEGER NOT NULL,
        claim_epoch INTEGER NOT NULL,
        device      TEXT NOT NULL,
        at          REAL NOT NULL
    ) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Intent:
    queue_id: int
    claim_epoch: int
    device: str
    """The linked device it was handed to (`60123456789:3@s.whatsapp.net`)."""


class Intents:
    """Thread-safe. Methods raise sqlite3.Error when the file cannot be used: then nothing may be sent."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._conn = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._conn.execute("PRAGMA journal_mode = WAL")
        self._conn.execute("PRAGMA synchronous = FULL")
        self._conn.execute(_SCHEMA)
        self._conn.execute("DELETE FROM intents WHERE at < ?", (time.time() - KEEP_SECONDS,))

    def write(self, rows: Sequence[tuple[bytes, Intent]]) -> None:
        """Each under its secret, all of them or none, with one wait for the disk. Durable when it returns."""
        now = time.time()
        with self._lock:
            self._conn.execute("BEGIN IMMEDIATE")
            try:
                self._conn.executemany(
                    "INSERT OR REPLACE INTO intents (secret, queue_id, claim_epoch, device, at) VALUES (?, ?, ?, ?, ?)",
                    [(secret, i.queue_id, i.claim_epoch, i.device, now) for secret, i in rows],
                )
                self._conn.execute("COMMIT")
            except BaseException:
                if self._conn.in_transaction:
                    self._conn.execute("ROLLBACK")
                raise

    def find(self, secret: bytes) -> Intent | None:
        with self._lock:
            row = self._conn.execute(
                "SELECT queue_id, claim_epoch, device FROM intents WHERE secret = ?", (secret,)
            ).fetchone()
        return Intent(int(row[0]), int(row[1]), str(row[2])) if row else None

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._conn.close()
