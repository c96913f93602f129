"""What an error of the Bot API means for a send, and in which words a person is told.

Pure. Telegram has no idempotency key and nothing to look a message up by: what may have arrived is `unknown` for good.
"""

from __future__ import annotations

import httpx
from telegram.error import (
    BadRequest,
    ChatMigrated,
    Conflict,
    Forbidden,
    InvalidToken,
    NetworkError,
    TelegramError,
)

from core.errors import ChannelError, NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from gateway.telegram.api import Flood, redacted

UNREACHABLE_WAIT = 3.0
_BEFORE_IT_LEFT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
"""No connection, or none to a server that could have taken it."""

# What Telegram's descriptions say (they are English and part of no contract), our code, and what to tell a person.
_FORBIDDEN = (
    ("blocked by the user", "blocked_by_user", "This person has blocked the bot."),
    ("user is deactivated", "user_deactivated", "This person's Telegram account no longer exists."),
    ("can't initiate conversation", "first_contact_refused",
     "Telegram lets a bot write only to people who wrote to it first; ask this person to open the bot and press Start."),
    ("was kicked", "not_in_chat", "The bot was removed from this group; have it added again."),
    ("not a member", "not_in_chat", "The bot is not in this group; have it added."),
    ("bots can't send messages to bots", "recipient_is_bot", "That is a bot; Telegram lets bots not write to each other."),
)  # fmt: skip
_BAD = (
    ("chat not found", "chat_not_found",
     "Telegram knows no such chat for this bot: the person has to write to the bot first."),
    ("peer_id_invalid", "chat_not_found",
     "Telegram knows no such chat for this bot: the person has to write to the bot first."),
    ("is too long", "too_long", "The text is longer than Telegram takes in one message; send it in parts."),
    ("message is not modified", "not_modified", "The message says this already."),
    ("message can't be edited", "not_editable", "Telegram lets nobody edit this message any more."),
    ("message to edit not found", "message_not_found", "The message to be edited is not there (any more)."),
    ("message can't be deleted", "not_deletable", "Telegram lets a bot delete this message no more."),
    ("message to delete not found", "message_not_found", "The message to be deleted is not there (any more)."),
    ("message to react not found", "message_not_found", "The message to react to is not there (any more)."),
    ("message to be replied not found", "message_not_found", "The message to be answered is not there (any more)."),
    ("reaction_invalid", "reaction_invalid", "Telegram does not take this emoji as a reaction; use one from its list."),
    ("not enough rights", "no_rights", "The bot may not do that in this group; give it the right."),
    ("have no rights", "no_rights", "The bot may not do that in this group; give it the right."),
    ("topic_closed", "topic_closed", "The topic is closed; open it again or write elsewhere."),
    ("message thread not found", "topic_not_found", "The topic is not there (any more)."),
    ("too big", "media_too_large", "The file is larger than Telegram takes from a bot (50 MB, photos 10 MB)."),
    ("photo_invalid_dimensions", "media_wrong_type",
     "Telegram does not show a picture of this shape as a photo; send it as a document."),
    ("image_process_failed", "media_wrong_type", "Telegram cannot read this picture; send it as a document."),
)  # fmt: skip


def failure(error: BaseException) -> ChannelError:
    """What `send` raises for it. The order matters: BadRequest and TimedOut are NetworkErrors too."""
    match error:
        case ChannelError():
            return error
        case Flood():
            return ThrottledError(
                f"Telegram asks to wait {error.seconds:.0f} s before this chat is written to again.",
                retry_after=error.seconds,
                code="flood_limit",
            )
        case ChatMigrated():
            return RefusedError(
                f"The group became a supergroup; its id is telegram:{error.new_chat_id} now.",
                code="chat_migrated",
            )
        case Forbidden():
            return _refused(error, _FORBIDDEN, "forbidden", "Telegram forbids it")
        case BadRequest():
            return _refused(error, _BAD, "bad_request", "Telegram refuses it")
        case InvalidToken():
            return RefusedError(
                "Telegram refuses the bot's token; put a new one from @BotFather into the session's credentials.",
                code="invalid_token",
            )
        case Conflict():
            return NotSentError(
                "Telegram refused the call because another program uses this bot.", code="conflict"
            )
        case NetworkError() if isinstance(error.__cause__, _BEFORE_IT_LEFT):
            # Not the message's fault, and an outage must not use its attempts up.
            return ThrottledError(
                "Telegram cannot be reached at this moment; the message has not left.",
                retry_after=UNREACHABLE_WAIT,
                code="unreachable",
            )
        case _:
            return UnknownOutcomeError(
                f"The call was cut off and nothing proves whether it went out ({why(error)}); look before sending again."
            )


def _refused(
    error: TelegramError, table: tuple[tuple[str, str, str], ...], code: str, words: str
) -> RefusedError:
    said = error.message.lower()
    for part, found, sentence in table:
        if part in said:
            return RefusedError(sentence, code=found)
    return RefusedError(f"{words}: {redacted(error.message)[:300]}.", code=code)


def why(error: BaseException) -> str:
    """A short cause for logs and rows, without the token and without what people wrote."""
    cause = error.__cause__
    if isinstance(cause, httpx.HTTPError):
        return type(cause).__name__
    if isinstance(error, TelegramError):
        return redacted(error.message)[:200] or type(error).__name__
    return type(error).__name__
