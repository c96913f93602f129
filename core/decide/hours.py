"""Opening hours: whether a business is open, and since when it is closed. Pure; daylight saving is the zone's business."""

from __future__ import annotations

from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from core.decide.config import DAYS, RulesSettings

_LOOK_BACK_DAYS = 31


def is_open(settings: RulesSettings, now: datetime, zone: ZoneInfo) -> bool:
    """True when no opening hours are set: then nobody said that the business is ever closed."""
    if settings.opening_hours is None:
        return True
    return any(start <= now < end for start, end in _spans(settings, now, zone, days_back=1))


def closed_since(settings: RulesSettings, now: datetime, zone: ZoneInfo) -> datetime | None:
    """The beginning of the closed period that `now` lies in (at most a month back); None while open."""
    if is_open(settings, now, zone):
        return None
    ends = [end for _, end in _spans(settings, now, zone, days_back=_LOOK_BACK_DAYS) if end <= now]
    return max(ends, default=now - timedelta(days=_LOOK_BACK_DAYS))


def _spans(
    settings: RulesSettings, now: datetime, zone: ZoneInfo, *, days_back: int
) -> list[tuple[datetime, datetime]]:
    """Open spans of today and the days before, in local time made absolute."""
    today = now.astimezone(zone).date()
    found = []
    for back in range(days_back + 1):
        day = today - timedelta(days=back)
        if day in settings.closed_dates:
            continue
        for start, end in (settings.opening_hours or {}).get(DAYS[day.weekday()], ()):
            opens = datetime.combine(day, start, zone)
            if end == time.max:
                closes = datetime.combine(day + timedelta(days=1), time.min, zone)
            else:
                closes = datetime.combine(day if end > start else day + timedelta(days=1), end, zone)
            found.append((opens, closes))
    return found
