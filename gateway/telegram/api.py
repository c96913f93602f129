"""One bot's way to the Bot API: python-telegram-bot's `Bot` with its errors, and files as streams.

Every method is called by its name and answers as JSON, so that what Telegram adds later is kept and cannot fail. No text of
an error that leaves this module holds the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import orjson
from telegram import Bot, InputFile
from telegram.error import BadRequest, NetworkError, TelegramError
from telegram.request import BaseRequest, HTTPXRequest, RequestData

OFFICIAL = "https://api.telegram.org"
TOKEN = re.compile(r"[0-9]{1,20}:[A-Za-z0-9_-]{20,200}")
"""What @BotFather gives out: the bot's id and its secret."""
_ANY_TOKEN = re.compile(r"[0-9]{1,20}(?::|%3[Aa])[A-Za-z0-9_-]{20,}")
BUSY = 5.0
"""Seconds to wait after a 429 that does not say how long."""
CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. Tests shorten them."""

    poll: int = 25
    """How long Telegram holds a question for updates open."""
    slack: float = 10.0
    """Beyond that a silent connection counts as dead."""
    connect: float = 10.0
    read: float = 30.0
    """For an answer to anything but a file: cut off after it, and the outcome unknown."""
    upload: float = 75.0
    """For the answer after a file; below the outbound worker's watchdog."""
    write: float = 20.0
    download: float = 30.0
    """Without a byte."""
    first_wait: float = 1.0
    most_wait: float = 60.0
    look: float = 60.0
    """Between two looks at a webhook, or at a token that was refused."""
    stop: float = 2.0
    drain: float = 5.0
    """How long a stop waits for calls under way: cut off, nobody would know what became of them."""


@cache
def _tls() -> ssl.SSLContext:
    """httpx's roots, or those that SSL_CERT_FILE names. One for all bots: reading them holds a loop up."""
    return httpx.create_ssl_context(trust_env=True)


def redacted(text: str) -> str:
    """Without anything that looks like a bot's token."""
    return _ANY_TOKEN.sub("<token>", text)


class Flood(TelegramError):
    """429: nothing was done, ask again in `seconds`. The library's own `RetryAfter` warns about itself when it is made."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"Too Many Requests: retry after {seconds:g}")
        # Telegram counts whole seconds; a little more is never too early.
        self.seconds = seconds + 0.2


class Request(HTTPXRequest):
    """Closes gaps of the library's reading of answers, where they would be taken for something else."""

    async def do_request(self, url: str, method: str, request_data: RequestData | None = None,
                         read_timeout: Any = BaseRequest.DEFAULT_NONE, write_timeout: Any = BaseRequest.DEFAULT_NONE,
                         connect_timeout: Any = BaseRequest.DEFAULT_NONE,
                         pool_timeout: Any = BaseRequest.DEFAULT_NONE) -> tuple[int, bytes]:  # fmt: skip
        code, payload = await super().do_request(
            url, method, request_data, read_timeout, write_timeout, connect_timeout, pool_timeout
        )
        if code in (401, 404) and _json(payload) is None:
            # A proxy's or a web server's own page says nothing about the token.
            raise NetworkError(f"HTTP {code} from something that is not the Bot API")
        if code == 413:
            raise BadRequest("Request Entity Too Large: the file is too big")
        if code == 429:
            raise Flood(_retry_after(payload))
        return code, payload

    @staticmethod
    def parse_json_payload(payload: bytes) -> dict[str, Any]:
        """As the library's, but what cannot be read is not logged: it may hold what people wrote."""
        found = _json(payload)
        if found is None:
            raise TelegramError("Invalid server response")
        return found


def _json(payload: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(payload.decode("utf-8", "replace"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _retry_after(payload: bytes) -> float:
    parameters = (_json(payload) or {}).get("parameters")
    seconds = parameters.get("retry_after") if isinstance(parameters, dict) else None
    return float(seconds) if isinstance(seconds, (int, float)) and seconds > 0 else BUSY


class _AnyMethod(Bot):
    async def call(self, method: str, params: Mapping[str, Any] | None, **timeouts: Any) -> Any:
        return await self._post(method, dict(params or {}), **timeouts)


class BotApi:
    """`await close()` when done. Raises `telegram.error.TelegramError`; see `failures` for what that means for a send."""

    def __init__(
        self,
        token: str,
        base_url: str = OFFICIAL,
        *,
        proxy: str | None = None,
        timings: Timings | None = None,
    ) -> None:
        """Raises ValueError for a token that cannot be one, and for a proxy of a kind that is not installed."""
        if not TOKEN.fullmatch(token):
            raise ValueError("that is no bot token; it looks like 123456789:AbC… and comes from @BotFather")
        self.bot_id = int(token.partition(":")[0])
        self.timings = t = timings or Timings()
        base = base_url.rstrip("/")
        self._files_url = f"{base}/file/bot{token}"
        # Nothing from the environment: a proxy there would see the token of every tenant.
        common: dict[str, Any] = {
            "proxy": proxy,
            "connect_timeout": t.connect,
            "write_timeout": t.write,
            "media_write_timeout": t.write,
            "pool_timeout": t.connect,
            "httpx_kwargs": {"trust_env": False, "verify": _tls()},
        }
        try:
            self._requests = (
                Request(connection_pool_size=1, read_timeout=t.poll + t.slack, **common),
                Request(connection_pool_size=CONNECTIONS, read_timeout=t.read, **common),
            )
            self._downloads = httpx.AsyncClient(
                proxy=proxy,
                trust_env=False,
                verify=_tls(),
                follow_redirects=False,
                timeout=httpx.Timeout(t.download, connect=t.connect),
            )
        except (RuntimeError, ImportError, httpx.InvalidURL) as error:
            raise ValueError(
                "this kind of proxy cannot be used for Telegram; take an http:// proxy"
            ) from error
        self._bot = _AnyMethod(
            token,
            base_url=f"{base}/bot",
            base_file_url=f"{base}/file/bot",
            request=self._requests[1],
            get_updates_request=self._requests[0],
        )

    async def call(
        self, method: str, params: Mapping[str, Any] | None = None, *, upload: bool = False
    ) -> Any:
        """Any method of the Bot API, by its name; `upload`: it carries a file."""
        timeouts = {"read_timeout": self.timings.upload} if upload else {}
        return await self._bot.call(method, params, **timeouts)

    async def updates(
        self, offset: int | None, kinds: tuple[str, ...], *, wait: int | None = None
    ) -> list[Any]:
        """What has happened since `offset`, as it came. Waits up to `timings.poll` seconds for something."""
        seconds = self.timings.poll if wait is None else wait
        params = {"offset": offset, "timeout": seconds, "limit": 100, "allowed_updates": list(kinds)}
        found = await self._bot.call("getUpdates", params, read_timeout=seconds + self.timings.slack)
        return found if isinstance(found, list) else []

    @asynccontextmanager
    async def file(self, path: str, offset: int) -> AsyncIterator[httpx.Response]:
        """A file of the Bot API from `offset` on, to be read in pieces. Raises httpx.HTTPError; its text holds the token."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._downloads.stream("GET", f"{self._files_url}/{path}", headers=headers) as response:
            yield response

    async def close(self) -> None:
        closing = (*(request.shutdown() for request in self._requests), self._downloads.aclose())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.timings.stop):
                await asyncio.gather(*closing, return_exceptions=True)


def upload(handle: Any, filename: str) -> InputFile:
    """An open file, read piece by piece while it is sent: it must stay open until the call ends."""
    return InputFile(handle, filename=filename, read_file_handle=False)
