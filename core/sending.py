"""How a session paces what it sends (`metadata.settings.sending`): rate, first contacts a day, quiet hours.

Pure: checked when it is written, read when it is used. Whatever is odd in a row that SQL wrote counts as not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.channel import Json
from core.errors import InvalidField

MOST_A_MINUTE = 60_000
DAY = timedelta(days=1)


class FirstContacts(BaseModel):
    """How many messages a day may go to people who never wrote to the session: `first` on the first day on which there are
    any, `growth` times as many on each further one, never more than `most`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    first: Annotated[int, Field(ge=0, le=1_000_000)] = 250
    growth: Annotated[float, Field(ge=1, le=10)] = 2.0
    most: Annotated[int, Field(ge=0, le=1_000_000)] = 1_000

    def on_day(self, number: int) -> int:
        """`number` counts from 1."""
        # The power of a long-lived session's days would be too large for a float.
        days = min(number - 1, math.ceil(math.log(1_000_001, self.growth)) if self.growth > 1 else 0)
        return min(self.most, int(self.first * self.growth**days))


def _clock_time(text: str) -> str:
    hour, colon, minute = text.partition(":")
    if not (
        colon and len(hour) == len(minute) == 2 and (hour + minute).isascii() and (hour + minute).isdigit()
    ):
        raise ValueError("give a time of day as HH:MM, as in 21:30")
    time(int(hour), int(minute))
    return text


ClockTime = Annotated[str, AfterValidator(_clock_time)]


class QuietHours(BaseModel):
    """From when until when nothing but replies goes out, in the time zone of the session's workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    start: ClockTime
    end: ClockTime

    @model_validator(mode="after")
    def _some(self) -> QuietHours:
        if self.start == self.end:
            raise ValueError("start and end are the same; for no quiet hours say null")
        return self

    def until(self, now: datetime, zone: ZoneInfo) -> datetime | None:
        """When the quiet hours that `now` lies in end; None outside of them. `now` is aware."""
        here = now.astimezone(zone)
        start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
        at = here.time()
        quiet = start <= at < end if start < end else at >= start or at < end
        if not quiet:
            return None
        day = here.date() if at < end else here.date() + DAY
        return datetime.combine(day, end, zone)


class Sending(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    per_minute: Annotated[float, Field(gt=0, le=MOST_A_MINUTE)] | None = None
    """Messages of any kind; null: as fast as the channel takes them."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.3
    """By which part of it the pause between two messages is longer or shorter at random. Without a rate it means nothing."""
    first_contacts: FirstContacts | None = None
    """null: as many as there are."""
    quiet_hours: QuietHours | None = None


UNPACED = Sending()
_NAMES = {"first_contacts": tuple(FirstContacts.model_fields), "quiet_hours": tuple(QuietHours.model_fields)}


def check(settings: Any) -> Json:
    """What stands under `settings.sending`, as it may be stored. Raises InvalidField."""
    if not isinstance(settings, dict):
        raise InvalidField(
            "settings.sending", f"must be an object with some of {', '.join(Sending.model_fields)}"
        )
    try:
        Sending.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(["settings", "sending", *(str(part) for part in first["loc"])])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            names = _NAMES.get(str(first["loc"][0])) if len(first["loc"]) > 1 else None
            reason = f"there is no such setting; there are: {', '.join(names or Sending.model_fields)}"
        raise InvalidField(field, reason) from None
    return dict(settings)


def read(given: Any, default: Sending = UNPACED) -> Sending:
    """A session's own settings over its channel's. Never raises."""
    good: Json = {name: getattr(default, name) for name in Sending.model_fields}
    for name in Sending.model_fields:
        if isinstance(given, Mapping) and name in given:
            try:
                good[name] = getattr(Sending.model_validate({name: given[name]}), name)
            except ValidationError:
                continue
    return Sending.model_construct(**good)


def zone_of(name: str | None) -> ZoneInfo:
    """A workspace's time zone; UTC for none, or for one that this machine does not know."""
    try:
        return ZoneInfo(name or "UTC")
    except (KeyError, ValueError, OSError):
        return ZoneInfo("UTC")


def next_day(now: datetime, zone: ZoneInfo) -> datetime:
    """When tomorrow begins."""
    return datetime.combine(local_day(now, zone) + DAY, time(), zone)


def local_day(now: datetime, zone: ZoneInfo) -> date:
    return now.astimezone(zone).date()


Reason = Literal["rate", "first_contacts", "channel_limit", "quiet_hours"]
"""Why rows wait, as the metrics say it."""
