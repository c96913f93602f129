"""The durable disk queue: one SQLite file; what `append` returned for survives `kill -9`, power loss and a full disk.

Two processes may use one file at once (a channel's child appends, the gateway reads and releases). Blocking calls: from
asyncio use `asyncio.to_thread`. It knows no channel, no database server and nothing beyond the standard library.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from core import faults
from core.errors import JournalError

KEEP_SECONDS = 24 * 3600.0
"""How long released entries stay for `replay`."""
BUSY_SECONDS = 10.0
BATCH = 200
"""Rows per write transaction of release, replay and prune: the other process never waits long for the lock."""

_SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS entries (
        number      INTEGER PRIMARY KEY AUTOINCREMENT,
        kind        TEXT NOT NULL,
        key         TEXT NOT NULL,
        payload     BLOB NOT NULL,
        appended_at REAL NOT NULL,
        released_at REAL
    )
    """,
    "CREATE INDEX IF NOT EXISTS entries_key ON entries (kind, key)",
    "CREATE INDEX IF NOT EXISTS entries_pending ON entries (number) WHERE released_at IS NULL",
    "CREATE INDEX IF NOT EXISTS entries_released ON entries (released_at) WHERE released_at IS NOT NULL",
)
_INSERT = "INSERT INTO entries (kind, key, payload, appended_at) VALUES (?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Entry:
    number: int
    """Rises in the order of the commits."""
    kind: str
    key: str
    payload: bytes
    appended_at: float
    """Wall clock, seconds."""


class Journal:
    """Thread-safe. Every method raises JournalError when the file cannot do what it promises."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._append_lock = threading.Lock()
        self._lock = threading.Lock()
        with self._guarded("open"):
            self._create_file()
            # Appends wait for the disk. Releases do not: one that is lost only means a replay, which the
            # dedupe key of et_messages takes. Two connections, because `synchronous` is set per connection.
            self._appender = self._connect(synchronous="FULL", checkpoint_pages=4000)
            try:
                self._create_schema()
                self._reader = self._connect(synchronous="NORMAL", checkpoint_pages=1000)
            except BaseException:
                self._appender.close()
                raise

    # ---- writing ----

    def append(self, kind: str, key: str, payload: bytes) -> int:
        """Make one entry durable; returns its number once it is on the disk."""
        faults.point("journal.before_append")
        with self._append_lock, self._guarded("append"):
            self._check_in_place()
            faults.point("journal.before_fsync")
            # A statement alone is a transaction: one call instead of three, and each call costs whoever waits for
            # Python's lock (all of the client's threads) a turn.
            number = self._appender.execute(_INSERT, (kind, key, payload, time.time())).lastrowid
        assert number is not None
        faults.point("journal.after_fsync")
        return number

    def append_many(self, items: Sequence[tuple[str, str, bytes]]) -> list[int]:
        """All of them or none, with one wait for the disk. Numbers in the order given."""
        if not items:
            return []
        faults.point("journal.before_append")
        now = time.time()
        numbers: list[int] = []
        with self._append_lock, self._guarded("append"):
            self._check_in_place()
            with _transaction(self._appender) as conn:
                for kind, key, payload in items:
                    cursor = conn.execute(_INSERT, (kind, key, payload, now))
                    assert cursor.lastrowid is not None
                    numbers.append(cursor.lastrowid)
                faults.point("journal.before_fsync")
        faults.point("journal.after_fsync")
        return numbers

    def release(self, numbers: Iterable[int]) -> None:
        """These are committed elsewhere: no longer pending, kept for `KEEP_SECONDS`. Unknown numbers are no error."""
        faults.point("journal.before_release")
        now = time.time()
        for batch in _batches(sorted(set(numbers))):
            with self._lock, self._guarded("release"), _transaction(self._reader) as conn:
                conn.executemany(
                    "UPDATE entries SET released_at = ? WHERE number = ? AND released_at IS NULL",
                    [(now, number) for number in batch],
                )
        faults.point("journal.after_release")

    def discard(self, numbers: Iterable[int]) -> None:
        """What these hold is nobody's business here: it is wiped and comes back from no replay. Their keys stay known."""
        now = time.time()
        for batch in _batches(sorted(set(numbers))):
            with self._lock, self._guarded("release"), _transaction(self._reader) as conn:
                conn.executemany(
                    "UPDATE entries SET payload = x'', released_at = coalesce(released_at, ?) WHERE number = ?",
                    [(now, number) for number in batch],
                )

    def replay(self, since: float) -> int:
        """Make released entries appended at or after `since` (wall clock, seconds) pending again; how many."""
        total = 0
        with self._lock, self._guarded("replay"):
            rows = self._reader.execute(
                "SELECT number FROM entries WHERE released_at IS NOT NULL AND appended_at >= ?", (since,)
            ).fetchall()
        for batch in _batches([row[0] for row in rows]):
            with self._lock, self._guarded("replay"), _transaction(self._reader) as conn:
                total += conn.executemany(
                    "UPDATE entries SET released_at = NULL WHERE number = ? AND released_at IS NOT NULL",
                    [(number,) for number in batch],
                ).rowcount
        return total

    def prune(self, older_than: float = KEEP_SECONDS) -> int:
        """Delete entries released more than `older_than` seconds ago; pending ones always stay. How many went."""
        limit = time.time() - older_than
        total = 0
        while True:
            with self._lock, self._guarded("prune"):
                with _transaction(self._reader) as conn:
                    gone = conn.execute(
                        "DELETE FROM entries WHERE number IN"
                        " (SELECT number FROM entries WHERE released_at IS NOT NULL AND released_at <= ? LIMIT ?)",
                        (limit, BATCH),
                    ).rowcount
                # Give the space back in small steps, so that no append waits for one long write.
                # (A script, because `execute` stops this pragma after its first page.)
                self._reader.executescript("PRAGMA incremental_vacuum(1000)")
            total += gone
            if gone < BATCH:
                return total

    # ---- reading ----

    def pending(self, after: int = 0, limit: int = 100) -> list[Entry]:
        """The oldest entries that were not released, above `after`, in the order they were appended."""
        rows = self._query(
            "SELECT number, kind, key, payload, appended_at FROM entries"
            " WHERE released_at IS NULL AND number > ? ORDER BY number LIMIT ?",
            (after, limit),
        )
        return [Entry(*row) for row in rows]

    def released(self, since: float, *, after: int, through: int, limit: int = 100) -> list[Entry]:
        """Released entries appended at or after `since` (wall clock, seconds), numbered above `after` up to `through`, in
        the order they were appended; without those that were discarded."""
        rows = self._query(
            "SELECT number, kind, key, payload, appended_at FROM entries"
            " WHERE number > ? AND number <= ? AND released_at IS NOT NULL AND appended_at >= ?"
            " AND length(payload) > 0 ORDER BY number LIMIT ?",
            (after, through, since, limit),
        )
        return [Entry(*row) for row in rows]

    def newest(self) -> int:
        """The number of the last entry on file, 0 when there is none."""
        number = self._query("SELECT max(number) FROM entries", ())[0][0]
        return number if isinstance(number, int) else 0

    def keys(self, kind: str) -> set[str]:
        """Every key of this kind still on file, released or not."""
        return {row[0] for row in self._query("SELECT DISTINCT key FROM entries WHERE kind = ?", (kind,))}

    def depth(self) -> int:
        """How many entries wait to be released."""
        count = self._query("SELECT count(*) FROM entries WHERE released_at IS NULL", ())[0][0]
        assert isinstance(count, int)
        return count

    def close(self) -> None:
        """Idempotent; later calls of other methods raise JournalError."""
        with self._append_lock, self._lock, contextlib.suppress(sqlite3.Error):
            self._reader.close()
            self._appender.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----

    def _create_file(self) -> None:
        """An empty file only its owner can read (SQLite gives its side files the same mode), entered durably
        into its folder: SQLite itself never syncs the folder for the main file."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
                self._inode = os.fstat(descriptor).st_ino
            finally:
                os.close(descriptor)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise JournalError(
                f"journal {self.path}: {error.strerror or error}; the folder must exist, be writable"
                " for this user and have room",
            ) from error

    def _check_in_place(self) -> None:
        """A file deleted or replaced under us would swallow entries that nobody ever reads."""
        try:
            in_place = os.stat(self.path).st_ino == self._inode
        except OSError:
            in_place = False
        if not in_place:
            raise JournalError(
                f"journal {self.path}: the file was moved or deleted while in use; restart the gateway"
            )

    def _connect(self, *, synchronous: str, checkpoint_pages: int) -> sqlite3.Connection:
        conn = sqlite3.connect(
            self.path,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=32,
        )
        try:
            conn.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes in a file that is still empty
            mode = _switch_to_wal(conn)
            if mode != "wal":
                raise JournalError(
                    f"journal {self.path}: this file system has no shared memory for two processes;"
                    " put DATA_DIR on a local disk"
                )
            conn.execute(f"PRAGMA synchronous = {synchronous}")
            conn.execute("PRAGMA fullfsync = ON")  # macOS: a plain fsync stops at the drive's cache
            conn.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")
            conn.execute("PRAGMA journal_size_limit = 67108864")
        except BaseException:
            conn.close()
            raise
        return conn

    def _create_schema(self) -> None:
        if self._appender.execute("PRAGMA user_version").fetchone()[0] == 1:
            return
        with _transaction(self._appender) as conn:
            for statement in _SCHEMA:
                conn.execute(statement)
            conn.execute("PRAGMA user_version = 1")

    def _query(self, sql: str, parameters: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._lock, self._guarded("read"):
            return self._reader.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        """SQLite's and the system's errors as one JournalError that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(f"journal {self.path}: cannot {action}: {_explain(error)}") from error


def _switch_to_wal(conn: sqlite3.Connection) -> str:
    """Two processes that open a new file together get SQLITE_BUSY at once here, whatever the busy timeout says."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return str(conn.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _transaction(conn: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """IMMEDIATE: the write lock is waited for at the start, where the busy timeout applies; a read transaction
    that turns into a write fails at once when the other process wrote in between."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield conn
        conn.execute("COMMIT")
    except BaseException:
        # After some errors SQLite has rolled back by itself; then there is nothing to roll back.
        with contextlib.suppress(sqlite3.Error):
            if conn.in_transaction:
                conn.execute("ROLLBACK")
        raise


def _explain(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    advice = {
        sqlite3.SQLITE_FULL: "the disk is full; free space, nothing that was confirmed is lost",
        sqlite3.SQLITE_IOERR: "the disk does not take writes (full, over quota or failing); nothing confirmed is lost",
        sqlite3.SQLITE_READONLY: "the file is read-only for this user; correct its owner or mode",
        sqlite3.SQLITE_CANTOPEN: "the file cannot be opened; the folder must be writable for this user",
        sqlite3.SQLITE_PERM: "permission denied; correct the owner or mode",
        sqlite3.SQLITE_NOTADB: "this is not a journal; move the file away and start again",
        sqlite3.SQLITE_CORRUPT: "the file is damaged; move it away, keep it for recovery, and start again",
        sqlite3.SQLITE_BUSY: f"another process held it for over {BUSY_SECONDS:g} s; end that process",
    }.get(code)
    return f"{advice} ({error})" if advice else str(error)


def _batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), BATCH):
        yield numbers[start : start + BATCH]
