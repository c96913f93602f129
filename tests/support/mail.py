"""Mails for tests: recorded ones through parse and convert, in this process."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.channel import Converted, Person, SessionContext, SessionId, TenantId
from core.settings import load
from core.sinks import Written
from gateway.email import parse
from gateway.email.convert import Known, Origin, convert, unreadable
from gateway.email.ids import MessageIds
from gateway.media.guard import Guard
from sandbox.mail import MailSandbox

OWN = "shop@example.com"
IDS = MessageIds(b"k" * 32, OWN)
LOOPBACK = Guard(networks=load(MailSandbox.launch_env()).mail_private_networks)
"""Lets sessions log in to the sandbox and to Dovecot."""
CONTEXT = SessionContext(TenantId(1), SessionId(2), "email", OWN, None, {}, {}, Path("unused"))
RECEIVED = datetime(2026, 6, 1, 8, 0, 5, tzinfo=UTC)


def raw_of(given: dict[str, Any]) -> bytes:
    """`raw`: the mail's lines; `§n§` stands for the Message-ID of our queue item n. `latin1`: bytes that are no UTF-8."""
    text = "\r\n".join(given["raw"])
    for number in range(1, 10):
        text = text.replace(f"§{number}§", IDS.of(number))
    return text.encode("latin-1" if given.get("latin1") else "utf-8")


def convert_given(given: dict[str, Any]) -> Converted:
    """A fixture's `given` as the channel would convert it. `sent`: to whom our mails went, by queue item."""
    raw = raw_of(given)
    origin = Origin(
        uidvalidity=1, uid=7, size=len(raw), received_at=RECEIVED, sent=bool(given.get("in_sent_folder"))
    )
    if "unreadable" in given:
        return unreadable(
            raw,
            parse.surface(raw),
            given["unreadable"],
            digest=parse.digest(raw),
            context=CONTEXT,
            origin=origin,
        )
    written = {
        IDS.of(int(number)): Written(Person(to["to"]), {"cc": to.get("cc", [])})
        for number, to in given.get("sent", {}).items()
    }
    known = Known(OWN, IDS.queue_id, written)
    return convert(parse.parse(raw), digest=parse.digest(raw), context=CONTEXT, known=known, origin=origin)
