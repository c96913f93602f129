"""Message bodies as phones make them. Pure functions; encryption and addressing are the phone's, reading is `reading.py`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sandbox.whatsapp.media import EncryptedMedia
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.protos import e2e

Message: TypeAlias = e2e.Message

SECRET_SIZE = 32


@dataclass(frozen=True)
class Target:
    """A message that another one is about. `from_me` is seen from whoever refers to it; `author` only counts in groups."""

    chat: JID
    id: str
    from_me: bool
    author: JID | None = None

    def fill(self, key: Any) -> None:
        key.remoteJID, key.ID, key.fromMe = str(self.chat.bare), self.id, self.from_me
        if self.author is not None:
            key.participant = str(self.author.bare)


# --- what people write, show and record ---


def text(content: str) -> Message:
    return e2e.Message(conversation=content)


def media(kind: str, stored: EncryptedMedia, path: str, size: int, **fields: Any) -> Message:
    """`kind`: image, video, audio, document, sticker; `fields` are those of its protobuf (caption, mimetype, …)."""
    message = e2e.Message()
    part = getattr(message, f"{kind}Message")
    part.URL, part.directPath = f"https://mmg.whatsapp.net{path}", path
    part.mediaKey, part.fileLength = stored.key, size
    part.fileSHA256, part.fileEncSHA256 = stored.plain_sha256, stored.blob_sha256
    part.mediaKeyTimestamp = int(time.time())
    for name, value in fields.items():
        if value is not None:
            setattr(part, name, value)
    return message


def location(latitude: float, longitude: float, name: str = "", address: str = "") -> Message:
    message = e2e.Message()
    place = message.locationMessage
    place.degreesLatitude, place.degreesLongitude = latitude, longitude
    place.name, place.address = name, address
    return message


def live_location(latitude: float, longitude: float, caption: str = "", *, sequence: int = 1) -> Message:
    """One point of a shared position; the next ones come with a higher `sequence`."""
    message = e2e.Message()
    place = message.liveLocationMessage
    place.degreesLatitude, place.degreesLongitude, place.caption = latitude, longitude, caption
    place.sequenceNumber, place.accuracyInMeters, place.timeOffset = sequence, 12, 0
    return message


def vcard(name: str, phone: str) -> str:
    digits = phone.removeprefix("+")
    return f"BEGIN:VCARD\nVERSION:3.0\nFN:{name}\nTEL;type=CELL;type=VOICE;waid={digits}:{phone}\nEND:VCARD"


def contact(name: str, phone: str) -> Message:
    message = e2e.Message()
    message.contactMessage.displayName, message.contactMessage.vcard = name, vcard(name, phone)
    return message


def contacts(people: Sequence[tuple[str, str]]) -> Message:
    """Several cards in one message: (name, phone) of each."""
    message = e2e.Message()
    message.contactsArrayMessage.displayName = f"{len(people)} contacts"
    for name, phone in people:
        card = message.contactsArrayMessage.contacts.add()
        card.displayName, card.vcard = name, vcard(name, phone)
    return message


# --- about another message ---


def reaction(emoji: str, target: Target) -> Message:
    """An empty emoji takes the reaction back."""
    message = e2e.Message()
    target.fill(message.reactionMessage.key)
    message.reactionMessage.text = emoji
    message.reactionMessage.senderTimestampMS = int(time.time() * 1000)
    return message


def edit(target: Target, content: str, *, wrapped: bool = True) -> Message:
    """`wrapped`: inside an `editedMessage`, as today's phones send it; older clients send the inner part alone."""
    message = e2e.Message()
    body = message.editedMessage.message if wrapped else message
    change = body.protocolMessage
    change.type = e2e.ProtocolMessage.MESSAGE_EDIT
    target.fill(change.key)
    change.editedMessage.conversation = content
    change.timestampMS = int(time.time() * 1000)
    return message


def revoke(target: Target) -> Message:
    message = e2e.Message()
    change = message.protocolMessage
    change.type = e2e.ProtocolMessage.REVOKE
    target.fill(change.key)
    return message


# --- answers to what a business offered ---


def button_answer(button_id: str, label: str) -> Message:
    message = e2e.Message()
    answer = message.buttonsResponseMessage
    answer.selectedButtonID, answer.selectedDisplayText = button_id, label
    answer.type = e2e.ButtonsResponseMessage.DISPLAY_TEXT
    return message


def template_answer(button_id: str, label: str, index: int = 0) -> Message:
    message = e2e.Message()
    answer = message.templateButtonReplyMessage
    answer.selectedID, answer.selectedDisplayText, answer.selectedIndex = button_id, label, index
    return message


def list_answer(row_id: str, title: str, description: str = "") -> Message:
    message = e2e.Message()
    answer = message.listResponseMessage
    answer.title, answer.description = title, description
    answer.listType = e2e.ListResponseMessage.SINGLE_SELECT
    answer.singleSelectReply.selectedRowID = row_id
    return message


def flow_answer(name: str, words: str, params: str = "{}") -> Message:
    """What interactive messages (native flows) bring back; `params` is JSON."""
    message = e2e.Message()
    answer = message.interactiveResponseMessage
    answer.body.text = words
    answer.nativeFlowResponseMessage.name, answer.nativeFlowResponseMessage.paramsJSON = name, params
    return message


# --- polls ---


def poll(
    question: str, options: Iterable[str], *, choices: int = 1, secret: bytes | None = None, version: int = 3
) -> Message:
    """`choices`: how many options one may pick, 0 for any number. Votes are encrypted with `secret`."""
    message = e2e.Message()
    form = getattr(message, "pollCreationMessage" if version == 1 else f"pollCreationMessageV{version}")
    form.name, form.selectableOptionsCount = question, choices
    for option in options:
        form.options.add().optionName = option
    message.messageContextInfo.messageSecret = secret or os.urandom(SECRET_SIZE)
    return message


def option_hash(option: str) -> bytes:
    return hashlib.sha256(option.encode()).digest()


def vote(poll_target: Target, payload: bytes, iv: bytes) -> Message:
    """A vote that `polls.seal` has encrypted."""
    message = e2e.Message()
    poll_target.fill(message.pollUpdateMessage.pollCreationMessageKey)
    message.pollUpdateMessage.vote.encPayload, message.pollUpdateMessage.vote.encIV = payload, iv
    message.pollUpdateMessage.senderTimestampMS = int(time.time() * 1000)
    return message


# --- what any body may carry besides ---


def context_of(message: Message) -> Any:
    """The context of the message's one content, to be filled in. A plain text becomes an extended one."""
    if message.conversation:
        message.extendedTextMessage.text = message.conversation
        message.ClearField("conversation")
    for field, value in message.ListFields():
        if field.message_type is not None and "contextInfo" in field.message_type.fields_by_name:
            return value.contextInfo
    raise ValueError("this kind of message has no context")


def quoting(message: Message, quoted_id: str, author: JID, original: Message) -> Message:
    context = context_of(message)
    context.stanzaID, context.participant = quoted_id, str(author.bare)
    context.quotedMessage.CopyFrom(original)
    context.quotedMessage.ClearField("messageContextInfo")
    return message


def quote(content: str, quoted_id: str, author: JID, original: Message) -> Message:
    return quoting(text(content), quoted_id, author, original)


def forwarded(message: Message, score: int = 1) -> Message:
    """`score`: how many times it was passed on; from 5 the apps say "many times"."""
    context = context_of(message)
    context.isForwarded, context.forwardingScore = True, score
    return message


def from_ad(
    message: Message,
    *,
    source_id: str,
    title: str,
    body: str = "",
    url: str = "https://fb.me/sandbox",
    click_id: str = "",
) -> Message:
    """The first message of somebody who tapped an ad that leads to WhatsApp."""
    context = context_of(message)
    ad = context.externalAdReply
    ad.sourceType, ad.sourceID, ad.sourceURL, ad.title, ad.body = "ad", source_id, url, title, body
    ad.ctwaClid, ad.showAdAttribution, ad.sourceApp = click_id, True, "facebook"
    ad.mediaType = e2e.ContextInfo.ExternalAdReplyInfo.IMAGE
    context.conversionSource, context.entryPointConversionSource = "FB_Ads", "ctwa_ad"
    context.entryPointConversionApp = "facebook"
    return message


def ephemeral(message: Message, seconds: int = 86_400) -> Message:
    """As sent in a chat with disappearing messages."""
    context_of(message).expiration = seconds
    wrapped = e2e.Message()
    wrapped.ephemeralMessage.message.CopyFrom(message)
    if message.HasField("messageContextInfo"):
        wrapped.messageContextInfo.CopyFrom(message.messageContextInfo)
        wrapped.ephemeralMessage.message.ClearField("messageContextInfo")
    return wrapped


def view_once(message: Message) -> Message:
    """A picture, video or voice note that may be looked at once."""
    wrapped = e2e.Message()
    inner = wrapped.viewOnceMessageV2.message
    if message.HasField("audioMessage"):
        inner = wrapped.viewOnceMessageV2Extension.message
    inner.CopyFrom(message)
    for field in ("imageMessage", "videoMessage", "audioMessage"):
        if inner.HasField(field):
            getattr(inner, field).viewOnce = True
            return wrapped
    raise ValueError("only a picture, a video or a voice note can be seen once")


# --- between a phone and its own linked devices ---


def device_sent(chat: JID, message: Message) -> Message:
    """What a phone tells its own linked devices about a message that it sent."""
    wrapped = e2e.Message()
    wrapped.deviceSentMessage.destinationJID = str(chat)
    wrapped.deviceSentMessage.message.CopyFrom(message)
    if message.HasField("messageContextInfo"):
        wrapped.messageContextInfo.CopyFrom(message.messageContextInfo)
    return wrapped
