"""Telegram: a bot per session, through the Bot API. `kind` is the line of the registry."""

from gateway.telegram.line import kind

__all__ = ["kind"]
