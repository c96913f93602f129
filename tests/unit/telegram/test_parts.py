"""The small parts: pace, formatting, settings, the words for Telegram's errors, the check of a token's form."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx
import pytest
from telegram.error import BadRequest, Conflict, Forbidden, NetworkError, TelegramError, TimedOut

from core.errors import (
    InvalidField,
    NotSentError,
    RefusedError,
    SettingsError,
    ThrottledError,
    UnknownOutcomeError,
)
from core.settings import load
from gateway.telegram import formatting, settings
from gateway.telegram.api import BotApi, Flood, redacted
from gateway.telegram.failures import failure, why
from gateway.telegram.line import check_credentials
from gateway.telegram.pace import Limits, Pace

TOKEN = "8000000001:AAHk3v0Fq2b9dXw7yZ1cM5nL8pR4sT6uV0E"

# --- pace


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("gateway.telegram.pace.asyncio.sleep", self.sleep)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_a_chat_gets_one_message_a_second(clock: Clock) -> None:
    pace, times = Pace(Limits(), clock), []
    for _ in range(4):
        await pace.turn(5)
        times.append(clock.now)
    assert [round(later - earlier, 2) for earlier, later in itertools.pairwise(times)] == [1.05] * 3


async def test_a_group_gets_nineteen_a_minute_and_is_told_when_it_may_go_on(clock: Clock) -> None:
    pace = Pace(Limits(), clock)
    for _ in range(19):
        await pace.turn(-5)
    with pytest.raises(ThrottledError) as error:
        await pace.turn(-5)
    assert 35 < error.value.retry_after <= 60
    await pace.turn(6)  # others do not wait for it
    clock.now += error.value.retry_after
    await pace.turn(-5)


async def test_all_chats_together_get_no_more_than_the_bot_may(clock: Clock) -> None:
    pace, times = Pace(Limits(per_second=28), clock), []
    for chat in range(1, 100):
        await pace.turn(chat)
        times.append(clock.now)
    assert all(sum(at <= other < at + 1 for other in times) <= 28 for at in times)
    assert times[-1] - times[0] < 4, "slower than it must be"


async def test_a_chat_that_is_held_is_left_alone_and_two_of_them_hold_the_bot(clock: Clock) -> None:
    pace = Pace(Limits(), clock)
    pace.hold(5, 30)
    with pytest.raises(ThrottledError) as error:
        await pace.turn(5)
    assert error.value.retry_after == 30
    await pace.turn(6)
    pace.hold(7, 20)
    with pytest.raises(ThrottledError):
        await pace.turn(8)
    clock.now += 30
    for chat in (5, 7, 8):
        await pace.turn(chat)


async def test_who_waits_too_long_behind_others_is_told_so() -> None:
    pace = Pace(Limits(chat_seconds=0.05, most=0.12))
    turns = await asyncio.gather(*(pace.turn(5) for _ in range(12)), return_exceptions=True)
    late = [turn for turn in turns if isinstance(turn, ThrottledError)]
    assert 0 < len(late) < 12
    assert all(one.code == "paced" for one in late)


async def test_chats_that_are_quiet_are_forgotten(clock: Clock) -> None:
    pace = Pace(Limits(per_second=10**6, chat_seconds=0), clock)
    for chat in range(1, 3 * Pace.CHATS):
        await pace.turn(chat)
    assert len(pace._chats) <= Pace.CHATS + 1


# --- formatting


def entity(kind: str, offset: int, length: int, **more: Any) -> dict[str, Any]:
    return {"type": kind, "offset": offset, "length": length, **more}


@pytest.mark.parametrize(
    ("text", "plain", "entities"),
    [
        ("*bold* and _slanted_", "bold and slanted", [entity("bold", 0, 4), entity("italic", 9, 7)]),
        ("~old~ `x*y*z`", "old x*y*z", [entity("strikethrough", 0, 3), entity("code", 4, 5)]),
        ("*_both_*", "both", [entity("bold", 0, 4), entity("italic", 0, 4)]),
        ("```\na\n```", "a", [entity("pre", 0, 1)]),
        ("[the menu](https://a.b/c?d=1)", "the menu", [entity("text_link", 0, 8, url="https://a.b/c?d=1")]),
        ("🍞🍞 *x*", "🍞🍞 x", [entity("bold", 5, 1)]),
        ("2*3*4 snake_case_name ~5 ~6", "2*3*4 snake_case_name ~5 ~6", []),
        ("* a list\n* of two", "* a list\n* of two", []),
        ("[x](javascript:alert(1))", "[x](javascript:alert(1))", []),
        ("<b>no</b> **", "<b>no</b> **", []),
    ],
)
def test_marks_at_the_edges_of_words_become_entities(text: str, plain: str, entities: list[Any]) -> None:
    assert formatting.markup(text) == (plain, entities)


def test_a_long_text_of_nothing_but_marks_takes_no_time() -> None:
    for mark in ("*", "_", "~", "`", "[", "*a ", "_a_ *"):
        formatting.markup(mark * 5000)


# --- settings


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"typing": "yes"}, "settings.typing"),
        ({"colour": 1}, "settings.colour"),
        ({"format": "html"}, "settings.format"),
        ({"webhook_url": "http://example.com"}, "settings.webhook_url"),
        ({"webhook_url": "https://example.com:3000"}, "settings.webhook_url"),
        ({"webhook_url": "https://user:secret@example.com"}, "settings.webhook_url"),
        ({"webhook_url": "https://example.com/?a=b"}, "settings.webhook_url"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(given: Any, field: str) -> None:
    with pytest.raises(InvalidField) as error:
        settings.check(given)
    assert error.value.field == field


def test_settings_written_by_sql_fall_back_one_by_one() -> None:
    found = settings.read({"settings": {"typing": 5, "groups": False, "webhook_url": "https://a.example/x/"}})
    assert (found.typing, found.groups, found.webhook_url) == (False, False, "https://a.example/x")
    assert settings.read({"settings": "odd"}) == settings.SessionSettings()


def test_the_address_of_the_bot_api_is_checked_at_the_start() -> None:
    assert load({"TELEGRAM_BASE_URL": "http://127.0.0.1:8081/"}).telegram_base_url == "http://127.0.0.1:8081"
    for wrong in ("api.telegram.org", "https://user@api.telegram.org", "https://a b"):
        with pytest.raises(SettingsError, match="TELEGRAM_BASE_URL"):
            load({"TELEGRAM_BASE_URL": wrong})


# --- failures


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Flood(5), ThrottledError),
        (Forbidden("x"), RefusedError),
        (BadRequest("x"), RefusedError),  # although a NetworkError
        (Conflict("x"), NotSentError),
        (caused(NetworkError("x"), httpx.ConnectError("x")), NotSentError),
        (caused(TimedOut(), httpx.ConnectTimeout("x")), NotSentError),
        (caused(TimedOut(), httpx.PoolTimeout("x")), NotSentError),
        (caused(TimedOut(), httpx.ReadTimeout("x")), UnknownOutcomeError),
        (caused(TimedOut(), httpx.WriteTimeout("x")), UnknownOutcomeError),
        (caused(NetworkError("x"), httpx.RemoteProtocolError("x")), UnknownOutcomeError),
        (caused(NetworkError("x"), httpx.ReadError("x")), UnknownOutcomeError),
        (NetworkError("Internal Server Error"), UnknownOutcomeError),
        (TelegramError("Invalid server response"), UnknownOutcomeError),
        (ZeroDivisionError("x"), UnknownOutcomeError),
    ],
)
def test_an_error_means_sent_not_sent_or_unknown(error: Exception, expected: type[Exception]) -> None:
    assert type(failure(error)) is expected or isinstance(failure(error), expected)
    if expected is UnknownOutcomeError:
        assert not isinstance(failure(error), NotSentError)


def test_no_words_about_an_error_hold_the_token() -> None:
    url = f"https://api.telegram.org/bot{TOKEN}/sendMessage"
    for error in (NetworkError(f"httpx.ReadError: {url}"), BadRequest(url), Forbidden(url)):
        assert TOKEN not in why(error) + failure(error).detail
    assert redacted(f"a {TOKEN} b {TOKEN.replace(':', '%3A')}") == "a <token> b <token>"


# --- log in


@pytest.mark.parametrize("token", ["", "abc", "123:short", f"{TOKEN} ", f"{TOKEN}/../x", f"bot{TOKEN}"])
def test_what_cannot_be_a_token_makes_no_client(token: str) -> None:
    with pytest.raises(ValueError, match="BotFather"):
        BotApi(token)


@pytest.mark.parametrize(
    ("credentials", "field"),
    [
        ({}, "credentials.token"),
        ({"token": 5}, "credentials.token"),
        ({"token": "nonsense"}, "credentials.token"),
        ({"token": TOKEN, "webhook_secret": "a b"}, "credentials.webhook_secret"),
        ({"token": TOKEN, "password": "x"}, "credentials.password"),
        ({"token": TOKEN}, "credentials.token"),  # nobody listens there
    ],
)
async def test_credentials_with_a_mistake_are_refused_with_the_field(credentials: Any, field: str) -> None:
    with pytest.raises(InvalidField) as error:
        await check_credentials(credentials, {}, base_url="http://127.0.0.1:9")
    assert error.value.field == field
    assert TOKEN not in str(error.value)
