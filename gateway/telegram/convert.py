"""From Bot API updates to the gateway's messages. Pure: no IO, and no library, so that a kind nobody knows yet cannot fail.

`convert_update` reads one update; `convert_webhook` one body. What cannot be understood is stored as `unsupported` with all
of it; only what names no chat and no person has nowhere to go and is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.channel import Converted, InboundMessage, MessageType, Person, SessionContext
from gateway.telegram import content
from gateway.telegram.content import Content, person_name
from gateway.telegram.settings import wants_groups
from gateway.telegram.values import (
    Json,
    clean,
    items,
    known,
    message_key,
    milliseconds,
    name_of,
    number_of,
    obj,
    text_of,
)

KINDS = (
    "message",
    "edited_message",
    "channel_post",
    "edited_channel_post",
    "message_reaction",
    "my_chat_member",
    "poll",
    "poll_answer",
    "callback_query",
    "chat_join_request",
)
"""What is asked for (`allowed_updates`): Telegram leaves reactions out unless they are named."""


@dataclass(frozen=True, slots=True)
class SentPoll:
    """A poll that a vote may be about: votes name it by its own id and their options by number."""

    message_key: str
    question: str
    options: tuple[str, ...]


NO_POLLS: Mapping[str, SentPoll] = {}


@dataclass(frozen=True, slots=True)
class Found:
    """What an update says, before it becomes a message."""

    key: str
    chat: Person
    sender: str
    content: Content
    at: int | None = None
    reply_to: str | None = None
    marks: Json = field(default_factory=dict)


def convert_webhook(body: Any, context: SessionContext) -> Converted:
    """One update, or a list of them. Never raises."""
    updates = body if isinstance(body, list) else [body]
    parts = [convert_update(update, context) for update in updates]
    return Converted(
        messages=tuple(message for part in parts for message in part.messages),
        errors=tuple((index, words) for index, part in enumerate(parts) for _, words in part.errors),
        ignored=sum(part.ignored for part in parts),
    )


def convert_update(
    update: Any,
    context: SessionContext,
    polls: Mapping[str, SentPoll] = NO_POLLS,
    *,
    arrived: float | None = None,
) -> Converted:
    """One update. `polls`: those sent from here, by poll id. Never raises."""
    fields = obj(update)
    number = number_of(fields.get("update_id"))
    kind = next((name for name in fields if name != "update_id"), None)
    if number is None or kind is None:
        return Converted(
            errors=((0, "this is no Telegram update: update_id and what happened are expected"),)
        )
    try:
        found = _find(kind, obj(fields[kind]), number, polls)
    except (ValueError, TypeError, KeyError, RecursionError):
        found = _unknown(kind, fields, number)
    if found is None or (found.chat.kind == "group" and not wants_groups(context.metadata)):
        return Converted(ignored=1)
    said = found.content
    media = {**(said.media or {}), "notice": True} if said.notice else said.media
    message = InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=found.key,
        person=found.chat,
        message_type=said.message_type,
        content=said.content,
        channel_timestamp=found.at,
        role="system" if said.notice else "user",
        sender_identifier=found.sender,
        chat_identifier=found.chat.external_id if found.chat.kind == "group" else None,
        reply_to_message_id=found.reply_to,
        media_metadata=media,
        raw_payload={**clean(fields), **found.marks},
        arrived_at=time.time() if arrived is None else arrived,
    )
    return Converted(messages=(message,))


def message_of(raw: Json) -> Json:
    """The Bot API message inside a stored update."""
    for name in ("message", "edited_message", "channel_post", "edited_channel_post"):
        if isinstance(raw.get(name), dict):
            return obj(raw[name])
    return {}


def _find(kind: str, part: Json, number: int, polls: Mapping[str, SentPoll]) -> Found | None:
    match kind:
        case "message" | "channel_post":
            return _message(part)
        case "edited_message" | "edited_channel_post":
            return _edited(part, number)
        case "message_reaction":
            return _reaction(part, number)
        case "poll_answer":
            return _vote(part, number, polls)
        case "my_chat_member":
            return _membership(part, number)
        case "callback_query":
            return _button(part)
        case "chat_join_request":
            return _join_request(part, number)
        case "poll":
            return None  # how a poll stands; each vote comes as `poll_answer` too
        case _:
            return _unknown(kind, {kind: part}, number)


def _message(part: Json) -> Found:
    chat = _chat(part.get("chat"))
    key = message_key(_id(obj(part["chat"])), _message_id(part))
    aliases = [number_of(part.get(name)) for name in ("migrate_to_chat_id", "migrate_from_chat_id")]
    if other := next((alias for alias in aliases if alias), None):
        return _migrated(part, chat, other)
    return Found(
        key,
        chat,
        _sender(part, chat),
        content.read(part),
        milliseconds(part.get("date")),
        _replied(part),
        _marks(part),
    )


def _migrated(part: Json, chat: Person, other: int) -> Found:
    """A group got a new id; Telegram says it in both, and the send that noticed may have been first: one row."""
    mine = _id(obj(part["chat"]))
    old, new = (mine, other) if "migrate_to_chat_id" in part else (other, mine)
    return Found(
        migration_key(old, new),
        migrated_person(old, new, chat.name),
        _sender(part, chat),
        content.read(part),
        milliseconds(part.get("date")),
    )


def migration_key(old: int, new: int) -> str:
    return f"{old}:migrated:{new}"


def migrated_person(old: int, new: int, name: str | None = None) -> Person:
    """A group under its new id, proven to be the one under the old id."""
    return Person(f"telegram:{new}", "group", name, (f"telegram:{old}",))


def migration(context: SessionContext, old: int, new: int) -> InboundMessage:
    """What a send learned: the same row that Telegram's own notice would make."""
    return InboundMessage(
        tenant_id=context.tenant_id,
        session_id=context.session_id,
        channel=context.channel,
        channel_message_id=migration_key(old, new),
        person=migrated_person(old, new),
        message_type=MessageType.UNSUPPORTED,
        content="The group became a supergroup",
        channel_timestamp=None,
        role="system",
        sender_identifier=f"telegram:{new}",
        chat_identifier=f"telegram:{new}",
        media_metadata={"notice": True},
        raw_payload={"migrate_from_chat_id": old, "migrate_to_chat_id": new},
    )


def _edited(part: Json, number: int) -> Found:
    chat = _chat(part.get("chat"))
    key = message_key(_id(obj(part["chat"])), _message_id(part))
    said = content.read(part)
    stamp = number_of(part.get("edit_date"))
    return Found(
        # Two edits within one second have the same edit_date.
        f"{key}:edited:{stamp or 0}:{number}",
        chat,
        _sender(part, chat),
        Content(MessageType.EDITED, said.content, said.media),
        milliseconds(stamp) or milliseconds(part.get("date")),
        key,
    )


def _reaction(part: Json, number: int) -> Found:
    chat = _chat(part.get("chat"))
    key = message_key(_id(obj(part["chat"])), _message_id(part))
    before = [_emoji(one) for one in items(part.get("old_reaction"))]
    now = [_emoji(one) for one in items(part.get("new_reaction"))]
    added = [emoji for emoji in now if emoji not in before]
    # Empty: taken back.
    emoji = next(reversed(added or now), None)
    return Found(
        f"{key}:reaction:{number}",
        chat,
        _user(part.get("user")) or _user(part.get("actor_chat")) or chat.external_id,
        Content(MessageType.REACTION, emoji),
        milliseconds(part.get("date")),
        key,
    )


def _emoji(reaction: Any) -> str:
    fields = obj(reaction)
    match fields.get("type"):
        case "emoji":
            return name_of(fields.get("emoji")) or "�"
        case "paid":
            return "⭐"
        case _:
            return "�"  # an emoji of Telegram's own, known only by its number


def _vote(part: Json, number: int, polls: Mapping[str, SentPoll]) -> Found:
    poll_id = name_of(part.get("poll_id")) or ""
    poll = polls.get(poll_id)
    voter = _user(part.get("user")) or _user(part.get("voter_chat"))
    if voter is None:
        raise ValueError("nobody voted")
    person = (
        _chat({"type": "private", **obj(part.get("user"))}) if "user" in part else _chat(part["voter_chat"])
    )
    if poll is not None and poll.message_key.startswith("-"):
        # A member's vote belongs to the group the poll was sent to.
        person = Person(f"telegram:{poll.message_key.partition(':')[0]}", "group")
    chosen = [one for option in items(part.get("option_ids")) if (one := number_of(option)) is not None]
    words = [
        poll.options[one] if poll is not None and 0 <= one < len(poll.options) else f"option {one + 1}"
        for one in chosen
    ]
    media = known(
        {"vote": True, "chosen": words, "question": poll.question if poll else None, "poll_id": poll_id}
    )
    return Found(
        f"poll:{poll_id}:{voter.removeprefix('telegram:')}:{number}",
        person,
        voter,
        Content(MessageType.POLL, f"Voted: {', '.join(words)}" if words else "Took the vote back", media),
        None,
        poll.message_key if poll else None,
    )


_GONE, _HERE = ("left", "kicked"), ("member", "administrator", "creator", "restricted")


def _membership(part: Json, number: int) -> Found:
    """What somebody did with the bot itself: blocked it, started it again, took it into a group or out of it."""
    chat = _chat(part.get("chat"))
    before, now = (obj(part.get(name)).get("status") for name in ("old_chat_member", "new_chat_member"))
    actor = person_name(part.get("from")) or "somebody"
    if chat.kind == "person":
        words = "Blocked the bot" if now == "kicked" else "Lets the bot write again"
    elif now in _GONE:
        words = f"The bot was removed by {actor}"
    elif before in _GONE and now in _HERE:
        words = f"The bot was added by {actor}"
    else:
        words = f"The bot's rights were changed by {actor}"
    return Found(
        f"{_id(obj(part['chat']))}:member:{number}",
        chat,
        _user(part.get("from")) or chat.external_id,
        Content(MessageType.UNSUPPORTED, words, {"blocked": now == "kicked"}, notice=True),
        milliseconds(part.get("date")),
    )


def _button(part: Json) -> Found:
    message = obj(part.get("message"))
    chat = (
        _chat(message.get("chat"))
        if message.get("chat")
        else _chat({"type": "private", **obj(part.get("from"))})
    )
    data = text_of(part.get("data")) or text_of(part.get("game_short_name"))
    key = message_key(_id(obj(message["chat"])), _message_id(message)) if message.get("chat") else None
    return Found(
        f"button:{text_of(part['id'])}",
        chat,
        _user(part.get("from")) or chat.external_id,
        Content(MessageType.UNSUPPORTED, f"Pressed a button: {data}" if data else "Pressed a button"),
        None,
        key,
    )


def _join_request(part: Json, number: int) -> Found:
    chat = _chat(part.get("chat"))
    who = person_name(part.get("from")) or "somebody"
    return Found(
        f"{_id(obj(part['chat']))}:join:{number}",
        chat,
        _user(part.get("from")) or chat.external_id,
        Content(MessageType.UNSUPPORTED, f"{who} asks to join", notice=True),
        milliseconds(part.get("date")),
    )


def _unknown(kind: str, fields: Json, number: int) -> Found | None:
    """A kind this gateway does not know, put where it seems to belong; None when it names nobody."""
    part = obj(fields.get(kind))
    for holder in (part, *(obj(value) for value in part.values())):
        chat = holder.get("chat")
        for place in (chat, holder.get("from"), holder.get("user")):
            identifier = number_of(obj(place).get("id"))
            if not identifier:
                continue
            person = _chat(place if place is chat else {"type": "private", **obj(place)})
            return Found(
                f"update:{kind[:64]}:{number}",
                person,
                _user(holder.get("from")) or _user(holder.get("user")) or person.external_id,
                Content(MessageType.UNSUPPORTED, text_of(part.get("text"))),
                milliseconds(part.get("date")),
            )
    return None


# --- who ---


def _id(chat: Json) -> int:
    identifier = number_of(chat.get("id"))
    if not identifier:
        raise ValueError("it names no chat")
    return identifier


def _message_id(part: Json) -> int:
    identifier = number_of(part.get("message_id"))
    if identifier is None or identifier <= 0:
        raise ValueError("it names no message")
    return identifier


def _chat(chat: Any) -> Person:
    """The lead: a person, or a whole group or broadcast channel (their ids are negative)."""
    fields = obj(chat)
    identifier = _id(fields)
    if identifier < 0:
        return Person(f"telegram:{identifier}", "group", name_of(fields.get("title")))
    return Person(f"telegram:{identifier}", "person", person_name(fields))


def _user(user: Any) -> str | None:
    identifier = number_of(obj(user).get("id"))
    return f"telegram:{identifier}" if identifier else None


def _sender(part: Json, chat: Person) -> str:
    """The author. Who writes for a chat (an anonymous admin, a channel) comes with a stand-in as `from`."""
    return _user(part.get("sender_chat")) or _user(part.get("from")) or chat.external_id


def _replied(part: Json) -> str | None:
    original = obj(part.get("reply_to_message"))
    if not original or "forum_topic_created" in original:
        return None  # what is written in a topic "replies" to the topic's beginning
    chat = number_of(obj(original.get("chat")).get("id")) or _id(obj(part["chat"]))
    identifier = number_of(original.get("message_id"))
    return message_key(chat, identifier) if identifier else None


def _marks(part: Json) -> Json:
    """What is worth finding in `raw_payload` without knowing Telegram."""
    topic = number_of(part.get("message_thread_id")) if part.get("is_topic_message") is True else None
    return known({"forwarded": 1 if part.get("forward_origin") else None, "topic": topic})
