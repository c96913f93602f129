"""The SMTP side of the sandbox: aiosmtpd on our own loop, delivering to mailboxes and people, and breaking on demand."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import ssl
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword
from aiosmtpd.smtp import Session as SmtpSession

Where = Literal["mail", "data", "accepted"]
"""Before the mail is named; while it is handed over; after it was taken but before the server says so."""
MOST_BYTES = 40 << 20
# It prints every line that comes in, log-ins among them.
logging.getLogger("mail.log").setLevel(logging.ERROR)


@dataclass(slots=True)
class Orders:
    """What the next mails meet. Each `…_next` is for one mail."""

    cut_next: Where | None = None
    answer_next: list[str] = field(default_factory=list)
    """Said instead of taking the mail, like `451 4.3.0 try again`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Recipients nobody takes mail for, and what the server says of them."""


class Handler:
    """aiosmtpd's hooks. `deliver` gets sender, recipients and the mail; what it raises is answered with 451."""

    def __init__(
        self,
        orders: Orders,
        deliver: Callable[[str, list[str], bytes, str], None],
        log_in: Callable[[str, str], bool],
    ) -> None:
        self._orders = orders
        self._deliver = deliver
        self._log_in = log_in

    async def auth_XOAUTH2(self, server: SMTP, words: list[str]) -> AuthResult:
        """A bearer token in the place of a password."""
        said = base64.b64decode(words[1]).decode("utf-8", "replace") if len(words) > 1 else ""
        match = re.fullmatch("user=(.*)\1auth=Bearer (.*)\1\1", said)
        if match is not None and self._log_in(match[1], match[2]):
            return AuthResult(success=True, auth_data=match[1])
        return AuthResult(success=False, handled=False)

    async def handle_MAIL(
        self, server: SMTP, session: SmtpSession, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self._orders.cut_next == "mail":
            self._orders.cut_next = None
            _cut(server)
            return "421 gone"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(
        self, server: SMTP, session: SmtpSession, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        said = self._orders.refused.get(address.lower())
        if said is not None:
            return said
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: SmtpSession, envelope: Envelope) -> str:
        orders = self._orders
        if orders.cut_next == "data":
            orders.cut_next = None
            _cut(server)
            return "421 gone"
        if orders.answer_next:
            return orders.answer_next.pop(0)
        content = envelope.original_content or b""
        user = getattr(session, "auth_data", None)
        try:
            self._deliver(envelope.mail_from or "", list(envelope.rcpt_tos), content, str(user or ""))
        except Exception as error:
            return f"451 4.3.0 the sandbox could not keep it: {type(error).__name__}"
        if orders.cut_next == "accepted":
            orders.cut_next = None
            _cut(server)
        return "250 2.0.0 taken"


def _cut(server: SMTP) -> None:
    if isinstance(server.transport, asyncio.WriteTransport):
        server.transport.abort()


class Watch(Protocol):
    """Who wants to know of connections."""

    def met(self, transport: asyncio.BaseTransport) -> bool:
        """False: it stays open and gets no answer."""
        ...

    def parted(self, transport: asyncio.BaseTransport) -> None: ...


class _Connection(SMTP):
    def __init__(self, handler: Handler, watch: Watch, **more: Any) -> None:
        super().__init__(handler, **more)
        self._watch = watch
        self._met: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._met is None:  # again after STARTTLS
            self._met = transport
            if not self._watch.met(transport):
                return
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._met is not None:
            self._watch.parted(self._met)
        if self.transport is not None:
            super().connection_lost(error)


def make_server(
    handler: Handler,
    log_in: Callable[[str, str], bool],
    watch: Watch,
    *,
    loop: asyncio.AbstractEventLoop,
    tls: ssl.SSLContext | None = None,
) -> SMTP:
    """One connection. `tls`: for STARTTLS; None where the socket is encrypted already."""

    def authenticate(server: SMTP, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        if not isinstance(data, LoginPassword):
            return AuthResult(success=False, handled=False)
        user = data.login.decode("utf-8", "replace")
        if log_in(user, data.password.decode("utf-8", "replace")):
            return AuthResult(success=True, auth_data=user)
        return AuthResult(success=False, handled=False)

    with warnings.catch_warnings():
        # It knows only STARTTLS: that the socket is encrypted from the start it cannot see.
        warnings.simplefilter("ignore", UserWarning)
        return _Connection(
            handler,
            watch,
            hostname="localhost",
            ident="mail sandbox",
            data_size_limit=MOST_BYTES,
            enable_SMTPUTF8=False,
            authenticator=authenticate,
            auth_required=True,
            auth_require_tls=tls is not None,
            require_starttls=tls is not None,
            tls_context=tls,
            loop=loop,
            timeout=300,
        )
