"""Trying an email log-in before it is stored, and the form that asks for it. Logs in once over IMAP and SMTP, and out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from core.channel import CredentialField, Json, LogIn
from core.errors import Invalid, InvalidField
from gateway.email.imap import Imap, ImapLost, ImapRefused
from gateway.email.live import tls_context
from gateway.email.oauth import Tokens
from gateway.email.problems import Problem
from gateway.email.settings import Credentials, read_credentials
from gateway.email.smtp import Smtp
from gateway.email.timings import Timings
from gateway.media.guard import Guard

SECONDS = 19.0
_TIMINGS = Timings(connect=9.0, command=8.0)

FORM = (
    CredentialField(("username",), "E-mail address", help="What you log in to the mailbox with."),
    CredentialField(
        ("password",), "Password", "secret", help="Many providers want an app password for mail programs."
    ),
    CredentialField(("imap", "host"), "IMAP server", help="For reading, like imap.example.com."),
    CredentialField(("imap", "port"), "IMAP port", "number", default="993"),
    CredentialField(
        ("imap", "security"), "IMAP security", "choice", default="tls", choices=("tls", "starttls")
    ),
    CredentialField(("smtp", "host"), "SMTP server", help="For sending, like smtp.example.com."),
    CredentialField(("smtp", "port"), "SMTP port", "number", default="465"),
    CredentialField(
        ("smtp", "security"), "SMTP security", "choice", default="tls", choices=("tls", "starttls")
    ),
    CredentialField(
        ("address",), "Own address", required=False, help="Only where it is not what you log in with."
    ),
)


async def check_credentials(
    credentials: Json, metadata: Mapping[str, Any], *, guard: Guard | None = None
) -> LogIn:
    """As `core.channel.CredentialCheck`. Raises InvalidField with the field and what the server said."""
    read = read_credentials(credentials)
    try:
        own = read.own
    except Invalid:
        raise InvalidField(
            "credentials.address", "is needed: the user name is no e-mail address", code="invalid_credentials"
        ) from None
    try:
        async with asyncio.timeout(SECONDS):
            refresh_token = await _try(read, guard or Guard())
    except Problem as problem:
        raise _field_of(problem) from None
    except (ImapLost, ImapRefused) as error:
        raise InvalidField(
            "credentials.imap.host", f"the mail server said: {error}", code="imap_refused"
        ) from None
    except TimeoutError:
        raise InvalidField(
            "credentials.imap.host", "the mail servers did not answer in time", code="connection_timeout"
        ) from None
    return LogIn(own, _kept(read, refresh_token))


async def _try(credentials: Credentials, guard: Guard) -> str | None:
    """The refresh token that is good from now on, if that is how this mailbox is opened: trying it may have replaced it."""
    tls = tls_context(credentials.ca)
    tokens = Tokens(credentials.oauth, tls, guard) if credentials.oauth else None
    connection = await Imap.open(credentials, tls, _TIMINGS, tokens, guard=guard)
    try:
        await connection.select("INBOX")
    finally:
        await connection.close()
    smtp = Smtp(credentials, tls, _TIMINGS, tokens, guard=guard)
    try:
        await smtp.probe()
    finally:
        await smtp.close()
    return tokens.refresh_token if tokens is not None else None


def _field_of(problem: Problem) -> InvalidField:
    reason = f"{problem.detail}. {problem.action}" if problem.action else problem.detail
    if problem.part == "oauth":
        path = f"credentials.oauth.{problem.field}"
    elif problem.field in ("password", "username"):
        path = f"credentials.{problem.field}"
    else:
        path = f"credentials.{problem.part}.{problem.field}"
    return InvalidField(path, reason, code=problem.code)


def _kept(read: Credentials, refresh_token: str | None) -> Json:
    """Everything that is needed later, with ports and security filled in."""
    kept: Json = read.model_dump(mode="json", exclude_none=True, exclude={"password", "oauth"})
    if read.password is not None:
        kept["password"] = read.password.get_secret_value()
    if read.oauth is not None:
        oauth: Json = read.oauth.model_dump(mode="json", exclude_none=True)
        oauth["refresh_token"] = refresh_token or read.oauth.refresh_token.get_secret_value()
        if read.oauth.client_secret is not None:
            oauth["client_secret"] = read.oauth.client_secret.get_secret_value()
        kept["oauth"] = oauth
    return kept
