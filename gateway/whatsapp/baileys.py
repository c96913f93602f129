"""Baileys message objects, as a Baileys server posts them to the webhook, to the gateway's messages. Pure.

One object, a list, or `{"messages": […]}`. Good ones are converted; each bad one is named by its index and what is wrong.
"""

from __future__ import annotations

from typing import Any

from core.channel import Converted, InboundMessage, MessageType, SessionContext
from gateway.whatsapp import content
from gateway.whatsapp.people import is_group, is_ignored, own_address, party
from gateway.whatsapp.values import Json, clean, field, message_id, milliseconds, name_of

_CIPHERTEXT = (2, "CIPHERTEXT", "2")
"""`messageStubType` of a message that Baileys could not decrypt (yet)."""


class _Bad(Exception):
    """What is wrong with one object, in words for whoever posted it."""


def convert_baileys(body: Any, context: SessionContext) -> Converted:
    messages: list[InboundMessage] = []
    errors: list[tuple[int, str]] = []
    ignored = 0
    found = _objects(body)
    if found is None:
        return Converted(
            errors=((0, 'expected a Baileys message object, a list of them, or {"messages": [...]}'),)
        )
    for index, item in enumerate(found):
        try:
            message = _convert(item, context)
        except _Bad as error:
            errors.append((index, str(error)))
            continue
        if message is None:
            ignored += 1
        else:
            messages.append(message)
    return Converted(tuple(messages), (), tuple(errors), ignored)


def _objects(body: Any) -> list[Any] | None:
    if isinstance(body, list):
        return body
    if not isinstance(body, dict):
        return None
    if isinstance(body.get("messages"), list):
        return list(body["messages"])
    if (
        isinstance(body.get("data"), dict) and "key" not in body
    ):  # some servers wrap the event's name around it
        return _objects(body["data"])
    return [body] if "key" in body or "message" in body else None


def _convert(item: Any, context: SessionContext) -> InboundMessage | None:
    """Raises _Bad."""
    if not isinstance(item, dict):
        raise _Bad("a message must be a JSON object")
    key = item.get("key")
    if not isinstance(key, dict):
        raise _Bad("key is missing or not an object")
    identifier = message_id(key.get("id"))
    if identifier is None:
        raise _Bad("key.id is missing or not a text")
    remote = key.get("remoteJid")
    if not isinstance(remote, str) or not remote:
        raise _Bad("key.remoteJid is missing or not a text")
    if is_ignored(remote):
        return None
    placeholder = item.get("messageStubType") in _CIPHERTEXT and not item.get("message")
    found = content.Content(MessageType.UNSUPPORTED) if placeholder else _content(item)
    if found is None:
        return None
    timestamp = _timestamp(item)

    group = is_group(remote)
    alternative = _first(key, "remoteJidAlt", "senderPn", "senderLid")
    lead = party(remote, "" if group else alternative, _unknown)
    if lead is None:
        raise _Bad(f"key.remoteJid {clean(remote)[:80]!r} is not a WhatsApp address")
    author = lead
    if group:
        participant = _first(key, "participant") or str(item.get("participant") or "")
        member = party(
            participant, _first(key, "participantAlt", "participantPn", "participantLid"), _unknown
        )
        if member is None and key.get("fromMe") is not True:
            raise _Bad("key.participant is missing: it names the author of a group message")
        author = member or lead
    from_me = key.get("fromMe") is True
    raw = clean(item)
    raw |= content.marks(item.get("message"))
    if from_me:
        raw["origin"] = "phone"
    sender = own_address(context) if from_me else author.address
    return InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=identifier,
        person=lead.person(None if from_me or group else name_of(item.get("pushName"))),
        message_type=found.message_type,
        content=found.content,
        channel_timestamp=timestamp,
        direction="outbound" if from_me else "inbound",
        role="assistant" if from_me else "user",
        sender_identifier=sender,
        chat_identifier=lead.address if group else None,
        reply_to_message_id=found.reply_to,
        media_metadata=found.media,
        raw_payload=raw,
        placeholder=placeholder,
        message_secret=content.secret(item.get("message")) if from_me else None,
    )


def _content(item: Json) -> content.Content | None:
    body = item.get("message")
    if body is None and item.get("messageStubType") is not None:
        return None  # "X joined the group": a notice, not a message
    if not isinstance(body, dict) or not body:
        raise _Bad("message is missing, empty or not an object")
    return content.read(body)


def _timestamp(item: Json) -> int:
    value = item.get("messageTimestamp")
    if value is None:
        raise _Bad("messageTimestamp is missing")
    timestamp = milliseconds(value)
    if timestamp is None:
        raise _Bad("messageTimestamp is not a time: expected seconds as a number, a text or a Long object")
    return timestamp


def _first(key: Json, *names: str) -> str:
    return next((v for v in (field(key, name) for name in names) if isinstance(v, str) and v), "")


def _unknown(_lid: str) -> None:
    return None
