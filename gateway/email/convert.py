"""From a parsed mail to the gateway's messages and receipts. Pure: who a referenced mail went to is handed in.

A mail is one row for what it says and one for each file. Nothing is dropped: what is not a conversation is stored too,
marked so that nobody answers it by machine.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from core.channel import (
    Converted,
    InboundMessage,
    MessageType,
    Person,
    QueueId,
    SessionContext,
    StatusUpdate,
)
from core.errors import Invalid
from core.identity import address_of, external_id
from core.sinks import Written
from gateway.email import calendar

Json = dict[str, Any]

CHANNEL = "email"
NOBODY = "unknown@invalid"
"""Stands for a sender that is no address."""
UNREADABLE_CONTENT = "This mail could not be read; its original is kept."
MOST_RAW = 512 * 1024
"""Bytes of an unreadable mail that its row holds."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a mail lay. `sent`: in the folder of sent mail. `whole`: False when it was too large to be fetched."""

    folder: str = "INBOX"
    uidvalidity: int = 0
    uid: int = 0
    size: int = 0
    received_at: datetime | None = None
    sent: bool = False
    whole: bool = True
    history: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of our own mail: the session's address, which Message-IDs are ours, where those went."""

    own: str
    queue_id: Callable[[str | None], QueueId | None] = lambda _: None
    written: Mapping[str, Written] = field(default_factory=dict)


def references(parsed: Json) -> list[str]:
    """Message-IDs that this mail may be about, the likeliest first: look these up for `Known.written`."""
    bounce = parsed.get("bounce") or {}
    listed = [*bounce.get("message_ids", []), *parsed.get("in_reply_to", [])]
    return list(dict.fromkeys([*listed, *reversed(parsed.get("references", []))]))[:60]


def convert(parsed: Json, *, digest: str, context: SessionContext, known: Known, origin: Origin) -> Converted:
    """Never raises on what a stranger can send."""
    return _Mail(parsed, digest, context, known, origin).converted()


def unreadable(
    raw: bytes, surface: Json, reason: str, *, digest: str, context: SessionContext, origin: Origin
) -> Converted:
    """A row for a mail that no parser survives: who and when as far as the header lines say, and the original."""
    people = surface.get("from")
    address = people["address"] if isinstance(people, dict) else ""
    payload: Json = {
        "subject": surface.get("subject"),
        "message_id": surface.get("message_id"),
        "from": people,
        "auto_submitted": True,
        "quarantined": reason,
        "original_base64": b64encode(raw[:MOST_RAW]).decode("ascii"),
        "size": len(raw),
        "imap": _place(origin),
    }
    message = InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=CHANNEL,
        channel_message_id=digest,
        person=Person(_external(address)),
        message_type=MessageType.UNSUPPORTED,
        content=UNREADABLE_CONTENT,
        channel_timestamp=_stamp(surface.get("date"), origin),
        sender_identifier=_bare(address),
        raw_payload=payload,
        is_history=origin.history,
    )
    return Converted(messages=(message,))


class _Mail:
    def __init__(
        self, parsed: Json, digest: str, context: SessionContext, known: Known, origin: Origin
    ) -> None:
        self.parsed = parsed
        self.digest = digest
        self.context = context
        self.known = known
        self.origin = origin
        people = parsed.get("from")
        self.sender = str(people["address"]).lower() if people else ""
        self.name = (people or {}).get("name") or None
        self.automatic: str | None = parsed.get("automatic")
        self.bounce: Json | None = parsed.get("bounce")

    def converted(self) -> Converted:
        queue_id = self.known.queue_id(self.parsed.get("message_id"))
        if queue_id is not None:
            return Converted(messages=tuple(self._echo(queue_id)))
        if self.origin.sent or (self.sender == self.known.own and not self._asks_elsewhere()):
            return Converted(messages=tuple(self._own_writing()))
        return Converted(messages=tuple(self._inbound()), updates=tuple(self._receipts()))

    # ---- what they wrote

    def _inbound(self) -> list[InboundMessage]:
        about = self._about()
        written = self.known.written.get(about) if about else None
        sender, name = self._author()
        person = Person(_external(sender), name=name)
        chat: str | None = None
        if written is not None and written.person.kind == "person":
            # They answer a mail of ours, perhaps from another address: it belongs where ours stands.
            same = written.person.external_id == person.external_id
            person = person if same else Person(written.person.external_id)
            if self.bounce is not None and not same:
                chat = _bare(written.person.external_id.removeprefix("email:"))
        first = replace(
            self._row(person, sender),
            role="system" if self.bounce is not None else "user",
            reply_to_message_id=about,
            chat_identifier=chat,
        )
        return self._with_files(first)

    def _author(self) -> tuple[str, str | None]:
        """Whom an answer reaches: a form on the own web site writes from the own address for somebody else."""
        elsewhere = self._asks_elsewhere()
        if elsewhere and self.sender == self.known.own:
            return elsewhere["address"].lower(), elsewhere.get("name") or None
        return self.sender, self.name

    def _asks_elsewhere(self) -> dict[str, str] | None:
        wanted = [one for one in self.parsed.get("reply_to", []) if one["address"].lower() != self.known.own]
        return wanted[0] if len(wanted) == 1 else None

    def _about(self) -> str | None:
        """The mail of ours that this one answers or returns."""
        for one in references(self.parsed):
            if one in self.known.written or self.known.queue_id(one) is not None:
                return one
        return None

    def _receipts(self) -> list[StatusUpdate]:
        bounce = self.bounce
        if bounce is None:
            return []
        about = next((one for one in bounce["message_ids"] if self._is_ours(one)), None)
        if about is None:
            return []
        written = self.known.written.get(about)
        copies = _copies(written.payload) if written is not None else frozenset[str]()
        main = [one for one in bounce["failed"] if one not in copies]
        if main:
            reason = bounce.get("reason") or "the other mail server gave no reason"
            return [self._receipt(about, "failed", f"the mail to {main[0]} was returned: {reason}")]
        if any(one not in copies for one in bounce["delivered"]):
            return [self._receipt(about, "delivered", None)]
        return []

    def _is_ours(self, message_id: str) -> bool:
        return message_id in self.known.written or self.known.queue_id(message_id) is not None

    def _receipt(
        self, message_id: str, status: Literal["failed", "delivered"], reason: str | None
    ) -> StatusUpdate:
        stamp = _stamp(self.parsed.get("date"), self.origin)
        return StatusUpdate(
            self.context.tenant_id,
            self.context.session_id,
            CHANNEL,
            (message_id,),
            status,
            occurred_at=datetime.fromtimestamp(stamp / 1000, UTC) if stamp else None,
            reason=reason,
        )

    # ---- what we wrote

    def _echo(self, queue_id: QueueId) -> list[InboundMessage]:
        """A mail of the gateway itself, seen in a folder: proof that its queue item went out."""
        row = self._row(self._addressee(), self.known.own)
        payload = {**row.raw_payload, "queue_ref": {"queue_id": int(queue_id)}}
        return [self._outbound(row, payload)]

    def _own_writing(self) -> list[InboundMessage]:
        """What a person sent from another program, or a mail to oneself."""
        person = self._addressee()
        if person.external_id == _external(self.known.own) and not self.origin.sent:
            # To oneself from oneself: kept, and never answered.
            row = self._row(person, self.known.own)
            return self._with_files(replace(row, raw_payload={**row.raw_payload, "auto_submitted": True}))
        row = self._row(person, self.known.own)
        machine = {"automatic": self.automatic} if self.automatic else {"origin": "phone"}
        first = self._outbound(row, {**row.raw_payload, **machine})
        return self._with_files(replace(first, reply_to_message_id=self._about()))

    def _outbound(self, row: InboundMessage, payload: Json) -> InboundMessage:
        message_id = self.parsed.get("message_id")
        return replace(
            row,
            direction="outbound",
            role="assistant",
            # What answers to it will name its Message-ID.
            channel_message_id=message_id or row.channel_message_id,
            raw_payload=payload,
        )

    def _addressee(self) -> Person:
        for one in (*self.parsed.get("to", []), *self.parsed.get("cc", [])):
            if one["address"].lower() != self.known.own:
                return Person(_external(one["address"]))
        return Person(_external(self.known.own))

    # ---- rows

    def _row(self, person: Person, sender: str) -> InboundMessage:
        event = self.parsed.get("calendar")
        said: Json = {}
        if self.parsed.get("subject"):
            said["subject"] = self.parsed["subject"]
        if event:
            said["calendar"] = event
        return InboundMessage(
            tenant_id=self.context.tenant_id,
            session_id=self.context.session_id,
            channel=CHANNEL,
            channel_message_id=self.digest,
            person=person,
            message_type=MessageType.TEXT,
            content=self._content(event),
            channel_timestamp=_stamp(self.parsed.get("date"), self.origin),
            sender_identifier=_bare(sender),
            media_metadata=said or None,
            raw_payload=self._payload(),
            is_history=self.origin.history,
            arrived_at=time.time(),
        )

    def _content(self, event: Json | None) -> str:
        words = str(self.parsed.get("content") or "").strip()
        if self.bounce is not None and (self.bounce["failed"] or self.bounce["delayed"]):
            who = ", ".join((self.bounce["failed"] or self.bounce["delayed"])[:3])
            how = "was returned" if self.bounce["failed"] else "is late"
            reason = f": {self.bounce['reason']}" if self.bounce.get("reason") else ""
            return f"The mail to {who} {how}{reason}"
        if event:
            return "\n\n".join(part for part in (calendar.sentence(event), words) if part)
        return words or str(self.parsed.get("subject") or "")

    def _payload(self) -> Json:
        parsed = self.parsed
        payload: Json = {
            "subject": parsed.get("subject"),
            "message_id": parsed.get("message_id"),
            "in_reply_to": parsed.get("in_reply_to"),
            "references": parsed.get("references"),
            "from": parsed.get("from"),
            "reply_to": [one["address"] for one in parsed.get("reply_to", [])],
            "to": parsed.get("to"),
            "cc": parsed.get("cc"),
            "text": parsed.get("text"),
            "html": parsed.get("html"),
            "headers": parsed.get("headers"),
            "attachments": parsed.get("attachments"),
            "size": self.origin.size,
            "imap": _place(self.origin),
        }
        if not self.origin.whole:
            payload["cut_off"] = True
        if self.automatic:
            payload |= {"auto_submitted": True, "automatic": self.automatic}
        if self.bounce:
            payload |= {"auto_submitted": True, "bounce": self.bounce}
        return {name: value for name, value in payload.items() if value not in (None, [], "")}

    def _with_files(self, first: InboundMessage) -> list[InboundMessage]:
        """The words, and a row for each file; a mail without words is its first file."""
        files = [one for one in self.parsed.get("attachments", []) if "left_out" not in one]
        if not files:
            return [first]
        wordless = not str(self.parsed.get("content") or "").strip() and not self.parsed.get("calendar")
        if wordless and self.bounce is None:
            lead, files = files[0], files[1:]
            described = lead.get("description") or first.content
            rows = [
                replace(
                    first,
                    message_type=_type(lead["mime_type"]),
                    content=described or None,
                    media_metadata={**(first.media_metadata or {}), **self._media(lead)},
                    raw_payload={**first.raw_payload, "attachment": lead["index"]},
                )
            ]
        else:
            rows = [first]
        return rows + [self._file(first, one) for one in files]

    def _file(self, first: InboundMessage, one: Json) -> InboundMessage:
        payload: Json = {
            "attachment": one["index"],
            "message_id": first.raw_payload.get("message_id"),
            "part_of": first.channel_message_id,
            "imap": _place(self.origin),
        }
        kept = ("auto_submitted", "origin", "automatic", "subject", "references", "reply_to", "from")
        payload |= {name: first.raw_payload[name] for name in kept if name in first.raw_payload}
        return replace(
            first,
            channel_message_id=f"{first.channel_message_id}/{one['index']}",
            message_type=_type(one["mime_type"]),
            content=one.get("description"),
            media_metadata=self._media(one),
            raw_payload=payload,
        )

    def _media(self, one: Json) -> Json:
        told: Json = {"filename": one["filename"], "mime_type": one["mime_type"], "size": one["size"]}
        if not self.origin.whole:
            reason = "the mail is larger than this session takes; open it in the mailbox"
            return {**told, "state": "failed", "error": "mail_too_large", "reason": reason}
        return {**told, "state": "pending"}


def _type(mime_type: str) -> MessageType:
    main = mime_type.partition("/")[0]
    if main == "image" and not mime_type.endswith(("svg+xml", "tiff", "vnd.adobe.photoshop")):
        return MessageType.IMAGE
    return {"video": MessageType.VIDEO, "audio": MessageType.AUDIO}.get(main, MessageType.DOCUMENT)


def _place(origin: Origin) -> Json:
    return {"folder": origin.folder, "uidvalidity": origin.uidvalidity, "uid": origin.uid}


def _stamp(date: object, origin: Origin) -> int | None:
    """When it was written, as the mail says; when it came, where it says nothing that can be."""
    came = int(origin.received_at.timestamp() * 1000) if origin.received_at else None
    if isinstance(date, int) and date > 0 and (came is None or date <= came + 86_400_000):
        return date
    return came


def _external(address: str) -> str:
    """The lead; a mail without a usable sender has one too."""
    try:
        return external_id(CHANNEL, address)
    except Invalid:
        return f"{CHANNEL}:{NOBODY}"


def _bare(address: str) -> str:
    try:
        return address_of(external_id(CHANNEL, address))
    except Invalid:
        return address[:300] or NOBODY


def _copies(payload: Mapping[str, Any]) -> frozenset[str]:
    given = payload.get("cc")
    values = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return frozenset(str(one).strip().lower() for one in values)
