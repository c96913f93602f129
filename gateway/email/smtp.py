"""One SMTP connection, kept open between mails and made anew when needed; says of every try what it proves.

TLS is demanded, never opportunistic. Nobody gets a mail of which another recipient was refused: either all or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aiosmtplib import (
    SMTP,
    SMTPDataError,
    SMTPException,
    SMTPResponseException,
)
from aiosmtplib.response import SMTPResponse

from core import faults
from core.errors import ChannelError, NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from gateway.email.oauth import Tokens
from gateway.email.problems import Problem, is_throttle, refused_login, throttled, unreachable
from gateway.email.settings import Credentials
from gateway.email.timings import Timings
from gateway.media.guard import Guard

T = TypeVar("T")

WAIT_SECONDS = 60.0
"""After a rate limit that names no time."""
_GONE = (SMTPException, OSError, EOFError, TimeoutError)


class Smtp:
    """`await send(…)`, `await probe()`, `await close()`. Mails go one after the other."""

    def __init__(
        self,
        credentials: Credentials,
        tls: ssl.SSLContext,
        timings: Timings,
        tokens: Tokens | None,
        *,
        guard: Guard,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._credentials = credentials
        self._tls = tls
        self._timings = timings
        self._tokens = tokens
        self._guard = guard
        self._clock = clock
        self._turn = asyncio.Lock()
        self._client: SMTP | None = None
        self._used = 0.0
        self._retire: asyncio.TimerHandle | None = None

    async def send(self, sender: str, recipients: Sequence[str], raw: bytes, message_id: str) -> None:
        """Hand the mail over; returns when the server has taken it for every recipient.

        Raises Problem (no connection, no log-in: nothing was sent), NotSentError, ThrottledError, RefusedError, and
        UnknownOutcomeError when the connection broke after the mail had begun to go out.
        """
        async with self._turn:
            client = await self._connected()
            try:
                await self._envelope(client, sender, recipients, len(raw))
                await self._data(client, raw, message_id)
            except BaseException:
                await self._drop(client)
                raise
            self._keep()

    async def probe(self) -> None:
        """Whether we could send now. Raises Problem."""
        async with self._turn:
            await self._connected()
            self._keep()

    async def close(self) -> None:
        async with self._turn:
            if self._client is not None:
                await self._drop(self._client)

    # ---- connecting

    async def _connected(self) -> SMTP:
        client = self._client
        if client is not None:
            fresh = client.is_connected and self._clock() - self._used < self._timings.keep
            # It may have gone since: then nothing has been sent, and another is made.
            if fresh and await self._answers(client):
                return client
            await self._drop(client)
        self._client = client = await self._open()
        return client

    async def _answers(self, client: SMTP) -> bool:
        try:
            await client.rset(timeout=min(5.0, self._timings.command))
        except _GONE:
            return False
        return True

    async def _open(self) -> SMTP:
        server = self._credentials.smtp
        client: SMTP | None = None
        try:
            async with asyncio.timeout(self._timings.connect):
                client = SMTP(
                    hostname=server.host,
                    sock=await self._guard.connect(server.host, server.port),
                    use_tls=server.security == "tls",
                    start_tls=False,
                    tls_context=self._tls,
                    timeout=self._timings.connect,
                    local_hostname="localhost",
                )
                await client.connect()
                if server.security == "starttls":
                    await self._start_tls(client)
        except BaseException as error:
            if client is not None:
                client.close()
            if not isinstance(error, Exception):
                raise
            raise self._not_connected(error) from None
        try:
            async with asyncio.timeout(self._timings.connect):
                await self._log_in(client)
        except Problem:
            client.close()
            raise
        except _GONE as error:
            client.close()
            raise unreachable("smtp", server.host, server.port, error) from None
        except BaseException:
            client.close()
            raise
        return client

    async def _start_tls(self, client: SMTP) -> None:
        server = self._credentials.smtp
        await client.ehlo()
        if not client.supports_extension("starttls"):
            raise Problem(
                "tls_failed",
                f"{server.host}:{server.port} offers no STARTTLS",
                "Choose tls with its port (465), or another server: mail is not sent in the clear.",
                lasting=True,
                part="smtp",
                field="security",
            )
        await client.starttls(tls_context=self._tls, server_hostname=server.host)

    def _not_connected(self, error: Exception) -> Problem:
        server = self._credentials.smtp
        if isinstance(error, Problem):
            return error
        if isinstance(error, SMTPResponseException):
            return throttled("smtp", f"{error.code} {error.message}")
        # The library wraps what happened.
        cause: BaseException = error
        while (
            isinstance(cause, SMTPException) and (inner := cause.__cause__ or cause.__context__) is not None
        ):
            cause = inner
        return unreachable("smtp", server.host, server.port, cause)

    async def _log_in(self, client: SMTP) -> None:
        credentials = self._credentials
        try:
            await client.ehlo()
            if self._tokens is None:
                assert credentials.password is not None
                await client.login(credentials.username, credentials.password.get_secret_value())
                return
            token = await self._tokens.token()
            try:
                await client.auth_xoauth2(credentials.username, token)
            except SMTPResponseException:
                token = await self._tokens.token(renew=True)
                await client.auth_xoauth2(credentials.username, token)
        except SMTPResponseException as error:
            said = f"{error.code} {error.message}"
            if 400 <= error.code < 500:
                raise throttled("smtp", said) from None
            raise refused_login("smtp", said, oauth=self._tokens is not None) from None
        except SMTPException as error:
            if isinstance(error, OSError | TimeoutError):
                raise
            raise refused_login("smtp", str(error), oauth=self._tokens is not None) from None

    # ---- one mail

    async def _envelope(self, client: SMTP, sender: str, recipients: Sequence[str], size: int) -> None:
        """MAIL and RCPT: while the mail itself has not begun, every failure is a definite not-sent."""
        faults.point("email.smtp.mail.before")
        options = ["BODY=8BITMIME"] if client.supports_extension("8bitmime") else []
        if client.supports_extension("size"):
            options.append(f"SIZE={size}")
        await self._step(client.mail(sender, options=options, timeout=self._timings.command), sender)
        for recipient in recipients:
            await self._step(client.rcpt(recipient, timeout=self._timings.command), recipient)

    async def _step(self, step: Awaitable[SMTPResponse], address: str) -> None:
        try:
            await step
        except SMTPResponseException as error:
            raise _answered(error.code, error.message, address) from None
        except _GONE as error:
            raise NotSentError(
                f"the mail server ended the connection before it was given the mail ({type(error).__name__})",
                code="smtp_connection_lost",
            ) from None

    async def _data(self, client: SMTP, raw: bytes, message_id: str) -> None:
        faults.point("email.smtp.data.before")
        try:
            await client.data(raw, timeout=self._timings.data)
        except SMTPDataError as error:
            raise _answered(error.code, error.message, None) from None
        except _GONE as error:
            raise UnknownOutcomeError(
                "the connection to the mail server broke while it was given the mail, and nothing proves whether it took it"
                f" ({type(error).__name__})",
                channel_message_id=message_id,
                code="cut_off",
            ) from None
        faults.point("email.smtp.data.after")

    # ---- keeping

    def _keep(self) -> None:
        self._used = self._clock()
        if self._retire is not None:
            self._retire.cancel()
        self._retire = asyncio.get_running_loop().call_later(self._timings.keep, self._expire)

    def _expire(self) -> None:
        if not self._turn.locked() and self._client is not None:
            self._client.close()
            self._client = None

    async def _drop(self, client: SMTP) -> None:
        if self._retire is not None:
            self._retire.cancel()
            self._retire = None
        if self._client is client:
            self._client = None
        if client.is_connected:
            with contextlib.suppress(Exception):
                await client.quit(timeout=1)
        client.close()


def _answered(code: int, message: str, address: str | None) -> ChannelError:
    """What the server's answer means. `address`: whom it was about; None for the mail itself."""
    said = f"{code} {' '.join(message.split())[:300]}"
    about = f" for {address}" if address else ""
    if code >= 500:
        word = "recipient_refused" if address else "mail_refused"
        if is_throttle(message) and ("4.7" in message or "limit" in message.lower()):
            return ThrottledError(
                f"the provider limits sending{about}: {said}", retry_after=WAIT_SECONDS, code="throttled"
            )
        return RefusedError(f"the mail server refused the mail{about}: {said}", code=word)
    if is_throttle(message) or code == 421:
        return ThrottledError(
            f"the provider limits sending for now{about}: {said}", retry_after=WAIT_SECONDS, code="throttled"
        )
    return NotSentError(f"the mail server did not take the mail{about} for now: {said}", code="smtp_later")
