"""When the phone itself last gave a sign: WhatsApp unlinks every device of a phone that was offline for 14 days.

A sign is what only the phone can have made: the pairing, a message or a read mark of its own. A phone that lies on a desk,
online and unused, gives none, so the warning asks to look, it does not say that the phone is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateway.whatsapp.values import milliseconds, obj

FILE = "phone.seen"
"""Its modification time is the sign's."""
DAY = 86_400.0
UNSEEN_SECONDS = 10 * DAY
WRITTEN_EVERY = 3600.0

WARNING = (
    "The phone has given no sign for {days} days. WhatsApp unlinks devices when the phone is offline for 14: "
    "open WhatsApp on the phone and check that it is online."
)


class PhoneSign:
    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock`: the wall clock."""
        self._path, self._clock = folder / FILE, clock
        self._at: float | None = None
        self._written = 0.0

    def start(self) -> None:
        """Read what an earlier run noted; the first look counts as a sign. Blocking."""
        try:
            self._at = self._written = self._path.stat().st_mtime
        except OSError:
            self.seen(self._clock())

    def seen(self, at: float) -> None:
        """A sign of that moment. Blocking for a moment, at most once an hour."""
        at = min(at, self._clock())
        if self._at is not None and at <= self._at:
            return
        self._at = at
        if at - self._written >= WRITTEN_EVERY:
            with contextlib.suppress(OSError):  # a warning that comes from memory alone is still a warning
                self._path.touch(mode=0o600)
                os.utime(self._path, (at, at))
                self._written = at

    @property
    def last(self) -> float | None:
        """Seconds since the epoch."""
        return self._at

    @property
    def warning(self) -> str | None:
        if self._at is None:
            return None
        silent = self._clock() - self._at
        return WARNING.format(days=int(silent // DAY)) if silent >= UNSEEN_SECONDS else None


def sign_of(event: Mapping[str, Any]) -> float | None:
    """When the own phone did what a journaled event tells of, or None when it was somebody else.

    The phone is device 0; other linked devices have numbers.
    """
    data = obj(event.get("data"))
    info = obj(data.get("Info"))
    source = obj(info.get("MessageSource") or data.get("MessageSource"))
    sender = obj(source.get("Sender"))
    if source.get("IsFromMe") is not True or not sender.get("User") or sender.get("Device"):
        return None
    at = milliseconds(info.get("Timestamp") or data.get("Timestamp"))
    return at / 1000 if at is not None else None
