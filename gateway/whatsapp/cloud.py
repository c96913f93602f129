"""WhatsApp Cloud API notifications to the gateway's messages and receipts. Pure.

`entry[].changes[].value` with `messages`, `statuses`, `contacts`; also `message_echoes` of a phone that shares the number.
Bad items are named by their place in the order of the body.
Source: Meta's "Webhooks notification payload reference" for the WhatsApp Business Platform.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from core.channel import Converted, InboundMessage, MessageType, SessionContext, StatusUpdate
from gateway.whatsapp.content import Content
from gateway.whatsapp.people import Party, own_address, party
from gateway.whatsapp.values import (
    Json,
    clean,
    decimal_of,
    digest_of,
    items,
    message_id,
    milliseconds,
    name_of,
    number_of,
    obj,
    text_of,
)

_STATUSES: dict[object, Literal["sent", "delivered", "read", "failed"]] = {
    "sent": "sent",
    "delivered": "delivered",
    "read": "read",
    "played": "read",
    "failed": "failed",
}
_MEDIA = {
    "image": MessageType.IMAGE,
    "video": MessageType.VIDEO,
    "audio": MessageType.AUDIO,
    "voice": MessageType.AUDIO,
    "document": MessageType.DOCUMENT,
    "sticker": MessageType.STICKER,
}


class _Bad(Exception):
    """What is wrong with one item."""


def convert_cloud(body: Any, context: SessionContext) -> Converted:
    if not isinstance(body, dict) or not isinstance(body.get("entry"), list):
        return Converted(errors=((0, "entry is missing or not a list"),))
    messages: list[InboundMessage] = []
    updates: list[StatusUpdate] = []
    errors: list[tuple[int, str]] = []
    ignored = 0
    for index, (kind, item, value) in enumerate(_items(body)):
        try:
            if kind == "status":
                update = _status(item, context)
                if update is None:
                    ignored += 1
                else:
                    updates.append(update)
            elif kind in ("message", "echo"):
                messages.append(_message(item, value, context, echo=kind == "echo"))
            else:
                raise _Bad(kind)
        except _Bad as error:
            errors.append((index, str(error)))
    return Converted(tuple(messages), tuple(updates), tuple(errors), ignored)


def _items(body: Json) -> Iterator[tuple[str, Any, Json]]:
    for entry in items(body.get("entry")):
        changes = obj(entry).get("changes")
        if not isinstance(changes, list):
            yield "entry.changes is missing or not a list", None, {}
            continue
        for change in changes:
            value = obj(change).get("value")
            if not isinstance(value, dict):
                yield "changes.value is missing or not an object", None, {}
                continue
            for kind, name in (("message", "messages"), ("echo", "message_echoes"), ("status", "statuses")):
                for item in items(value.get(name)):
                    yield kind, item, value


def _message(item: Any, value: Json, context: SessionContext, *, echo: bool) -> InboundMessage:
    """Raises _Bad."""
    if not isinstance(item, dict):
        raise _Bad("a message must be a JSON object")
    identifier = message_id(item.get("id"))
    if identifier is None:
        raise _Bad("id is missing or not a text")
    field = "to" if echo else "from"
    lead = _party(item.get(field))
    if lead is None:
        raise _Bad(f"{field} is missing or not a phone number")
    timestamp = milliseconds(item.get("timestamp"))
    if timestamp is None:
        raise _Bad("timestamp is missing or not a time in seconds")
    kind = item.get("type")
    if not isinstance(kind, str):
        raise _Bad("type is missing or not a text")
    found = _content(kind, item)
    raw = {**clean(item), "metadata": clean(obj(value.get("metadata")))}
    if echo:
        raw["origin"] = "phone"
    return InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=identifier,
        person=lead.person(None if echo else _profile_name(value, item.get("from"))),
        message_type=found.message_type,
        content=found.content,
        channel_timestamp=timestamp,
        direction="outbound" if echo else "inbound",
        role="assistant" if echo else "user",
        sender_identifier=own_address(context) if echo else lead.address,
        reply_to_message_id=found.reply_to or message_id(obj(item.get("context")).get("id")),
        media_metadata=found.media,
        raw_payload=raw,
    )


def _party(value: Any) -> Party | None:
    if not isinstance(value, str) or not value.removeprefix("+").isascii() or "@" in value or ":" in value:
        return None
    return party(value, "", lambda _lid: None)


def _profile_name(value: Json, wa_id: Any) -> str | None:
    for contact in items(value.get("contacts")):
        if obj(contact).get("wa_id") == wa_id:
            return name_of(obj(obj(contact).get("profile")).get("name"))
    return None


def _content(kind: str, item: Json) -> Content:
    part = obj(item.get(kind))
    if kind == "text":
        words = text_of(part.get("body"))
        if words is None:
            raise _Bad("text.body is missing or empty")
        return Content(MessageType.TEXT, words)
    if kind in _MEDIA:
        return _media(_MEDIA[kind], part)
    if kind == "location":
        place = {
            "latitude": decimal_of(part.get("latitude")),
            "longitude": decimal_of(part.get("longitude")),
            "name": name_of(part.get("name")),
            "address": text_of(part.get("address")),
            "url": text_of(part.get("url")),
        }
        shown = ", ".join(filter(None, (name_of(part.get("name")), text_of(part.get("address")))))
        return Content(
            MessageType.LOCATION, shown or None, None, {k: v for k, v in place.items() if v is not None}
        )
    if kind == "contacts":
        return _contacts(items(item.get("contacts")))
    if kind == "reaction":
        return Content(MessageType.REACTION, text_of(part.get("emoji")), message_id(part.get("message_id")))
    if kind == "button":
        return _words(part.get("text") or part.get("payload"))
    if kind == "interactive":
        reply = obj(part.get(str(part.get("type"))))
        return _words(reply.get("title") or reply.get("body"))
    if kind == "system":
        return Content(MessageType.UNSUPPORTED, text_of(part.get("body")))
    return Content(MessageType.UNSUPPORTED)


def _words(value: Any) -> Content:
    words = text_of(value)
    return Content(MessageType.TEXT, words) if words else Content(MessageType.UNSUPPORTED)


def _media(kind: MessageType, part: Json) -> Content:
    caption = text_of(part.get("caption"))
    media = {
        "state": "pending",
        "filename": name_of(part.get("filename")),
        "mime_type": name_of(part.get("mime_type")),
        "size": number_of(part.get("file_size")),
        "sha256": digest_of(part.get("sha256")),
        "caption": caption,
        "voice": True if part.get("voice") is True else None,
        "animated": True if part.get("animated") is True else None,
        "media_id": name_of(part.get("id")),
    }
    return Content(kind, caption, None, {k: v for k, v in media.items() if v is not None})


def _contacts(cards: list[Any]) -> Content:
    contacts = [
        {
            "name": name_of(obj(obj(card).get("name")).get("formatted_name")),
            "phones": [
                p for p in (name_of(obj(x).get("phone")) for x in items(obj(card).get("phones"))) if p
            ],
            "emails": [
                e for e in (name_of(obj(x).get("email")) for x in items(obj(card).get("emails"))) if e
            ],
        }
        for card in cards[:100]
    ]
    names = ", ".join(str(c["name"]) for c in contacts if c["name"])
    return Content(MessageType.CONTACT, names or None, None, {"contacts": contacts})


def _status(item: Any, context: SessionContext) -> StatusUpdate | None:
    """Raises _Bad; None for a status that says nothing about a delivery."""
    if not isinstance(item, dict):
        raise _Bad("a status must be a JSON object")
    identifier = message_id(item.get("id"))
    if identifier is None:
        raise _Bad("id is missing or not a text")
    value = item.get("status")
    if not isinstance(value, str):
        raise _Bad("status is missing or not a text")
    status = _STATUSES.get(value)
    if status is None:
        return None
    recipient = _party(item.get("recipient_id"))
    at = milliseconds(item.get("timestamp"))
    return StatusUpdate(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        message_ids=(identifier,),
        status=status,
        chat=recipient.person() if recipient else None,
        occurred_at=datetime.fromtimestamp(at / 1000, UTC) if at else None,
        reason=_reason(item) if status == "failed" else None,
    )


def _reason(item: Json) -> str | None:
    error = obj(next(iter(items(item.get("errors"))), None))
    code = number_of(error.get("code"))
    words = (
        text_of(obj(error.get("error_data")).get("details"))
        or text_of(error.get("message"))
        or text_of(error.get("title"))
    )
    return ": ".join(filter(None, (str(code) if code is not None else None, words))) or None
