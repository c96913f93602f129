"""Credentials from a person or from JSON: what is asked, what is refused, and that a secret is never shown."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import click
import pytest
from click.testing import CliRunner

from core import log_in
from core.channel import ChannelKind
from core.errors import GatewayError, Invalid
from gateway.commands import asking
from tests.support.log_in import RIGHT, Desk

KIND = Desk().kind()


def ask(lines: str, kind: ChannelKind = KIND) -> tuple[Any, str]:
    found: list[Any] = []

    @click.command()
    def command() -> None:
        try:
            found.append(asking.credentials(kind, None))
        except GatewayError as error:
            found.append(error.detail)

    result = CliRunner().invoke(command, input=lines)
    assert result.exception is None, result.exception
    return found[0], result.output


def test_each_field_is_asked_for_and_no_secret_is_shown() -> None:
    given, shown = ask(f"shop@desk.test\n{RIGHT}\n\n\nstarttls\n")
    assert given == {
        "username": "shop@desk.test",
        "password": RIGHT,
        "server": {"host": "desk.test", "security": "starttls"},
    }
    assert RIGHT not in shown
    assert "Server [desk.test]" in shown
    assert "Port (optional)" in shown


def test_what_does_not_fit_a_field_names_it() -> None:
    given, _ = ask(f"shop@desk.test\n{RIGHT}\n\nimap\ntls\n")
    assert given == "credentials.server.port: Enter a number."


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"password": "s3cret-of-the-shop"', "not JSON (line 1, column 34)"),
        (b"[1]", "one JSON object"),
        (b" " * (1 << 17), "one JSON object"),
    ],
)
def test_json_that_is_none_is_refused_without_showing_it(raw: bytes, says: str) -> None:
    file: BinaryIO = io.BytesIO(raw)
    with pytest.raises(Invalid) as refused:
        asking.credentials(KIND, file)
    assert says in refused.value.detail
    assert RIGHT not in refused.value.detail


def test_a_channel_without_a_log_in_takes_none() -> None:
    number = ChannelKind("whatsapp", None)
    assert asking.credentials(number, None) == {}
    with pytest.raises(Invalid, match="leave --credentials out"):
        asking.credentials(number, io.BytesIO(b"{}"))


def test_a_field_left_empty_keeps_what_is_stored() -> None:
    stored = {"username": "a", "password": " old ", "server": {"host": "x.test", "ca": "kept"}}
    given, wrong = log_in.from_form(KIND, {"server.host": "y.test", "password": ""}, stored=stored)
    assert (given, wrong) == (
        {"username": "a", "password": " old ", "server": {"host": "y.test", "ca": "kept"}},
        {},
    )
    assert stored["server"] == {"host": "x.test", "ca": "kept"}  # not changed itself
    _, wrong = log_in.from_form(KIND, {"username": "a\nb", "server.security": "none"})
    assert wrong == {
        "username": "This is too long, or has characters in it that cannot be typed.",
        "password": "Fill this in.",
        "server.security": "Choose one of: tls, starttls.",
    }
