"""What WhatsApp tells the members of a group about it, as a sentence a person can read. Pure."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from core.channel import Converted, InboundMessage, MessageType, SessionContext
from gateway.whatsapp.people import Party
from gateway.whatsapp.values import Json, clean, field, items, milliseconds, name_of, obj, text_of

SHOWN = 20
"""People named in one sentence."""


def convert_notice(data: Json, context: SessionContext, group: Party | None, actor: Party | None,
                   who: Any, arrived: float) -> Converted:  # fmt: skip
    """`who`: a JID object → how the person is called. Raises ValueError when it names no group."""
    if group is None or group.kind != "group":
        raise ValueError("the notice names no group")
    joined = obj(data.get("GroupInfo"))
    title = name_of(field(obj(field(joined or data, "GroupName") or data.get("Name")), "Name"))
    words = (
        [f"This number was added to the group{_titled(title)}"]
        if joined
        else _sentences(data, title, actor, who)
    )
    if not words:
        return Converted(ignored=1)
    at = milliseconds(data.get("Timestamp"))
    message = InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=_identifier(data),
        person=group.person(title),
        message_type=MessageType.UNSUPPORTED,
        content=". ".join(words) + ".",
        channel_timestamp=at or int(arrived * 1000),
        role="system",
        sender_identifier=actor.address if actor else None,
        chat_identifier=group.address,
        raw_payload={"notice": "group", **clean(data)},
        arrived_at=arrived,
    )
    return Converted(messages=(message,))


def _sentences(data: Json, title: str | None, actor: Party | None, who: Any) -> list[str]:
    by = f" by {actor.address}" if actor else ""
    found: list[str] = []
    if title:
        found.append(f"Group renamed to “{title}”{by}")
    topic = obj(data.get("Topic"))
    if topic:
        text = text_of(topic.get("Topic"))
        removed = topic.get("TopicDeleted") is True or not text
        found.append(
            f"Group description removed{by}" if removed else f"Group description changed{by}: {text}"
        )
    found += _people(data, actor, who, by)
    for name, field_name, on, off in (
        ("Announce", "IsAnnounce", "Writing restricted to admins", "Writing opened to everybody"),
        ("Locked", "isLocked", "Group settings restricted to admins", "Group settings opened to everybody"),
        ("Ephemeral", "IsEphemeral", "Disappearing messages turned on", "Disappearing messages turned off"),
    ):  # fmt: skip
        if isinstance(data.get(name), dict):
            found.append((on if field(data[name], field_name) is True else off) + by)
    if isinstance(data.get("Delete"), dict):
        found.append(f"The group was deleted{by}")
    if data.get("NewInviteLink"):
        found.append(f"The invite link was changed{by}")
    for name, words in (("Link", "linked to"), ("Unlink", "unlinked from")):
        if isinstance(data.get(name), dict):
            found.append(f"The group was {words} a community or another group{by}")
    return found


def _people(data: Json, actor: Party | None, who: Any, by: str) -> list[str]:
    found: list[str] = []
    for name in ("Join", "Leave", "Promote", "Demote"):
        people = [who(jid) for jid in items(data.get(name))]
        if not people:
            continue
        names = ", ".join(people[:SHOWN]) + (
            f" and {len(people) - SHOWN} more" if len(people) > SHOWN else ""
        )
        alone = actor is not None and people == [actor.address]
        match name:
            case "Join":
                found.append(f"{names} joined" if alone or not by else f"{names} added{by}")
            case "Leave":
                found.append(f"{names} left" if alone or not by else f"{names} removed{by}")
            case "Promote":
                found.append(f"{names} made admin{by}")
            case _:
                found.append(f"{names} no longer admin{by}")
    return found


def _titled(title: str | None) -> str:
    return f" “{title}”" if title else ""


def _identifier(data: Json) -> str:
    """The event does not carry its id: the same notice, brought again, has the same text."""
    digest = hashlib.sha256(orjson.dumps(clean(data), option=orjson.OPT_SORT_KEYS)).hexdigest()
    return f"notice-{digest[:32]}"
