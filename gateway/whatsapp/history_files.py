"""History sync on its way through a session's folder: what the phone announced, what was fetched, what is stored.

    <session>/history/<when>-<id>.notice   the phone's announcement, durable before it is acknowledged (the child)
                     …blob                 the announced file, whole (the child)
                     …done | …failed       stored in the database, or why it never will be (the gateway, the child)
    <session>/history/names.json           names of people, as the phone sent them

Blocking, standard library and orjson only. Nothing here knows what is in a blob.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

FOLDER = "history"
NAMES = "names.json"
KEEP_SECONDS = 14 * 86400.0
"""How long it is remembered that an announcement was dealt with."""
_KNOWN = frozenset({".notice", ".done", ".failed"})
_ODD = re.compile(r"[^A-Za-z0-9_.]")


@dataclass(frozen=True, slots=True)
class Notice:
    """One announcement. `stem` orders them by arrival and names their files."""

    stem: str
    message_id: str
    fields: dict[str, Any]
    """`kind`, `path`, `key`, `enc_sha256`, `sha256` as a download takes them; `sync`, `chunk`, `progress`."""


class HistoryFolder:
    def __init__(self, session_folder: Path) -> None:
        self.path = session_folder / FOLDER

    # ---- the child's side ----

    def announce(self, message_id: str, fields: dict[str, Any], inline: bytes | None = None) -> Notice | None:
        """Make an announcement durable; None when it is known already. `inline`: the file itself, if it came along.

        Raises OSError."""
        name = _ODD.sub("_", message_id)[:100]
        self.path.mkdir(mode=0o700, exist_ok=True)
        # Not a draft that a crash left behind: that one was never promised.
        if any(path.suffix in _KNOWN for path in self.path.glob(f"*-{name}.*")):
            return None
        notice = Notice(f"{time.time_ns():020d}-{name}", message_id, fields)
        if inline is not None:
            self._write(f"{notice.stem}.blob", inline)
        self._write(f"{notice.stem}.notice", orjson.dumps({"id": message_id, **fields}))
        return notice

    def waiting(self) -> list[Notice]:
        """Announced and not fetched yet, in order."""
        found = []
        for path in sorted(self.path.glob("*.notice")):
            if self.here_or_over(path.stem):
                continue
            try:
                fields = orjson.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            found.append(Notice(path.stem, str(fields.pop("id", "")), fields))
        return found

    def here_or_over(self, stem: str) -> bool:
        """Fetched, stored or given up."""
        return any((self.path / f"{stem}{end}").exists() for end in (".blob", ".done", ".failed"))

    def partial(self, notice: Notice) -> Path:
        return self.path / f"{notice.stem}.part"

    def fetched(self, notice: Notice) -> None:
        """The partial file is whole: make it durable."""
        part = self.partial(notice)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self.path / f"{notice.stem}.blob")
        _sync(self.path)

    def fail(self, notice: Notice, reason: str) -> None:
        self._write(f"{notice.stem}.failed", orjson.dumps({"reason": reason}))
        self.partial(notice).unlink(missing_ok=True)

    # ---- the gateway's side ----

    def blobs(self) -> list[Path]:
        """Fetched and not stored yet, in order."""
        return sorted(self.path.glob("*.blob"))

    def stored(self, blob: Path) -> None:
        """All of it is committed: the file goes, that it was there is remembered."""
        self._write(f"{blob.stem}.done", b"{}")
        blob.unlink(missing_ok=True)

    def put_aside(self, blob: Path, reason: str) -> None:
        """It cannot be read. Kept for whoever wants to know why, as long as it is remembered at all."""
        self._write(f"{blob.stem}.failed", orjson.dumps({"reason": reason}))
        blob.replace(blob.with_suffix(".bad"))

    def failures(self) -> int:
        return sum(1 for _ in self.path.glob("*.failed"))

    def names(self) -> dict[str, str]:
        try:
            found = orjson.loads((self.path / NAMES).read_bytes())
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}

    def keep_names(self, names: dict[str, str]) -> None:
        self._write(NAMES, orjson.dumps(names))

    def prune(self, now: float | None = None) -> None:
        limit = (time.time() if now is None else now) - KEEP_SECONDS
        for path in self.path.glob("*.*"):
            draft = path.name.startswith(".")
            if draft or path.suffix in (".done", ".failed"):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < (limit + KEEP_SECONDS - 3600 if draft else limit):
                        for end in (".notice", ".bad"):
                            path.with_suffix(end).unlink(missing_ok=True)
                        path.unlink()

    def clear(self) -> None:
        """Forget all of it: it was never ours."""
        for path in self.path.glob("*"):
            path.unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        draft = self.path / f".{name}.{os.getpid()}"
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path / name)
        _sync(self.path)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
