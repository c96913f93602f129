"""Field types and base models every resource shares.

Bodies are strict (no guessing of types) and closed: a field that is not known is named, not ignored.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

T = TypeVar("T")

MAX_ID = 2**63 - 1
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 1, 1, tzinfo=UTC)

Id = Annotated[int, Field(ge=1, le=MAX_ID)]


def _moment(value: object) -> object:
    """RFC 3339 text with a zone. A bare number could be seconds or milliseconds: not guessed."""
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise ValueError("a time as text with a zone is needed, such as 2026-01-31T09:00:00Z")
    try:
        # A plus sign that was not escaped in a query arrives as a space.
        moment = datetime.fromisoformat(value.strip().replace(" ", "+") if "T" in value else value)
    except ValueError:
        raise ValueError("not a time; write it as 2026-01-31T09:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("the time has no zone; end it with Z or an offset such as +08:00")
    return moment


def _in_range(value: datetime) -> datetime:
    try:
        moment = value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between 2000 and 2200") from None
    if not EARLIEST <= moment <= LATEST:
        raise ValueError("must lie between 2000 and 2200")
    return moment


Moment = Annotated[
    datetime,
    Field(strict=False),
    BeforeValidator(_moment),
    AfterValidator(_in_range),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


def _known_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"{value[:60]!r} is not an IANA time zone; write it as Asia/Singapore or UTC"
        ) from None
    return value


Timezone = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_known_zone)]


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_not_blank)]
Text = Annotated[str, Field(max_length=65_536)]
ChannelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")]
JsonObject = dict[str, Any]

Direction = Literal["inbound", "outbound"]
QueueStatus = Literal["queued", "dispatching", "sent", "failed", "unknown", "cancelled"]
SessionStatusName = Literal["pairing", "connecting", "active", "disconnected", "logged_out", "suspended"]
MessageTypeName = Literal[
    "text", "image", "video", "audio", "document", "sticker", "location", "contact", "poll", "reaction",
    "edited", "deleted", "unsupported",
]  # fmt: skip
OutboundType = Literal[
    "text", "image", "video", "audio", "document", "sticker", "location", "contact", "poll", "reaction",
    "edited", "deleted",
]  # fmt: skip
MEDIA_TYPES = frozenset({"image", "video", "audio", "document", "sticker"})


class Body(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class Query(BaseModel):
    """Query parameters: text, so numbers are read from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, populate_by_name=True)


class View(BaseModel):
    """What a caller gets."""

    model_config = ConfigDict(frozen=True, from_attributes=False)


class NoBody(Body):
    """The route takes no body."""


class NoQuery(Query):
    """The route takes no query parameters."""


class TenantQuery(Query):
    tenant_id: Id | None = Field(
        None, description="Needed with a platform key; a tenant's key knows its own."
    )


class PlainPageQuery(Query):
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=500)] | None = Field(
        None, description="`next_cursor` of the page before; opaque."
    )


class PageQuery(PlainPageQuery, TenantQuery):
    """A page of one tenant's list."""


class Page(View, Generic[T]):
    items: list[T]
    next_cursor: str | None


class Done(View):
    """Nothing to report but that it is so."""

    ok: Literal[True] = True
