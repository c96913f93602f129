"""What a Telegram message says: its type, text and media description, from the Bot API's own JSON.

Pure. Never raises on a message it does not know: that one is `unsupported`, with words where there are some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.channel import MessageType
from gateway.telegram.values import Json, decimal_of, items, known, name_of, number_of, obj, text_of

MAX_FILE = 20 << 20
"""Bytes that a bot may download from Telegram's own servers."""


@dataclass(frozen=True, slots=True)
class Content:
    message_type: MessageType
    content: str | None = None
    media: Json | None = None
    notice: bool = False
    """Telegram says it about a chat; nobody wrote it."""


def read(message: Json) -> Content:
    """What a Bot API `Message` says. Telegram puts an animation under `document` as well, a venue under `location`."""
    if (text := text_of(message.get("text"))) is not None:
        return Content(MessageType.TEXT, text, _album(message, None))
    for name, kind in _FILES.items():
        if name in message:
            return _file(message, name, kind)
    for name, reader in _THINGS.items():
        if isinstance(message.get(name), dict):
            return reader(message[name], message)
    if (words := _notice(message)) is not None:
        return Content(MessageType.UNSUPPORTED, words, None, notice=True)
    for name, words in _OTHERS.items():
        if name in message:
            return Content(MessageType.UNSUPPORTED, text_of(message.get("caption")) or words)
    return Content(MessageType.UNSUPPORTED, text_of(message.get("caption")))


# --- files ---

_FILES = {
    "photo": MessageType.IMAGE,
    "animation": MessageType.VIDEO,
    "video": MessageType.VIDEO,
    "video_note": MessageType.VIDEO,
    "voice": MessageType.AUDIO,
    "audio": MessageType.AUDIO,
    "sticker": MessageType.STICKER,
    "document": MessageType.DOCUMENT,
}
_MIME = {"photo": "image/jpeg", "video_note": "video/mp4", "voice": "audio/ogg"}
"""Where Telegram does not say it."""


def file_of(message: Json) -> Json:
    """The file a message carries, as the Bot API describes it; of a photo the largest size. Empty: none."""
    for name in _FILES:
        if name in message:
            return _largest(message[name]) if name == "photo" else obj(message[name])
    return {}


def _largest(sizes: Any) -> Json:
    found = [obj(size) for size in items(sizes)]
    return max(
        found,
        key=lambda size: (number_of(size.get("width")) or 0) * (number_of(size.get("height")) or 0),
        default={},
    )


def _file(message: Json, name: str, kind: MessageType) -> Content:
    part = file_of(message)
    caption = text_of(message.get("caption"))
    size = number_of(part.get("file_size"))
    mime_type = name_of(part.get("mime_type")) or _MIME.get(name)
    if name == "sticker":
        mime_type = _sticker_type(part)
    media = known(
        {
            "state": "pending" if text_of(part.get("file_id")) else "failed",
            "filename": name_of(part.get("file_name")),
            "mime_type": mime_type,
            "size": size,
            "caption": caption,
            "width": number_of(part.get("width")) or (number_of(part.get("length")) or None),
            "height": number_of(part.get("height")) or (number_of(part.get("length")) or None),
            "duration": number_of(part.get("duration")),
            "title": name_of(part.get("title")),
            "performer": name_of(part.get("performer")),
            "voice": True if name == "voice" else None,
            "round": True if name == "video_note" else None,
            "animated": True if name == "animation" or _moves(part) else None,
            "emoji": name_of(part.get("emoji")),
            "spoiler": True if message.get("has_media_spoiler") is True else None,
        }
    )
    words = caption or (name_of(part.get("emoji")) if name == "sticker" else None)
    return Content(kind, words, _album(message, media))


def _moves(part: Json) -> bool:
    return part.get("is_animated") is True or part.get("is_video") is True


def _sticker_type(part: Json) -> str:
    if part.get("is_animated") is True:
        return "application/x-tgsticker"
    return "video/webm" if part.get("is_video") is True else "image/webp"


def _album(message: Json, media: Json | None) -> Json | None:
    """Pictures of an album come one by one; this says which belong together."""
    album = name_of(message.get("media_group_id"))
    return {**(media or {}), "album": album} if album else media


# --- things ---


def _venue(part: Json, _message: Json) -> Content:
    place = obj(part.get("location"))
    title, address = name_of(part.get("title")), text_of(part.get("address"))
    media = known({**_point(place), "name": title, "address": address})
    return Content(MessageType.LOCATION, ", ".join(filter(None, (title, address))) or None, media)


def _location(part: Json, _message: Json) -> Content:
    live = {"live": True, "seconds": part["live_period"]} if number_of(part.get("live_period")) else {}
    return Content(MessageType.LOCATION, None, known({**_point(part), **live}))


def _point(part: Json) -> Json:
    return {name: decimal_of(part.get(name)) for name in ("latitude", "longitude")}


def _contact(part: Json, _message: Json) -> Content:
    name = name_of(" ".join(filter(None, (text_of(part.get("first_name")), text_of(part.get("last_name"))))))
    phone = name_of(part.get("phone_number"))
    card = known(
        {
            "name": name,
            "phones": [phone] if phone else [],
            "emails": _emails(text_of(part.get("vcard"))),
            "telegram": number_of(part.get("user_id")),
        }
    )
    return Content(MessageType.CONTACT, name, {"contacts": [card]})


def _emails(card: str | None) -> list[str]:
    found = []
    for line in (card or "").splitlines()[:200]:
        name, colon, value = line.partition(":")
        if colon and name.split(";")[0].rpartition(".")[2].upper() == "EMAIL" and value.strip():
            found.append(value.strip()[:MAX_EMAIL])
    return found


MAX_EMAIL = 320


def _poll(part: Json, _message: Json) -> Content:
    options = [text_of(obj(option).get("text")) for option in items(part.get("options"))[:50]]
    poll = {
        "options": [option for option in options if option],
        "selectable": 0 if part.get("allows_multiple_answers") is True else 1,
        "poll_id": name_of(part.get("id")),
        "anonymous": part.get("is_anonymous") is not False,
    }
    return Content(MessageType.POLL, text_of(part.get("question")), poll)


def _dice(part: Json, _message: Json) -> Content:
    emoji, value = name_of(part.get("emoji")) or "🎲", number_of(part.get("value"))
    return Content(MessageType.UNSUPPORTED, f"{emoji} {value}" if value is not None else emoji)


_THINGS: dict[str, Callable[[Json, Json], Content]] = {
    "venue": _venue,
    "location": _location,
    "contact": _contact,
    "poll": _poll,
    "dice": _dice,
}

_OTHERS = {
    "story": "Forwarded a story",
    "paid_media": "Sent paid media",
    "game": "Sent a game",
    "invoice": "Sent an invoice",
    "giveaway": "Started a giveaway",
    "checklist": "Sent a checklist",
    "chat_shared": "Shared a chat with the bot",
    "users_shared": "Shared people with the bot",
    "refunded_payment": "A payment was given back",
    "successful_payment": "A payment was made",
}


# --- what Telegram says about a chat ---


def person_name(user: Any) -> str | None:
    fields = obj(user)
    parts = (text_of(fields.get("first_name")), text_of(fields.get("last_name")))
    return name_of(" ".join(filter(None, parts))) or name_of(fields.get("username"))


def _called(user: Any) -> str:
    return person_name(user) or "somebody"


def _joined(part: Any, message: Json) -> str:
    people = [_called(user) for user in items(part)]
    actor = _called(message.get("from"))
    names = ", ".join(people[:20]) + (f" and {len(people) - 20} more" if len(people) > 20 else "")
    return f"{names or actor} joined" if people in ([], [actor]) else f"{names} added by {actor}"


def _left(part: Any, message: Json) -> str:
    person, actor = _called(part), _called(message.get("from"))
    return f"{person} left" if person == actor else f"{person} removed by {actor}"


def _titled(part: Any, _message: Json) -> str:
    return f"Group renamed to “{name_of(part) or ''}”"


def _topic(part: Any, _message: Json) -> str:
    return f"Topic “{name_of(obj(part).get('name')) or ''}” opened"


def _topic_edited(part: Any, _message: Json) -> str:
    name = name_of(obj(part).get("name"))
    return f"Topic renamed to “{name}”" if name else "The topic's icon was changed"


def _pinned(part: Any, _message: Json) -> str:
    words = read(obj(part)).content if part else None
    return f"Pinned: {words[:200]}" if words else "Pinned a message"


def _fixed(words: str) -> Callable[[Any, Json], str]:
    return lambda _part, _message: words


_NOTICES: dict[str, Callable[[Any, Json], str]] = {
    "new_chat_members": _joined,
    "left_chat_member": _left,
    "new_chat_title": _titled,
    "new_chat_photo": _fixed("The group's picture was changed"),
    "delete_chat_photo": _fixed("The group's picture was removed"),
    "group_chat_created": _fixed("The group was created"),
    "supergroup_chat_created": _fixed("The group was created"),
    "channel_chat_created": _fixed("The channel was created"),
    "migrate_to_chat_id": _fixed("The group became a supergroup"),
    "migrate_from_chat_id": _fixed("The group became a supergroup"),
    "pinned_message": _pinned,
    "message_auto_delete_timer_changed": _fixed("The time after which messages vanish was changed"),
    "forum_topic_created": _topic,
    "forum_topic_edited": _topic_edited,
    "forum_topic_closed": _fixed("The topic was closed"),
    "forum_topic_reopened": _fixed("The topic was opened again"),
    "general_forum_topic_hidden": _fixed("The general topic was hidden"),
    "general_forum_topic_unhidden": _fixed("The general topic is shown again"),
    "video_chat_scheduled": _fixed("A video chat was planned"),
    "video_chat_started": _fixed("A video chat began"),
    "video_chat_ended": _fixed("The video chat ended"),
    "video_chat_participants_invited": _fixed("People were invited to the video chat"),
    "proximity_alert_triggered": _fixed("Two people who share their place are near each other"),
    "boost_added": _fixed("The chat was boosted"),
    "chat_background_set": _fixed("The chat's background was changed"),
    "write_access_allowed": _fixed("Allowed the bot to write"),
    "connected_website": _fixed("Logged in to a website with Telegram"),
    "giveaway_created": _fixed("A giveaway was started"),
    "giveaway_completed": _fixed("A giveaway has ended"),
    "giveaway_winners": _fixed("The winners of a giveaway"),
}


def _notice(message: Json) -> str | None:
    for name, words in _NOTICES.items():
        if name in message:
            return words(message[name], message)
    return None
