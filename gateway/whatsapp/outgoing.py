"""An outbound message of any type as the JSON of WhatsApp's protobuf. Pure: files are uploaded between `draft` and `finish`.

`draft` refuses whatever WhatsApp could never take, so nothing is uploaded, written down or sent for it.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from core import payloads
from core.channel import LocalFile, MessageType, OutboundMessage, Quoted
from core.errors import Invalid, RefusedError
from gateway.whatsapp import vcard
from gateway.whatsapp.sending import author, quote
from gateway.whatsapp.store import Device
from gateway.whatsapp.values import Json

MAX_TEXT = 65_536
"""Characters WhatsApp takes in one message."""
MAX_CAPTION = 4096
MAX_STICKER = 1 << 20
OPUS = "audio/ogg; codecs=opus"
"""Phones play a voice note only under this very name."""

UploadKind = Literal["image", "video", "audio", "document"]


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that must be on WhatsApp's media server first."""

    file: LocalFile
    kind: UploadKind
    preview: bool = False
    """Make a small picture of it."""
    sticker: bool = False
    """Make a WebP of it if it is another kind of picture."""
    duration: bool = False
    """Find out how long it plays."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One content of WhatsApp's `Message`: its field, its parts, and the file that it still needs."""

    name: str
    part: Json
    upload: Upload | None = None
    wrapper: str | None = None


def draft(message: OutboundMessage, to: str, device: Device | None) -> Draft:
    """What will be sent to the chat `to` (a JID). Raises RefusedError that names the field."""
    try:
        payload = payloads.read(message.message_type, message.payload, message.content)
    except payloads.BadPayload as bad:
        raise RefusedError(bad.detail, code=bad.code) from None
    kind = message.message_type
    if kind in _ABOUT:
        return _ABOUT[kind](message, payload, to, device)
    if kind not in _PLAIN:
        raise RefusedError(f"WhatsApp has no messages of type {kind}.", code="unsupported_type")
    made = _PLAIN[kind](message, payload)
    if message.quoted is not None:
        made.part["contextInfo"] = quote(message.quoted, device)
    return made


def finish(draft: Draft, secret: bytes, uploaded: Json | None = None) -> Json:
    """The whole message, marked with the attempt's secret (which is also what votes on a poll are encrypted with)."""
    part = draft.part
    if uploaded:
        # What the caller said of a file wins over what was found out about it.
        part = {**uploaded, **part}
    body: Json = {draft.name: part}
    if draft.wrapper is not None:
        body = {draft.wrapper: {"message": body}}
    return {**body, "messageContextInfo": {"messageSecret": b64encode(secret).decode()}}


# --- words ---


def _text(message: OutboundMessage, payload: payloads.Text) -> Draft:
    text = _words(message.content)
    part: Json = {"text": text}
    preview = payload.link_preview
    if preview is not None:
        if preview.url not in text:
            raise RefusedError(
                "payload.link_preview.url: must stand in the text as it is given here.",
                code="invalid_payload",
            )
        part |= {"matchedText": preview.url, "title": preview.title, "previewType": "NONE"}
        if preview.description:
            part["description"] = preview.description
    return Draft("extendedTextMessage", part)


def _words(content: str | None) -> str:
    text = (content or "").replace("\x00", "")
    if not text.strip():
        raise RefusedError("The message has no text.", code="empty")
    if len(text) > MAX_TEXT:
        raise RefusedError(
            f"The text has {len(text)} characters; WhatsApp takes {MAX_TEXT}. Split it.", code="too_long"
        )
    return text


# --- files ---

_ACCEPTED: dict[MessageType, tuple[dict[str, str], str]] = {
    MessageType.IMAGE: (
        {t: t for t in ("image/jpeg", "image/png", "image/webp")},
        "JPEG, PNG or WebP",
    ),
    MessageType.VIDEO: (
        {
            "video/mp4": "video/mp4",
            "video/x-m4v": "video/mp4",
            "video/quicktime": "video/mp4",
            "video/3gpp": "video/3gpp",
        },
        "MP4 or 3GP",
    ),
    MessageType.AUDIO: (
        {t: t for t in ("audio/mpeg", "audio/mp4", "audio/aac", "audio/amr", "audio/3gpp")}
        | {"audio/ogg": OPUS},
        "MP3, M4A, AAC, AMR or Ogg Opus",
    ),
    MessageType.STICKER: (
        dict.fromkeys(("image/webp", "image/png", "image/jpeg"), "image/webp"),
        "WebP, PNG or JPEG",
    ),
}
"""Under which name WhatsApp takes a file of which type, and how to say so. Documents may be anything."""


def _file(message: OutboundMessage) -> tuple[LocalFile, str]:
    """The file and the type it goes out as. Raises RefusedError."""
    file = message.media
    if file is None:
        raise RefusedError(
            f"media_url: a message of type {message.message_type} needs a file.", code="invalid_payload"
        )
    accepted = _ACCEPTED.get(message.message_type)
    if accepted is None:
        return file, file.mime_type
    types, words = accepted
    if file.mime_type not in types:
        raise RefusedError(
            f"WhatsApp does not take {file.mime_type} as {message.message_type}; convert it to {words}, "
            "or send it as a document.",
            code="media_wrong_type",
        )
    return file, types[file.mime_type]


def _caption(message: OutboundMessage) -> Json:
    text = (message.content or "").replace("\x00", "")
    if len(text) > MAX_CAPTION:
        raise RefusedError(
            f"The caption has {len(text)} characters; WhatsApp takes {MAX_CAPTION}. Send the rest as a text.",
            code="too_long",
        )
    return {"caption": text} if text.strip() else {}


def _image(message: OutboundMessage, _payload: payloads.Plain) -> Draft:
    file, mime_type = _file(message)
    part = {"mimetype": mime_type, **_size(file), **_caption(message)}
    return Draft("imageMessage", part, Upload(file, "image", preview=True))


def _video(message: OutboundMessage, payload: payloads.Film) -> Draft:
    file, mime_type = _file(message)
    part = {"mimetype": mime_type, **_size(file), **_caption(message)}
    if payload.gif:
        part["gifPlayback"] = True
    if payload.duration is not None:
        part["seconds"] = payload.duration
    return Draft("videoMessage", part, Upload(file, "video", duration=True))


def _audio(message: OutboundMessage, payload: payloads.Sound) -> Draft:
    file, mime_type = _file(message)
    voice = mime_type == OPUS if payload.voice is None else payload.voice
    if voice and mime_type != OPUS:
        raise RefusedError(
            f"payload.voice: a voice note must be Ogg Opus, this is {file.mime_type}; "
            "convert it (ffmpeg -c:a libopus) or leave `voice` out.",
            code="invalid_payload",
        )
    part: Json = {"mimetype": mime_type}
    if voice:
        part["PTT"] = True
    if payload.duration is not None:
        part["seconds"] = payload.duration
    if message.content and message.content.strip():
        raise RefusedError(
            "content: WhatsApp shows no caption under audio; send it as a text of its own.",
            code="invalid_payload",
        )
    return Draft("audioMessage", part, Upload(file, "audio", duration=True))


def _document(message: OutboundMessage, _payload: payloads.Plain) -> Draft:
    file, mime_type = _file(message)
    caption = _caption(message)
    part = {"mimetype": mime_type, "fileName": file.filename, "title": file.filename, **caption}
    # Phones show a document's words only inside this envelope.
    wrapper = "documentWithCaptionMessage" if caption else None
    return Draft("documentMessage", part, Upload(file, "document"), wrapper)


def _sticker(message: OutboundMessage, _payload: payloads.Plain) -> Draft:
    file, mime_type = _file(message)
    if file.size > MAX_STICKER:
        raise RefusedError(
            f"A sticker may have {MAX_STICKER >> 10} KiB, this has {file.size >> 10}; make it smaller.",
            code="media_too_large",
        )
    return Draft("stickerMessage", {"mimetype": mime_type}, Upload(file, "image", sticker=True))


def _size(file: LocalFile) -> Json:
    return {"width": file.width, "height": file.height} if file.width and file.height else {}


# --- things ---


def _location(message: OutboundMessage, payload: payloads.Location) -> Draft:
    part: Json = {"degreesLatitude": payload.latitude, "degreesLongitude": payload.longitude}
    part |= {k: v for k, v in (("name", payload.name), ("address", payload.address)) if v}
    if message.content and message.content.strip():
        part["comment"] = _words(message.content)
    return Draft("locationMessage", part)


def _contact(_message: OutboundMessage, payload: payloads.Contact) -> Draft:
    try:
        card = vcard.write(payload.name, payload.phones, payload.emails)
    except Invalid as error:
        raise RefusedError(error.detail, code="invalid_payload") from None
    return Draft("contactMessage", {"displayName": payload.name, "vcard": card})


def _poll(_message: OutboundMessage, payload: payloads.Poll) -> Draft:
    part: Json = {
        "name": payload.question,
        "options": [{"optionName": option} for option in payload.options],
        "selectableOptionsCount": payload.selectable,
    }
    # The first form of a poll: the only one whatsmeow marks as a poll on its envelope.
    return Draft("pollCreationMessage", part)


# --- about another message ---


def _reaction(message: OutboundMessage, payload: payloads.Reaction, to: str, device: Device | None) -> Draft:
    part: Json = {
        "key": _key(_target(message), to, device),
        "text": payload.emoji,
        "senderTimestampMS": str(int(time.time() * 1000)),
    }
    return Draft("reactionMessage", part)


def _edited(message: OutboundMessage, _payload: payloads.Plain, to: str, device: Device | None) -> Draft:
    change: Json = {
        "type": "MESSAGE_EDIT",
        "key": _key(_own(message), to, device),
        "editedMessage": {"conversation": _words(message.content)},
        "timestampMS": str(int(time.time() * 1000)),
    }
    return Draft("protocolMessage", change, wrapper="editedMessage")


def _deleted(message: OutboundMessage, _payload: payloads.Plain, to: str, device: Device | None) -> Draft:
    return Draft("protocolMessage", {"type": "REVOKE", "key": _key(_own(message), to, device)})


def _target(message: OutboundMessage) -> Quoted:
    if message.quoted is None:
        raise RefusedError(
            f"reply_to_message_id: a message of type {message.message_type} needs the message it is about.",
            code="invalid_payload",
        )
    return message.quoted


def _own(message: OutboundMessage) -> Quoted:
    """WhatsApp lets everybody change only what is their own."""
    quoted = _target(message)
    stored = quoted.sender_identifier is not None or bool(quoted.raw_payload)
    if stored and not quoted.from_me:
        raise RefusedError(
            "reply_to_message_id: that message is the other person's; only what this number sent can be "
            f"{message.message_type}.",
            code="invalid_payload",
        )
    # One that is not stored here was sent by this number before the gateway had it.
    return Quoted(quoted.channel_message_id, quoted.sender_identifier, quoted.content, True)


def _key(quoted: Quoted, to: str, device: Device | None) -> Json:
    key: Json = {"remoteJID": to, "fromMe": quoted.from_me, "ID": quoted.channel_message_id}
    if to.endswith("@g.us") and not quoted.from_me and (who := author(quoted, device)):
        key["participant"] = who
    return key


_PLAIN: dict[MessageType, Callable[[OutboundMessage, Any], Draft]] = {
    MessageType.TEXT: _text,
    MessageType.IMAGE: _image,
    MessageType.VIDEO: _video,
    MessageType.AUDIO: _audio,
    MessageType.DOCUMENT: _document,
    MessageType.STICKER: _sticker,
    MessageType.LOCATION: _location,
    MessageType.CONTACT: _contact,
    MessageType.POLL: _poll,
}
_ABOUT: dict[MessageType, Callable[[OutboundMessage, Any, str, Device | None], Draft]] = {
    MessageType.REACTION: _reaction,
    MessageType.EDITED: _edited,
    MessageType.DELETED: _deleted,
}
