"""The mail sandbox: one mailbox for the business, people who write to it and are written to, and everything that can break.

Loopback alone, TLS with a certificate of its own, any free port. It sends nothing to anybody outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any

from sandbox.mail import imap_server
from sandbox.mail.certificate import Certificate, make_certificate
from sandbox.mail.mailbox import Account
from sandbox.mail.smtp_server import Handler, Orders, Where, make_server

DOMAIN = "customers.example"
PASSWORD = "sandbox-password-4711"  # noqa: S105  (of a mailbox that exists for minutes, on loopback)


@dataclass(frozen=True, slots=True)
class Letter:
    """A mail as a person got it."""

    raw: bytes
    at: float
    message: EmailMessage

    @property
    def message_id(self) -> str:
        return str(self.message["Message-ID"] or "")

    @property
    def subject(self) -> str:
        return str(self.message["Subject"] or "")

    @property
    def text(self) -> str:
        part = self.message.get_body(("plain",))
        return "" if part is None else str(part.get_content()).replace("\r\n", "\n").rstrip("\n")

    @property
    def in_reply_to(self) -> str | None:
        return str(self.message["In-Reply-To"]) if self.message["In-Reply-To"] else None

    @property
    def files(self) -> list[tuple[str, str, bytes]]:
        """Name, type and bytes of each attachment."""
        return [
            (str(part.get_filename()), part.get_content_type(), part.get_payload(decode=True) or b"")  # type: ignore[misc]
            for part in self.message.iter_attachments()
        ]


@dataclass
class Person:
    """Somebody who writes to the business. `letters`: every mail that reached them, twice when it came twice."""

    sandbox: MailSandbox
    name: str
    address: str
    letters: list[Letter] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def write(
        self,
        text: str,
        *,
        subject: str = "Hello",
        answers: Letter | None = None,
        html: str | None = None,
        files: Sequence[tuple[str, str, bytes]] = (),
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """Send a mail to the business; returns it. `files`: name, type, bytes."""
        mail = EmailMessage(policy=policy.SMTP)
        mail["From"] = f"{self.name} <{self.address}>"
        mail["To"] = self.sandbox.account.address
        mail["Subject"] = f"Re: {answers.subject.removeprefix('Re: ')}" if answers else subject
        mail["Date"] = format_datetime(_now())
        mail["Message-ID"] = make_msgid(domain=DOMAIN)
        if answers is not None:
            mail["In-Reply-To"] = answers.message_id
            mail["References"] = answers.message_id
        for name, value in (headers or {}).items():
            mail[name] = value
        mail.set_content(text)
        if html is not None:
            mail.add_alternative(html, subtype="html")
        for filename, kind, data in files:
            main, _, sub = kind.partition("/")
            mail.add_attachment(data, maintype=main, subtype=sub, filename=filename)
        raw = mail.as_bytes()
        self.sandbox.deliver(raw)
        return raw

    async def letter(self, number: int = 1, seconds: float = 30.0) -> Letter:
        """Wait until so many mails have come; the last of them."""
        async with asyncio.timeout(seconds):
            while len(self.letters) < number:
                self.arrived.clear()
                await self.arrived.wait()
        return self.letters[number - 1]


class MailSandbox:
    """`async with MailSandbox() as mail:`. `mail.credentials` is what a session logs in with."""

    def __init__(
        self, address: str = "shop@sandbox.example", password: str = PASSWORD, *,
        saves_sent: bool = False,
    ) -> None:  # fmt: skip
        """`saves_sent`: the provider itself puts what goes out through SMTP into Sent, as Gmail does."""
        self.account = Account(address, password)
        self.saves_sent = saves_sent
        self.people: dict[str, Person] = {}
        self.returned: list[bytes] = []
        """Mail for people nobody knows; kept, so that a test can look."""
        self.orders = Orders()
        self.tokens: set[str] = set()
        """Access tokens that open the mailbox as well (XOAUTH2)."""
        self.log_ins_refused = False
        self.imap_port = self.smtp_port = self.starttls_port = 0
        self._certificate: Certificate | None = None
        self._servers: list[asyncio.Server] = []
        self._transports: set[asyncio.BaseTransport] = set()
        self._muted: set[asyncio.BaseTransport] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent = False
        self._down = False

    # ---- life

    async def __aenter__(self) -> MailSandbox:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._certificate = await asyncio.to_thread(make_certificate)
        await self._listen()

    async def stop(self) -> None:
        await self._hush()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)

    async def _listen(self) -> None:
        assert self._certificate is not None
        loop = asyncio.get_running_loop()
        tls = self._certificate.server_context()
        imap = await asyncio.start_server(
            self._imap, "127.0.0.1", self.imap_port, ssl=tls, limit=1 << 20, reuse_address=True
        )
        smtp = await self._smtp_listener(loop, self.smtp_port, tls, None)
        plain = await self._smtp_listener(loop, self.starttls_port, None, tls)
        self._servers = [imap, smtp, plain]
        self.imap_port, self.smtp_port, self.starttls_port = (
            server.sockets[0].getsockname()[1] for server in self._servers
        )

    async def _smtp_listener(
        self,
        loop: asyncio.AbstractEventLoop,
        port: int,
        tls: ssl.SSLContext | None,
        upgrade: ssl.SSLContext | None,
    ) -> asyncio.Server:
        handler = Handler(self.orders, self._submitted, self._may_enter)

        def connection() -> asyncio.Protocol:
            return make_server(handler, self._may_enter, self, loop=loop, tls=upgrade)

        return await loop.create_server(connection, "127.0.0.1", port, ssl=tls, reuse_address=True)

    async def _hush(self) -> None:
        """Nobody listens, and every connection is cut."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        self.kill_connections()
        for server in servers:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.wait_closed(), 2)

    # ---- what a session needs

    @property
    def ca(self) -> str:
        assert self._certificate is not None
        return self._certificate.pem

    @staticmethod
    def launch_env() -> dict[str, str]:
        """What a gateway must be told so that its sessions may log in here: servers on loopback are refused otherwise."""
        return {"MAIL_PRIVATE_NETWORKS": "127.0.0.0/8, ::1"}

    @property
    def credentials(self) -> dict[str, Any]:
        return {
            "imap": {"host": "localhost", "port": self.imap_port, "security": "tls"},
            "smtp": {"host": "localhost", "port": self.smtp_port, "security": "tls"},
            "username": self.account.address,
            "password": self.account.password,
            "ca": self.ca,
        }

    # ---- people

    def person(self, name: str, address: str | None = None) -> Person:
        """Somebody with a mailbox of their own."""
        made = Person(self, name, address or f"{name.lower().replace(' ', '.')}@{DOMAIN}")
        self.people[made.address.lower()] = made
        return made

    def deliver(self, raw: bytes) -> str:
        """Put a mail into the business's INBOX; returns its SHA-256."""
        self.account.inbox.add(raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        return hashlib.sha256(raw).hexdigest()

    def _submitted(self, sender: str, recipients: list[str], raw: bytes, user: str) -> None:
        """What came in over SMTP: to people, to the business itself, or to nobody."""
        if self.saves_sent:
            self.account.sent.add(raw, {"\\Seen"})
        parsed = message_from_bytes(raw, policy=policy.default)
        for recipient in recipients:
            address = recipient.lower()
            if address == self.account.address.lower():
                self.deliver(raw)
            elif (person := self.people.get(address)) is not None:
                person.letters.append(Letter(raw, time.time(), parsed))
                person.arrived.set()
            else:
                self.returned.append(raw)

    # ---- faults

    def cut_next(self, where: Where) -> None:
        """The next send loses its connection there."""
        self.orders.cut_next = where

    def answer_next(self, *answers: str) -> None:
        """The next mails are answered so instead of being taken (`451 4.3.0 busy`)."""
        self.orders.answer_next.extend(answers)

    def refuse(self, address: str, said: str = "550 5.1.1 there is no such mailbox") -> None:
        self.orders.refused[address.lower()] = said

    def kill_connections(self) -> None:
        for transport in list(self._transports):
            _abort(transport)

    async def down(self) -> None:
        """Every connection is cut, new ones are refused, until `up`."""
        if not self._down:
            self._down = True
            await self._hush()

    async def up(self) -> None:
        """All faults are over. Idempotent."""
        self._silent = False
        self.log_ins_refused = False
        # The same object: handlers hold it.
        self.orders.cut_next = None
        self.orders.answer_next.clear()
        self.orders.refused.clear()
        for transport in self._muted:
            _abort(transport)
        self._muted.clear()
        if self._down:
            self._down = False
            await self._listen()

    def hang(self) -> None:
        """Say nothing any more, to anybody, and close nothing."""
        self._silent = True
        for transport in list(self._transports):
            self._mute(transport)

    def refuse_log_ins(self) -> None:
        self.log_ins_refused = True
        self.kill_connections()

    # ---- connections

    def _may_enter(self, user: str, password: str) -> bool:
        known = (self.account.password, *self.tokens)
        right = user.lower() == self.account.address.lower() and any(
            imap_server.same(password, one) for one in known
        )
        return right and not self.log_ins_refused

    def _account_of(self, user: str, password: str) -> Account | None:
        return self.account if self._may_enter(user, password) else None

    async def _imap(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self.met(writer.transport):
                await asyncio.sleep(3600)
            await imap_server.serve(reader, writer, self._account_of)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            self.parted(writer.transport)

    def met(self, transport: asyncio.BaseTransport) -> bool:
        self._transports.add(transport)
        if self._silent:
            self._mute(transport)
        return not self._silent

    def parted(self, transport: asyncio.BaseTransport) -> None:
        self._transports.discard(transport)
        self._muted.discard(transport)

    def _mute(self, transport: asyncio.BaseTransport) -> None:
        self._muted.add(transport)
        if isinstance(transport, asyncio.ReadTransport):
            transport.pause_reading()


def _abort(transport: asyncio.BaseTransport) -> None:
    abort = getattr(transport, "abort", transport.close)
    abort()


def _now() -> datetime:
    return datetime.now(UTC)
