"""What else must not leave before it is durable: acknowledgements of calls and of history, and the end of a history file.

The gate's smaller sister (see `gate.py` for how whatsmeow's log lets us hold its goroutines). Pure: no IO, no neonize.

A call's `<ack class="call">` waits until the call is in the journal. A `hist_sync` receipt waits until the file it is
about is on our disk, or given up. And whatsmeow, which fetches the same file for itself and then deletes it from
WhatsApp's server, is held between the two until we have it. It works off the announcements one by one, in the order in
which we get them, so its n-th line is about the n-th of them. That one wait has an end: nothing is acknowledged by it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

_K = TypeVar("_K", bound=Hashable)

DELETE_SECONDS = 120.0
"""How long whatsmeow is kept from deleting a history file that we have not fetched yet."""
REMEMBERED = 2000
CALLS = frozenset({"offer", "offer_notice", "terminate", "accept"})
"""The parts of a call that are journaled; the others say nothing that is kept."""

_CALL = re.compile(r"<call (?P<outer>[^>]*)>\s*<(?P<tag>[\w-]+) (?P<inner>[^>]*)>")
_ID = re.compile(r'(?:^| )id="([^"]*)"')
_CALL_ID = re.compile(r'(?:^| )call-id="([^"]*)"')
_RECEIVED, _FAILED = "Received history sync (type ", "Failed to download history sync: "


class Holds:
    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, delete_seconds: float = DELETE_SECONDS
    ) -> None:
        self._clock, self._delete_seconds = clock, delete_seconds
        self._changed = threading.Condition()
        self._calls: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._stored: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._history: OrderedDict[str, None] = OrderedDict()
        self._announced: list[str] = []
        self._worked_off = 0
        self.overdue = 0
        """History files that whatsmeow was let delete before we had them: its log does not read as it did, or the media
        server is slower for us than for it."""

    # ---- what is durable ----

    def call_stored(self, part: str, call_id: str) -> None:
        with self._changed:
            _remember(self._stored, (part, call_id))
            self._changed.notify_all()

    def history_announced(self, message_id: str) -> None:
        """In the order in which they come, one that was announced before as well."""
        with self._changed:
            self._announced.append(message_id)
            self._changed.notify_all()

    def history_here(self, message_id: str) -> None:
        """The file of this announcement is on our disk, or will never be."""
        with self._changed:
            _remember(self._history, message_id)
            self._changed.notify_all()

    # ---- whatsmeow's side ----

    def on_log(self, source: str, text: str) -> None:
        """One line of whatsmeow's log. Blocks the goroutine that logs."""
        if source == "Client/Recv":
            if text.startswith("<call "):
                self._on_call(text)
        elif source == "Client/Send":
            if text.startswith("<ack ") and 'class="call"' in text:
                self._hold_call(text)
            elif text.startswith("<receipt ") and 'type="hist_sync"' in text:
                self._hold_receipt(text)
        elif source == "Client":
            if text.startswith(_RECEIVED):
                self._hold_delete()
            elif text.startswith(_FAILED):
                with self._changed:
                    self._worked_off += 1

    def _on_call(self, text: str) -> None:
        match = _CALL.match(text)
        if match is None or match["tag"] not in CALLS:
            return
        stanza, call = _ID.search(match["outer"]), _CALL_ID.search(match["inner"])
        if stanza and call:
            with self._changed:
                self._calls[stanza[1]] = (match["tag"], call[1])
                while len(self._calls) > REMEMBERED:
                    self._calls.popitem(last=False)

    def _hold_call(self, text: str) -> None:
        stanza = _ID.search(text[: text.find(">")])
        with self._changed:
            key = self._calls.pop(stanza[1], None) if stanza else None
            while key is not None and key not in self._stored:
                self._changed.wait(1.0)

    def _hold_receipt(self, text: str) -> None:
        found = _ID.search(text[: text.find(">")])
        with self._changed:
            while found is not None and found[1] not in self._history:
                self._changed.wait(1.0)

    def _hold_delete(self) -> None:
        deadline = self._clock() + self._delete_seconds
        with self._changed:
            number = self._worked_off
            self._worked_off += 1
            while not self._is_here(number):
                if self.overdue or self._clock() >= deadline:  # once wrong, it would be wrong each time
                    self.overdue += 1
                    return
                self._changed.wait(1.0)

    def _is_here(self, number: int) -> bool:
        return number < len(self._announced) and self._announced[number] in self._history


def _remember(known: OrderedDict[_K, None], key: _K) -> None:
    known[key] = None
    while len(known) > REMEMBERED:
        known.popitem(last=False)
