"""whatsmeow's own SQLite file, read: who we are, what a send became, which phone a LID is. And the one thing we delete.

Reads are short, so that whatsmeow hardly waits for them; only `drop_sessions` writes, and only while no
client runs. Cryptographic state is never edited.

Never called in the process where a client runs: whatsmeow brings an SQLite of its own, and POSIX locks belong to the
process, so closing the file here would drop the locks held there (https://www.sqlite.org/howtocorrupt.html, "Two SQLite
libraries").
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.whatsapp.gate import bare

BUSY_SECONDS = 5.0
_SETTINGS = "_foreign_keys=on&_journal_mode=WAL&_synchronous=FULL&_txlock=immediate&_="
"""Of the driver in whatsmeow (github.com/mattn/go-sqlite3, "DSN"). A write-ahead log waits for the disk once where the
default, a journal deleted at each commit, waits three times; a message sent takes two commits. FULL, because that driver
would let commits of a write-ahead log go without waiting, and a send's secret must be on the disk before the message is on
the wire. Immediate: a transaction that reads first and writes then is not refused because another one wrote between.
The last name swallows what neonize appends (`?_foreign_keys=on`)."""


@dataclass(frozen=True, slots=True)
class Device:
    """The linked device this file holds."""

    jid: str
    """With its device number: `60123456789:3@s.whatsapp.net`."""
    phone: str
    """Bare: `60123456789@s.whatsapp.net`."""
    lid: str
    name: str

    @property
    def identifier(self) -> str:
        return "+" + self.phone.partition("@")[0]


@dataclass(frozen=True, slots=True)
class SecretRow:
    message_id: str
    chat: str


def opened_as(path: Path) -> str:
    """What neonize is told as the file's name."""
    return f"{path}?{_SETTINGS}"


def device(path: Path) -> Device | None:
    """The linked device, or None when nothing is paired (no file, logged out)."""
    rows = _read(path, "SELECT jid, lid, push_name FROM whatsmeow_device LIMIT 1")
    if not rows:
        return None
    jid, lid, name = rows[0]
    return Device(str(jid), bare(str(jid)), bare(str(lid or "")), str(name or ""))


def find_secret(path: Path, secret: bytes) -> SecretRow | None:
    """The message that was sent with this secret. whatsmeow writes the row before the message goes on the wire."""
    rows = _read(path, "SELECT message_id, chat_jid FROM whatsmeow_message_secrets WHERE key = ?", (secret,))
    return SecretRow(str(rows[0][0]), str(rows[0][1])) if rows else None


def secrets_of(path: Path, message_id: str) -> list[tuple[bytes, str]]:
    """(secret, author) of the messages with this id: ids are unique only per chat."""
    rows = _read(
        path, "SELECT key, sender_jid FROM whatsmeow_message_secrets WHERE message_id = ?", (message_id,)
    )
    return [(key, str(author)) for key, author in rows if isinstance(key, bytes)]


def phone_of_lid(path: Path, lid: str) -> str | None:
    """`100000000000002` → `60123456789` (digits), when whatsmeow has seen the pair."""
    rows = _read(path, "SELECT pn FROM whatsmeow_lid_map WHERE lid = ?", (lid,))
    return str(rows[0][0]) if rows else None


def lid_of_phone(path: Path, phone: str) -> str | None:
    rows = _read(path, "SELECT lid FROM whatsmeow_lid_map WHERE pn = ?", (phone,))
    return str(rows[0][0]) if rows else None


def drop_sessions(path: Path, suspects: Sequence[tuple[str, str, str]]) -> int:
    """Forget the Signal sessions of these `(sender, chat, reason)`, so that a redelivered message gives "no session",
    a retry receipt goes out and the sender's phone encrypts it anew. How many rows went.

    Only while no client runs on this file. A group message is read with the sender's group key; that alone goes when
    whatsmeow named it, else the pairwise session as well.
    """
    gone = 0
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as conn:
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute("BEGIN IMMEDIATE")
        for sender, chat, reason in suspects:
            for address in _signal_addresses(conn, sender):
                if chat.endswith("@g.us"):
                    gone += conn.execute(
                        r"DELETE FROM whatsmeow_sender_keys WHERE chat_id = ? AND sender_id LIKE ? ESCAPE '\'",
                        (chat, address),
                    ).rowcount
                if "group message" not in reason:
                    gone += conn.execute(
                        r"DELETE FROM whatsmeow_sessions WHERE their_id LIKE ? ESCAPE '\'", (address,)
                    ).rowcount
        conn.execute("COMMIT")
    return gone


def _signal_addresses(conn: sqlite3.Connection, sender: str) -> Iterator[str]:
    """LIKE patterns for every device of a person: `60123:%`, and for the LID `100_1:%`."""
    user = sender.partition("@")[0]
    if not re.fullmatch(r"[0-9]+", user):
        return
    users = {user}
    for row in conn.execute("SELECT lid, pn FROM whatsmeow_lid_map WHERE lid = ? OR pn = ?", (user, user)):
        users.update(map(str, row))
    for each in sorted(users):
        yield f"{each}:%"
        yield rf"{each}\_%"


def _read(path: Path, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Rows, or none when the file or the table is not there yet. Raises sqlite3.Error when it cannot be read."""
    if not path.exists():
        return []
    # Not `mode=ro`: after a kill in the middle of a transaction SQLite has to roll it back before anyone can read.
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as conn:
        conn.execute("PRAGMA query_only = ON")
        try:
            return conn.execute(sql, parameters).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
