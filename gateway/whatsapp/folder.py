"""A session's folder: who may work in it (an exclusive lock), the key of its message secrets, forgetting its keys.

One process at a time holds the lock; its id stands in the file, so that whoever must take over can end it first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import signal
import time
from pathlib import Path
from types import TracebackType

from gateway.whatsapp.protocol import LOCK_FILE, SECRET_FILE, STORE_FILE


class FolderTaken(Exception):
    """Another process works in this folder. `pid` as it recorded itself, if it did."""

    def __init__(self, folder: Path, pid: int | None) -> None:
        super().__init__(f"{folder} is in use by process {pid or 'unknown'}")
        self.pid = pid


class FolderLock:
    """Held until `release` or the end of the process, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        """Raises FolderTaken at once when another holds it, OSError when the folder cannot be written."""
        self._fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _recorded(self._fd)
            os.close(self._fd)
            raise FolderTaken(folder, pid) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take(folder: Path, *, seconds: float) -> FolderLock:
    """The lock, ending the recorded child when it does not go by itself within half of `seconds`.

    Blocking: call it in a thread. Raises FolderTaken when it cannot be had.
    """
    started = time.monotonic()
    ended = False
    while True:
        try:
            return FolderLock(folder)
        except FolderTaken as taken:
            waited = time.monotonic() - started
            if waited >= seconds:
                raise
            if waited >= seconds / 2 and not ended and taken.pid is not None:
                ended = _end_child(taken.pid, folder)
        time.sleep(0.05)


def _end_child(pid: int, folder: Path) -> bool:
    """Kill a recorded child, after a look that it is one, and of this folder."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    words = {word.decode(errors="replace") for word in command}
    if "--folder" not in words or str(folder) not in words:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    return True


def _recorded(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def message_secret(folder: Path, queue_id: int, claim_epoch: int) -> bytes:
    """The 32 bytes that mark the send of one attempt; another attempt of the same item has its own."""
    return hmac.new(_secret_key(folder), f"{queue_id}:{claim_epoch}".encode(), hashlib.sha256).digest()


def _secret_key(folder: Path) -> bytes:
    path = folder / SECRET_FILE
    with contextlib.suppress(FileNotFoundError):
        key = path.read_bytes()
        if len(key) == 32:
            return key
    partial = folder / f"{SECRET_FILE}.{secrets.token_hex(4)}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, secrets.token_bytes(32))
        os.fsync(fd)
    finally:
        os.close(fd)
    with contextlib.suppress(FileExistsError):
        os.link(partial, path)  # whoever comes first wins, also between two processes
    partial.unlink()
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return path.read_bytes()


def forget_device(folder: Path) -> None:
    """Delete the device's keys. The journal stays: what it holds is not stored elsewhere yet."""
    for path in folder.glob(f"{STORE_FILE}*"):
        path.unlink(missing_ok=True)
