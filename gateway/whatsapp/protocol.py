"""What the gateway and the WhatsApp child agree on: exit codes, file names, journal kinds, lines of JSON.

Standard library and orjson only, because both sides import it; it never does IO.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

import orjson

STORE_FILE = "whatsapp.db"
"""whatsmeow's own SQLite file: device keys, Signal sessions, message secrets."""
JOURNAL_FILE = "journal.db"
INTENTS_FILE = "intents.db"
LOCK_FILE = "lock"
SECRET_FILE = "secret.key"  # noqa: S105 - a file name

# Kinds of journal entries.
MESSAGE = "message"
UNDECRYPTABLE = "undecryptable"
RECEIPT = "receipt"
CALL = "call"
GROUP_NOTICE = "group_notice"
LOST = "lost"
"""A message that could not be recovered: stored as a placeholder that says so."""

LINE_LIMIT = 64 << 20
"""Bytes; a line with an image's thumbnail or a long contact list is far below."""


class Exit(IntEnum):
    """Why a child ended by itself. Anything else (a Go panic, a signal) is a crash."""

    STOPPED = 0
    LOCKED = 20
    """Another process holds the session's folder."""
    HEAL = 21
    """A message was decrypted before a crash and never stored: its sender's session must be dropped first."""
    JOURNAL = 22
    """The journal cannot make anything durable: nothing was acknowledged."""
    PAIRING = 23
    """The QR codes ran out, or the phone refused."""
    CONNECT = 24
    """The first connection failed; whatsmeow does not try again by itself then."""
    PARENT = 25
    """Started by somebody who is gone."""


def encode(line: dict[str, Any]) -> bytes:
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes) -> dict[str, Any]:
    """Raises ValueError when it is not a JSON object."""
    value = orjson.loads(line)
    if not isinstance(value, dict):
        raise ValueError("a line must be a JSON object")
    return value


def store_path(folder: Path) -> Path:
    return folder / STORE_FILE


def journal_path(folder: Path) -> Path:
    return folder / JOURNAL_FILE
