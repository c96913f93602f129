"""From a raw mail to what it says, as plain JSON values. Runs in the worker process: it may be slow, crash or hang there.

`digest` and `surface` are the exception: cheap and safe on anything, they also name a mail that cannot be read.
"""

from __future__ import annotations

import hashlib
import re
from email import message_from_bytes, policy
from email.message import Message
from typing import Any, NamedTuple

from gateway.email import calendar, headers, signs, text

Json = dict[str, Any]

MOST_HEADER_BYTES = 256 * 1024
MOST_TEXT = 1 << 20
"""Characters of text and of HTML that are kept in the row."""
MOST_PARTS = 400
MOST_DEPTH = 60
MOST_ATTACHMENTS = 50
SMALL_PICTURE = 4096
"""Bytes: a picture inside the text that is smaller is an icon or a counter, not something somebody sent."""
_TRACE = (b"received", b"return-path", b"delivered-to", b"x-original-to", b"envelope-to", b"x-envelope-to")
_SIGNATURES = ("application/pgp-signature", "application/pkcs7-signature", "application/x-pkcs7-signature")
_FIELD = re.compile(rb"[!-9;-~]{1,200}:")


def digest(raw: bytes) -> str:
    """The mail's id: the same however often, and by whichever way, the same mail comes."""
    fields = dict(reversed(_fields(raw)))
    if fields.get(b"message-id", b"").strip():
        named = (fields.get(name, b"").strip() for name in (b"message-id", b"from", b"date"))
        return hashlib.sha256(b"\0".join(named)).hexdigest()
    head, blank, body = _parted(raw)
    kept = [value for name, value in _fields(head) if name not in _TRACE]
    return hashlib.sha256(b"\0".join(kept) + blank + body).hexdigest()


def surface(raw: bytes) -> Json:
    """Who, what and when, read from the header lines alone. Never raises, takes no time worth naming."""
    fields = dict(reversed(_fields(raw)))

    def value(name: bytes) -> str:
        return fields.get(name, b"")[: headers.MOST_CHARS].decode("utf-8", "replace").strip()

    people = headers.addresses([value(b"from")])
    return {
        "message_id": headers.message_id(value(b"message-id")),
        "subject": headers.decoded(value(b"subject")),
        "from": people[0] if people else None,
        "date": headers.milliseconds(value(b"date")),
    }


def _parted(raw: bytes) -> tuple[bytes, bytes, bytes]:
    blanks = [(at, blank) for blank in (b"\r\n\r\n", b"\n\n") if (at := raw.find(blank)) >= 0]
    if not blanks:
        return raw, b"", b""
    at, blank = min(blanks)
    return raw[:at], blank, raw[at + len(blank) :]


def _fields(raw: bytes) -> list[tuple[bytes, bytes]]:
    """Header names (lower case) and unfolded values, as they were written."""
    head = _parted(raw)[0][:MOST_HEADER_BYTES]
    found: list[list[bytes]] = []
    for line in head.replace(b"\r\n", b"\n").split(b"\n"):
        if line[:1] in b" \t" and found and line:
            found[-1][1] += b" " + line.strip()
        elif _FIELD.match(line):
            name, _, value = line.partition(b":")
            found.append([name.lower(), value.strip()])
    return [(name, value) for name, value in found]


class Leaf(NamedTuple):
    number: int
    """Its place among all parts of the mail: how an attachment is found again."""
    part: Message


class Words(NamedTuple):
    full: str
    own: str


def parse(raw: bytes) -> Json:
    """Everything the row needs. Raises on what cannot be read; see `surface` then."""
    message = message_from_bytes(raw, policy=policy.compat32)
    people = headers.addresses(headers.all_raw(message, "From"))
    sender = people[0]["address"] if people else ""
    subject = headers.decoded(headers.raw(message, "Subject"))
    reading = _Reading()
    words = reading.words(message, 0)
    content = text.reply_of(words.own, subject) if words.own.strip() else ""
    return {
        **surface(raw),
        "from": people[0] if people else None,
        "subject": subject,
        "reply_to": headers.addresses(headers.all_raw(message, "Reply-To"))[:5],
        "to": headers.addresses(headers.all_raw(message, "To")),
        "cc": headers.addresses(headers.all_raw(message, "Cc")),
        "in_reply_to": headers.ids(headers.raw(message, "In-Reply-To")),
        "references": headers.ids(headers.raw(message, "References")),
        "content": content,
        "text": text.tidy(words.full)[:MOST_TEXT],
        "html": "\n".join(reading.html)[:MOST_TEXT] or None,
        "headers": headers.listed(message),
        "automatic": signs.automatic(message, sender, subject) if sender else "no_sender",
        "bounce": signs.bounce(message, sender),
        "calendar": reading.calendar,
        "attachments": reading.attachments(report=message.get_content_type() == "multipart/report"),
    }


def attachment(raw: bytes, index: int) -> bytes:
    """The bytes of one attachment, by the index that `parse` gave it. Raises LookupError."""
    for leaf in leaves(message_from_bytes(raw, policy=policy.compat32)):
        if leaf.number == index:
            return _bytes(leaf.part)
    raise LookupError(f"the mail has no part {index}")


def leaves(message: Message) -> list[Leaf]:
    """Parts without parts, in order; an attached mail counts as one. Raises RecursionError on a tower of parts."""
    found: list[Leaf] = []

    def visit(part: Message, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise RecursionError(f"more than {MOST_DEPTH} parts inside each other")
        children = _children(part)
        if children is not None:
            for child in children:
                visit(child, depth + 1)
        elif len(found) < MOST_PARTS:
            found.append(Leaf(len(found), part))

    visit(message, 0)
    return found


class _Reading:
    """One pass over the parts: words, HTML, the invitation, and what is left over as attachments."""

    def __init__(self) -> None:
        self.html: list[str] = []
        self.calendar: Json | None = None
        self._index = 0
        self._attached: list[Leaf] = []

    def words(self, part: Message, depth: int) -> Words:
        if depth > MOST_DEPTH:
            raise RecursionError(f"more than {MOST_DEPTH} parts inside each other")
        children = _children(part)
        if children is not None:
            said = [self.words(child, depth + 1) for child in children]
            if part.get_content_type() == "multipart/alternative":
                # The plain text is the first that says something; HTML only where there is none.
                return next((one for one in said if one.full.strip()), Words("", ""))
            spoken = [one for one in said if one.full.strip()]
            return Words("\n\n".join(s.full for s in spoken), "\n\n".join(s.own for s in spoken))
        if self._index >= MOST_PARTS:
            return Words("", "")
        leaf = Leaf(self._index, part)
        self._index += 1
        return self._leaf(leaf)

    def _leaf(self, leaf: Leaf) -> Words:
        part, kind = leaf.part, leaf.part.get_content_type()
        attached = _disposition(part) == "attachment" or bool(_filename(part))
        if kind == "text/calendar" and self.calendar is None:
            self.calendar = calendar.read(_text(part))
            if not attached and self.calendar is not None:
                return Words("", "")
        if attached or kind not in ("text/plain", "text/html"):
            self._attached.append(leaf)
            return Words("", "")
        body = _text(part)
        if kind == "text/html":
            self.html.append(body)
            return Words(*text.from_html(body))
        if str(part.get_param("format", "") or "").lower() == "flowed":
            body = text.flowed(body, delsp=str(part.get_param("delsp", "") or "").lower() == "yes")
        return Words(body, body)

    def attachments(self, *, report: bool) -> list[Json]:
        shown = "\n".join(self.html)
        found = []
        for leaf in self._attached:
            kind = leaf.part.get_content_type()
            if kind in _SIGNATURES or kind == "message/delivery-status":
                continue
            data = _bytes(leaf.part)
            cid = headers.raw(leaf.part, "Content-ID").strip().strip("<>")
            inline = bool(cid) and f"cid:{cid}" in shown
            one: Json = {
                "index": leaf.number,
                "filename": _filename(leaf.part) or _named(kind, leaf.number),
                "mime_type": kind,
                "size": len(data),
                "inline": inline,
            }
            described = headers.decoded(headers.raw(leaf.part, "Content-Description"))
            if described and described != one["filename"]:
                one["description"] = described[:1000]
            if not data or (inline and kind.startswith("image/") and len(data) < SMALL_PICTURE):
                one["left_out"] = "empty" if not data else "a small picture of the layout"
            if report and kind in ("message/rfc822", "text/rfc822-headers"):
                one["left_out"] = "the returned mail"
            found.append(one)
        kept = [one for one in found if "left_out" not in one]
        for one in kept[MOST_ATTACHMENTS:]:
            one["left_out"] = f"more than {MOST_ATTACHMENTS} files"
        return found


def _children(part: Message) -> list[Message] | None:
    """What stands inside a multipart; None for a leaf."""
    children = part.get_payload()
    if part.get_content_maintype() != "multipart" or not isinstance(children, list):
        return None
    return [child for child in children if isinstance(child, Message)]


def _disposition(part: Message) -> str:
    return headers.raw(part, "Content-Disposition").partition(";")[0].strip().lower()


def _filename(part: Message) -> str | None:
    """As the sender wrote it, without folders and control characters."""
    try:
        name = part.get_filename()
    except Exception:
        name = None
    if not name:
        return None
    plain = headers.decoded(str(name)).replace("\\", "/").rpartition("/")[2].strip(". ")
    return plain[:200] or None


def _named(kind: str, index: int) -> str:
    endings = {"message/rfc822": "eml", "text/calendar": "ics", "text/plain": "txt", "text/html": "html"}
    return f"part-{index}.{endings.get(kind, kind.rpartition('/')[2].split('+')[0][:10] or 'bin')}"


def _bytes(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    if isinstance(payload, bytes):
        return payload
    inner = part.get_payload()
    if isinstance(inner, list):
        return b"\r\n".join(one.as_bytes() for one in inner if isinstance(one, Message))
    return str(inner or "").encode("utf-8", "surrogateescape")


def _text(part: Message) -> str:
    data = _bytes(part)[: 4 * MOST_TEXT]
    try:
        named = part.get_content_charset()
    except Exception:
        named = None
    for charset in (named, "utf-8"):
        try:
            return data.decode(charset or "ascii").replace("\0", "")
        except (LookupError, UnicodeError, ValueError):
            continue
    # Nobody named a charset that fits: the one of old Windows programs turns every byte into something.
    return data.decode("cp1252", "replace").replace("\0", "")
