"""Credentials and settings at the door, and what a problem means for a person. No secret is ever shown."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pytest

from core.channel import SessionState, SessionStatus
from core.errors import InvalidField
from gateway.email import settings
from gateway.email.problems import Problem, refused_login, state_of, unreachable
from gateway.email.standing import SMTP, Standing

GOOD: dict[str, Any] = {
    "imap": {"host": "imap.example.com"},
    "smtp": {"host": "smtp.example.com", "port": 587},
    "username": "shop@example.com",
    "password": "geheim-123",
}


def test_ports_and_security_are_filled_in() -> None:
    read = settings.read_credentials(GOOD)
    assert (read.imap.port, read.imap.security) == (993, "tls")
    assert (read.smtp.port, read.smtp.security) == (587, "starttls")
    assert read.own == "shop@example.com"
    assert "geheim" not in repr(read)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"imap": None}, "credentials.imap"),
        ({"imap": {"host": "a/b"}}, "credentials.imap.host"),
        ({"smtp": {"host": "x", "port": 70000}}, "credentials.smtp.port"),
        ({"smtp": {"host": "x", "security": "none"}}, "credentials.smtp.security"),
        ({"username": "a\r\nb"}, "credentials.username"),
        ({"password": "geheim\r\n-123"}, "credentials.password"),
        ({"password": None}, "credentials"),
        ({"ca": "no certificate"}, "credentials.ca"),
        ({"more": 1}, "credentials.more"),
        (
            {"oauth": {"client_id": "x", "refresh_token": "geheim-123", "token_url": "http://x"}},
            "credentials.oauth.token_url",
        ),
    ],
)
def test_a_mistake_in_credentials_is_named_and_shows_nothing(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        settings.read_credentials({**GOOD, **change})
    assert refused.value.field == field
    assert "geheim" not in str(refused.value)


def test_settings_are_checked_on_the_way_in_and_forgiving_on_the_way_out() -> None:
    assert settings.check({"folders": ["INBOX", "Orders"]}) == {"folders": ["INBOX", "Orders"]}
    with pytest.raises(InvalidField, match="no_such"):
        settings.check({"no_such": 1})
    with pytest.raises(InvalidField, match="folders"):
        settings.check({"folders": []})
    read = settings.read({"settings": {"folders": "odd", "history_days": 3, "x": 1}})
    assert (read.folders, read.history_days) == (["INBOX"], 3)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (socket.gaierror(), "host_not_found"),
        (ConnectionRefusedError(), "connection_refused"),
        (TimeoutError(), "connection_timeout"),
        (ssl.SSLCertVerificationError(), "certificate_not_trusted"),
        (ssl.SSLError(), "tls_failed"),
        (ConnectionResetError(), "connection_lost"),
    ],
)
def test_a_problem_has_a_code_and_says_what_to_do(error: Exception, code: str) -> None:
    problem = unreachable("imap", "imap.example.com", 993, error)
    assert problem.code == code
    assert "imap.example.com" in problem.detail
    assert problem.action or code == "connection_lost"


@pytest.mark.parametrize(
    ("said", "code", "status"),
    [
        ("[AUTHENTICATIONFAILED] Invalid credentials", "auth_failed", SessionStatus.DISCONNECTED),
        ("[ALERT] Too many simultaneous connections", "throttled", SessionStatus.SUSPENDED),
        ("454 4.7.0 Too many login attempts", "throttled", SessionStatus.SUSPENDED),
        ("Your account has been suspended", "account_suspended", SessionStatus.SUSPENDED),
    ],
)
def test_what_a_provider_says_at_the_log_in(said: str, code: str, status: SessionStatus) -> None:
    problem = refused_login("imap", said, oauth=False)
    state = state_of(problem, "shop@example.com")
    assert (problem.code, state.status) == (code, status)
    assert state.action


def test_a_session_is_active_only_when_it_can_read_and_send() -> None:
    said: list[SessionState] = []
    standing = Standing(("INBOX", SMTP), "shop@example.com", said.append)
    standing.starting()
    standing.tell("INBOX", None)
    standing.tell(SMTP, Problem("auth_failed", "no", "do", lasting=True, part="smtp"))
    standing.tell("INBOX", Problem("connection_lost", "broke"))
    standing.tell("INBOX", None)
    standing.tell(SMTP, None)
    standing.tell("Orders", Problem("folder_missing", "no", "create it", lasting=True))
    assert [(state.status, state.reason, state.action) for state in said] == [
        ("connecting", None, None),
        ("disconnected", "smtp_auth_failed", "do"),
        ("active", None, None),
        ("active", None, "create it"),
    ]
