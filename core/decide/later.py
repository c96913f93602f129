"""When a customer says "not now": "call me tomorrow", "nanti", "next week" → the moment to come back to them.

Only says when; careful rather than clever: a question that happens to name a day is no follow-up.
"""

from __future__ import annotations

from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from core.decide.config import DAYS
from core.decide.match import Text, normalise
from core.decide.phrases import phrases
from core.decide.wordlists import load

MORNING = time(10, 0)
"""When a day was named without an hour."""
_MAX_CHARS = 300

# Asked to come back, or putting it off: together with a time this is a follow-up.
_ASK = phrases("later_ask")
_NAMED = tuple((when, phrases(f"later_{when}")) for when in ("month", "week", "tonight", "tomorrow", "later"))

_LENGTHS = {
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
    "month": timedelta(days=30),
}
_UNITS = {word: _LENGTHS[unit] for unit, words in load("later_units").items() for word in words}
_NUMBERS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "couple": 2,
    "few": 3,
    "half": 1,
}
_WEEKDAYS = tuple(load("later_weekdays")[day] for day in DAYS)


def follow_up_at(content: str, now: datetime, zone: ZoneInfo) -> datetime | None:
    """When to come back, or None when the message does not ask for it. `zone` is the customer's, else the workspace's."""
    if len(content) > _MAX_CHARS:
        return None
    text = normalise(content)
    asks = _ASK.within(text)
    if text.question and not asks:
        return None
    local = now.astimezone(zone)
    if asks and (amount := _amount(text)):
        return now + amount
    if asks and (weekday := _weekday(text)) is not None:
        days = (weekday - local.weekday() - 1) % 7 + 1
        return _morning(local, days)
    for when, words in _NAMED:
        if words.whole(content) or (asks and words.within(text)):
            return _moment(when, now, local)
    return None


def _moment(when: str, now: datetime, local: datetime) -> datetime:
    match when:
        case "tomorrow":
            return _morning(local, 1)
        case "week":
            return _morning(local, 7 - local.weekday())
        case "month":
            return _morning(local, 30)
        case "tonight":
            evening = datetime.combine(local.date(), time(19, 0), local.tzinfo)
            return evening if evening > local else now + timedelta(hours=1)
    return now + timedelta(hours=4)


def _morning(local: datetime, days: int) -> datetime:
    return datetime.combine(local.date() + timedelta(days=days), MORNING, local.tzinfo)


def _amount(text: Text) -> timedelta | None:
    """ "in 2 hours", "3 days", "30 minit lagi"."""
    words = text.words
    for position, word in enumerate(words):
        unit = _UNITS.get(word)
        if unit is None or position == 0:
            continue
        for before in (words[position - 1], words[position - 2] if position > 1 else ""):
            if before.isascii() and before.isdecimal() and len(before) <= 3 and int(before) > 0:
                return min(unit * int(before), timedelta(days=366))
            if before in _NUMBERS:
                return unit * _NUMBERS[before]
    return None


def _weekday(text: Text) -> int | None:
    words = set(text.words)
    for number, names in enumerate(_WEEKDAYS):
        if words.intersection(names) and not ("minggu" in words and "depan" in words):
            return number
    return None
