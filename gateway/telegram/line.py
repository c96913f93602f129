"""The registry's line for Telegram: how a bot's session is made, checked and logged in."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping
from typing import Any

from telegram.error import InvalidToken, TelegramError

from core.channel import Channel, ChannelKind, CredentialField, Json, LogIn, SessionContext, Sink
from core.errors import InvalidField
from core.settings import Settings
from gateway.telegram import settings as session_settings
from gateway.telegram.api import BotApi, Timings
from gateway.telegram.channel import TelegramChannel
from gateway.telegram.content import person_name
from gateway.telegram.convert import convert_webhook
from gateway.telegram.failures import why
from gateway.telegram.pace import Limits
from gateway.telegram.values import obj, text_of

CHECK_SECONDS = 15.0
_SECRET = re.compile(r"[A-Za-z0-9_-]{1,256}")
"""What Telegram takes and sends back in `X-Telegram-Bot-Api-Secret-Token`."""
_KNOWN = frozenset({"token", "webhook_secret", "proxy"})

FORM = (
    CredentialField(
        ("token",),
        "Bot token",
        "secret",
        help="From @BotFather on Telegram: /newbot makes a bot, /mybots shows the token of one that exists.",
    ),
    CredentialField(
        ("webhook_secret",),
        "Webhook secret",
        "secret",
        required=False,
        help="Only for settings.webhook_url. Left empty, one is made.",
    ),
)


def kind(settings: Settings, *, timings: Timings | None = None, limits: Limits | None = None) -> ChannelKind:
    base_url = settings.telegram_base_url

    def channel(context: SessionContext, sink: Sink) -> Channel:
        return TelegramChannel(context, sink, base_url=base_url, timings=timings, limits=limits)

    async def check(credentials: Json, metadata: Mapping[str, Any]) -> LogIn:
        return await check_credentials(credentials, metadata, base_url=base_url, timings=timings)

    return ChannelKind(
        "telegram",
        channel,
        webhook=convert_webhook,
        settings=session_settings.check,
        files=False,
        check_credentials=check,
        form=FORM,
    )


async def check_credentials(
    credentials: Json, metadata: Mapping[str, Any], *, base_url: str, timings: Timings | None = None
) -> LogIn:
    """Whose token it is, asked of Telegram itself. Raises InvalidField."""
    kept = _read(credentials)
    try:
        api = BotApi(
            kept["token"], base_url, proxy=kept.get("proxy") or metadata.get("proxy"), timings=timings
        )
    except ValueError as error:
        raise InvalidField("proxy" if "proxy" in str(error) else "credentials.token", str(error)) from None
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            me = obj(await api.call("getMe"))
    except InvalidToken:
        raise InvalidField(
            "credentials.token",
            "Telegram does not know this token; copy it again from @BotFather (/mybots, API Token)",
        ) from None
    except (TelegramError, TimeoutError) as error:
        raise InvalidField(
            "credentials.token",
            f"Telegram could not be asked whose token this is ({why(error)}); see that this machine reaches {base_url}",
        ) from None
    finally:
        await api.close()
    username = text_of(me.get("username"))
    if me.get("is_bot") is not True or username is None:
        raise InvalidField("credentials.token", "that is not the token of a bot")
    return LogIn(f"@{username}", kept, person_name(me))


def _read(credentials: Json) -> Json:
    for name in credentials:
        if name not in _KNOWN:
            raise InvalidField(
                f"credentials.{name}", "is not known for Telegram; there are token and webhook_secret"
            )
    token, secret = credentials.get("token"), credentials.get("webhook_secret")
    if not isinstance(token, str) or not token.strip():
        raise InvalidField("credentials.token", "is required: the bot's token from @BotFather")
    if secret in (None, ""):
        secret = secrets.token_urlsafe(32)
    elif not isinstance(secret, str) or not _SECRET.fullmatch(secret):
        raise InvalidField("credentials.webhook_secret", "may hold A-Z, a-z, 0-9, _ and -, up to 256 of them")
    return {**credentials, "token": token.strip(), "webhook_secret": secret}
