"""The child's sends: handed over in their order by a few threads of their own, each answered by the thread that made it.

whatsmeow sends one message at a time. While one is under way the next stands in line inside whatsmeow already, so that the
gateway, the pipe and Python cost no time between two. What still waits here has not begun. Knows no WhatsApp.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

THREADS = 4
"""More than two, because a first message to somebody asks WhatsApp for their address before it stands in line."""


class Senders:
    def __init__(self, send: Callable[[dict[str, Any]], Any], answer: Callable[..., None]) -> None:
        """`send(command)` blocks; `answer` is told `id` and either `result` or `error` and `kind`, from any thread."""
        self._send, self._answer = send, answer
        self._waiting: SimpleQueue[dict[str, Any]] = SimpleQueue()
        for number in range(THREADS):
            threading.Thread(target=self._run, name=f"send-{number}", daemon=True).start()

    def put(self, command: dict[str, Any]) -> None:
        self._waiting.put(command)

    def _run(self) -> None:
        while True:
            command = self._waiting.get()
            number = command.get("id")
            try:
                result = self._send(command)
            except Exception as error:
                self._answer(id=number, error=str(error) or type(error).__name__, kind=type(error).__name__)
            else:
                self._answer(id=number, result=result)
