"""A chat as a phone's screen shows it: messages with their edits, reactions, votes and ticks folded in. Pure, as JSON."""

from __future__ import annotations

import time
from typing import Any

from sandbox.whatsapp import reading
from sandbox.whatsapp.phone import Phone, Received

_SHOWN = 150  # newest messages of a chat
_TYPING_LASTS = 15.0
_TICKS = {"delivery": "delivered", "inactive": "delivered", "read": "read", "played": "read"}
_HIDDEN = ("reaction", "edit", "revoke", "vote", "other")


def messages_with(phone: Phone, chat: str) -> list[Received]:
    """Everything between this phone and a number (or in a group), in order, each message once."""
    every = [m for m in (*phone.received, *phone.written) if m.chat == chat and not m.duplicate]
    return sorted(every, key=lambda m: m.monotonic)


def chat(phone: Phone, other: str, names: dict[str, str]) -> list[dict[str, Any]]:
    """`names`: by number, for who wrote what in a group."""
    shown: dict[str, dict[str, Any]] = {}
    for message in messages_with(phone, other):
        target = shown.get(reading.target_of(message.message))
        kind = message.kind
        if kind not in _HIDDEN:
            shown[message.id] = _bubble(phone, message, names)
        elif target is None:
            continue
        elif kind == "reaction":
            emoji = message.about.get("emoji", "")
            target["reactions"].pop(message.sender, None)
            if emoji:
                target["reactions"][message.sender] = emoji
        elif kind == "edit" and message.sender == target["sender"]:
            target["text"], target["edited"] = message.text, True
        elif kind == "revoke" and message.sender == target["sender"]:
            target["deleted"] = True
    for receipt in phone.receipts:
        ours = shown.get(receipt.id)
        state = _TICKS.get(receipt.kind)
        if ours is not None and state is not None and ours["tick"] not in ("", "read"):
            ours["tick"] = state
    newest = list(shown.values())[-_SHOWN:]
    for bubble in newest:
        quoted = shown.get(bubble["about"].get("quoted", ""))
        bubble["quoted"] = {"sender": quoted["name"], "text": _summary(quoted)} if quoted else None
        bubble["reactions"] = list(bubble["reactions"].values())
        if bubble["kind"] == "poll":
            bubble["votes"] = _votes(phone, bubble)
    return newest


def _votes(phone: Phone, bubble: dict[str, Any]) -> dict[str, list[str]]:
    try:
        return phone.votes(bubble["id"])
    except ValueError:
        return {}


def _bubble(phone: Phone, message: Received, names: dict[str, str]) -> dict[str, Any]:
    found = reading.media_of(message.message)
    by_hand = message.from_me and message.device == phone.account.phone
    return {
        "id": message.id,
        "kind": message.kind,
        "text": message.text,
        "about": message.about,
        "mine": message.from_me,
        "sender": message.sender,
        "name": "You" if message.from_me else names.get(message.sender, message.sender),
        "at": message.at,
        "media": f"/people/{phone.number[1:]}/messages/{message.id}/media" if found else None,
        "tick": "sent" if by_hand else "",
        "read": message.from_me or message.id in phone.seen,
        "reactions": {},
        "edited": False,
        "deleted": False,
    }


def _summary(bubble: dict[str, Any]) -> str:
    return str(bubble["text"] or bubble["about"].get("question") or bubble["kind"])


def overview(phone: Phone, names: dict[str, str]) -> list[dict[str, Any]]:
    """The phone's list of chats, the latest first."""
    chats: dict[str, dict[str, Any]] = {}
    for message in sorted((*phone.received, *phone.written), key=lambda m: m.monotonic):
        if message.duplicate or message.kind == "other":
            continue
        line = chats.setdefault(message.chat, {"chat": message.chat, "unread": 0})
        if message.kind not in _HIDDEN:
            line |= {"text": message.text or message.kind, "at": message.at}
            if not message.from_me and message.id not in phone.seen:
                line["unread"] += 1
    for line in chats.values():
        line["name"] = names.get(line["chat"], line["chat"])
    return sorted(chats.values(), key=lambda line: -float(line.get("at", 0)))


def is_typing(phone: Phone, other: str) -> bool:
    number, state, at = phone.last_typing
    latest = max((m.monotonic for m in phone.received.items[-5:]), default=0.0)
    return number == other and state == "composing" and time.monotonic() - at < _TYPING_LASTS and latest < at
