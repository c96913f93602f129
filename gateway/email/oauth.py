"""Access tokens for XOAUTH2 from a refresh token, renewed before they run out. Logs no token.

A refresh token that the server gives in place of the old one is kept by the session's sink before it is used.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable

import aiohttp
import orjson

from core import log
from gateway.email.problems import Problem, unreachable
from gateway.email.settings import OAuth
from gateway.media.guard import Guard, PrivateAddressError

logger = log.get(part="email")

EARLY = 60.0
"""Seconds before its end a token is renewed."""
SECONDS = 15.0
MOST_BYTES = 64 * 1024
CLOSE_SECONDS = 2.0


Keep = Callable[[str, str], Awaitable[object]]
"""Makes a new refresh token durable in place of the old one."""


class Tokens:
    """`await token()`; `await token(renew=True)` after a server refused one; `await close()`.

    Some servers take a refresh token once and give another with every answer. An answer under way is therefore never
    given up because a log-in took too long, and nothing is done with what it brought before the new token is kept.
    """

    def __init__(
        self,
        oauth: OAuth,
        tls: ssl.SSLContext,
        guard: Guard,
        *,
        keep: Keep | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`guard`: where the token server may be. `keep`: None where a new token is looked at by the caller."""
        self._oauth = oauth
        self._tls, self._guard, self._keep = tls, guard, keep
        self._clock = clock
        self.refresh_token = oauth.refresh_token.get_secret_value()
        """The newest."""
        self._kept = self.refresh_token
        self._token = ""
        self._until = 0.0
        self._renewed = 0.0
        self._turn = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    async def token(self, *, renew: bool = False) -> str:
        """Raises Problem."""
        asked = self._clock()
        async with self._turn:
            if self._renewing is not None:
                await asyncio.wait({self._renewing})  # of somebody who did not wait for its end
            fresh = self._token and self._clock() < self._until - EARLY
            # Of several that were refused the same token the first renews it for all.
            if not fresh or (renew and asked >= self._renewed):
                self._renewing = asyncio.create_task(self._renew(), name="email.oauth")
                self._renewing.add_done_callback(_looked_at)
                await asyncio.shield(self._renewing)
            await self._keep_it()
            return self._token

    async def close(self) -> None:
        """Let an answer that is under way come, and keep what it brings; some seconds at most."""
        if self._renewing is not None and not self._renewing.done():
            await asyncio.wait({self._renewing}, timeout=CLOSE_SECONDS)
            self._renewing.cancel()
        with contextlib.suppress(Problem, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._keep_it()

    async def _renew(self) -> None:
        # What the last answer brought may be the only one that is good: first it is kept, then it is used.
        await self._keep_it()
        status, answer = await self._ask()
        token = answer.get("access_token")
        if status != 200 or not isinstance(token, str) or not token or not token.isascii():
            raise _refused(status, answer)
        lasts = answer.get("expires_in")
        seconds = float(lasts) if isinstance(lasts, int | float) and lasts > 0 else 3600.0
        rotated = answer.get("refresh_token")
        if isinstance(rotated, str) and rotated:
            self.refresh_token = rotated
        self._token, self._renewed = token, self._clock()
        self._until = self._renewed + max(seconds, EARLY + 1)
        logger.info("oauth.renewed", duration_s=round(seconds))
        await self._keep_it()

    async def _ask(self) -> tuple[int, dict[str, object]]:
        oauth = self._oauth
        form = {
            "grant_type": "refresh_token",
            "client_id": oauth.client_id,
            "refresh_token": self.refresh_token,
        }
        if oauth.client_secret is not None:
            form["client_secret"] = oauth.client_secret.get_secret_value()
        if oauth.scope is not None:
            form["scope"] = oauth.scope
        connector = self._guard.connector(self._tls)
        try:
            async with (
                asyncio.timeout(SECONDS),
                aiohttp.ClientSession(trust_env=False, connector=connector) as session,
                session.post(oauth.token_url, data=form, allow_redirects=False) as response,
            ):
                return response.status, _json(await response.content.read(MOST_BYTES))
        except Exception as error:
            cause = PrivateAddressError() if connector.refused else error
            raise _unreachable(oauth.token_url, cause) from None

    async def _keep_it(self) -> None:
        """Raises Problem while it cannot be kept."""
        new = self.refresh_token
        if self._keep is None or new == self._kept:
            return
        try:
            await self._keep(self._kept, new)
        except Exception as error:
            logger.error(
                "oauth.not_kept",
                error=type(error).__name__,
                action="the new refresh token is held in memory and kept as soon as the database takes it",
            )
            raise Problem(
                "token_unavailable",
                "the token server gave a new refresh token, and it could not be stored yet",
                part="oauth",
                field="refresh_token",
            ) from None
        self._kept = new


def _looked_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # whoever waited has it


def _json(body: bytes) -> dict[str, object]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _unreachable(url: str, error: Exception) -> Problem:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    host = url.partition("://")[2].partition("/")[0]
    name, _, port = host.rpartition(":")
    return unreachable("oauth", name or host, int(port) if port.isdigit() else 443, cause)


def _refused(status: int, answer: dict[str, object]) -> Problem:
    why = str(answer.get("error") or f"HTTP {status}")[:60]
    if status >= 500 or status == 429:
        return Problem(
            "token_unavailable", f"the token server answered {why}", part="oauth", field="token_url"
        )
    return Problem(
        "auth_failed",
        f"the token server gave no access token ({why})",
        "Link the mailbox again: its permission was taken back or has run out.",
        lasting=True,
        part="oauth",
        field="refresh_token" if why == "invalid_grant" else "client_id",
    )


def xoauth2(username: str, token: str) -> str:
    """The initial response of XOAUTH2."""
    return base64.b64encode(f"user={username}\1auth=Bearer {token}\1\1".encode()).decode("ascii")
