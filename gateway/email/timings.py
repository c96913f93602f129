"""How long an email session waits for what. Seconds. Tests shorten them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    connect: float = 20.0
    """TCP, TLS and the greeting."""
    command: float = 60.0
    """One IMAP command without a big answer, one SMTP command."""
    fetch: float = 180.0
    """Some mails' worth of bodies."""
    idle: float = 240.0
    """Then IDLE is begun anew: a line that died silently is noticed, and providers end longer ones."""
    poll: float = 30.0
    """Where a server has no IDLE, or a push may have been lost."""
    data: float = 90.0
    """From the last byte of a mail to the server's word on it."""
    keep: float = 30.0
    """How long an unused SMTP connection stays open."""
    probe: float = 60.0
    """Between two looks whether sending works again; after refused credentials ten times as long."""
    backoff_first: float = 1.0
    backoff_most: float = 120.0
    refused: float = 600.0
    """Wait after the server refused the password: more would have the account locked."""
    throttled: float = 300.0
    store: float = 3.0
    """Between two tries to store while the database is away."""
    sent_copy: float = 30.0
    stop: float = 3.0
