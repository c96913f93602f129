"""One session whose mailbox is a real Dovecot and whose way out is the sandbox's SMTP server, for a whole module."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, make_msgid

import pytest
import pytest_asyncio

from core.channel import Json
from gateway.email import parse
from tests.contract.email_peer import EmailPeer
from tests.contract.peer import LogIn
from tests.contract.world import World
from tests.support.dovecot import PASSWORD, USER, Dovecot
from tests.support.outbound import fetch
from tests.support.postgres import PostgresServer


class DovecotPeer(EmailPeer):
    """The suite's peer with Dovecot in the place of the sandbox's IMAP server."""

    def __init__(self, dovecot: Dovecot, settings: Json | None = None) -> None:
        super().__init__()
        self.mail.account.address, self.mail.account.password = USER, PASSWORD
        self.mail.saves_sent = False
        self.dovecot = dovecot
        self._settings = settings or {}

    def log_in(self) -> LogIn:
        both = self.dovecot.ca + self.mail.ca
        credentials = {
            **self.mail.credentials,
            "imap": {"host": "127.0.0.1", "port": self.dovecot.port, "security": "tls"},
            "ca": both,
        }
        return LogIn(USER, credentials, {"settings": self._settings} if self._settings else {})


class Shop(World):
    """A world with Dovecot in it, and the questions these tests ask."""

    peer: DovecotPeer

    @property
    def dovecot(self) -> Dovecot:
        return self.peer.dovecot

    def deliver(self, text: str, *, folder: str = "", **more: str) -> str:
        """A mail from a customer, into the Maildir; returns the id of its row."""
        raw = letter(text, **more)
        self.dovecot.deliver(raw, folder=folder)
        return parse.digest(raw)

    async def texts(self) -> list[str]:
        """What customers said, in the order it was stored."""
        rows = await fetch(
            self.db,
            "SELECT content FROM et_messages WHERE channel_session_id = $1 AND direction = 'inbound' ORDER BY id",
            self.session.id,
        )
        return [row["content"] for row in rows]

    async def said(self, *texts: str) -> None:
        """Wait until the last of these is stored; then each of them must be there exactly once, in this order."""

        async def there() -> bool:
            return texts[-1] in await self.texts()

        await self.until(there, f"{texts[-1]!r} stored")
        assert [text for text in await self.texts() if text in texts] == list(texts)

    async def pause(self) -> None:
        await self.want("disconnected")
        await self.stands(lambda row: row.status == "disconnected", "disconnected")

    async def resume(self) -> None:
        await self.want("connected")
        await self.active()


def letter(
    text: str,
    *,
    sender: str = "Mei <mei@customer.example>",
    subject: str = "Hello",
    files: tuple[tuple[str, str, bytes], ...] = (),
    **headers: str,
) -> bytes:
    mail = EmailMessage(policy=SMTP)
    mail["From"] = sender
    mail["To"] = USER
    mail["Subject"] = subject
    mail["Date"] = format_datetime(datetime.now(UTC))
    mail["Message-ID"] = make_msgid(domain="customer.example")
    for name, value in headers.items():
        del mail[name.replace("_", "-")]
        mail[name.replace("_", "-")] = value
    mail.set_content(text)
    for filename, kind, data in files:
        main, _, sub = kind.partition("/")
        mail.add_attachment(data, maintype=main, subtype=sub, filename=filename)
    return mail.as_bytes()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(
    postgres_server: PostgresServer, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shop]:
    """Two mails lie there before the first start, a folder beside INBOX is read too."""
    dovecot = Dovecot()
    url = postgres_server.create_database(migrated_template)
    try:
        dovecot.deliver(letter("from before", Date="Mon, 05 Jan 2026 10:00:00 +0000", Message_ID="<old@c>"))
        dovecot.deliver(letter("also from before"))
        dovecot.deliver(letter("in the other folder from before"), folder="Orders")
        await asyncio.to_thread(dovecot.start)
        peer = DovecotPeer(dovecot, {"folders": ["INBOX", "Orders"], "history_days": 7})
        async with Shop(peer, url, tmp_path_factory.mktemp("email")) as shop:
            yield shop
    finally:
        await asyncio.to_thread(dovecot.close)
        postgres_server.drop_database(url)
