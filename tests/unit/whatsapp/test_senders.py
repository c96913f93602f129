"""The child's sends: in order, each answered, a refusal as one."""

from __future__ import annotations

import queue
import threading
from typing import Any

from gateway.whatsapp.senders import THREADS, Senders

SECONDS = 5


def test_each_send_is_answered_with_its_result_or_its_error() -> None:
    answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def send(command: dict[str, Any]) -> str:
        if command["to"] == "nobody":
            raise ValueError("no LID found")
        return command["to"].upper()

    senders = Senders(send, lambda **fields: answers.put(fields))
    senders.put({"id": 1, "to": "mei"})
    assert answers.get(timeout=SECONDS) == {"id": 1, "result": "MEI"}
    senders.put({"id": 2, "to": "nobody"})
    assert answers.get(timeout=SECONDS) == {"id": 2, "error": "no LID found", "kind": "ValueError"}


def test_sends_begin_in_their_order_and_those_that_wait_have_not_begun() -> None:
    begun: queue.Queue[int] = queue.Queue()
    answers: queue.Queue[int] = queue.Queue()
    gate = threading.Semaphore(0)

    def send(command: dict[str, Any]) -> None:
        begun.put(command["id"])
        assert gate.acquire(timeout=SECONDS)

    senders = Senders(send, lambda **fields: answers.put(fields["id"]))
    for number in range(THREADS + 3):
        senders.put({"id": number})
    assert sorted(begun.get(timeout=SECONDS) for _ in range(THREADS)) == list(range(THREADS))
    assert begun.empty()
    for number in range(THREADS, THREADS + 3):
        gate.release()
        assert begun.get(timeout=SECONDS) == number
    for _ in range(THREADS):
        gate.release()
    assert sorted(answers.get(timeout=SECONDS) for _ in range(THREADS + 3)) == list(range(THREADS + 3))
