"""The media of a stored message: where WhatsApp keeps it, and what the child's answer about it means. Pure.

Reads `raw_payload` as `convert` made it: events of the child, Baileys objects, and history.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from core.channel import StoredMedia
from core.errors import ChannelError, MediaExpired, NotSentError, RefusedError, ThrottledError
from gateway.whatsapp import content
from gateway.whatsapp.downloads import KINDS, path_of
from gateway.whatsapp.values import Json, bytes_of, field, obj, text_of

LIMIT = 128 << 20
"""Bytes; the same as the media worker's own."""


def request(message: StoredMedia) -> Json:
    """What the child is asked to download. Raises RefusedError when the message names nothing to download."""
    raw = message.raw_payload
    body, _ = content.unwrap(obj(field(raw, "message")))
    for name in KINDS:
        part = field(body, name)
        if isinstance(part, dict):
            return {
                "kind": name,
                "path": path_of(text_of(field(part, "directPath")), text_of(field(part, "url"))),
                "key": _base64(field(part, "mediaKey")),
                "enc_sha256": _base64(field(part, "fileEncSha256")),
                "sha256": _base64(field(part, "fileSha256")),
            }
    raise RefusedError("The stored message carries no media that could be downloaded.", code="media_missing")


def outcome(reply: Any) -> ChannelError | None:
    """What the child's answer means for whoever asked; None when the file is whole."""
    found = obj(reply)
    detail = str(found.get("detail") or "it broke off")
    match found.get("result"):
        case "stored":
            return None
        case "gone":
            return MediaExpired(
                f"{detail[:1].upper()}{detail[1:]}, and the client library cannot ask the phone to bring it again: "
                "ask the sender to send it once more, or save it on the phone.",
            )
        case "broken":
            return RefusedError(f"The media cannot be had: {detail}.", code="media_broken")
        case _:
            after = found.get("after")
            if isinstance(after, (int, float)) and after > 0:
                return ThrottledError(f"The media cannot be had yet: {detail}.", retry_after=float(after))
            return NotSentError(f"The media cannot be had yet: {detail}.", code="media_later")


def _base64(value: Any) -> str | None:
    found = bytes_of(value)
    return b64encode(found).decode() if found else None
