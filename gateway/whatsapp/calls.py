"""Calls: what a person reads of them, and the text that follows one that was declined. Pure.

A call is one message of type `unsupported`: while it rings a placeholder ("Incoming voice call"), which its end fills.
What a call is about is lost to us; that it happened is not.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from core.channel import Converted, InboundMessage, MessageType, SessionContext
from gateway.whatsapp.people import Party
from gateway.whatsapp.settings import SessionSettings
from gateway.whatsapp.values import Json, clean, decimal_of, message_id, milliseconds, obj

PURPOSE = "call_text"
AT_MOST_EVERY = timedelta(hours=24)
FRESH_SECONDS = 60.0
"""A call that began longer ago rings no more: nothing to decline."""


def convert_call(
    entry: Json, data: Json, context: SessionContext, author: Party | None, policy: str
) -> Converted:
    """One part of a call. `policy`: the session's `call_policy`. Raises ValueError when it names nobody."""
    part, meta = str(entry.get("part")), obj(data.get("basicCallMeta"))
    identifier = message_id(meta.get("callID"))
    if author is None or identifier is None:
        raise ValueError("the call names no caller or no id")
    outcome = _outcome(part, data, declined=policy == "decline")
    video = entry.get("video")
    kind = "call" if not isinstance(video, bool) else "video call" if video else "voice call"
    if data.get("type") == "group":
        kind = f"group {kind}"
    message = InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=identifier,
        person=author.person(),
        message_type=MessageType.UNSUPPORTED,
        content=_words(outcome, kind),
        channel_timestamp=milliseconds(meta.get("timestamp")),
        sender_identifier=author.address,
        media_metadata={"call": outcome, "video": video is True},
        raw_payload={"call": {"outcome": outcome, "video": video is True}, **clean(data)},
        placeholder=outcome == "ringing",
        arrived_at=decimal_of(entry.get("at")) or time.time(),
    )
    return Converted(messages=(message,))


def text_after(entry: Json, data: Json, settings: SessionSettings, now: float) -> str | None:
    """What the caller is written after this part of a call, if anything."""
    if entry.get("part") != "offer" or settings.call_policy != "decline":
        return None
    began = milliseconds(obj(data.get("basicCallMeta")).get("timestamp"))
    # A text about a call of yesterday would only confuse.
    return settings.call_text if began is not None and now - began / 1000 < 3600 else None


def rings(at: Any, now: float) -> bool:
    began = milliseconds(at)
    return began is not None and now - began / 1000 < FRESH_SECONDS


def _outcome(part: str, data: Json, *, declined: bool) -> str:
    if part in ("offer", "offer_notice"):
        return "declined" if declined and part == "offer" else "ringing"
    reason = str(data.get("reason") or "")
    if part == "accept" or reason.startswith("accept"):
        return "answered"
    return "rejected" if reason.startswith("reject") else "missed"


def _words(outcome: str, kind: str) -> str:
    match outcome:
        case "ringing":
            return f"Incoming {kind}"
        case "declined":
            return f"{kind.capitalize()}, declined automatically"
        case "answered":
            return f"{kind.capitalize()}, answered on the phone"
        case "rejected":
            return f"{kind.capitalize()}, declined on the phone"
        case _:
            return f"Missed {kind}"
