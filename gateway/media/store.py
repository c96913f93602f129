"""The folder of media: every content once, under the SHA-256 of its bytes. A file that has its name is whole and durable.

Knows no tenant and no row: who may read what is `et_media_files`. Never blocks the event loop: disk work is in threads.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from core import faults
from core.errors import NotSentError, RefusedError

BUFFER = 1 << 20
"""Bytes gathered before a thread is asked to write them."""
RESERVE = 256 << 20
"""Bytes that media leaves free: the journal of messages lives on the same disk."""
HEAD, FOOT = 16384, 4096
"""How much of both ends a sniffer is shown."""
ABANDONED_SECONDS = 3 * 86400.0
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DRAFT = re.compile(r"[a-z0-9-]{1,80}")


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes that are in the store. `head` and `foot` are the ends of them, for sniffing."""

    sha256: str
    size: int
    path: Path
    head: bytes
    foot: bytes


def too_large(limit: int) -> RefusedError:
    return RefusedError(
        f"the file is larger than {_megabytes(limit)} MB, the most that is taken; send a smaller one",
        code="media_too_large",
    )


def _megabytes(size: int) -> str:
    return f"{size / (1 << 20):.3g}"


def disk_full(folder: Path, free: int) -> NotSentError:
    return NotSentError(
        f"the disk of {folder} has {_megabytes(max(0, free))} MB left; free some space or move DATA_DIR",
        code="media_disk_full",
        action="free space on the disk of DATA_DIR",
    )


class MediaStore:
    """`async with store.draft(...) as draft: await draft.write(...); content = await draft.keep()`."""

    def __init__(self, folder: Path, *, reserve: int = RESERVE) -> None:
        """Makes the folder (mode 0700) when missing: call it in a thread, or at start."""
        self.folder = folder
        self.reserve = reserve
        self._drafts = folder / "drafts"
        for made in (folder, self._drafts):
            made.parent.mkdir(parents=True, exist_ok=True)
            made.mkdir(mode=0o700, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a content is, or would be. Raises ValueError for what is no SHA-256 in hex."""
        if not _DIGEST.fullmatch(sha256):
            raise ValueError("not a SHA-256 in hex")
        return self.folder / sha256[:2] / sha256[2:4] / sha256

    async def has(self, sha256: str) -> bool:
        return await asyncio.to_thread(self.path(sha256).is_file)

    @asynccontextmanager
    async def draft(self, name: str | None = None, *, limit: int, expected: int = 0) -> AsyncIterator[Draft]:
        """A file that is being written. Gone at the end unless kept; with a `name` an interrupted one stays, and the
        next draft of that name goes on where it stopped. `limit` and `expected` are bytes.

        Raises RefusedError `media_too_large`, NotSentError `media_disk_full`.
        """
        if expected > limit:
            raise too_large(limit)
        if name is not None and not _DRAFT.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a draft")
        path = self._drafts / (f"{name}.part" if name else f"{os.urandom(12).hex()}.tmp")
        draft = await asyncio.to_thread(Draft, self, path, limit, expected)
        try:
            yield draft
        finally:
            await draft.close(resume=name is not None)

    async def read(self, sha256: str, *, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """The content in pieces of at most `BUFFER` bytes. Raises FileNotFoundError."""
        file = await asyncio.to_thread(self.path(sha256).open, "rb")
        try:
            await asyncio.to_thread(file.seek, start)
            left = length if length is not None else 1 << 62
            while left > 0 and (piece := await asyncio.to_thread(file.read, min(BUFFER, left))):
                left -= len(piece)
                yield piece
        finally:
            await asyncio.to_thread(file.close)

    # --- what follows blocks; for threads

    def free(self) -> int:
        """Bytes that media may still take."""
        return shutil.disk_usage(self.folder).free - self.reserve

    def require(self, size: int) -> None:
        free = self.free()
        if free < size:
            raise disk_full(self.folder, free)

    def remove(self, sha256: str, *, unless_since: float) -> bool:
        """Delete a content nobody names, unless it was stored again since (epoch seconds).

        Taken away first and looked at then: a draft that is kept at this very moment puts a fresh file in its place, and
        nothing can come between a look and a removal.
        """
        path = self.path(sha256)
        aside = self._drafts / f"{os.urandom(12).hex()}.old"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        if aside.stat().st_mtime >= unless_since:
            aside.rename(path)
            return False
        aside.unlink()
        return True

    def contents(self) -> Iterator[tuple[str, float]]:
        """Every content with its time of storing (epoch seconds), one shard at a time."""
        for shard in sorted(self.folder.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]")):
            with suppress(FileNotFoundError), os.scandir(shard) as entries:
                for entry in entries:
                    if _DIGEST.fullmatch(entry.name):
                        with suppress(FileNotFoundError):
                            yield entry.name, entry.stat().st_mtime

    def prune_drafts(self, *, older_than: float = ABANDONED_SECONDS) -> int:
        """Drafts that a crash or a dropped download left behind."""
        pruned = 0
        with os.scandir(self._drafts) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < time.time() - older_than:
                        os.unlink(entry.path)
                        pruned += 1
        return pruned


class Draft:
    """A file in the making; keeps the contract's `MediaTarget`. One task at a time."""

    def __init__(self, store: MediaStore, path: Path, limit: int, expected: int) -> None:
        self._store = store
        self._path = path
        self._limit = limit
        self._file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab"
        )
        self._written = os.fstat(self._file.fileno()).st_size
        self._pending = bytearray()
        self._checked_at = self._written
        self._kept = self._dropped = False
        try:
            store.require(max(0, expected - self._written))
        except BaseException:
            self._file.close()
            if not self._written:
                path.unlink()
            raise

    @property
    def path(self) -> Path:
        return self._path

    @property
    def offset(self) -> int:
        return self._written + len(self._pending)

    async def write(self, chunk: bytes) -> None:
        if self.offset + len(chunk) > self._limit:
            raise too_large(self._limit)
        self._pending += chunk
        if len(self._pending) >= BUFFER:
            await self.flush()

    async def flush(self) -> None:
        """Hand what was gathered to the disk (not yet durable)."""
        piece, self._pending = self._pending, bytearray()
        self._written += len(piece)
        if piece:
            await asyncio.to_thread(self._append, piece)

    async def restart(self) -> None:
        self._pending.clear()
        self._written = self._checked_at = 0
        await asyncio.to_thread(os.truncate, self._path, 0)

    async def keep(self) -> Content:
        """Make it durable under its content's name. Raises like `MediaStore.draft`."""
        await self.flush()
        content = await asyncio.to_thread(self._keep)
        self._kept = True
        return content

    def drop(self) -> None:
        """No later attempt will go on with this one."""
        self._dropped = True

    async def close(self, *, resume: bool) -> None:
        resume = resume and not self._dropped
        if resume and not self._kept and self._pending:
            with suppress(NotSentError):
                await self.flush()
        await asyncio.to_thread(self._close, resume)

    def _append(self, piece: bytearray) -> None:
        if self._written - self._checked_at > 8 * BUFFER:
            self._store.require(0)
            self._checked_at = self._written
        try:
            self._file.write(piece)
            self._file.flush()
        except OSError as error:
            raise self._explain(error) from error

    def _keep(self) -> Content:
        # Read back rather than hashed while writing: a client may have written the file itself.
        with self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > self._limit:
                raise too_large(self._limit)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            head = file.read(HEAD)
            file.seek(max(0, size - FOOT))
            foot = file.read(FOOT)
            target = self._store.path(sha256)
            try:
                faults.point("media.before_fsync")
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o600)
                for shard in (target.parent.parent, target.parent):
                    shard.mkdir(mode=0o700, exist_ok=True)
                # Over an older file of the same content too: its time of storing is then now, see `remove`.
                os.utime(self._path)
                self._path.replace(target)
                for folder in (target.parent, target.parent.parent, self._store.folder):
                    _sync_folder(folder)
                faults.point("media.after_rename")
            except OSError as error:
                raise self._explain(error) from error
        return Content(sha256, size, target, head, foot)

    def _close(self, resume: bool) -> None:
        self._file.close()
        if not self._kept and not resume:
            self._path.unlink(missing_ok=True)

    def _explain(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(self._store.folder, 0)
        return NotSentError(
            f"{self._store.folder}: the file could not be stored ({error.strerror}); look at the disk of DATA_DIR",
            code="media_disk",
        )


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
