"""What a message says, whoever made it: its kind, text, media and a JSON description. Pure functions."""

from __future__ import annotations

from typing import Any

from sandbox.whatsapp.bodies import Message
from sandbox.whatsapp.protos import e2e

_WRAPPERS = (
    "deviceSentMessage",
    "ephemeralMessage",
    "viewOnceMessage",
    "viewOnceMessageV2",
    "viewOnceMessageV2Extension",
    "documentWithCaptionMessage",
    "editedMessage",
)
_MEDIA = {
    "imageMessage": "image",
    "videoMessage": "video",
    "ptvMessage": "video",
    "audioMessage": "audio",
    "documentMessage": "document",
    "stickerMessage": "sticker",
}
_POLLS = (
    "pollCreationMessage",
    "pollCreationMessageV2",
    "pollCreationMessageV3",
    "pollCreationMessageV4",
    "pollCreationMessageV5",
    "pollCreationMessageV6",
)
_KINDS = {
    "conversation": "text",
    "extendedTextMessage": "text",
    "locationMessage": "location",
    "liveLocationMessage": "live_location",
    "contactMessage": "contact",
    "contactsArrayMessage": "contacts",
    "reactionMessage": "reaction",
    "pollUpdateMessage": "vote",
    "buttonsResponseMessage": "button",
    "templateButtonReplyMessage": "button",
    "listResponseMessage": "list",
    "interactiveResponseMessage": "flow",
    **dict.fromkeys(_POLLS, "poll"),
}
_CHANGES = {e2e.ProtocolMessage.MESSAGE_EDIT: "edit", e2e.ProtocolMessage.REVOKE: "revoke"}


def unwrap(message: Message) -> Message:
    """The message inside its envelopes (ephemeral, view once, edited, sent by another own device, …)."""
    for _ in range(8):
        found = next((name for name in _WRAPPERS if message.HasField(name)), None)
        if found is None:
            break
        message = getattr(message, found).message
    return message


def media_of(message: Message) -> tuple[str, Any] | None:
    """(kind, the media part), or None for a message without media."""
    message = unwrap(message)
    for field, kind in _MEDIA.items():
        if message.HasField(field):
            return kind, getattr(message, field)
    return None


def poll_of(message: Message) -> Any | None:
    """The part that creates a poll, of whichever version."""
    message = unwrap(message)
    return next((getattr(message, field) for field in _POLLS if message.HasField(field)), None)


def secret_of(message: Message) -> bytes:
    """What votes on this message, and other things about it, are encrypted with."""
    inner = unwrap(message)
    return bytes(inner.messageContextInfo.messageSecret or message.messageContextInfo.messageSecret)


def kind_of(message: Message) -> str:
    """text, image, video, audio, voice, document, sticker, location, contact, poll, vote, reaction, edit, revoke, …"""
    found = media_of(message)
    if found is not None:
        return "voice" if found[0] == "audio" and found[1].PTT else found[0]
    message = unwrap(message)
    if message.HasField("protocolMessage"):
        return _CHANGES.get(message.protocolMessage.type, "other")
    return next((kind for field, kind in _KINDS.items() if message.HasField(field)), "other")


def text_of(message: Message) -> str:
    """The text, caption or chosen words, or an empty string."""
    message = unwrap(message)
    if message.conversation:
        return str(message.conversation)
    if message.HasField("extendedTextMessage"):
        return str(message.extendedTextMessage.text)
    if message.HasField("protocolMessage") and message.protocolMessage.HasField("editedMessage"):
        return text_of(message.protocolMessage.editedMessage)
    found = media_of(message)
    if found is not None:
        return str(getattr(found[1], "caption", ""))
    if message.HasField("buttonsResponseMessage"):
        return str(message.buttonsResponseMessage.selectedDisplayText)
    if message.HasField("templateButtonReplyMessage"):
        return str(message.templateButtonReplyMessage.selectedDisplayText)
    if message.HasField("listResponseMessage"):
        return str(message.listResponseMessage.title)
    if message.HasField("interactiveResponseMessage"):
        return str(message.interactiveResponseMessage.body.text)
    return ""


def target_of(message: Message) -> str:
    """The id of the message that a reaction, edit, revoke or vote is about."""
    message = unwrap(message)
    for part in ("reactionMessage", "protocolMessage"):
        if message.HasField(part):
            return str(getattr(message, part).key.ID)
    if message.HasField("pollUpdateMessage"):
        return str(message.pollUpdateMessage.pollCreationMessageKey.ID)
    return ""


def quoted_of(message: Message) -> str:
    """The id of the message that this one answers."""
    for field, value in unwrap(message).ListFields():
        if field.message_type is not None and "contextInfo" in field.message_type.fields_by_name:
            return str(value.contextInfo.stanzaID)
    return ""


def describe(message: Message) -> dict[str, Any]:
    """What the kind adds to the text, as JSON; votes are the phone's to decrypt."""
    kind, inner = kind_of(message), unwrap(message)
    about: dict[str, Any] = {}
    found, form = media_of(message), poll_of(message)
    if found is not None:
        part = found[1]
        about = {"mimetype": part.mimetype, "size": part.fileLength}
        if kind == "document":
            about["filename"] = part.fileName
        if kind in ("audio", "voice", "video"):
            about["seconds"] = part.seconds
    elif form is not None:
        about = {
            "question": form.name,
            "options": [option.optionName for option in form.options],
            "choices": form.selectableOptionsCount,
        }
    elif kind in ("location", "live_location"):
        place = inner.locationMessage if kind == "location" else inner.liveLocationMessage
        about = {"latitude": place.degreesLatitude, "longitude": place.degreesLongitude}
        if kind == "location":
            about |= {"name": place.name, "address": place.address}
    elif kind in ("contact", "contacts"):
        cards = [inner.contactMessage] if kind == "contact" else inner.contactsArrayMessage.contacts
        about = {"contacts": [{"name": card.displayName, "vcard": card.vcard} for card in cards]}
    elif kind == "reaction":
        about = {"emoji": inner.reactionMessage.text}
    elif inner.HasField("extendedTextMessage") and inner.extendedTextMessage.title:
        preview = inner.extendedTextMessage
        about = {
            "preview": {
                "url": preview.matchedText,
                "title": preview.title,
                "description": preview.description,
            }
        }
    for name, value in (("target", target_of(message)), ("quoted", quoted_of(message))):
        if value:
            about[name] = value
    return about


def stanza_attributes(message: Message) -> tuple[dict[str, str], dict[str, str]]:
    """(attributes of the stanza, of its ciphertext): what a server may know about an encrypted message."""
    kind, found = kind_of(message), media_of(message)
    if found is not None:
        return {"type": "media"}, {"mediatype": "ptt" if kind == "voice" else found[0]}
    if kind in ("location", "live_location"):
        return {"type": "media"}, {"mediatype": "location" if kind == "location" else "livelocation"}
    if kind in ("contact", "contacts"):
        return {"type": "media"}, {"mediatype": "vcard" if kind == "contact" else "contact_array"}
    if kind in ("button", "list", "flow"):
        names = {"button": "button_response", "list": "list_response", "flow": "native_flow_response"}
        return {"type": "media"}, {"mediatype": names[kind]}
    if kind == "reaction":
        return {"type": "reaction"}, {}
    if kind in ("edit", "revoke"):
        return {"type": "text", "edit": "1" if kind == "edit" else "7"}, {}
    if kind in ("poll", "vote"):
        return {"type": "poll"}, {}
    return {"type": "text"}, {}
