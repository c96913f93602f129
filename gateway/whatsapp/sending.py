"""Where a send goes, what it quotes, and what whatsmeow's error texts mean for it. Pure; bodies are made in `outgoing`."""

from __future__ import annotations

from typing import Any

from core.channel import Quoted
from core.errors import ChannelError, Invalid, NotSentError, RefusedError, ThrottledError
from core.identity import address_of, channel_of, checked
from gateway.whatsapp import content
from gateway.whatsapp.store import Device
from gateway.whatsapp.values import Json, obj

REACHOUT_WAIT = 6 * 3600.0
"""Seconds until first contacts are tried again after WhatsApp refused one."""
LINK_WAIT = 2.0


def jid_of(recipient: str) -> str:
    """`whatsapp:+60…` → `60…@s.whatsapp.net`; a LID and a group as they are. Raises RefusedError."""
    try:
        if channel_of(recipient) != "whatsapp":
            raise Invalid("another channel's address")
        address = address_of(checked(recipient))
    except Invalid:
        raise RefusedError(
            "The recipient is not a WhatsApp address; write it like +60123456789.", code="invalid_recipient"
        ) from None
    if "@" in address:
        return address
    return f"{address.lstrip('+')}@s.whatsapp.net"


def quote(quoted: Quoted, device: Device | None) -> Json:
    """What a reply carries of the message it answers: its id, its author, and what it said."""
    return {
        "stanzaID": quoted.channel_message_id,
        "participant": author(quoted, device),
        "quotedMessage": _quoted_body(quoted),
    }


def author(quoted: Quoted, device: Device | None) -> str:
    """Who wrote it, in the form the chat is addressed by where that is known; empty when nothing is."""
    if quoted.from_me:
        return device.phone if device else ""
    # The form the chat is addressed by, where the original still says it; else the phone.
    sender = obj(obj(obj(quoted.raw_payload.get("Info")).get("MessageSource")).get("Sender"))
    if sender.get("User") and sender.get("Server"):
        return f"{sender['User']}@{sender['Server']}"
    address = quoted.sender_identifier or ""
    return address if "@" in address or not address else f"{address.lstrip('+')}@s.whatsapp.net"


def _quoted_body(quoted: Quoted) -> Json:
    # Only neonize's own spelling can go back into the protobuf as it is; anything else is quoted by its text.
    body = obj(quoted.raw_payload.get("Message"))
    inner, _ = content.unwrap(body)
    if inner and "Info" in quoted.raw_payload:
        return {k: _without_quote(v) for k, v in inner.items() if k != "messageContextInfo"}
    return {"conversation": quoted.content or ""}


def _without_quote(part: Any) -> Any:
    """WhatsApp quotes one level deep."""
    return {k: v for k, v in part.items() if k != "contextInfo"} if isinstance(part, dict) else part


def refusal(text: str) -> ChannelError | None:
    """What whatsmeow's error says about a send; None when it proves nothing either way."""
    low = text.lower()
    if "no lid found" in low:
        return RefusedError("This number is not on WhatsApp.", code="not_on_whatsapp")
    if "server returned error 463" in low:
        return ThrottledError(
            "WhatsApp lets this number write to no more new people for now; replies go on.",
            retry_after=REACHOUT_WAIT,
            first_contacts_only=True,
            code="reachout_limit",
            action="Wait, and let customers write first.",
        )
    if "server returned error 475" in low:
        return ThrottledError(
            "WhatsApp has capped this number's messages to new people.",
            retry_after=REACHOUT_WAIT,
            first_contacts_only=True,
            code="reachout_capped",
            action="Check the number's standing in WhatsApp, and let customers write first.",
        )
    if "websocket not connected" in low or "not logged in" in low:
        return not_connected()
    if "server returned error" in low:
        return NotSentError(
            f"WhatsApp refused the message: {low.partition('server returned ')[2]}.", code="refused"
        )
    if low.startswith("invalid message"):
        return RefusedError(f"The message cannot be built: {text}", code="invalid_message")
    return None


def not_connected() -> ThrottledError:
    """Not sent, and not the message's fault: it costs no attempt."""
    return ThrottledError(
        "The session is not connected to WhatsApp at this moment; it reconnects by itself.",
        retry_after=LINK_WAIT,
        code="websocket_not_connected",
    )
