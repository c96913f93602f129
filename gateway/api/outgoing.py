"""What `/send` and the outbound routes share: the message they take, the idempotency key, and whether a repeat is one."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import orjson
from asyncpg import Record
from pydantic import AfterValidator, Field

from core import payloads
from core.channel import Json
from core.errors import Invalid
from core.identity import external_id
from core.store import requests as store
from gateway.api.models import MEDIA_TYPES, JsonObject, OutboundType, Text
from gateway.api.problems import Problem, invalid

MAX_KEY = 200


def _fetchable(value: str) -> str:
    if value.startswith("upload:") or (value.startswith("https://") and len(value) > len("https://")):
        return value
    raise ValueError("must be an https:// address or upload:<id>")


MediaUrl = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_fetchable)]
Recipient = Annotated[str, Field(min_length=1, max_length=320)]
ChannelMessageId = Annotated[str, Field(min_length=1, max_length=512)]
DedupeKey = Annotated[str, Field(min_length=1, max_length=MAX_KEY)]


def check_content(
    message_type: OutboundType,
    content: Text | None,
    media_url: str | None,
    payload: JsonObject | None,
    reply_to: str | None,
) -> None:
    """What each type needs; the channel asks once more, for rows that came by SQL. Here the field is named."""
    blank = content is None or not content.strip()
    if message_type in ("text", "edited") and blank and not (payload or {}).get("html"):
        raise invalid("content", f"a message of type {message_type} needs text")
    if message_type in MEDIA_TYPES and not media_url:
        raise invalid("media_url", f"a message of type {message_type} needs a file")
    if message_type in ("location", "contact", "poll") and not payload:
        raise invalid("payload", f"a message of type {message_type} needs it")
    if message_type in ("reaction", "edited", "deleted") and not reply_to:
        raise invalid(
            "reply_to_message_id", f"a message of type {message_type} needs the message it is about"
        )
    payloads.read(message_type, payload, content)


def normal_recipient(channel: str, recipient: str) -> str:
    try:
        return external_id(channel, recipient)
    except Invalid as error:
        raise invalid("recipient", error.detail) from None


def request_hash(*parts: Any) -> str:
    """What a call asks for, so that a repeat with the same key and another body is noticed."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS, default=str)).hexdigest()[:32]


def same_request(row: Record, wanted: str, outgoing: store.Outgoing) -> bool:
    """Rows that SQL put in carry no hash: for those the fields are compared."""
    if row["request_hash"] is not None:
        return bool(row["request_hash"] == wanted)
    return (row["channel_session_id"], row["message_type"], row["content"], row["media_url"]) == (
        outgoing.session_id,
        outgoing.message_type,
        outgoing.content,
        outgoing.media_url,
    )


def other_body() -> Problem:
    return Problem(
        422,
        "idempotency_key_reused",
        "this key was used for another message; give every message a key of its own",
        errors=[{"field": "Idempotency-Key", "detail": "used for another message"}],
    )


def key_from_header(value: str | None) -> str | None:
    if value is None:
        return None
    value = value.strip()
    if not 1 <= len(value) <= MAX_KEY or not value.isprintable() or not value.isascii():
        raise invalid("Idempotency-Key", f"must be 1 to {MAX_KEY} printable ASCII characters")
    return value


def origin(hashed: str) -> Json:
    return {"origin": "api", "request_hash": hashed}
