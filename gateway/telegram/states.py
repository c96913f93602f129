"""Where a Telegram session may stand, with what a person must do. Pure."""

from __future__ import annotations

from core.channel import SessionState, SessionStatus

_MEND = "put the bot's token (@BotFather: /mybots, API Token) into the session's credentials, then connect it again"


def connecting() -> SessionState:
    return SessionState(SessionStatus.CONNECTING)


def active(identifier: str, name: str | None) -> SessionState:
    return SessionState(SessionStatus.ACTIVE, identifier=identifier, name=name)


def disconnected(reason: str | None = None, action: str | None = None) -> SessionState:
    return SessionState(SessionStatus.DISCONNECTED, reason, action)


def unreachable() -> SessionState:
    return disconnected("unreachable")


def server_error() -> SessionState:
    return disconnected("server_error")


def throttled() -> SessionState:
    return disconnected("flood_limit")


def invalid_token() -> SessionState:
    return SessionState(SessionStatus.LOGGED_OUT, "invalid_token", f"Telegram refuses the token: {_MEND}")


def no_token() -> SessionState:
    return SessionState(SessionStatus.LOGGED_OUT, "no_token", f"there is no usable token: {_MEND}")


def other_bot(theirs: str, ours: str) -> SessionState:
    return SessionState(
        SessionStatus.LOGGED_OUT,
        "wrong_bot",
        f"the token is of {theirs} but this session is {ours}: put its own token in, or make a session for {theirs}",
    )


def conflict() -> SessionState:
    return disconnected(
        "conflict",
        "another program asks for this bot's updates; stop it, or take the bot to yourself with a new token from @BotFather",
    )


def webhook_taken() -> SessionState:
    return disconnected(
        "webhook_changed",
        "another program has set a webhook for this bot; stop it, or take the bot to yourself with a new token",
    )


def webhook_secret_missing() -> SessionState:
    return disconnected(
        "webhook_secret_missing",
        "add webhook_secret (A-Z, a-z, 0-9, _ and -) to the session's credentials, or take settings.webhook_url away",
    )


def webhook_refused(words: str) -> SessionState:
    return disconnected("webhook_refused", f"Telegram does not take settings.webhook_url: {words}")


def bad_proxy(words: str) -> SessionState:
    return disconnected("bad_proxy", words)
