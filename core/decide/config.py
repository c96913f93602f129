"""`agents.settings` of the rules decider and of the gates, as pydantic models, with errors that name the place.

`validate` is for whoever writes settings (the API, the command line), `read` for the worker: it never raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, time, timedelta
from functools import lru_cache
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from core.channel import MessageType
from core.decide.port import MAX_WORD_CHARS, Action
from core.decide.texts import NAMES, VARIABLES, unknown_variables
from core.errors import Invalid

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
MAX_TEXT_CHARS = 3500
"""Below the reply's limit: names are filled in."""


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; use false to say nothing")
    if len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"is longer than {MAX_TEXT_CHARS} characters")
    if unknown := unknown_variables(value):
        known = ", ".join(f"{{{name}}}" for name in VARIABLES)
        raise ValueError(f"{{{unknown[0]}}} is not a variable; there are {known}")
    return value


def _duration(value: Any) -> Any:
    if isinstance(value, str) and value[:-1].isdecimal() and value[-1:] in _UNITS and len(value) <= 6:
        return timedelta(**{_UNITS[value[-1]]: int(value[:-1])})
    if isinstance(value, timedelta):
        return value
    raise ValueError("write it as 30m, 4h, 2d or 1w")


def _span(value: Any) -> Any:
    if isinstance(value, str):
        start, dash, end = value.partition("-")
        try:
            if not dash:
                raise ValueError
            return (_clock_time(start), _clock_time(end))
        except ValueError:
            raise ValueError(f"{value!r} is not a span such as 09:00-18:00") from None
    return value


def _clock_time(text: str) -> time:
    hours, _, minutes = text.strip().partition(":")
    if hours == "24" and minutes == "00":
        return time.max
    return time(int(hours), int(minutes))


def _zone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError(f"{value!r} is not a time zone such as Asia/Kuala_Lumpur")
    return value


def _phrase(value: str) -> str:
    if not any(char.isalnum() for char in value):
        raise ValueError("a phrase needs letters or digits")
    return value


TextLine = Annotated[str, AfterValidator(_text)]
Text = TextLine | Annotated[dict[str, TextLine], Field(min_length=1)]
Duration = Annotated[timedelta, BeforeValidator(_duration), Field(gt=timedelta(0), le=timedelta(days=366))]
Span = Annotated[tuple[time, time], BeforeValidator(_span)]
Phrase = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_phrase)]
Word = Annotated[str, Field(min_length=1, max_length=MAX_WORD_CHARS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Caps(_Strict):
    """Most automatic replies in one thread that no person interrupts."""

    per_10_minutes: Annotated[int, Field(ge=1, le=100)] = 6
    per_day: Annotated[int, Field(ge=1, le=1000)] = 40


class When(_Strict):
    """What a rule waits for. All that is given must hold; `word*` stands for every word that begins so."""

    any: Annotated[tuple[Phrase, ...], Field(max_length=200)] = ()
    all: Annotated[tuple[Phrase, ...], Field(max_length=50)] = ()
    none: Annotated[tuple[Phrase, ...], Field(max_length=200)] = ()
    types: tuple[MessageType, ...] = ()
    open: bool | None = None
    """True: only in opening hours; false: only outside them."""

    @model_validator(mode="after")
    def _something(self) -> When:
        if not (self.any or self.all or self.types):
            raise ValueError("needs at least one of any, all, types")
        return self


class Rule(_Strict):
    name: Word
    when: When
    reply: Text | None = None
    label: Word = "question"
    action: Action | None = None
    """Left out: `auto_reply` with a reply, `follow_up` with `follow_up_in`, else `human_takeover`."""
    follow_up_in: Duration | None = None
    first: bool = False
    """Before the built-in ones (a complaint, the wish for a person); else after them."""

    @model_validator(mode="after")
    def _whole(self) -> Rule:
        action = self.resolved_action
        if action == "auto_reply" and self.reply is None:
            raise ValueError("action auto_reply needs a reply")
        if action == "ignore" and self.reply is not None:
            raise ValueError("action ignore sends no reply; take one of the two out")
        if action == "follow_up" and self.follow_up_in is None:
            raise ValueError("action follow_up needs follow_up_in, such as 2d")
        if action != "follow_up" and self.follow_up_in is not None:
            raise ValueError(f"follow_up_in goes with action follow_up, not with {action}")
        return self

    @property
    def resolved_action(self) -> Action:
        if self.action is not None:
            return self.action
        if self.follow_up_in is not None:
            return "follow_up"
        return "auto_reply" if self.reply is not None else "human_takeover"


class BuiltIn(_Strict):
    """Which built-in rules are on."""

    greeting: bool = True
    thanks: bool = True
    human_request: bool = True
    complaint: bool = True
    follow_up: bool = True


class GateSettings(BaseModel):
    """What the gates before every decider read, so an agent with another decider may set it too."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    business: Annotated[str, Field(max_length=100)] | None = None
    """`{business}`; left out: the tenant's name."""
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")] = "en"
    """For the built-in texts when the customer's own cannot be told."""
    texts: dict[str, Text | Literal[False]] = Field(default_factory=dict)
    """Own wording for the built-in texts; false: say nothing."""
    opt_out_words: Annotated[tuple[Phrase, ...], Field(max_length=50)] = ()
    """More whole-message opt-out words; the built-in ones always count."""
    caps: Caps = Caps()
    max_age: Duration = timedelta(hours=12)
    """An older message is left to a person."""
    quote: bool = False
    """Replies quote the message they answer."""

    @model_validator(mode="after")
    def _known_texts(self) -> GateSettings:
        for name in self.texts:
            if name not in NAMES:
                raise ValueError(f"texts.{name} is not one of {', '.join(NAMES)}")
        return self


class RulesSettings(GateSettings):
    """The whole of `agents.settings` for `decider = 'rules'`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timezone: Annotated[str, AfterValidator(_zone)] | None = None
    """For the opening hours; left out: the workspace's."""
    opening_hours: dict[Day, tuple[Span, ...]] | None = None
    """Spans by weekday; a day left out is closed, all left out: always open. An end before its start is past midnight."""
    closed_dates: Annotated[tuple[date, ...], Field(max_length=400)] = ()
    built_in: BuiltIn = BuiltIn()
    rules: Annotated[tuple[Rule, ...], Field(max_length=300)] = ()
    default_reply: Text | None = None
    """When nothing else fits; left out: a person takes over."""

    @model_validator(mode="after")
    def _distinct(self) -> RulesSettings:
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two rules are called {twice[0]!r}; give each its own name")
        return self

    @property
    def zone(self) -> ZoneInfo | None:
        return ZoneInfo(self.timezone) if self.timezone else None


def validate(settings: Mapping[str, Any], decider: str = "rules") -> RulesSettings | GateSettings:
    """Check settings before they are saved. Raises Invalid with one line that names the place and what is allowed."""
    model = RulesSettings if decider == "rules" else GateSettings
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        raise Invalid(explain(error), code="invalid_settings") from None


def explain(error: ValidationError) -> str:
    """The first problem in one line: `settings.rules[2].when.any[0]: …`."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = "settings"
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in ("str", "constrained-str") or "[" in str(part):
            continue  # the branch of a union, no place that a person knows
        else:
            place += f".{part}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is not a setting; look for a typing error"
    return f"{place}: {message}"


def read(settings: Mapping[str, Any]) -> tuple[RulesSettings, str | None]:
    """The settings as the worker uses them, and what is wrong with them, if anything.

    Unknown top-level keys (another decider's) are passed over. Wrong settings give defaults and the reason: the gates
    go on with them, the rules leave the thread to a person.
    """
    try:
        return _read(orjson.dumps(dict(settings), option=orjson.OPT_SORT_KEYS))
    except (TypeError, orjson.JSONEncodeError) as error:
        return RulesSettings(), f"settings: {error}"


@lru_cache(maxsize=512)
def _read(blob: bytes) -> tuple[RulesSettings, str | None]:
    known = {key: value for key, value in orjson.loads(blob).items() if key in RulesSettings.model_fields}
    try:
        return RulesSettings.model_validate(known), None
    except ValidationError as error:
        return RulesSettings(), explain(error)
