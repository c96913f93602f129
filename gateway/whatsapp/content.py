"""What a WhatsApp message says: its type, text, quote and media description, from the JSON of WhatsApp's own protobuf.

Pure. Reads both spellings of that JSON: neonize's (`stanzaID`, `URL`) and Baileys' (`stanzaId`, `url`). Never raises on
a message it does not know: that one is `unsupported`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from core.channel import MessageType
from gateway.whatsapp.values import (
    Json,
    bytes_of,
    decimal_of,
    digest_of,
    field,
    items,
    message_id,
    name_of,
    number_of,
    obj,
    text_of,
)


@dataclass(frozen=True, slots=True)
class Content:
    message_type: MessageType
    content: str | None = None
    reply_to: str | None = None
    media: Json | None = None


_WRAPPERS = (
    "deviceSentMessage",
    "ephemeralMessage",
    "viewOnceMessage",
    "viewOnceMessageV2",
    "viewOnceMessageV2Extension",
    "documentWithCaptionMessage",
    "editedMessage",
    "groupMentionedMessage",
    "botInvokeMessage",
    "associatedChildMessage",
    "lottieStickerMessage",
)
_ENVELOPES = {name.lower(): name for name in _WRAPPERS}
_MAX_WRAPPERS = 8

_MEDIA = {
    "imageMessage": MessageType.IMAGE,
    "videoMessage": MessageType.VIDEO,
    "ptvMessage": MessageType.VIDEO,
    "audioMessage": MessageType.AUDIO,
    "documentMessage": MessageType.DOCUMENT,
    "stickerMessage": MessageType.STICKER,
}

# Messages whose words are worth reading although they are more than text: where the words stand.
_WORDS = {
    "buttonsResponseMessage": ("selectedDisplayText", "selectedButtonID"),
    "listResponseMessage": ("title", "description"),
    "templateButtonReplyMessage": ("selectedDisplayText", "selectedID"),
    "interactiveResponseMessage": ("body.text",),
    "buttonsMessage": ("contentText",),
    "listMessage": ("description", "title"),
    "interactiveMessage": ("body.text",),
    "templateMessage": (
        "hydratedTemplate.hydratedContentText",
        "hydratedFourRowTemplate.hydratedContentText",
    ),
}

POLLS = ("pollCreationMessage", "pollCreationMessageV2", "pollCreationMessageV3", "pollCreationMessageV5")

_NOT_FOR_PEOPLE = frozenset(
    {
        "senderkeydistributionmessage",
        "fastratchetkeysenderkeydistributionmessage",
        "messagecontextinfo",
        "albummessage",  # a folder for pictures that come by themselves
        "pininchatmessage",
        "keepinchatmessage",
        "encreactionmessage",
        "messagehistorynotice",
        "messagehistorybundle",
    }
)

_REVOKE, _EDIT = (0, "REVOKE", "0"), (14, "MESSAGE_EDIT", "14")


def read(message: Any) -> Content | None:
    """What it says, or None when it is not meant for a person's eyes (keys, settings, sync)."""
    body, once = unwrap(obj(message))
    content = _read(body)
    if content is not None and once and content.media is not None:
        content = replace(content, media={**content.media, "view_once": True})
    return content


def unwrap(message: Json) -> tuple[Json, bool]:
    """The message inside its envelopes, and whether one of them was "view once"."""
    once = False
    for _ in range(_MAX_WRAPPERS):
        # By what is there, not by what might be: most messages have no envelope at all.
        present = {str(name).lower() for name in message}
        for low, name in _ENVELOPES.items():
            if low not in present:
                continue
            inner = field(obj(field(message, name)), "message")
            if isinstance(inner, dict) and inner:
                once = once or name.startswith("viewOnce")
                message = inner
                break
        else:
            break
    return message, once


def vote(message: Any, opened: Json) -> Content | None:
    """A vote that could be opened (see `polls.py`): which options were chosen, in words."""
    body, _ = unwrap(obj(message))
    part = field(body, "pollUpdateMessage")
    if not isinstance(part, dict):
        return read(message)
    chosen = [option for option in items(opened.get("options")) if isinstance(option, str)]
    unknown = number_of(opened.get("unknown")) or 0
    words = ", ".join(chosen + ([f"{unknown} option{'s'[: unknown > 1]}"] if unknown else []))
    target = _target(part, "pollCreationMessageKey")
    media = {"vote": True, "chosen": chosen, "question": text_of(opened.get("question"))}
    return Content(MessageType.POLL, f"Voted: {words}" if words else "Took the vote back", target, media)


_REFERRAL = {
    "source_url": "sourceUrl",
    "source_id": "sourceId",
    "source_type": "sourceType",
    "headline": "title",
    "body": "body",
    "ref": "ref",
    "ctwa_clid": "ctwaClid",
    "app": "sourceApp",
}
"""The Cloud API's names for where an ad's click came from, and WhatsApp's own."""


def marks(message: Any) -> Json:
    """What is worth finding in `raw_payload` without knowing WhatsApp: the ad it came from, that it was forwarded."""
    body, _ = unwrap(obj(message))
    found: Json = {}
    for part in body.values():
        context = obj(field(part, "contextInfo")) if isinstance(part, dict) else {}
        if not context:
            continue
        ad = obj(field(context, "externalAdReply"))
        referral = {name: text_of(field(ad, key)) for name, key in _REFERRAL.items()}
        referral["entry_point"] = text_of(field(context, "entryPointConversionSource"))
        if any(referral[name] for name in ("source_id", "ctwa_clid", "entry_point")):
            found["referral"] = {name: value for name, value in referral.items() if value}
        if field(context, "isForwarded") is True:
            found["forwarded"] = max(1, number_of(field(context, "forwardingScore")) or 1)
    return found


def secret(message: Any) -> str | None:
    """Hex of the message's secret, which marks what our own queue sent."""
    outer = obj(message)
    for candidate in (outer, unwrap(outer)[0]):
        found = bytes_of(field(obj(field(candidate, "messageContextInfo")), "messageSecret"))
        if found:
            return found.hex()
    return None


def _read(body: Json) -> Content | None:
    words = text_of(field(body, "conversation"))
    if words is not None:
        return Content(MessageType.TEXT, words)
    extended = field(body, "extendedTextMessage")
    if isinstance(extended, dict):
        return Content(MessageType.TEXT, text_of(field(extended, "text")), _quoted(extended))
    for name, kind in _MEDIA.items():
        found = field(body, name)
        if isinstance(found, dict):
            return _media(name, kind, found)
    for reader in (_place, _contacts, _poll, _reaction, _words):
        content = reader(body)
        if content is not None:
            return content
    protocol = field(body, "protocolMessage")
    if isinstance(protocol, dict):
        return _protocol(protocol)
    if (
        body
        and all(str(name).lower() in _NOT_FOR_PEOPLE for name in body)
        and body.keys() - {"messageContextInfo"}
    ):
        return None
    quoted = next((q for value in body.values() if isinstance(value, dict) and (q := _quoted(value))), None)
    return Content(MessageType.UNSUPPORTED, None, quoted)


def _quoted(part: Json) -> str | None:
    return message_id(field(obj(field(part, "contextInfo")), "stanzaId"))


def _media(name: str, kind: MessageType, part: Json) -> Content:
    caption = text_of(field(part, "caption"))
    media = {
        "state": "pending",
        "filename": name_of(field(part, "fileName")) or name_of(field(part, "title")),
        "mime_type": name_of(field(part, "mimetype")),
        "size": number_of(field(part, "fileLength")),
        "sha256": digest_of(field(part, "fileSha256")),
        "caption": caption,
        "width": number_of(field(part, "width")),
        "height": number_of(field(part, "height")),
        "duration": number_of(field(part, "seconds")),
        "pages": number_of(field(part, "pageCount")),
        "voice": True if field(part, "ptt") is True else None,
        "round": True if name == "ptvMessage" else None,
        "animated": True if field(part, "isAnimated") is True or field(part, "gifPlayback") is True else None,
        "view_once": True if field(part, "viewOnce") is True else None,
    }
    return Content(kind, caption, _quoted(part), {k: v for k, v in media.items() if v is not None})


def _place(body: Json) -> Content | None:
    for name in ("locationMessage", "liveLocationMessage"):
        part = field(body, name)
        if not isinstance(part, dict):
            continue
        title, address = name_of(field(part, "name")), text_of(field(part, "address"))
        place = {
            "latitude": decimal_of(field(part, "degreesLatitude")),
            "longitude": decimal_of(field(part, "degreesLongitude")),
            "name": title,
            "address": address,
            "url": text_of(field(part, "url")),
            "live": True if name == "liveLocationMessage" or field(part, "isLive") is True else None,
        }
        words = text_of(field(part, "caption")) or text_of(field(part, "comment"))
        shown = words or ", ".join(filter(None, (title, address))) or None
        return Content(
            MessageType.LOCATION, shown, _quoted(part), {k: v for k, v in place.items() if v is not None}
        )
    return None


def _contacts(body: Json) -> Content | None:
    one, many = field(body, "contactMessage"), field(body, "contactsArrayMessage")
    part = one if isinstance(one, dict) else many
    if not isinstance(part, dict):
        return None
    cards = [part] if part is one else [obj(card) for card in items(field(part, "contacts"))]
    contacts = [
        {"name": name_of(field(card, "displayName")), **_vcard(text_of(field(card, "vcard")))}
        for card in cards[:100]
    ]
    names = ", ".join(c["name"] for c in contacts if c["name"])
    return Content(MessageType.CONTACT, names or None, _quoted(part), {"contacts": contacts})


def _vcard(card: str | None) -> Json:
    """Phones and addresses of a vCard, as they stand there."""
    phones: list[str] = []
    emails: list[str] = []
    for line in (card or "").splitlines()[:200]:
        name, colon, value = line.partition(":")
        kind = name.split(";")[0].rpartition(".")[2].upper()
        if colon and value.strip() and kind in ("TEL", "EMAIL"):
            (phones if kind == "TEL" else emails).append(value.strip()[:200])
    return {"phones": phones, "emails": emails}


def _poll(body: Json) -> Content | None:
    for name in POLLS:
        part = field(body, name)
        if isinstance(part, dict):
            options = [
                name_of(field(obj(option), "optionName")) for option in items(field(part, "options"))[:50]
            ]
            poll = {
                "options": [option for option in options if option],
                "selectable": number_of(field(part, "selectableOptionsCount")) or 0,
            }
            return Content(MessageType.POLL, text_of(field(part, "name")), _quoted(part), poll)
    vote = field(body, "pollUpdateMessage")
    if isinstance(vote, dict):  # the vote itself is encrypted with the poll's secret: see `vote`
        return Content(
            MessageType.UNSUPPORTED,
            "Voted in a poll (the vote could not be read)",
            _target(vote, "pollCreationMessageKey"),
        )
    return None


def _reaction(body: Json) -> Content | None:
    part = field(body, "reactionMessage")
    if not isinstance(part, dict):
        return None
    # An empty text takes the reaction back.
    return Content(MessageType.REACTION, text_of(field(part, "text")), _target(part, "key"))


def _words(body: Json) -> Content | None:
    for name, paths in _WORDS.items():
        part = field(body, name)
        if not isinstance(part, dict):
            continue
        for path in paths:
            value: Any = part
            for step in path.split("."):
                value = field(obj(value), step)
            if words := text_of(value):
                return Content(MessageType.TEXT, words, _quoted(part))
        return Content(MessageType.UNSUPPORTED, None, _quoted(part))
    return None


def _protocol(part: Json) -> Content | None:
    kind, target = field(part, "type"), _target(part, "key")
    if kind in _REVOKE or (kind is None and target):
        return Content(MessageType.DELETED, None, target)
    if kind in _EDIT:
        inner = read(field(part, "editedMessage"))
        return Content(MessageType.EDITED, inner.content if inner else None, target)
    return None


def _target(part: Json, name: str) -> str | None:
    return message_id(field(obj(field(part, name)), "id"))
