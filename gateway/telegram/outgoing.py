"""An outbound message of any type as one call of the Bot API. Pure: files are opened by the channel, when the call is made.

`draft` refuses whatever Telegram could never take, so nothing is counted, written down or sent for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from core import payloads
from core.channel import LocalFile, MessageType, OutboundMessage, Quoted
from core.errors import Invalid, RefusedError
from core.identity import channel_of, checked
from gateway.telegram.formatting import markup
from gateway.telegram.settings import SessionSettings
from gateway.telegram.values import Json, clean_text, known, number_of, parse_key

MAX_TEXT = 4096
MAX_CAPTION = 1024
MAX_PHOTO = 10 << 20
MAX_UPLOAD = 50 << 20
MAX_STICKER = 512 << 10


@dataclass(frozen=True, slots=True)
class Draft:
    """One call: its method and parameters, and the file that goes with it under the name `field`."""

    method: str
    params: Json
    file: LocalFile | None = None
    field: str = ""

    @property
    def chat_id(self) -> int:
        return int(self.params["chat_id"])

    def to(self, chat_id: int) -> Draft:
        """The same to another chat. What it answers or is about has another number there, and stays behind."""
        params = {name: value for name, value in self.params.items() if name != "reply_parameters"}
        return replace(self, params={**params, "chat_id": chat_id})


def chat_of(recipient: str) -> int:
    """`telegram:123` → 123. Raises RefusedError."""
    try:
        if channel_of(recipient) != "telegram":
            raise Invalid("another channel's address")
        return int(checked(recipient).removeprefix("telegram:"))
    except Invalid:
        raise RefusedError(
            "The recipient is not a Telegram chat; write it like telegram:123456789 (bots cannot write to @names).",
            code="invalid_recipient",
        ) from None


def draft(message: OutboundMessage, settings: SessionSettings, topic: int | None = None) -> Draft:
    """The call. `topic`: where in the chat, when the chat has topics. Raises RefusedError that names the field."""
    chat_id = chat_of(message.attempt.recipient)
    try:
        payload = payloads.read(message.message_type, message.payload, message.content)
    except payloads.BadPayload as bad:
        raise RefusedError(bad.detail, code=bad.code) from None
    kind = message.message_type
    if kind in _ABOUT:
        made = _ABOUT[kind](message, payload, settings)
        return replace(made, params={"chat_id": chat_id, **made.params})
    if kind not in _PLAIN:
        raise RefusedError(f"Telegram has no messages of type {kind}.", code="unsupported_type")
    made = _PLAIN[kind](message, payload, settings)
    params: Json = {"chat_id": chat_id, **made.params}
    if topic is not None:
        params["message_thread_id"] = topic
    if message.quoted is not None:
        params["reply_parameters"] = _reply(message.quoted, chat_id)
    return replace(made, params=params)


def topic_of(quoted: Quoted | None) -> int | None:
    """The topic the quoted message stands in, as `convert` noted it."""
    return number_of(quoted.raw_payload.get("topic")) if quoted is not None else None


def _reply(quoted: Quoted, chat_id: int) -> Json:
    chat, identifier = _key(quoted)
    # Somebody may have deleted it meanwhile: the answer goes out all the same.
    reply: Json = {"message_id": identifier, "allow_sending_without_reply": True}
    return reply if chat == chat_id else {**reply, "chat_id": chat}


def _key(quoted: Quoted) -> tuple[int, int]:
    found = parse_key(quoted.channel_message_id)
    if found is None:
        raise RefusedError(
            "reply_to_message_id: that message has no id on Telegram (yet); take the channel_message_id of one that has, "
            "like 123456789:42.",
            code="invalid_payload",
        )
    return found


# --- text ---


def _words(
    message: OutboundMessage, settings: SessionSettings, most: int, what: str
) -> tuple[str, list[Json]]:
    """The text and its entities. Raises RefusedError."""
    text = clean_text(message.content or "")
    if len(text) > 4 * most:
        raise _too_long(len(text), most, what)
    given = message.payload.get("entities")
    wish = message.payload.get("format", settings.format)
    if wish not in ("plain", "markup"):
        raise RefusedError("payload.format: must be plain or markup", code="invalid_payload")
    if given is not None:
        entities = _entities(given)
    elif wish == "markup":
        text, entities = markup(text)
    else:
        entities = []
    if len(text) > most:
        raise _too_long(len(text), most, what)
    return text, entities


def _too_long(length: int, most: int, what: str) -> RefusedError:
    return RefusedError(
        f"The {what} has {length} characters; Telegram takes {most}. Send the rest as a message of its own.",
        code="too_long",
    )


_ENTITIES = frozenset(
    {
        "bold", "italic", "underline", "strikethrough", "spoiler", "blockquote", "expandable_blockquote", "code", "pre",
        "text_link", "custom_emoji",
    }
)  # fmt: skip


def _entities(given: Any) -> list[Json]:
    """`payload.entities`, as the Bot API describes them. Raises RefusedError."""
    if not isinstance(given, list) or len(given) > 100:
        raise RefusedError("payload.entities: must be a list of up to 100", code="invalid_payload")
    for number, entity in enumerate(given):
        ok = (
            isinstance(entity, dict)
            and entity.get("type") in _ENTITIES
            and isinstance(entity.get("offset"), int)
            and isinstance(entity.get("length"), int)
            and all(isinstance(value, (str, int)) for value in entity.values())
        )
        if not ok:
            raise RefusedError(
                f"payload.entities.{number}: needs type ({', '.join(sorted(_ENTITIES))}), offset and length in UTF-16 units",
                code="invalid_payload",
            )
    return given


def _text(message: OutboundMessage, payload: payloads.Text, settings: SessionSettings) -> Draft:
    text, entities = _words(message, settings, MAX_TEXT, "text")
    if not text.strip():
        raise RefusedError("content: Telegram takes no empty text.", code="empty_content")
    params: Json = {"text": text}
    if entities:
        params["entities"] = entities
    if payload.link_preview is not None:
        params["link_preview_options"] = {"url": payload.link_preview.url}
    elif not settings.link_previews:
        params["link_preview_options"] = {"is_disabled": True}
    return Draft("sendMessage", params)


# --- files ---

_ACCEPTED: dict[MessageType, tuple[tuple[str, ...], str]] = {
    MessageType.IMAGE: (("image/jpeg", "image/png", "image/webp"), "JPEG, PNG or WebP"),
    MessageType.VIDEO: (("video/mp4", "video/quicktime", "image/gif"), "MP4"),
    MessageType.AUDIO: (
        ("audio/mpeg", "audio/mp4", "audio/x-m4a", "audio/aac", "audio/ogg"),
        "MP3, M4A or Ogg Opus",
    ),
    MessageType.STICKER: (
        ("image/webp", "video/webm", "application/x-tgsticker", "application/gzip"),
        "WebP of 512 × 512, WebM or TGS",
    ),
}


def _file(message: OutboundMessage, most: int = MAX_UPLOAD) -> LocalFile:
    file = message.media
    if file is None:
        raise RefusedError(
            f"media_url: a message of type {message.message_type} needs a file.", code="invalid_payload"
        )
    types, words = _ACCEPTED.get(message.message_type, ((), ""))
    if types and file.mime_type.partition(";")[0] not in types:
        raise RefusedError(
            f"Telegram does not take {file.mime_type} as {message.message_type}; convert it to {words}, "
            "or send it as a document.",
            code="media_wrong_type",
        )
    if file.size > most:
        raise RefusedError(
            f"The file has {file.size / 2**20:.1f} MB; Telegram takes {most / 2**20:g} MB from a bot as "
            f"{message.message_type}.",
            code="media_too_large",
        )
    return file


def _caption(message: OutboundMessage, settings: SessionSettings) -> Json:
    text, entities = _words(message, settings, MAX_CAPTION, "caption")
    if not text.strip():
        return {}
    return {"caption": text, **({"caption_entities": entities} if entities else {})}


def _image(message: OutboundMessage, _payload: Any, settings: SessionSettings) -> Draft:
    return Draft("sendPhoto", _caption(message, settings), _file(message, MAX_PHOTO), "photo")


def _video(message: OutboundMessage, payload: payloads.Film, settings: SessionSettings) -> Draft:
    file = _file(message)
    params = {**_caption(message, settings), **_shape(file), **known({"duration": payload.duration})}
    if payload.gif or file.mime_type == "image/gif":
        return Draft("sendAnimation", params, file, "animation")
    return Draft("sendVideo", {**params, "supports_streaming": True}, file, "video")


def _shape(file: LocalFile) -> Json:
    return {"width": file.width, "height": file.height} if file.width and file.height else {}


def _audio(message: OutboundMessage, payload: payloads.Sound, settings: SessionSettings) -> Draft:
    file = _file(message)
    opus = file.mime_type.startswith("audio/ogg")
    voice = opus if payload.voice is None else payload.voice
    if voice and not opus:
        raise RefusedError(
            f"payload.voice: a voice note must be Ogg Opus, this is {file.mime_type}; "
            "convert it (ffmpeg -c:a libopus) or leave `voice` out.",
            code="invalid_payload",
        )
    params = {**_caption(message, settings), **known({"duration": payload.duration})}
    return Draft("sendVoice", params, file, "voice") if voice else Draft("sendAudio", params, file, "audio")


def _document(message: OutboundMessage, _payload: Any, settings: SessionSettings) -> Draft:
    # Else Telegram turns some files into videos or animations by itself.
    params = {**_caption(message, settings), "disable_content_type_detection": True}
    return Draft("sendDocument", params, _file(message), "document")


def _sticker(message: OutboundMessage, _payload: Any, _settings: SessionSettings) -> Draft:
    _no_words(message, "a sticker")
    return Draft("sendSticker", {}, _file(message, MAX_STICKER), "sticker")


def _no_words(message: OutboundMessage, what: str) -> None:
    if message.content and message.content.strip():
        raise RefusedError(
            f"content: Telegram shows no words under {what}; send them as a text of their own.",
            code="invalid_payload",
        )


# --- things ---


def _location(message: OutboundMessage, payload: payloads.Location, _settings: SessionSettings) -> Draft:
    _no_words(message, "a place")
    point: Json = {"latitude": payload.latitude, "longitude": payload.longitude}
    title, address = payload.name or payload.address, payload.address or payload.name
    if title:
        return Draft("sendVenue", {**point, "title": title, "address": address})
    return Draft("sendLocation", point)


def _contact(message: OutboundMessage, payload: payloads.Contact, _settings: SessionSettings) -> Draft:
    _no_words(message, "a contact")
    if not payload.phones:
        raise RefusedError(
            "payload.phones: Telegram takes no contact without a phone number.", code="invalid_payload"
        )
    first, _, last = payload.name.partition(" ")
    params: Json = {
        "phone_number": payload.phones[0],
        "first_name": first,
        **({"last_name": last} if last else {}),
    }
    if len(payload.phones) > 1 or payload.emails:
        params["vcard"] = _card(payload)
    return Draft("sendContact", params)


def _card(contact: payloads.Contact) -> str:
    def escaped(text: str) -> str:
        for char in "\\,;":
            text = text.replace(char, "\\" + char)
        return text

    lines = ["BEGIN:VCARD", "VERSION:3.0", f"FN:{escaped(contact.name)}"]
    lines += [f"TEL;TYPE=CELL:{escaped(phone)}" for phone in contact.phones]
    lines += [f"EMAIL:{escaped(email)}" for email in contact.emails]
    card = "\n".join([*lines, "END:VCARD"])
    if len(card.encode()) > 2048:
        raise RefusedError(
            "payload: Telegram takes 2 KB of a contact; leave some out.", code="invalid_payload"
        )
    return card


def _poll(message: OutboundMessage, payload: payloads.Poll, _settings: SessionSettings) -> Draft:
    _no_words(message, "a poll")
    params: Json = {
        "question": payload.question,
        "options": [{"text": option} for option in payload.options],
        # Else nobody is told who voted for what.
        "is_anonymous": False,
        "allows_multiple_answers": payload.selectable != 1,
    }
    return Draft("sendPoll", params)


# --- about another message ---


def _target(message: OutboundMessage) -> tuple[int, int]:
    if message.quoted is None:
        raise RefusedError(
            f"reply_to_message_id: a message of type {message.message_type} needs the message it is about.",
            code="invalid_payload",
        )
    chat, identifier = _key(message.quoted)
    if chat != chat_of(message.attempt.recipient):
        raise RefusedError("reply_to_message_id: that message is in another chat.", code="invalid_payload")
    return chat, identifier


def _own(message: OutboundMessage) -> int:
    """Bots change only what is their own."""
    _, identifier = _target(message)
    quoted = message.quoted
    assert quoted is not None
    if (quoted.sender_identifier is not None or quoted.raw_payload) and not quoted.from_me:
        raise RefusedError(
            "reply_to_message_id: that message is the other person's; only what this bot sent can be "
            f"{message.message_type}.",
            code="invalid_payload",
        )
    return identifier


def _reaction(message: OutboundMessage, payload: payloads.Reaction, _settings: SessionSettings) -> Draft:
    reaction = [{"type": "emoji", "emoji": payload.emoji}] if payload.emoji else []
    return Draft("setMessageReaction", {"message_id": _target(message)[1], "reaction": reaction})


def _edited(message: OutboundMessage, _payload: Any, settings: SessionSettings) -> Draft:
    text, entities = _words(message, settings, MAX_TEXT, "text")
    if not text.strip():
        raise RefusedError("content: the new text is missing.", code="empty_content")
    params: Json = {"message_id": _own(message), "text": text, **({"entities": entities} if entities else {})}
    return Draft("editMessageText", params)


def as_caption(edit: Draft) -> Draft:
    """The same edit, of a message whose words stand under a file. Raises RefusedError."""
    if len(edit.params["text"]) > MAX_CAPTION:
        raise _too_long(len(edit.params["text"]), MAX_CAPTION, "caption")
    names = {"text": "caption", "entities": "caption_entities"}
    return Draft("editMessageCaption", {names.get(name, name): value for name, value in edit.params.items()})


def _deleted(message: OutboundMessage, _payload: Any, _settings: SessionSettings) -> Draft:
    return Draft("deleteMessage", {"message_id": _own(message)})


_Maker = Callable[[OutboundMessage, Any, SessionSettings], Draft]
_PLAIN: dict[MessageType, _Maker] = {
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
_ABOUT: dict[MessageType, _Maker] = {
    MessageType.REACTION: _reaction,
    MessageType.EDITED: _edited,
    MessageType.DELETED: _deleted,
}
