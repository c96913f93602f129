"""What can be wrong with a mail server, in a code, a sentence and what a person must do. Pure.

Both sides use it: the session for its state, the check of credentials for the field it names.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from typing import Literal

from core.channel import SessionState, SessionStatus
from gateway.media.guard import PrivateAddressError

Part = Literal["imap", "smtp", "oauth"]
_SERVERS: dict[Part, str] = {
    "imap": "an IMAP server",
    "smtp": "an SMTP server",
    "oauth": "a token address",
}


@dataclass(eq=False)
class Problem(Exception):
    """`code` becomes `status_reason`. `lasting`: only a person can mend it."""

    code: str
    detail: str
    action: str | None = None
    lasting: bool = False
    part: Part = "imap"
    field: str = "host"
    """Of the credentials: where the mistake most likely is."""
    after: float | None = None
    """The server asked to be left alone for so many seconds."""

    def __str__(self) -> str:
        return self.detail


_THROTTLED = (
    "too many", "rate limit", "ratelimit", "throttl", "greylist", "graylist", "temporarily blocked", "bandwidth",
    "overquota", "exceeded", "4.7.0", "4.7.28", "limit reached",
)  # fmt: skip
_SUSPENDED = ("suspend", "disabled", "blocked", "locked", "deactivated", "account has been")


def unreachable(part: Part, host: str, port: int, error: BaseException) -> Problem:
    """Why no connection could be made."""
    where = f"{host}:{port}"
    match error:
        case Problem():
            return error
        case PrivateAddressError():
            # Not which address it has: names of our own network are nobody else's business.
            return Problem(
                "private_address",
                f"{where} is not on the public internet",
                f"Name {_SERVERS[part]} that the internet can reach, or have the operator of this gateway allow that network"
                " (MAIL_PRIVATE_NETWORKS).",
                lasting=True,
                part=part,
                field="token_url" if part == "oauth" else "host",
            )
        case socket.gaierror():
            return Problem(
                "host_not_found",
                f"no server is called {host}",
                f"Correct the {part.upper()} server's name of this session.",
                lasting=True,
                part=part,
            )
        case ssl.SSLCertVerificationError():
            why = getattr(error, "verify_message", None) or "it is not trusted"
            return Problem(
                "certificate_not_trusted",
                f"the certificate of {where} cannot be trusted ({why})",
                "Correct the server's name, or give the authority that signed its certificate as `ca`.",
                lasting=True,
                part=part,
            )
        case ssl.SSLError():
            return Problem(
                "tls_failed",
                f"{where} speaks no TLS there ({getattr(error, 'reason', None) or 'handshake failed'})",
                "Choose the other kind of security (tls or starttls), or the port that fits it.",
                lasting=True,
                part=part,
                field="security",
            )
        case ConnectionRefusedError():
            return Problem(
                "connection_refused",
                f"{where} does not answer: the connection was refused",
                f"Look whether the {part.upper()} server runs and the port is right.",
                part=part,
                field="port",
            )
        case TimeoutError():
            return Problem(
                "connection_timeout",
                f"{where} did not answer in time",
                f"Look whether the {part.upper()} server can be reached from here.",
                part=part,
            )
        case _:
            return Problem(
                "connection_lost", f"the connection to {where} broke ({type(error).__name__})", part=part
            )


def refused_login(part: Part, said: str, *, oauth: bool) -> Problem:
    """The server did not let us in. `said`: its words, which hold no secret of ours."""
    words = " ".join(said.split())[:200]
    low = words.lower()
    if any(sign in low for sign in _THROTTLED):
        return throttled(part, words)
    if any(sign in low for sign in _SUSPENDED):
        return Problem(
            "account_suspended",
            f"the provider has suspended this mailbox: {words}",
            "Sign in to the mailbox at the provider's own page and follow what it says.",
            lasting=True,
            part=part,
            field="username",
        )
    if oauth:
        return Problem(
            "auth_failed",
            f"the {part.upper()} server refused the access token: {words}",
            "Link the mailbox again: its permission was taken back or does not cover mail.",
            lasting=True,
            part="oauth",
            field="refresh_token",
        )
    return Problem(
        "auth_failed",
        f"the {part.upper()} server refused the user name or password: {words}",
        "Enter the password again (many providers want an app password for mail programs).",
        lasting=True,
        part=part,
        field="password",
    )


def throttled(part: Part, said: str, after: float | None = None) -> Problem:
    return Problem(
        "throttled",
        f"the provider limits this mailbox for now: {' '.join(said.split())[:200]}",
        "Wait: it is tried again by itself. If it goes on, send less or ask the provider for a higher limit.",
        part=part,
        after=after,
    )


def is_throttle(said: str) -> bool:
    low = said.lower()
    return any(sign in low for sign in _THROTTLED)


def state_of(problem: Problem, identifier: str) -> SessionState:
    """The session's state while this problem lasts."""
    status = SessionStatus.DISCONNECTED
    if problem.code in ("throttled", "account_suspended"):
        status = SessionStatus.SUSPENDED
    elif problem.code == "connection_lost":
        status = SessionStatus.CONNECTING  # lines break; it is tried again at once
    reason = f"smtp_{problem.code}" if problem.part == "smtp" else problem.code
    return SessionState(status, reason, action=problem.action, identifier=identifier)
