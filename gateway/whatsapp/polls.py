"""Polls and their votes: which options a poll has, and what a vote chose.

A vote is encrypted with the poll's secret, which whatsmeow keeps in its store; it names the options by their hashes, so
the options of every poll that was seen or sent are kept beside it. Decryption as in whatsmeow (`msgsecret.go`). Blocking.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gateway.whatsapp import content, store
from gateway.whatsapp.gate import bare
from gateway.whatsapp.values import Json, bytes_of, field, items, name_of, obj, text_of

FILE = "polls.db"
_USE = b"Poll Vote"
_HASH = 32


class Polls:
    """The polls of one session. Thread-safe."""

    def __init__(self, folder: Path, store_file: Path) -> None:
        self._path, self._store = folder / FILE, store_file
        self._lock = threading.Lock()

    def remember(self, poll_id: str, message: Any) -> None:
        """Keep what a poll asks. Whatever is no poll is not kept. Raises sqlite3.Error."""
        form = form_of(message)
        if form is None:
            return
        with self._lock, self._opened() as conn:
            conn.execute(
                "INSERT OR REPLACE INTO polls (id, form) VALUES (?, ?)", (poll_id, orjson.dumps(form))
            )

    def read(self, data: Json) -> Json | None:
        """What a vote event chose: `{"question", "options", "unknown"}`; None when it cannot be opened.

        Raises sqlite3.Error."""
        info, vote = obj(data.get("Info")), _vote_of(data)
        if vote is None:
            return None
        key = obj(field(vote, "pollCreationMessageKey"))
        poll_id = text_of(field(key, "id"))
        sealed = obj(field(vote, "vote"))
        payload, iv = bytes_of(field(sealed, "encPayload")), bytes_of(field(sealed, "encIV"))
        if not poll_id or not payload or not iv:
            return None
        voters = self._forms(_people(obj(info.get("MessageSource")), ("Sender", "SenderAlt")))
        for secret, author in store.secrets_of(self._store, poll_id):
            plain = _open(secret, poll_id, self._forms([author]), voters, payload, iv)
            if plain is not None:
                return self._named(poll_id, _hashes(plain))
        return None

    def _named(self, poll_id: str, hashes: Sequence[bytes]) -> Json:
        with self._lock, self._opened() as conn:
            row = conn.execute("SELECT form FROM polls WHERE id = ?", (poll_id,)).fetchone()
        form: Json = orjson.loads(row[0]) if row else {}
        names = {hashlib.sha256(name.encode()).digest(): name for name in form.get("options", ())}
        chosen = [names[digest] for digest in hashes if digest in names]
        return {
            "question": form.get("question"),
            "options": chosen,
            "unknown": len(hashes) - len(chosen),
        }

    def _forms(self, jids: Iterable[str]) -> list[str]:
        """Each address, and the other form of each."""
        found: dict[str, None] = {}
        for jid in map(bare, jids):
            user, _, server = jid.partition("@")
            found[jid] = None
            if server == "lid":
                other = store.phone_of_lid(self._store, user)
                found |= {f"{other}@s.whatsapp.net": None} if other else {}
            elif server == "s.whatsapp.net":
                other = store.lid_of_phone(self._store, user)
                found |= {f"{other}@lid": None} if other else {}
        return list(found)

    @contextlib.contextmanager
    def _opened(self) -> Any:
        with contextlib.closing(sqlite3.connect(self._path, timeout=5, isolation_level=None)) as conn:
            self._path.chmod(0o600)
            conn.execute("CREATE TABLE IF NOT EXISTS polls (id TEXT PRIMARY KEY, form BLOB NOT NULL)")
            yield conn


def form_of(message: Any) -> Json | None:
    """Question and options of a message that is a poll."""
    body, _ = content.unwrap(obj(message))
    for name in content.POLLS:
        part = field(body, name)
        if isinstance(part, dict):
            options = [
                text_of(field(obj(option), "optionName")) for option in items(field(part, "options"))[:50]
            ]
            return {"question": name_of(field(part, "name")), "options": [o for o in options if o]}
    return None


def is_vote(data: Any) -> bool:
    return _vote_of(obj(data)) is not None


def _vote_of(data: Json) -> Json | None:
    body, _ = content.unwrap(obj(data.get("Message")))
    vote = field(body, "pollUpdateMessage")
    return vote if isinstance(vote, dict) else None


def _people(source: Json, names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        jid = obj(source.get(name))
        if jid.get("User") and jid.get("Server"):
            found.append(f"{jid['User']}@{jid['Server']}")
    return found


def _open(
    secret: bytes, poll_id: str, authors: Iterable[str], voters: Sequence[str], payload: bytes, iv: bytes
) -> bytes | None:
    for author in authors:
        for voter in voters:
            info = poll_id.encode() + author.encode() + voter.encode() + _USE
            key = HKDF(SHA256(), 32, None, info).derive(secret)
            try:
                return AESGCM(key).decrypt(iv, payload, f"{poll_id}\0{voter}".encode())
            except (InvalidTag, ValueError):
                continue
    return None


def _hashes(plain: bytes) -> list[bytes]:
    """The one repeated field of a PollVoteMessage: tag 1, a length, a hash."""
    found, at = [], 0
    while at + 2 + _HASH <= len(plain) and plain[at] == 0x0A and plain[at + 1] == _HASH:
        found.append(plain[at + 2 : at + 2 + _HASH])
        at += 2 + _HASH
    return found
