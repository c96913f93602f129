"""From WhatsApp's events and webhook bodies to the gateway's messages and receipts. Pure: no IO, no neonize.

`convert_event` reads the child's journal entries; `convert_webhook` tells Baileys objects from Cloud API notifications.
Nothing here raises on what a stranger can send; what cannot be understood is stored as `unsupported` with all of it.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from core.channel import Converted, InboundMessage, MessageType, SessionContext, StatusUpdate
from gateway.whatsapp import content, protocol
from gateway.whatsapp.baileys import convert_baileys
from gateway.whatsapp.calls import convert_call
from gateway.whatsapp.cloud import convert_cloud
from gateway.whatsapp.notices import convert_notice
from gateway.whatsapp.people import Party, is_group, is_ignored, own_address, party
from gateway.whatsapp.settings import read, wants_groups
from gateway.whatsapp.values import Json, clean, decimal_of, items, message_id, milliseconds, name_of, obj

__all__ = ["convert_baileys", "convert_cloud", "convert_event", "convert_webhook", "unreadable"]

PhoneOf = Callable[[str], str | None]

UNAVAILABLE = (
    "Not available on linked devices, perhaps a photo or video to be viewed once: open it on the phone"
)

_RECEIPTS: dict[str, Literal["delivered", "read"]] = {
    "DELIVERED": "delivered",
    "READ": "read",
    "PLAYED": "read",
}


def convert_webhook(body: Any, context: SessionContext) -> Converted:
    """Whichever of the two the body is. Never raises."""
    if isinstance(body, dict) and ("entry" in body or body.get("object") == "whatsapp_business_account"):
        return _wanted(convert_cloud(body, context), context)
    return _wanted(convert_baileys(body, context), context)


def _wanted(converted: Converted, context: SessionContext) -> Converted:
    """Without what is said in groups, when the session's settings say so."""
    if wants_groups(context.metadata):
        return converted
    kept = tuple(m for m in converted.messages if m.person.kind != "group")
    return replace(converted, messages=kept, ignored=converted.ignored + len(converted.messages) - len(kept))


def convert_event(
    entry: dict[str, Any], context: SessionContext, *, phone_of: PhoneOf | None = None
) -> Converted:
    """One journal entry of the child. `phone_of`: digits of the phone behind a LID, where that is known."""
    data = obj(entry.get("data"))
    kind = entry.get("event")
    arrived = decimal_of(entry.get("at")) or datetime.now(UTC).timestamp()
    look_up = phone_of or (lambda _lid: None)
    if kind == protocol.RECEIPT:
        return _receipt(data, context, look_up)
    if kind == protocol.LOST:
        return _wanted(_lost(data, context, look_up, arrived), context)
    if kind == protocol.CALL:
        meta = obj(data.get("basicCallMeta"))
        caller = party(_jid(meta.get("callCreator")), _jid(meta.get("callCreatorAlt")), look_up)
        return convert_call(entry, data, context, caller, read(context.metadata).call_policy)
    if kind == protocol.GROUP_NOTICE:
        return _wanted(_notice(data, context, look_up, arrived), context)
    placeholder = kind == protocol.UNDECRYPTABLE
    return _wanted(_message(entry, data, context, look_up, arrived, placeholder=placeholder), context)


def _message(
    entry: Json, data: Json, context: SessionContext, phone_of: PhoneOf, arrived: float, *, placeholder: bool
) -> Converted:
    info = obj(data.get("Info"))
    source = obj(info.get("MessageSource"))
    chat, sender = _jid(source.get("Chat")), _jid(source.get("Sender"))
    if is_ignored(chat) or (placeholder and _hidden(info, data)):
        return Converted(ignored=1)
    body = obj(data.get("Message"))
    found: content.Content | None
    if placeholder or "problem" in entry:
        found = content.Content(
            MessageType.UNSUPPORTED, UNAVAILABLE if data.get("IsUnavailable") is True else None
        )
    elif isinstance(entry.get("vote"), dict):
        found = content.vote(body, entry["vote"])
    else:
        found = content.read(body)
    if found is None:
        return Converted(ignored=1)
    from_me = source.get("IsFromMe") is True
    author = party(sender, _jid(source.get("SenderAlt")), phone_of)
    if is_group(chat):
        lead = party(chat, "", phone_of)
    elif from_me:
        lead = party(chat, _jid(source.get("RecipientAlt")), phone_of)
    else:
        lead = author
    identifier = message_id(info.get("ID"))
    if lead is None or identifier is None:
        raise ValueError("the event names no sender or no id")
    raw = clean(data)
    raw |= {key: clean(entry[key]) for key in ("raw", "problem", "vote") if key in entry}
    raw |= content.marks(body)
    if from_me:
        raw["origin"] = "phone"
    name = None if from_me or lead.kind == "group" else name_of(info.get("Pushname"))
    message = InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=identifier,
        person=lead.person(name),
        message_type=found.message_type,
        content=found.content,
        channel_timestamp=milliseconds(info.get("Timestamp")),
        direction="outbound" if from_me else "inbound",
        role="assistant" if from_me else "user",
        sender_identifier=(own_address(context) if from_me else None) or (author.address if author else None),
        chat_identifier=lead.address if lead.kind == "group" else None,
        reply_to_message_id=found.reply_to,
        media_metadata=found.media,
        raw_payload=raw,
        placeholder=placeholder,
        message_secret=content.secret(body) if from_me else None,
        arrived_at=arrived,
    )
    return Converted(messages=(message,))


def _hidden(info: Json, data: Json) -> bool:
    """Unreadable, and not meant for people: what the phone tells its own devices (keys, history) is asked for again."""
    return data.get("DecryptFailMode") == "DECRYPT_FAIL_HIDE" or info.get("Category") == "peer"


def _notice(data: Json, context: SessionContext, phone_of: PhoneOf, arrived: float) -> Converted:
    """Something about a group: a new name, members who come and go."""

    def who(jid: Any) -> str:
        found = party(_jid(jid), "", phone_of)
        return found.address if found else "somebody"

    info = obj(data.get("GroupInfo"))
    group = party(_jid(data.get("JID") or info.get("JID")), "", phone_of)
    actor = party(_jid(data.get("Sender")), _jid(data.get("SenderPN")), phone_of)
    return convert_notice(data, context, group, actor, who, arrived)


def _receipt(data: Json, context: SessionContext, phone_of: PhoneOf) -> Converted:
    status = _RECEIPTS.get(str(data.get("Type")))
    source = obj(data.get("MessageSource"))
    ids = tuple(filter(None, (message_id(i) for i in items(data.get("MessageIDs")))))
    chat = _jid(source.get("Chat"))
    # A receipt of our own phone says that we read something, not that somebody read ours.
    if status is None or not ids or source.get("IsFromMe") is True or is_ignored(chat):
        return Converted(ignored=1)
    other = party(chat, "" if is_group(chat) else _jid(source.get("SenderAlt")), phone_of)
    at = milliseconds(data.get("Timestamp"))
    update = StatusUpdate(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        message_ids=ids,
        status=status,
        chat=other.person() if other else None,
        occurred_at=datetime.fromtimestamp(at / 1000, UTC) if at else None,
    )
    return Converted(updates=(update,))


def _lost(data: Json, context: SessionContext, phone_of: PhoneOf, arrived: float) -> Converted:
    """A message that could not be recovered: said, never hidden."""
    chat, sender = str(data.get("chat") or ""), str(data.get("sender") or "")
    if is_ignored(chat):
        return Converted(ignored=1)
    author = party(sender, "", phone_of)
    lead = party(chat, "", phone_of) if is_group(chat) else author
    identifier = message_id(data.get("id"))
    if lead is None or identifier is None:
        raise ValueError("the entry names no sender or no id")
    return Converted(
        messages=(
            InboundMessage(
                tenant_id=context.tenant_id,
                session_id=context.session_id,
                channel=context.channel,
                channel_message_id=identifier,
                person=lead.person(),
                message_type=MessageType.UNSUPPORTED,
                content=None,
                channel_timestamp=None,
                sender_identifier=author.address if author else None,
                chat_identifier=lead.address if lead.kind == "group" else None,
                raw_payload={"possible_loss": True, **clean(data)},
                placeholder=True,
                arrived_at=arrived,
            ),
        )
    )


def unreadable(payload: bytes, key: str, appended_at: float, context: SessionContext) -> InboundMessage:
    """A journal entry that could not be converted, with all of it. `key` is the journal's: id and sender. Never raises."""
    try:
        raw = clean(orjson.loads(payload))
    except ValueError:
        raw = None
    identifier, _, sender = key.partition(" ")
    author = party(sender, "", lambda _lid: None) or Party("whatsapp-lid:unknown", ())
    return InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=message_id(identifier) or f"journal-{int(appended_at * 1000)}",
        person=author.person(),
        message_type=MessageType.UNSUPPORTED,
        content=None,
        channel_timestamp=int(appended_at * 1000),
        sender_identifier=author.address,
        raw_payload=raw if isinstance(raw, dict) else {"payload_base64": b64encode(payload).decode()},
        arrived_at=appended_at,
    )


def _jid(value: Any) -> str:
    """neonize's JID object as text, without device and agent; empty when there is none."""
    fields = obj(value)
    user, server = fields.get("User"), fields.get("Server")
    if (
        not isinstance(user, str)
        or not isinstance(server, str)
        or not server
        or fields.get("IsEmpty") is True
    ):
        return ""
    return f"{user}@{server}" if user else ""
