"""Originals of mails whose files are still to be fetched, on this gateway's disk: a mail deleted in the mailbox meanwhile
costs nothing. Only a shelf: what is not here is fetched from the mailbox again.

Each file of a mail has a link of its own to the one original. All calls block: use them in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

KEPT_SECONDS = 15 * 86400
"""As long as the media worker tries."""
USED_SECONDS = 3600
"""After the file was read: its row may not have been committed yet."""
MOST_BYTES = 2 << 30


class Raws:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "mail"

    def keep(self, mail: str, numbers: Iterable[int], raw: bytes) -> None:
        """Durable when it returns. A full disk is no reason to refuse mail: then the mailbox is the only source."""
        wanted = [self._path(mail, number) for number in numbers]
        if not wanted or self._full():
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = self._folder / f".{self._name(mail)}.{os.getpid()}"
            with open(draft, "wb", opener=_private) as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            for path in wanted:
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
            draft.unlink()

    def find(self, mail: str, number: int) -> bytes | None:
        path = self._path(mail, number)
        for candidate in (path, path.with_suffix(".used")):
            with contextlib.suppress(OSError):
                return candidate.read_bytes()
        return None

    def used(self, mail: str, number: int) -> None:
        path = self._path(mail, number)
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".used"))
            os.utime(path.with_suffix(".used"))

    def sweep(self) -> None:
        """Remove what nobody will ask for any more."""
        now = time.time()
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                age = now - entry.stat().st_mtime
                if age > (USED_SECONDS if entry.name.endswith(".used") else KEPT_SECONDS):
                    os.unlink(entry.path)

    def _full(self) -> bool:
        sizes: dict[int, int] = {}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                about = entry.stat()
                sizes[about.st_ino] = about.st_size
        return sum(sizes.values()) > MOST_BYTES

    def _path(self, mail: str, number: int) -> Path:
        return self._folder / f"{self._name(mail)}.{number}.eml"

    @staticmethod
    def _name(mail: str) -> str:
        return hashlib.sha256(mail.encode("utf-8", "replace")).hexdigest()[:40]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
