"""From a request to the admin API to the body a phone sends. Raises ValueError that says what is missing."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from sandbox.whatsapp import bodies, requests
from sandbox.whatsapp.outbox import To
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.protos import e2e

_MEDIA = {
    "image": "image/jpeg",
    "video": "video/mp4",
    "audio": "audio/mpeg",
    "voice": "audio/ogg; codecs=opus",
    "document": "application/octet-stream",
    "sticker": "image/webp",
}
_ABOUT = ("reaction", "edit", "revoke", "vote")


async def send(phone: Phone, to: To, wanted: requests.Send) -> str:
    """Send what the request describes; the message's id."""
    if wanted.kind in _ABOUT and not wanted.target:
        raise ValueError("`target`: the id of the message it is about")
    if wanted.kind == "vote":
        return await phone.vote(to, wanted.target, wanted.options, mode=wanted.mode)
    body = _body(phone, to, wanted)
    if wanted.quoted is not None:
        body = phone.quote(body, wanted.quoted)
    if wanted.forwarded:
        body = bodies.forwarded(body, wanted.forwarded)
    if wanted.ad is not None:
        body = bodies.from_ad(body, **wanted.ad.model_dump())
    if wanted.view_once:
        body = bodies.view_once(body)
    if wanted.ephemeral:
        body = bodies.ephemeral(body, wanted.ephemeral)
    return await phone.send_message(to, body, mode=wanted.mode, msg_id=wanted.id)


def _body(phone: Phone, to: To, wanted: requests.Send) -> e2e.Message:
    kind = wanted.kind
    if kind in _MEDIA:
        return _media(phone, wanted)
    if kind == "reaction":
        return bodies.reaction(wanted.emoji, phone.target(to, wanted.target))
    if kind == "revoke":
        return bodies.revoke(phone.target(to, wanted.target))
    if kind == "location":
        return bodies.location(wanted.latitude, wanted.longitude, wanted.name, wanted.address)
    if kind == "live_location":
        return bodies.live_location(wanted.latitude, wanted.longitude, wanted.text)
    if kind == "contacts":
        if not wanted.contacts:
            raise ValueError("`contacts` is empty")
        cards = [(card.name, card.phone) for card in wanted.contacts]
        return bodies.contact(*cards[0]) if len(cards) == 1 else bodies.contacts(cards)
    if kind == "poll":
        if not wanted.question or not wanted.options:
            raise ValueError("a poll needs `question` and `options`")
        return bodies.poll(wanted.question, wanted.options, choices=wanted.choices)
    if not wanted.text:
        raise ValueError("`text` is empty")
    if kind == "edit":
        return bodies.edit(phone.target(to, wanted.target), wanted.text)
    if kind == "button":
        return bodies.button_answer(wanted.button or wanted.text, wanted.text)
    if kind == "list":
        return bodies.list_answer(wanted.button or wanted.text, wanted.text)
    return bodies.text(wanted.text)


def _media(phone: Phone, wanted: requests.Send) -> e2e.Message:
    try:
        data = base64.b64decode(wanted.data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"`data` is not base64: {error}") from None
    if not data:
        raise ValueError("`data` is empty")
    kind = wanted.kind
    fields: dict[str, Any] = {"mimetype": wanted.mimetype or _MEDIA[kind]}
    if wanted.text and kind in ("image", "video", "document"):
        fields["caption"] = wanted.text
    if wanted.filename and kind == "document":
        fields["fileName"] = wanted.filename
    if wanted.seconds is not None and kind in ("video", "audio", "voice"):
        fields["seconds"] = wanted.seconds
    if kind == "voice":
        fields["PTT"] = True
    return phone.media_body("audio" if kind == "voice" else kind, data, **fields)
