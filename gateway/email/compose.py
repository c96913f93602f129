"""From an outgoing message to a mail: headers, text and HTML, one file. Pure but for the file it is handed as bytes.

Nothing that a caller writes can end a header: line breaks and NUL are refused in every value.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Any

from inscriptis import get_text

from core.channel import MessageType, OutboundMessage, Quoted
from core.errors import Invalid, RefusedError
from core.identity import address_of, external_id
from core.payloads import BadPayload, Contact, Location
from core.payloads import read as read_payload
from gateway.email import headers
from gateway.email.settings import SessionSettings

MOST_CC = 50
MOST_SUBJECT = 900
MOST_TEXT = 2 << 20
MOST_REFERENCES = 20
_RE = re.compile(r"\s*(re|aw|sv|antw|odp|ynt|回复|答复)\s*(\[\d+\])?\s*:", re.I)
_FILES = (
    MessageType.IMAGE, MessageType.VIDEO, MessageType.AUDIO, MessageType.DOCUMENT, MessageType.STICKER,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mail:
    """Ready for SMTP. `recipients`: the envelope's, the main one first."""

    message_id: str
    recipients: tuple[str, ...]
    raw: bytes


def compose(
    message: OutboundMessage,
    *,
    own: str,
    name: str | None,
    message_id: str,
    now: datetime,
    settings: SessionSettings,
    answered: Quoted | None,
    file: bytes | None,
) -> Mail:
    """Raises RefusedError: this message can never be a mail. `answered`: what it replies to, when that is known."""
    recipient = _recipient(message, answered, own)
    payload = message.payload
    copies = _copies(payload, recipient)
    mail = EmailMessage(policy=SMTP)
    try:
        mail["From"] = _from(own, settings.from_name or name)
        mail["To"] = recipient
        if copies:
            mail["Cc"] = ", ".join(copies)
        mail["Subject"] = _subject(payload, answered, settings, name or own)
        mail["Date"] = format_datetime(now)
        mail["Message-ID"] = message_id
        for header, value in _threading(answered, automatic=message.automatic):
            mail[header] = value
        _body(mail, message, file)
        raw = mail.as_bytes()
    except RefusedError:
        raise
    except (ValueError, LookupError, UnicodeError) as error:
        raise RefusedError(f"no mail can be made of it ({error})", code="invalid_payload") from None
    blind = (own,) if settings.bcc_self else ()
    return Mail(message_id, tuple(dict.fromkeys((recipient, *copies, *blind))), raw)


def _recipient(message: OutboundMessage, answered: Quoted | None, own: str) -> str:
    address = address_of(message.attempt.recipient)
    if answered is None or answered.from_me or answered.sender_identifier != address:
        return address
    # Whoever asked for answers elsewhere gets them there, as with any mail program.
    wanted = answered.raw_payload.get("reply_to")
    if isinstance(wanted, list) and len(wanted) == 1 and isinstance(wanted[0], str):
        try:
            elsewhere = address_of(external_id("email", wanted[0]))
        except Invalid:
            return address
        return elsewhere if elsewhere != own else address
    return address


def _copies(payload: dict[str, Any], recipient: str) -> list[str]:
    given = payload.get("cc")
    if given is None:
        return []
    values = [given] if isinstance(given, str) else given
    if not isinstance(values, list) or len(values) > MOST_CC:
        raise _bad("cc", f"must be a list of at most {MOST_CC} e-mail addresses")
    found = []
    for value in values:
        try:
            found.append(address_of(external_id("email", _line("cc", value))))
        except Invalid:
            raise _bad("cc", "holds something that is no e-mail address") from None
    return [one for one in dict.fromkeys(found) if one != recipient]


def _from(own: str, name: str | None) -> str:
    local, _, domain = own.rpartition("@")
    return str(Address(_line("from_name", name or ""), local, domain))


def _subject(payload: dict[str, Any], answered: Quoted | None, settings: SessionSettings, ours: str) -> str:
    given = payload.get("subject")
    if given is not None and str(given).strip():
        return _line("subject", given)[:MOST_SUBJECT]
    theirs = str(answered.raw_payload.get("subject") or "").strip() if answered else ""
    if theirs:
        theirs = headers.clean(theirs)[:MOST_SUBJECT]
        return theirs if _RE.match(theirs) else f"Re: {theirs}"
    return settings.subject or f"Message from {headers.clean(ours)}"


def _threading(answered: Quoted | None, *, automatic: bool) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if answered is not None:
        their_id = answered.channel_message_id if answered.from_me else answered.raw_payload.get("message_id")
        known = headers.ids(str(their_id or ""))
        if known:
            earlier = answered.raw_payload.get("references")
            listed = headers.ids(" ".join(map(str, earlier))) if isinstance(earlier, list) else []
            chain = [one for one in dict.fromkeys((*listed, known[0])) if _printable(one)][-MOST_REFERENCES:]
            if _printable(known[0]):
                found.append(("In-Reply-To", known[0]))
            if chain:
                found.append(("References", " ".join(chain)))
    if automatic:
        found += [("Auto-Submitted", "auto-replied"), ("X-Auto-Response-Suppress", "All")]
    return found


def _printable(message_id: str) -> bool:
    return message_id.isascii() and message_id.isprintable() and " " not in message_id


def _body(mail: EmailMessage, message: OutboundMessage, file: bytes | None) -> None:
    kind = message.message_type
    markup = message.payload.get("html")
    if markup is not None and (not isinstance(markup, str) or len(markup) > MOST_TEXT):
        raise _bad("html", f"must be text of at most {MOST_TEXT} characters")
    words = (message.content or "").replace("\0", "")
    if len(words) > MOST_TEXT:
        raise RefusedError(f"the text is longer than {MOST_TEXT} characters", code="invalid_payload")
    card: tuple[bytes, str] | None = None
    try:
        if kind is MessageType.LOCATION:
            words = _place(read_payload(kind, message.payload), words)
        elif kind is MessageType.CONTACT:
            contact = read_payload(kind, message.payload)
            words, card = _contact(contact, words)
    except BadPayload as error:
        raise RefusedError(error.detail, code=error.code) from None
    if kind is not MessageType.TEXT and kind not in (*_FILES, MessageType.LOCATION, MessageType.CONTACT):
        raise RefusedError(f"e-mail has no {kind} messages", code="unsupported_type")
    if markup and not words.strip():
        words = _text_of(markup)
    mail.set_content(words.rstrip("\n") + "\n" if words else "", cte=_encoding(words))
    if markup:
        mail.add_alternative(markup, subtype="html", cte="quoted-printable")
    if card is not None:
        mail.add_attachment(card[0], maintype="text", subtype="vcard", filename=card[1])
    if kind in _FILES:
        _attach(mail, message, file)


def _encoding(words: str) -> str:
    """Plain where lines are short and ASCII, so that a person who looks at the source can read it."""
    short = all(len(line) < 900 for line in words.split("\n"))
    return "7bit" if words.isascii() and short and "\r" not in words else "quoted-printable"


def _attach(mail: EmailMessage, message: OutboundMessage, file: bytes | None) -> None:
    if message.media is None or file is None:
        raise RefusedError(f"{message.message_type} needs a media_url", code="invalid_payload")
    main, _, sub = message.media.mime_type.partition("/")
    if main in ("text", "message", "multipart") or not sub:
        main, sub = ("application", "octet-stream") if main != "text" else ("text", sub or "plain")
    name = headers.clean(message.media.filename)
    mail.add_attachment(file, maintype=main, subtype=sub, filename=name)


def _place(place: Location, words: str) -> str:
    at = f"https://www.openstreetmap.org/?mlat={place.latitude}&mlon={place.longitude}#map=16/{place.latitude}/{place.longitude}"
    return "\n".join(part for part in (words, place.name, place.address, at) if part)


def _contact(contact: Contact, words: str) -> tuple[str, tuple[bytes, str]]:
    lines = ["BEGIN:VCARD", "VERSION:3.0", f"FN:{_escaped(contact.name)}", f"N:{_escaped(contact.name)};;;;"]
    lines += [f"TEL;TYPE=CELL:{_escaped(phone)}" for phone in contact.phones]
    lines += [f"EMAIL:{_escaped(address)}" for address in contact.emails]
    text = "\n".join(part for part in (words, contact.name, *contact.phones, *contact.emails) if part)
    return text, ("\r\n".join([*lines, "END:VCARD", ""]).encode(), f"{contact.name[:60]}.vcf")


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,").replace(";", "\\;")


def _text_of(markup: str) -> str:
    try:
        return str(get_text(markup)).strip()
    except Exception:
        return html.unescape(re.sub(r"<[^<>]{0,2000}>", " ", markup)).strip()


def _line(field: str, value: object) -> str:
    """One line of text. Raises RefusedError for anything that could end a header."""
    if not isinstance(value, str):
        raise _bad(field, "must be text")
    if any(char in value for char in "\r\n\0\u2028\u2029\x0b\x0c\x85"):
        raise _bad(field, "must not hold line breaks")
    return value.strip()


def _bad(field: str, reason: str) -> RefusedError:
    return RefusedError(f"payload.{field}: {reason}", code="invalid_payload")
