"""Access tokens for XOAUTH2 from a refresh token, renewed before they run out. Keeps nothing on disk, logs no token."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import Callable

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


class Tokens:
    """`await token()`; `await token(renew=True)` after a server refused one."""

    def __init__(
        self,
        oauth: OAuth,
        tls: ssl.SSLContext,
        guard: Guard,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`guard`: where the token server may be."""
        self._oauth = oauth
        self._tls, self._guard = tls, guard
        self._clock = clock
        self._refresh = oauth.refresh_token.get_secret_value()
        self._token = ""
        self._until = 0.0
        self._renewed = 0.0
        self._turn = asyncio.Lock()

    async def token(self, *, renew: bool = False) -> str:
        """Raises Problem."""
        asked = self._clock()
        async with self._turn:
            fresh = self._token and self._clock() < self._until - EARLY
            # Of several that were refused the same token the first renews it for all.
            if not fresh or (renew and asked >= self._renewed):
                await self._renew()
            return self._token

    async def _renew(self) -> None:
        oauth = self._oauth
        form = {
            "grant_type": "refresh_token",
            "client_id": oauth.client_id,
            "refresh_token": self._refresh,
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
                status, body = response.status, await response.content.read(MOST_BYTES)
                answer = _json(body)
        except Exception as error:
            cause = PrivateAddressError() if connector.refused else error
            raise _unreachable(oauth.token_url, cause) from None
        token = answer.get("access_token")
        if status != 200 or not isinstance(token, str) or not token or not token.isascii():
            raise _refused(status, answer)
        lasts = answer.get("expires_in")
        seconds = float(lasts) if isinstance(lasts, int | float) and lasts > 0 else 3600.0
        rotated = answer.get("refresh_token")
        if isinstance(rotated, str) and rotated:
            # Held in memory: the old one goes on working where tokens are rotated for servers.
            self._refresh = rotated
        self._token, self._renewed = token, self._clock()
        self._until = self._renewed + max(seconds, EARLY + 1)
        logger.info("oauth.renewed", duration_s=round(seconds))


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
