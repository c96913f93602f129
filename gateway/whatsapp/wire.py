"""The WhatsApp child's way to its parent: lines of JSON on what was stdout. Never a line of whatsmeow's log."""

from __future__ import annotations

import os
import threading
from typing import Any

from gateway.whatsapp.protocol import encode


class Wire:
    """Lines to the parent, whole ones only, from any thread."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)  # the Go library prints to stdout
        self._lock = threading.Lock()

    def say(self, event: str, **fields: Any) -> None:
        line = memoryview(encode({"ev": event, **fields}))
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]
