"""The file of a stored message, from the Bot API into the media store, going on where an earlier try broke off."""

from __future__ import annotations

import re

import httpx
from telegram.error import BadRequest, InvalidToken, TelegramError

from core.channel import MediaTarget, StoredMedia
from core.errors import NotSentError, RefusedError, ThrottledError
from gateway.telegram import content
from gateway.telegram.api import BotApi, Flood
from gateway.telegram.convert import message_of
from gateway.telegram.failures import why
from gateway.telegram.values import number_of, obj, text_of

CHUNK = 256 << 10
_PATH = re.compile(r"[\w.@-]+(?:/[\w.@-]+)*")
"""Of a file, below the bot's own address: nothing that leads elsewhere."""


async def download(api: BotApi, message: StoredMedia, target: MediaTarget) -> None:
    """As `MediaSource.download`."""
    part = content.file_of(message_of(message.raw_payload))
    file_id = text_of(part.get("file_id"))
    if file_id is None:
        raise RefusedError(
            "The stored message carries no file that could be downloaded.", code="media_missing"
        )
    path = await _path_of(api, file_id, number_of(part.get("file_size")))
    offset = target.offset
    try:
        async with api.file(path, offset) as response:
            if response.status_code == 416 or (response.status_code == 200 and offset):
                await target.restart()
            if response.status_code not in (200, 206):
                # Addresses are good for an hour; the next try asks for a new one.
                raise NotSentError(
                    f"Telegram gave no file (HTTP {response.status_code}).", code="media_later"
                )
            async for chunk in response.aiter_bytes(CHUNK):
                await target.write(chunk)
    except httpx.HTTPError as error:
        raise NotSentError(f"The download broke off ({type(error).__name__}).", code="media_later") from None


async def _path_of(api: BotApi, file_id: str, size: int | None) -> str:
    try:
        found = obj(await api.call("getFile", {"file_id": file_id}))
    except Flood as error:
        raise ThrottledError(
            "Telegram asks to wait.", retry_after=error.seconds, code="flood_limit"
        ) from None
    except BadRequest as error:
        said = error.message.lower()
        if "too big" in said:
            shown = f"{size / 2**20:.0f} MB, " if size else ""
            raise RefusedError(
                f"The file is too large for a bot ({shown}Telegram gives bots 20 MB): ask the sender for a smaller one or a "
                "link. A Bot API server of one's own gives 2 GB.",
                code="media_too_large",
            ) from None
        if "temporarily" in said:
            raise NotSentError("Telegram cannot give the file at the moment.", code="media_later") from None
        raise RefusedError(
            f"Telegram does not have the file any more ({why(error)}).", code="media_gone"
        ) from None
    except InvalidToken:
        raise NotSentError("Telegram refuses the bot's token.", code="media_later") from None
    except TelegramError as error:
        raise NotSentError(
            f"Telegram cannot be asked for the file ({why(error)}).", code="media_later"
        ) from None
    path = text_of(found.get("file_path")) or ""
    if path.startswith("/"):
        raise RefusedError(
            "The Bot API server runs with --local and keeps the file on its own disk; run it without --local.",
            code="media_not_here",
        )
    if not _PATH.fullmatch(path) or ".." in path:
        raise NotSentError("Telegram gave no usable address for the file.", code="media_later")
    return path
