"""Message bodies as phones make them. Pure functions; encryption and addressing are the phone's."""

from __future__ import annotations

from typing import Any, TypeAlias

from sandbox.whatsapp.media import EncryptedMedia
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.protos import e2e

Message: TypeAlias = e2e.Message


def text(content: str) -> Message:
    return e2e.Message(conversation=content)


def quote(content: str, quoted_id: str, author: JID, original: Message) -> Message:
    message = e2e.Message()
    message.extendedTextMessage.text = content
    context = message.extendedTextMessage.contextInfo
    context.stanzaID, context.participant = quoted_id, str(author.bare)
    context.quotedMessage.CopyFrom(original)
    return message


def media(kind: str, stored: EncryptedMedia, path: str, size: int, **fields: Any) -> Message:
    """`kind`: image, video, audio, document, sticker; `fields` are those of its protobuf (caption, mimetype, …)."""
    message = e2e.Message()
    part = getattr(message, f"{kind}Message")
    part.URL, part.directPath = f"https://mmg.whatsapp.net{path}", path
    part.mediaKey, part.fileLength = stored.key, size
    part.fileSHA256, part.fileEncSHA256 = stored.plain_sha256, stored.blob_sha256
    for name, value in fields.items():
        if value is not None:
            setattr(part, name, value)
    return message


def reaction(emoji: str, chat: JID, target_id: str, *, from_me: bool) -> Message:
    message = e2e.Message()
    key = message.reactionMessage.key
    key.remoteJID, key.ID, key.fromMe = str(chat), target_id, from_me
    message.reactionMessage.text = emoji
    return message


def edit(chat: JID, target_id: str, content: str) -> Message:
    message = e2e.Message()
    change = message.protocolMessage
    change.type = e2e.ProtocolMessage.MESSAGE_EDIT
    change.key.remoteJID, change.key.ID, change.key.fromMe = str(chat), target_id, True
    change.editedMessage.conversation = content
    return message


def revoke(chat: JID, target_id: str) -> Message:
    message = e2e.Message()
    change = message.protocolMessage
    change.type = e2e.ProtocolMessage.REVOKE
    change.key.remoteJID, change.key.ID, change.key.fromMe = str(chat), target_id, True
    return message


def location(latitude: float, longitude: float, name: str = "", address: str = "") -> Message:
    message = e2e.Message()
    place = message.locationMessage
    place.degreesLatitude, place.degreesLongitude, place.name, place.address = (
        latitude,
        longitude,
        name,
        address,
    )
    return message


def contact(name: str, phone: str) -> Message:
    message = e2e.Message()
    message.contactMessage.displayName = name
    message.contactMessage.vcard = f"BEGIN:VCARD\nVERSION:3.0\nFN:{name}\nTEL;TYPE=CELL:{phone}\nEND:VCARD"
    return message


def device_sent(chat: JID, message: Message) -> Message:
    """What a phone tells its own linked devices about a message that it sent."""
    wrapped = e2e.Message()
    wrapped.deviceSentMessage.destinationJID = str(chat)
    wrapped.deviceSentMessage.message.CopyFrom(message)
    return wrapped


_CAPTIONED = ("imageMessage", "videoMessage", "documentMessage")
_MEDIA = {
    "imageMessage": "image",
    "videoMessage": "video",
    "audioMessage": "audio",
    "documentMessage": "document",
    "stickerMessage": "sticker",
}


def text_of(message: Message) -> str:
    """The text or caption, or an empty string."""
    if message.conversation:
        return str(message.conversation)
    if message.HasField("extendedTextMessage"):
        return str(message.extendedTextMessage.text)
    if message.HasField("protocolMessage") and message.protocolMessage.HasField("editedMessage"):
        return text_of(message.protocolMessage.editedMessage)
    for field in _CAPTIONED:
        if message.HasField(field):
            return str(getattr(message, field).caption)
    return ""


def media_of(message: Message) -> tuple[str, Any] | None:
    """(kind, the media part), or None for a message without media."""
    for field, kind in _MEDIA.items():
        if message.HasField(field):
            return kind, getattr(message, field)
    return None


def stanza_attributes(message: Message) -> tuple[dict[str, str], dict[str, str]]:
    """(attributes of the stanza, of its ciphertext): what a server may know about an encrypted message."""
    found = media_of(message)
    if found is not None:
        return {"type": "media"}, {"mediatype": found[0]}
    if message.HasField("locationMessage"):
        return {"type": "media"}, {"mediatype": "location"}
    if message.HasField("contactMessage"):
        return {"type": "media"}, {"mediatype": "vcard"}
    if message.HasField("reactionMessage"):
        return {"type": "reaction"}, {}
    if message.HasField("protocolMessage"):
        change = message.protocolMessage
        if change.type == e2e.ProtocolMessage.MESSAGE_EDIT:
            return {"type": "text", "edit": "1"}, {}
        if change.type == e2e.ProtocolMessage.REVOKE:
            return {"type": "text", "edit": "7"}, {}
    if message.HasField("pollCreationMessageV3"):
        return {"type": "poll"}, {}
    return {"type": "text"}, {}
