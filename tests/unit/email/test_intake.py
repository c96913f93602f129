"""Storing what was fetched: with the cursor, however long the database is away, and whatever one of the mails is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from core.channel import (
    Cursor,
    InboundMessage,
    LeadId,
    MessageId,
    PairingUpdate,
    SessionState,
    StatusUpdate,
    Stored,
    ThreadId,
)
from core.errors import DatabaseUnavailable, Invalid
from gateway.email.convert import Origin
from gateway.email.intake import Fetched, Intake
from gateway.email.parser import MailParser, Unreadable
from gateway.email.raws import Raws
from gateway.email.timings import Timings
from tests.support.mail import CONTEXT, IDS, OWN


class Database:
    """A sink that is away for a while, and will not have some messages."""

    def __init__(self, *, away: int = 0, refuses: str = "nothing") -> None:
        self.away = away
        self.refuses = refuses
        self.messages: list[InboundMessage] = []
        self.updates: list[StatusUpdate] = []
        self.place: dict[str, Cursor] = {}

    def _there(self) -> None:
        if self.away:
            self.away -= 1
            raise DatabaseUnavailable("away")

    async def received(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        self._there()
        if any(self.refuses in (m.content or "") and "html" in m.raw_payload for m in messages):
            raise Invalid("this cannot be written as JSON")
        self.messages += messages
        return [Stored(MessageId(1), ThreadId(1), LeadId(1)) for _ in messages]

    async def status(self, updates: Sequence[StatusUpdate]) -> None:
        self._there()
        self.updates += updates

    async def cursors(self) -> Mapping[str, Cursor]:
        return self.place

    async def advance(self, cursor: Cursor) -> None:
        self.place[cursor.name] = cursor

    async def state(self, state: SessionState) -> None: ...
    async def pairing(self, update: PairingUpdate) -> None: ...


class Reader(MailParser):
    """Reads in this process; fails where the mail says so."""

    async def parse(self, raw: bytes) -> dict[str, object]:
        from gateway.email import parse

        if b"hurts" in raw:
            raise Unreadable("reading it took more than 5 s")
        return parse.parse(raw)


def intake(database: Database, folder: Path) -> Intake:
    timings = Timings(store=0.01)
    return Intake(CONTEXT, database, Reader(), Raws(folder), timings, own=OWN, ids=IDS)


def mails(*texts: str) -> list[Fetched]:
    return [
        Fetched(
            f"From: mei@c.example\r\nMessage-ID: <{n}@c>\r\nContent-Type: text/html\r\n\r\n<p>{text}</p>\r\n".encode(),
            Origin(uid=n),
            Cursor("imap:INBOX", {"uid": n}),
        )
        for n, text in enumerate(texts, 1)
    ]


async def test_mail_waits_for_the_database_in_its_order(tmp_path: Path) -> None:
    database = Database(away=3)
    assert await intake(database, tmp_path).store(mails("one", "two")) == 2
    assert [(m.content, m.cursor and m.cursor.value) for m in database.messages] == [
        ("one", {"uid": 1}),
        ("two", {"uid": 2}),
    ]


async def test_one_that_hurts_holds_back_nothing_and_is_kept(tmp_path: Path) -> None:
    database = Database()
    await intake(database, tmp_path).store(mails("one", "hurts", "three"))
    assert [(str(m.message_type), m.content) for m in database.messages] == [
        ("text", "one"),
        ("unsupported", "This mail could not be read; its original is kept."),
        ("text", "three"),
    ]
    assert [m.cursor and m.cursor.value["uid"] for m in database.messages] == [1, 2, 3]
    [kept] = (tmp_path / "mail").iterdir()
    assert b"hurts" in kept.read_bytes()


async def test_one_the_database_refuses_is_stored_plainly(tmp_path: Path) -> None:
    database = Database(refuses="poison")
    await intake(database, tmp_path).store(mails("one", "poison", "three"))
    assert [m.content for m in database.messages] == ["one", "poison", "three"]
    assert database.messages[1].raw_payload["quarantined"] == "this cannot be written as JSON"


@pytest.mark.parametrize("away", [0, 2])
async def test_what_a_returned_mail_says_is_told_before_its_place_moves(tmp_path: Path, away: int) -> None:
    raw = (
        "From: MAILER-DAEMON@mx.example\r\nMessage-ID: <d@mx>\r\nReturn-Path: <>\r\n"
        "Content-Type: multipart/report; boundary=d\r\n\r\n--d\r\nContent-Type: message/delivery-status\r\n\r\n"
        "Reporting-MTA: dns; mx\r\n\r\nFinal-Recipient: rfc822; mei@c.example\r\nAction: failed\r\nStatus: 5.1.1\r\n\r\n"
        f"--d\r\nContent-Type: message/rfc822\r\n\r\nMessage-ID: {IDS.of(4)}\r\n\r\nx\r\n--d--\r\n"
    ).encode()
    database = Database(away=away)
    await intake(database, tmp_path).store([Fetched(raw, Origin(uid=1), Cursor("imap:INBOX", {"uid": 1}))])
    [update] = database.updates
    assert (update.status, update.message_ids) == ("failed", (IDS.of(4),))
    assert len(database.messages) == 1
