"""Folders of sessions on disk: made private, moved to the surviving session, removed. Blocking: call it in a thread.

A journal that still holds something is never thrown away.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from core import log as logs
from core.journal import Journal

log = logs.get(part="sessions")

JOURNAL = "journal.db"


def make(root: Path, session_id: int) -> Path:
    """The session's own folder, mode 0700."""
    folder = root / str(session_id)
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def move(root: Path, old_id: int, new_id: int) -> None:
    """The pending session's folder becomes the surviving session's. What the older device had received and nobody had
    stored yet goes along. Can be repeated after a crash at any point."""
    old, new = root / str(old_id), root / str(new_id)
    if old.exists():
        if new.exists():
            new.rename(_aside(root, new_id))
        old.rename(new)
    for aside in sorted(root.glob(f"{new_id}.replaced-*")):
        if _carry_over(aside / JOURNAL, new / JOURNAL):
            shutil.rmtree(aside, ignore_errors=True)


def remove(root: Path, session_id: int) -> None:
    """Forget a deleted session's files; a journal with something in it stays, aside."""
    folder = root / str(session_id)
    if not folder.exists():
        return
    if _waiting(folder / JOURNAL):
        kept = _aside(root, session_id)
        folder.rename(kept)
        log.error(
            "session.journal_kept", session_id=session_id, action=f"look into {kept.name}: it holds messages"
        )
        return
    shutil.rmtree(folder, ignore_errors=True)


def numbered(root: Path) -> list[int]:
    """The sessions that have a folder here."""
    if not root.exists():
        return []
    return sorted(int(name) for name in os.listdir(root) if name.isascii() and name.isdigit())


def _aside(root: Path, session_id: int) -> Path:
    return root / f"{session_id}.replaced-{time.time_ns()}"


def _waiting(path: Path) -> int:
    if not path.exists():
        return 0
    with Journal(path) as journal:
        return journal.depth()


def _carry_over(source: Path, target: Path) -> bool:
    """True when nothing is left in the source."""
    if not source.exists():
        return True
    try:
        with Journal(source) as old, Journal(target) as new:
            while entries := old.pending(limit=100):
                new.append_many([(e.kind, e.key, e.payload) for e in entries])
                old.release([e.number for e in entries])
    except Exception as error:
        log.error("session.journal_not_moved", error=repr(error), action=f"look into {source.parent.name}")
        return False
    return True
