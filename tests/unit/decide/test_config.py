"""Settings of an agent: errors that a person understands, and the port's own checks."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.decide.config import RulesSettings, read, validate
from core.decide.port import Decision
from core.decide.texts import BUILT_IN, LANGUAGES, unknown_variables
from core.errors import Invalid
from tests.unit.decide.conftest import NOW


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({"greetings": "hi"}, "settings.greetings", "not a setting"),
        ({"texts": {"greating": "hi"}}, "settings", "texts.greating is not one of greeting"),
        (
            {"texts": {"greeting": "hi {nmae}"}},
            "settings.texts.greeting",
            "{nmae} is not a variable; there are {name}",
        ),
        ({"texts": {"greeting": "  "}}, "settings.texts.greeting", "is empty"),
        ({"default_reply": "x" * 4000}, "settings.default_reply", "longer than"),
        ({"opening_hours": {"monday": []}}, "settings.opening_hours.monday", "'mon', 'tue'"),
        (
            {"opening_hours": {"mon": ["9 to 5"]}},
            "settings.opening_hours.mon[0]",
            "not a span such as 09:00-18:00",
        ),
        ({"opening_hours": {"mon": ["09:00-25:00"]}}, "settings.opening_hours.mon[0]", "not a span"),
        ({"timezone": "Mars/Base"}, "settings.timezone", "not a time zone such as Asia/Kuala_Lumpur"),
        ({"max_age": "12"}, "settings.max_age", "write it as 30m, 4h, 2d or 1w"),
        ({"caps": {"per_day": 0}}, "settings.caps.per_day", "greater than or equal to 1"),
        ({"rules": [{"name": "a", "when": {}}]}, "settings.rules[0].when", "at least one of any, all, types"),
        (
            {"rules": [{"name": "a", "when": {"any": ["?!"]}}]},
            "settings.rules[0].when.any[0]",
            "letters or digits",
        ),
        (
            {"rules": [{"name": "a", "when": {"any": ["x"], "regex": "x"}}]},
            "settings.rules[0].when.regex",
            "not a setting",
        ),
        (
            {"rules": [{"name": "a", "when": {"any": ["x"]}, "action": "auto_reply"}]},
            "settings.rules[0]",
            "action auto_reply needs a reply",
        ),
        (
            {"rules": [{"name": "a", "when": {"any": ["x"]}, "action": "follow_up"}]},
            "settings.rules[0]",
            "follow_up_in",
        ),
        (
            {"rules": [{"name": "a", "when": {"any": ["x"]}, "action": "delete"}]},
            "settings.rules[0].action",
            "'auto_reply'",
        ),
        (
            {"rules": [{"name": "a", "when": {"types": ["picture"]}}]},
            "settings.rules[0].when.types[0]",
            "'image'",
        ),
        ({"rules": [{"name": "a", "when": {"any": ["x"]}}] * 2}, "settings", "two rules are called 'a'"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(settings: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        validate(settings)
    assert caught.value.detail.startswith(f"{place}: "), caught.value.detail
    assert words in caught.value.detail
    assert "\n" not in caught.value.detail


def test_right_settings_are_taken() -> None:
    settings = validate(
        {
            "business": "Kedai",
            "language": "ms",
            "timezone": "Asia/Kuala_Lumpur",
            "opening_hours": {"mon": ["09:00-18:00"], "fri": ["18:00-24:00"]},
            "closed_dates": ["2026-12-25"],
            "max_age": "1d",
            "texts": {"greeting": {"en": "Hi {name}"}, "thanks": False},
            "rules": [{"name": "a", "when": {"any": ["x"]}, "follow_up_in": "2d"}],
        }
    )
    assert isinstance(settings, RulesSettings)
    assert settings.max_age == timedelta(days=1)
    assert settings.rules[0].resolved_action == "follow_up"


def test_another_deciders_settings_may_carry_its_own_keys() -> None:
    validate({"temperature": 0.2, "caps": {"per_day": 5}}, decider="llm")
    with pytest.raises(Invalid):
        validate({"temperature": 0.2, "caps": {"per_day": 0}}, decider="llm")
    settings, problem = read({"temperature": 0.2, "caps": {"per_day": 5}})
    assert problem is None
    assert settings.caps.per_day == 5


@given(
    st.dictionaries(
        st.sampled_from([*RulesSettings.model_fields, "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
            ),
            max_leaves=4,
        ),
    )
)
def test_reading_never_raises(settings: dict[str, Any]) -> None:
    _, problem = read(settings)
    assert problem is None or problem.startswith("settings")


def test_built_in_texts_are_whole_in_every_language() -> None:
    for name, wording in BUILT_IN.items():
        assert set(wording) == set(LANGUAGES), name
        for text in wording.values():
            assert unknown_variables(text) == []
    assert all("START" in text for text in BUILT_IN["opt_out"].values())


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "send_money", "reason": "x"},
        {"action": "auto_reply", "reason": "x"},
        {"action": "auto_reply", "reason": "x", "reply": "  "},
        {"action": "ignore", "reason": "x", "reply": "hi"},
        {"action": "ignore", "reason": ""},
        {"action": "ignore", "reason": "x" * 65},
        {"action": "auto_reply", "reason": "x", "reply": "y" * 4097},
        {"action": "ignore", "reason": "x", "confidence": 1.5},
        {"action": "follow_up", "reason": "x"},
        {"action": "follow_up", "reason": "x", "follow_up_at": NOW.replace(tzinfo=None)},
    ],
)
def test_a_decision_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Decision(**fields)


def test_the_settings_in_the_documentation_are_right() -> None:
    page = (Path(__file__).parents[3] / "docs" / "deciding.md").read_text()
    blob = page.split("```json")[1].split("```")[0]
    settings = json.loads(blob)
    validate(settings)
    assert set(settings) == set(RulesSettings.model_fields)
