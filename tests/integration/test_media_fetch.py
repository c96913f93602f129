"""Fetching from real HTTPS servers on loopback: what is refused, what is resumed, what is bounded."""

from __future__ import annotations

import asyncio
import gzip
import os
from pathlib import Path

import pytest
from aiohttp import web

from core.errors import NotSentError, RefusedError
from gateway.media import Content, Fetcher, Guard, MediaStore
from gateway.media.fetch import Fetched
from tests.support.media import cut_off, picture, serving, trusting

LIMIT = 4 << 20


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", reserve=0)


async def fetch(
    store: MediaStore, fetcher: Fetcher, url: str, message_type: str | None = None
) -> tuple[Content, Fetched]:
    async with store.draft(limit=LIMIT) as draft:
        told = await fetcher.fetch(url, draft, message_type=message_type)
        return await draft.keep(), told


async def refused(store: MediaStore, fetcher: Fetcher, url: str, message_type: str | None = None) -> str:
    with pytest.raises(RefusedError) as error:
        await fetch(store, fetcher, url, message_type)
    assert "secret" not in error.value.detail
    assert not any(path.is_file() for path in store.folder.rglob("*"))
    return error.value.code


async def test_a_file_comes_with_what_the_server_says_of_it(store: MediaStore) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        headers = {"Content-Disposition": 'attachment; filename="cat.png"'}
        return web.Response(body=picture(), content_type="image/png", headers=headers)

    async with serving(answer) as site:
        content, told = await fetch(store, site.fetcher(), site.url("/a?secret=1"))
        _, unnamed = await fetch(store, site.fetcher(), site.url("/dir/b.png"))
    assert content.path.read_bytes() == picture()
    assert told == Fetched("image/png", "cat.png")
    assert unnamed.filename == "cat.png"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "[::ffff:127.0.0.1]"])
async def test_our_own_network_is_refused_without_an_exception(store: MediaStore, host: str) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=b"internal")

    async with serving(answer) as site:
        code = await refused(store, Fetcher(ssl=trusting()), site.url("/secret", host))
    assert code == "media_private_address"
    assert site.requests == []


@pytest.mark.parametrize(
    "target",
    [
        "https://127.0.0.2:{port}/secret",
        "https://169.254.169.254/secret",
        "https://[::1]:{port}/secret",
        "https://10.0.0.1/",
    ],
)
async def test_a_redirect_to_our_own_network_is_refused(store: MediaStore, target: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": target.format(port=request.url.port)})

    async with serving(answer) as site:
        assert await refused(store, site.fetcher(), site.url("/start")) == "media_private_address"
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/x",
        "ftp://example.com/",
        "file:///etc/passwd",
        "//user:pw@example.com/",
        "https://",
        "::",
    ],
)
async def test_a_redirect_away_from_https_is_refused(store: MediaStore, location: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": location.format(port=request.url.port)})

    async with serving(answer) as site:
        assert await refused(store, site.fetcher(), site.url("/start")) in (
            "media_bad_url",
            "media_not_found",
        )
    assert len(site.requests) <= 4


async def test_redirects_are_followed_three_times_and_no_more(store: MediaStore) -> None:
    async def answer(request: web.Request) -> web.Response:
        left = int(request.path[1:])
        if left:
            return web.Response(status=301, headers={"Location": f"/{left - 1}"})
        return web.Response(body=b"here")

    async with serving(answer) as site:
        content, _ = await fetch(store, site.fetcher(), site.url("/3"))
        assert content.head == b"here"
        with pytest.raises(RefusedError, match="redirects more than 3 times"):
            await fetch(store, site.fetcher(), site.url("/4"))


@pytest.mark.parametrize(
    "url",
    ["http://example.com/a", "ftp://example.com/a", "https://", "https:///a", "https://user:pw@example.com/", "file:///a",
     "https://exa mple.com:99999/", "javascript:alert(1)", "data:text/plain,x", ""],
)  # fmt: skip
async def test_only_plain_https_addresses_are_taken(store: MediaStore, url: str) -> None:
    assert await refused(store, Fetcher(), url) == "media_bad_url"


async def test_too_large_is_refused_announced_or_not(store: MediaStore) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/announced":
            return await cut_off(request, b"x" * 2_000_000, after=10)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(200):
            await response.write(b"x" * 10_000)
        return response

    async with serving(answer) as site:
        for path in ("/announced", "/endless"):
            assert await refused(store, site.fetcher(size=1_000_000), site.url(path)) == "media_too_large"


async def test_a_compressed_answer_is_refused_not_unpacked(store: MediaStore) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(bytes(3_000_000)), headers={"Content-Encoding": "gzip"})

    async with serving(answer) as site:
        assert await refused(store, site.fetcher(), site.url("/bomb")) == "media_wrong_type"


async def test_a_web_page_instead_of_a_picture_is_refused_at_once(store: MediaStore) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="<html>log in</html>", content_type="text/html")

    async with serving(answer) as site:
        assert await refused(store, site.fetcher(), site.url("/p.png"), "image") == "media_wrong_type"
        content, _ = await fetch(store, site.fetcher(), site.url("/p.html"), "document")
    assert content.size == 19


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204])
async def test_what_is_not_there_is_refused(store: MediaStore, status: int) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with serving(answer) as site:
        assert await refused(store, site.fetcher(), site.url("/secret")) == "media_not_found"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_server_in_trouble_is_worth_another_try(store: MediaStore, status: int) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with serving(answer) as site:
        with pytest.raises(NotSentError) as error:
            await fetch(store, site.fetcher(), site.url("/secret"))
    assert error.value.code == "media_unreachable"
    assert "secret" not in error.value.detail


async def test_a_dropped_download_resumes_where_it_stopped(store: MediaStore) -> None:
    body = os.urandom(1_500_000)

    async def answer(request: web.Request) -> web.StreamResponse:
        stated = {"ETag": '"v1"', "Content-Type": "video/mp4"}
        if "Range" not in request.headers:
            return await cut_off(request, body, after=600_000, **stated)
        assert request.headers["If-Range"] == '"v1"'
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        stated["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return web.Response(status=206, body=body[start:], headers=stated)

    async with serving(answer) as site:
        content, told = await fetch(store, site.fetcher(), site.url("/film"))
    assert content.path.read_bytes() == body
    assert told.mime_type == "video/mp4"
    assert [r is None for _, r in site.requests] == [True, False]


async def test_a_file_that_changed_meanwhile_is_fetched_anew(store: MediaStore) -> None:
    old, new = os.urandom(900_000), os.urandom(700_000)

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            return await cut_off(request, old, after=300_000, ETag='"old"')
        return web.Response(body=new, headers={"ETag": '"new"'})

    async with serving(answer) as site:
        content, _ = await fetch(store, site.fetcher(), site.url("/film"))
    assert content.path.read_bytes() == new


async def test_without_a_version_it_starts_over_and_never_joins_two_files(store: MediaStore) -> None:
    bodies = [os.urandom(500_000), os.urandom(500_000)]

    async def answer(request: web.Request) -> web.StreamResponse:
        assert "Range" not in request.headers
        if len(site.requests) == 1:
            return await cut_off(request, bodies[0], after=200_000)
        return web.Response(body=bodies[1])

    async with serving(answer) as site:
        content, _ = await fetch(store, site.fetcher(), site.url("/film"))
    assert content.path.read_bytes() == bodies[1]


async def test_a_connection_that_always_breaks_is_given_up(store: MediaStore) -> None:
    body = bytes(500_000)

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            return await cut_off(request, body, after=100_000, ETag='"v1"')
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        response = web.StreamResponse(status=206)
        response.content_length = len(body) - start
        response.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        await response.prepare(request)
        await response.write(body[:100_000])
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        return response

    async with serving(answer) as site:
        with pytest.raises(NotSentError, match="could not be reached"):
            await fetch(store, site.fetcher(resumes=2), site.url("/film"))
    assert [asked for _, asked in site.requests] == [None, "bytes=100000-", "bytes=200000-"]


async def test_a_connection_that_gets_no_further_is_given_up(store: MediaStore) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await cut_off(request, bytes(500_000), after=100_000)

    async with serving(answer) as site:
        with pytest.raises(NotSentError, match="could not be reached"):
            await fetch(store, site.fetcher(resumes=9), site.url("/film"))
    assert len(site.requests) == 2


async def test_a_server_that_drips_or_hangs_is_given_up_in_time(store: MediaStore) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000000"})
        await response.prepare(request)
        while request.path == "/drip":
            await response.write(b"x")
            await asyncio.sleep(0.02)
        await asyncio.sleep(5)
        return response

    async with serving(answer) as site:
        for path, limits in (("/drip", {"total": 0.3}), ("/hang", {"read": 0.2, "total": 5})):
            with pytest.raises(NotSentError) as error:
                await fetch(store, site.fetcher(**limits), site.url(path))
            assert error.value.code == "media_unreachable"


async def test_an_unknown_name_and_a_closed_port_can_be_tried_again(store: MediaStore) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response()

    async with serving(answer) as site:
        pass
    for url in (site.url("/x"), "https://no-such-host.invalid/x"):
        with pytest.raises(NotSentError, match="could not be reached"):
            await fetch(store, site.fetcher(), url)


async def test_a_certificate_nobody_vouches_for_is_not_believed(store: MediaStore) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=b"x")

    async with serving(answer) as site:
        doubting = Fetcher(Guard(allow=[("127.0.0.1", site.port)]))
        with pytest.raises(NotSentError, match="certificate"):
            await fetch(store, doubting, site.url("/x"))
    assert site.requests == []


async def test_the_environments_proxy_is_not_used(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=b"direct")

    async with serving(answer) as site:
        content, _ = await fetch(store, site.fetcher(), site.url("/x"))
    assert content.head == b"direct"
