"""How a session's pacing settings are checked and read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from core import sending
from core.errors import InvalidField
from core.sending import FirstContacts, QuietHours, Sending

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("settings", "field", "reason"),
    [
        ("fast", "settings.sending", "must be an object"),
        ({"speed": 1}, "settings.sending.speed", "per_minute, jitter, first_contacts, quiet_hours"),
        ({"per_minute": 0}, "settings.sending.per_minute", "greater than 0"),
        ({"jitter": 2}, "settings.sending.jitter", "less than or equal to 1"),
        ({"first_contacts": {"start": 5}}, "settings.sending.first_contacts.start", "first, growth, most"),
        ({"first_contacts": 5}, "settings.sending.first_contacts", "dictionary"),
        ({"quiet_hours": {"start": "22:00"}}, "settings.sending.quiet_hours.end", "required"),
        ({"quiet_hours": {"start": "9", "end": "10:00"}}, "settings.sending.quiet_hours.start", "HH:MM"),
        (
            {"quiet_hours": {"start": "25:00", "end": "10:00"}},
            "settings.sending.quiet_hours.start",
            "hour must",
        ),
        ({"quiet_hours": {"start": "10:00", "end": "10:00"}}, "settings.sending.quiet_hours", "say null"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(settings: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidField) as caught:
        sending.check(settings)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_what_is_right_is_stored_as_it_was_given() -> None:
    given = {"per_minute": 20, "first_contacts": None, "quiet_hours": {"start": "21:30", "end": "08:00"}}
    assert sending.check(given) == given


def test_a_session_overrides_its_channel_and_null_switches_off() -> None:
    default = Sending(first_contacts=FirstContacts(first=20))
    assert sending.read({"per_minute": 6}, default) == Sending(
        per_minute=6, first_contacts=FirstContacts(first=20)
    )
    assert sending.read({"first_contacts": None}, default) == Sending()
    assert sending.read({"per_minute": "many", "jitter": 0}, default).jitter == 0, "the odd one is left out"
    assert sending.read("nonsense", default) == default


def test_first_contacts_grow_day_by_day_up_to_the_most() -> None:
    contacts = FirstContacts(first=20, growth=1.5, most=100)
    assert [contacts.on_day(day) for day in (1, 2, 3, 4, 5, 6, 5000)] == [20, 30, 45, 67, 100, 100, 100]
    assert FirstContacts(first=5, growth=1, most=100).on_day(5000) == 5
    assert FirstContacts(first=1, growth=1.0000001, most=100).on_day(10**9) <= 100


@pytest.mark.parametrize(
    ("at", "until"),
    [
        ("2026-03-10T20:59:00+00:00", "2026-03-11T07:00:00+00:00"),  # 21:59 there
        ("2026-03-10T21:00:00+00:00", "2026-03-11T07:00:00+00:00"),
        ("2026-03-11T06:59:00+00:00", "2026-03-11T07:00:00+00:00"),
        ("2026-03-11T07:00:00+00:00", None),
        ("2026-03-10T20:29:00+00:00", None),
        ("2026-03-28T22:00:00+00:00", "2026-03-29T06:00:00+00:00"),  # the clocks go forward that night
    ],
)
def test_quiet_hours_go_over_midnight_on_the_workspaces_clock(at: str, until: str | None) -> None:
    quiet = QuietHours(start="21:30", end="08:00")
    found = quiet.until(datetime.fromisoformat(at), BERLIN)
    assert (found.astimezone(UTC).isoformat() if found else None) == until


def test_quiet_hours_within_a_day_and_a_zone_nobody_knows() -> None:
    quiet = QuietHours(start="12:00", end="14:00")
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    zone = sending.zone_of("Mars/Olympus")
    assert zone.key == "UTC"
    assert quiet.until(noon, zone) == datetime(2026, 5, 1, 14, tzinfo=UTC)
    assert quiet.until(noon.replace(hour=14), zone) is None
    assert sending.next_day(noon, BERLIN).astimezone(UTC).isoformat() == "2026-05-01T22:00:00+00:00"
