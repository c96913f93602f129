"""What `payload` of an outgoing message may hold, by message type: read once, the same for the API, SQL and every channel.

Pure. `read` raises BadPayload with the field's name and what is allowed there; it never looks at the channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core.channel import MessageType
from core.errors import InvalidField

MAX_OPTIONS = 12


class BadPayload(InvalidField):
    code = "invalid_payload"


def _line(value: str) -> str:
    """One line that says something."""
    text = " ".join(value.replace("\x00", "").split())
    if not text:
        raise ValueError("must not be empty")
    return text


def _emoji(value: str) -> str:
    text = value.strip()
    if text and (text.isascii() or any(char.isspace() for char in text)):
        raise ValueError("must be one emoji; an empty text takes the reaction back")
    return text


def _web(value: str) -> str:
    if not value.startswith(("https://", "http://")) or any(char.isspace() for char in value):
        raise ValueError("must be an http:// or https:// address")
    return value


Line = Annotated[str, Field(max_length=300), AfterValidator(_line)]
Option = Annotated[str, Field(max_length=100), AfterValidator(_line)]
Question = Annotated[str, Field(max_length=255), AfterValidator(_line)]
Words = Annotated[str, Field(max_length=1000)]
Web = Annotated[str, Field(max_length=2048), AfterValidator(_web)]
Emoji = Annotated[str, Field(max_length=40), AfterValidator(_emoji)]


class _Closed(BaseModel):
    """A name that is not known is an error: a mistyped one must not be lost silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class _Open(_Closed):
    """Other names belong to other channels (an e-mail's `subject`)."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)


class Location(_Closed):
    latitude: Annotated[float, Field(ge=-90, le=90, allow_inf_nan=False)]
    longitude: Annotated[float, Field(ge=-180, le=180, allow_inf_nan=False)]
    name: Line | None = None
    address: Line | None = None


class Contact(_Closed):
    name: Line
    phones: Annotated[list[Line], Field(max_length=20)] = []
    emails: Annotated[list[Line], Field(max_length=20)] = []


class Poll(_Closed):
    question: Question
    options: Annotated[list[Option], Field(min_length=2, max_length=MAX_OPTIONS)]
    selectable: Annotated[int, Field(ge=0, le=MAX_OPTIONS)] = 1
    """How many of them one person may pick; 0 for any number."""


class Reaction(_Closed):
    emoji: Emoji
    """Left out, the message's `content` is the emoji. Empty: the reaction is taken back."""


class LinkPreview(_Closed):
    """Shown as given: nothing is fetched. `url` is the part of the text it belongs to."""

    url: Web
    title: Line
    description: Words | None = None


class Text(_Open):
    link_preview: LinkPreview | None = None


class Sound(_Open):
    voice: bool | None = None
    """Whether it is a voice note; None: Ogg Opus is one, anything else is music."""
    duration: Annotated[int, Field(ge=0, le=86_400)] | None = None
    """Seconds, where the file itself does not tell."""


class Film(_Open):
    duration: Annotated[int, Field(ge=0, le=86_400)] | None = None
    gif: bool = False
    """Played by itself, silently, over and over."""


class Plain(_Open):
    pass


_MODELS: dict[MessageType, type[BaseModel]] = {
    MessageType.LOCATION: Location,
    MessageType.CONTACT: Contact,
    MessageType.POLL: Poll,
    MessageType.REACTION: Reaction,
    MessageType.TEXT: Text,
    MessageType.AUDIO: Sound,
    MessageType.VIDEO: Film,
}
_TEXTS: dict[str, str] = {
    "missing": "is required",
    "extra_forbidden": "is not known here; leave it out",
}


def read(
    message_type: MessageType | str, payload: Mapping[str, Any] | None, content: str | None = None
) -> Any:
    """The payload as the model of its type (`Location` for a location, …). Raises BadPayload."""
    model = _MODELS.get(MessageType(message_type), Plain)
    given = dict(payload or {})
    if model is Reaction and content is not None:
        given.setdefault("emoji", content)
    try:
        found = model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(["payload", *(str(part) for part in first["loc"])])
        reason = _TEXTS.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise BadPayload(field, reason) from None
    if isinstance(found, Contact) and not (found.phones or found.emails):
        raise BadPayload("payload.phones", "a contact needs at least one phone or e-mail address")
    if isinstance(found, Poll):
        if len({option.casefold() for option in found.options}) != len(found.options):
            raise BadPayload("payload.options", "each option may stand there once")
        if found.selectable > len(found.options):
            raise BadPayload("payload.selectable", "is more than there are options")
    return found


__all__ = [
    "BadPayload",
    "Contact",
    "Film",
    "LinkPreview",
    "Location",
    "Poll",
    "Reaction",
    "Sound",
    "Text",
    "read",
]
