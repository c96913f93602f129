"""Fetches a file from an address that somebody else chose: https, public hosts, bounded in size, time and hops.

Goes on where a connection broke when the server can (Range, If-Range). Never follows a redirect unlooked at, never sends
cookies or credentials, never unpacks: a compressed answer is refused, so nothing small can become large here.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from yarl import URL

from core import log as logs
from core.errors import GatewayError, NotSentError, RefusedError
from gateway.media.guard import Guard
from gateway.media.sniff import fits, normal
from gateway.media.store import Draft, too_large

log = logs.get(part="media")

CHUNK = 1 << 16
MAX_URL = 4096
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_LATER = frozenset((408, 425, 429))


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bytes and seconds. `resumes`: how often a broken connection is taken up again."""

    size: int = 64 << 20
    total: float = 60.0
    connect: float = 10.0
    read: float = 20.0
    redirects: int = 3
    resumes: int = 4


@dataclass(frozen=True, slots=True)
class Fetched:
    """What the server said about the file that is now in the draft."""

    mime_type: str | None
    filename: str | None


@dataclass(slots=True)
class _Trip:
    """One fetch: where it stands."""

    url: URL
    message_type: str | None
    hops: int = 0
    validator: str | None = None
    """A strong ETag or a date: without one a second request might be of another file."""
    fetched: Fetched = Fetched(None, None)
    shown: str = ""

    def here(self) -> str:
        return f"{self.url.host}"


class Fetcher:
    """`ssl`: an SSLContext for tests; by default the system's authorities."""

    def __init__(
        self, guard: Guard | None = None, *, limits: FetchLimits | None = None, ssl: Any = True
    ) -> None:
        self._guard = guard or Guard()
        self._ssl = ssl
        self.limits = limits or FetchLimits()

    async def fetch(self, url: str, draft: Draft, *, message_type: str | None = None) -> Fetched:
        """Bring the file into `draft` (empty at the start).

        Raises RefusedError (`media_bad_url`, `media_private_address`, `media_not_found`, `media_too_large`,
        `media_wrong_type`) and NotSentError (`media_unreachable`: worth another try). No message holds the URL's path or
        query: they may be secret.
        """
        trip = _Trip(_checked(url), message_type)
        connector = self._guard.connector(self._ssl)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self.limits.connect, sock_read=self.limits.read
        )
        try:
            async with (
                asyncio.timeout(self.limits.total),
                aiohttp.ClientSession(
                    connector=connector,
                    timeout=timeout,
                    trust_env=False,
                    auto_decompress=False,
                    cookie_jar=aiohttp.DummyCookieJar(),
                ) as session,
            ):
                await self._with_resumes(session, trip, draft)
        except TimeoutError as error:
            raise _unreachable(trip, f"took longer than {self.limits.total:g} s") from error
        except _Broken as broken:
            if connector.refused:
                raise RefusedError(
                    f"{trip.here()} is not on the public internet; media is only fetched from public https addresses",
                    code="media_private_address",
                ) from broken
            raise _unreachable(trip, broken.reason) from broken
        return trip.fetched

    async def _with_resumes(self, session: aiohttp.ClientSession, trip: _Trip, draft: Draft) -> None:
        left = self.limits.resumes
        while True:
            before = draft.offset
            try:
                while not await self._request(session, trip, draft):
                    pass
                return
            except _Broken as broken:
                left -= 1
                # Only what got somewhere is taken up again here; the queue has retries of its own.
                if left < 0 or draft.offset <= before:
                    raise
                log.info("media.resumed", action=trip.here(), result=broken.reason, bytes=draft.offset)

    async def _request(self, session: aiohttp.ClientSession, trip: _Trip, draft: Draft) -> bool:
        """One request; False: redirected, ask again. Raises _Broken when the connection failed."""
        if draft.offset and trip.validator is None:
            await draft.restart()
        headers = {"Accept-Encoding": "identity", "Accept": "*/*", "User-Agent": "channel-gateway"}
        if draft.offset and trip.validator is not None:
            headers |= {"Range": f"bytes={draft.offset}-", "If-Range": trip.validator}
        try:
            async with session.get(trip.url, headers=headers, allow_redirects=False) as response:
                if response.status in _REDIRECTS:
                    self._redirect(trip, response)
                    return False
                await self._body(trip, response, draft)
                return True
        except aiohttp.InvalidURL as error:
            raise _bad_url() from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise _Broken("its TLS certificate is not valid") from error
        except aiohttp.ClientConnectorDNSError as error:
            raise _Broken("its name cannot be resolved") from error
        except aiohttp.ServerTimeoutError as error:
            raise _Broken("it does not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Broken(f"the connection failed ({type(error).__name__})") from error

    def _redirect(self, trip: _Trip, response: aiohttp.ClientResponse) -> None:
        trip.hops += 1
        if trip.hops > self.limits.redirects:
            raise RefusedError(
                f"{trip.here()} redirects more than {self.limits.redirects} times; use the final address",
                code="media_not_found",
            )
        try:
            target = trip.url.join(URL(response.headers.get("Location", "")))
        except ValueError:
            raise _bad_url() from None
        trip.url = _checked(str(target))

    async def _body(self, trip: _Trip, response: aiohttp.ClientResponse, draft: Draft) -> None:
        self._check_status(trip, response)
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise RefusedError(
                f"{trip.here()} sends the file compressed although it was asked not to; use another address",
                code="media_wrong_type",
            )
        continued = response.status == 206
        if continued and _range_start(response) != draft.offset:
            raise _Broken("it sent another part of the file than it was asked for")
        if not continued:
            if draft.offset:
                await draft.restart()
            trip.fetched = _described(response)
            trip.validator = _validator(response)
            declared = normal(trip.fetched.mime_type)
            if trip.message_type and declared == "text/html" and not fits(trip.message_type, declared):
                raise wrong_type(trip.message_type, declared)
        if draft.offset + (response.content_length or 0) > self.limits.size:
            raise too_large(self.limits.size)
        async for chunk in response.content.iter_chunked(CHUNK):
            if draft.offset + len(chunk) > self.limits.size:
                raise too_large(self.limits.size)
            await draft.write(chunk)

    def _check_status(self, trip: _Trip, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status in (200, 206):
            return
        if status >= 500 or status in _LATER:
            raise NotSentError(
                f"{trip.here()} answered {status}; it is tried again", code="media_unreachable"
            )
        hint = "the link needs a login or has run out" if status in (401, 403) else "check the link"
        raise RefusedError(f"{trip.here()} answered {status}: {hint}", code="media_not_found")


class _Broken(Exception):
    """The connection failed or was cut off."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def wrong_type(message_type: str, mime_type: str) -> GatewayError:
    return RefusedError(
        f"the file is {mime_type}, which cannot be sent as {message_type}; send it as a document or use another file",
        code="media_wrong_type",
    )


def _unreachable(trip: _Trip, reason: str) -> NotSentError:
    return NotSentError(f"{trip.here()} could not be reached: {reason}", code="media_unreachable")


def _bad_url() -> RefusedError:
    return RefusedError(
        "media_url must be an https:// address of a public host, without a user name or password in it",
        code="media_bad_url",
    )


def _checked(text: str) -> URL:
    if len(text) > MAX_URL or not text.isprintable():
        raise _bad_url()
    try:
        url = URL(text)
        if url.scheme != "https" or not url.host or url.user or url.password or not url.port:
            raise _bad_url()
    except ValueError:
        raise _bad_url() from None
    return url.with_fragment(None)


def _validator(response: aiohttp.ClientResponse) -> str | None:
    if response.headers.get("Accept-Ranges", "").strip().lower() == "none":
        return None
    etag = response.headers.get("ETag", "").strip()
    if etag.startswith('"'):
        return etag
    return response.headers.get("Last-Modified")


def _range_start(response: aiohttp.ClientResponse) -> int | None:
    match = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _described(response: aiohttp.ClientResponse) -> Fetched:
    found = Fetched(response.headers.get("Content-Type"), response.url.name or None)
    disposition = response.content_disposition
    if disposition is not None and disposition.filename:
        found = replace(found, filename=disposition.filename)
    return found
