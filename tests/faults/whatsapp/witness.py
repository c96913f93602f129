"""What WhatsApp's side saw, written down at once: each message held out, each acknowledgement, and whether the message
was durable at that moment.

The sandbox runs in the harness's own process, which no fault is aimed at: its ledger is the truth. An acknowledgement is
checked where it arrives, before anything else happens: the message must stand in the journal file, read through a
connection of its own. A row that another connection can see has been fsynced (WAL, synchronous=FULL).
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.whatsapp.protocol import LOST, MESSAGE, UNDECRYPTABLE, journal_path
from sandbox.whatsapp.post import Ack
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.faults.ledger import ACKNOWLEDGED, OFFERED, Ledger

_DURABLE = (MESSAGE, UNDECRYPTABLE, LOST)


@dataclass(frozen=True, slots=True)
class Said:
    """A message somebody wrote to a session of ours (or its own phone wrote, and we get the echo)."""

    session: int
    text: str
    how: str
    """lid, pn, lid-only, group, echo"""
    number: int
    """In the order of writing."""
    at: float


@dataclass(slots=True)
class Witness:
    sandbox: WhatsAppSandbox
    ledger: Ledger
    said: dict[str, Said] = field(default_factory=dict)
    early: list[str] = field(default_factory=list)
    """Acknowledged, and not in the journal at that moment."""
    acked: dict[str, float] = field(default_factory=dict)
    """When (monotonic) each was acknowledged for good."""
    asked_again: dict[str, float] = field(default_factory=dict)
    """When a client first asked for it to be encrypted anew."""
    on_ack: Callable[[str], None] | None = None
    """Called for each acknowledgement of one of ours, in the moment in which it arrives."""
    _folders: dict[int, Path] = field(default_factory=dict)

    def watch(self) -> None:
        """From now on. Once per sandbox."""
        acks, retries = self.sandbox.acks, self.sandbox.retries
        note_ack, note_retry = acks.add, retries.add

        def on_ack(ack: Ack) -> None:
            self._taken_off_the_queue(ack)
            note_ack(ack)

        def on_retry(ack: Ack) -> None:
            self._taken_off_the_queue(ack)
            note_retry(ack)

        # In its place, not beside it: a task that waits for the ledger would look some milliseconds later.
        vars(acks)["add"] = on_ack
        vars(retries)["add"] = on_retry

    def folder(self, session: int, folder: Path) -> None:
        self._folders[session] = folder

    def wrote(self, msg_id: str, session: int, text: str, how: str) -> None:
        self.said[msg_id] = Said(session, text, how, len(self.said), time.monotonic())
        self.ledger.write(OFFERED, msg_id, session=session, how=how)

    def _taken_off_the_queue(self, ack: Ack) -> None:
        """WhatsApp will not deliver this stanza again: by then somebody else must have it."""
        said = self.said.get(ack.id)
        if said is None:
            return
        durable = self._durable(said.session, ack.id)
        if not durable:
            self.early.append(f"{ack.id} ({ack.how}, {said.how})")
        if ack.how == "retry":
            self.asked_again.setdefault(ack.id, ack.monotonic)
            return
        self.acked[ack.id] = ack.monotonic
        self.ledger.write(ACKNOWLEDGED, ack.id, how=ack.how, durable=durable)
        if self.on_ack is not None:
            self.on_ack(ack.id)

    def _durable(self, session: int, msg_id: str) -> bool:
        path = journal_path(self._folders[session])
        uri = f"{path.resolve().as_uri()}?mode=rw"
        # Opened anew each time: a connection that stayed open would spare a killed child's successor the recovery.
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as conn:
            found = conn.execute(
                f"SELECT 1 FROM entries WHERE kind IN ({','.join('?' * len(_DURABLE))}) AND key >= ? AND key < ? LIMIT 1",
                (*_DURABLE, f"{msg_id} ", f"{msg_id}!"),
            ).fetchone()
        return found is not None
