"""What the world outside saw: JSON lines, on the disk before `write` returns, appended by the process that saw it.

Never written by a gateway: a ledger belongs to a process that no fault is aimed at.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

OFFERED = "offered"
"""A message was held out to the gateway (each time, so a redelivery is a second line)."""
ACKNOWLEDGED = "acknowledged"
"""The gateway said it has it: from now on it is the gateway's to lose."""
CALLED = "called"
"""The gateway asked for something to be sent: written before anything is answered."""
ANSWERED = "answered"
"""What the call was told: `sent`, `not_sent`, `refused`, `dropped` (it went out, the answer did not)."""


@dataclass(frozen=True, slots=True)
class Entry:
    kind: str
    item: str
    """Which message or queue item; its form is the writer's."""
    at: float
    """Monotonic seconds, one clock for every process of this machine."""
    wall: float
    fields: dict[str, Any] = field(default_factory=dict)


class Ledger:
    """Thread-safe; one file for each writing process."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        # Closed by `close`: several processes must never share one descriptor's offset, O_APPEND keeps lines whole.
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def write(self, kind: str, item: object, **fields: Any) -> Entry:
        """One line, durable when this returns."""
        return self.write_many(kind, [(item, fields)])[0]

    def write_many(self, kind: str, items: list[tuple[object, dict[str, Any]]]) -> list[Entry]:
        """Several lines with one wait for the disk."""
        entries = [Entry(kind, str(item), time.monotonic(), time.time(), fields) for item, fields in items]
        data = b"".join(
            orjson.dumps({"kind": e.kind, "item": e.item, "at": e.at, "wall": e.wall, **e.fields}) + b"\n"
            for e in entries
        )
        with self._lock:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            os.fdatasync(self._fd)
        return entries

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(*paths: Path | str) -> list[Entry]:
    """Everything in these ledgers, by time. A torn last line (its writer was killed) was never acted upon: left out."""
    return sorted((entry for path in paths for entry in _lines(Path(path))), key=lambda entry: entry.at)


def _lines(path: Path) -> Iterator[Entry]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        fields = orjson.loads(line)
        yield Entry(fields.pop("kind"), fields.pop("item"), fields.pop("at"), fields.pop("wall"), fields)
