"""The mailboxes of the sandbox, in memory: folders of mails with UIDs that only rise, and whoever watches them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

DELETED = "\\Deleted"


@dataclass(slots=True)
class Mail:
    uid: int
    raw: bytes
    arrived_at: float
    flags: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Folder:
    name: str
    uidvalidity: int = field(default_factory=lambda: int(time.time()))
    next_uid: int = 1
    mails: list[Mail] = field(default_factory=list)
    watchers: set[Callable[[], None]] = field(default_factory=set)

    def add(self, raw: bytes, flags: set[str] | None = None) -> Mail:
        mail = Mail(self.next_uid, raw, time.time(), set(flags or ()))
        self.next_uid += 1
        self.mails.append(mail)
        self.changed()
        return mail

    def remove(self, uids: set[int]) -> None:
        self.mails = [mail for mail in self.mails if mail.uid not in uids]
        self.changed()

    def renumber(self) -> None:
        """As after a restored backup: other UIDs, and a UIDVALIDITY that says so."""
        self.uidvalidity += 1 + secrets.randbelow(1000)
        self.mails = [
            Mail(uid, mail.raw, mail.arrived_at, mail.flags) for uid, mail in enumerate(self.mails, start=1)
        ]
        self.next_uid = len(self.mails) + 1

    def changed(self) -> None:
        for watcher in list(self.watchers):
            watcher()


class Account:
    """One mailbox somebody logs in to."""

    def __init__(self, address: str, password: str) -> None:
        self.address = address
        self.password = password
        self.folders = {name: Folder(name) for name in ("INBOX", "Sent")}

    def folder(self, name: str) -> Folder | None:
        return self.folders.get("INBOX" if name.upper() == "INBOX" else name)

    @property
    def inbox(self) -> Folder:
        return self.folders["INBOX"]

    @property
    def sent(self) -> Folder:
        return self.folders["Sent"]
