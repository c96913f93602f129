"""The console's routes, put into the gateway's one application beside the API's."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from pathlib import Path

import aiohttp_jinja2
import jinja2
from aiohttp import web

from core.channel import ChannelKind
from core.database import Database
from core.secrets import KeyRing
from gateway.console import adding, channels, conversations, files, outbox, sign_in, words
from gateway.console.access import Visitors
from gateway.console.page import CONSOLE, Authenticate, Console, PageError, Plain, error_page, page, plain

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
_TENANT = r"/console/{tenant:\d{1,19}}"
_SESSION = _TENANT + r"/channels/{session:\d{1,19}}"
_ITEM = _TENANT + r"/outbox/{item:\d{1,19}}"
_THREAD = _TENANT + r"/threads/{thread:\d{1,19}}"


def install(
    app: web.Application,
    *,
    db: Database,
    authenticate: Authenticate,
    kinds: Mapping[str, ChannelKind],
    keys: KeyRing,
    media: files.Media | None = None,
) -> None:
    """Add the console to an application. `authenticate` proves an API key or raises `SignInRefused`; `kinds` are the
    channels that a session can be added for, `keys` seal what is entered here."""
    app[CONSOLE] = console = Console(db, authenticate, Visitors(db), kinds, keys, media)
    assets = _Assets()
    aiohttp_jinja2.setup(
        app,
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment = aiohttp_jinja2.get_env(app)
    environment.globals.update(asset=assets.url, words=words)

    for method, path, handler in _routes():
        app.router.add_route(method, path, handler)
    app.router.add_get("/console/static/{name:.+}", assets.serve)
    app.router.add_get("/favicon.ico", assets.icon)
    app.router.add_route("*", "/console/{rest:.*}", plain(_nowhere))

    async def close_streams(_: web.Application) -> None:
        console.closing.set()

    app.on_shutdown.append(close_streams)


def _routes() -> list[tuple[str, str, Plain]]:
    listing, one = channels.listing, channels.one
    messages, threads = conversations.messages, conversations.threads
    return [
        ("GET", "/", plain(sign_in.front)),
        ("POST", "/console/sign-in", plain(sign_in.sign_in)),
        ("POST", "/console/sign-out", page(sign_in.sign_out, None)),
        ("GET", "/console", page(sign_in.choose, "read")),
        ("POST", "/console/tenants", page(sign_in.create_tenant, "admin")),
        ("GET", _TENANT, page(listing.show, "read")),
        ("GET", _TENANT + "/stream", page(listing.stream, "read")),
        ("GET", _TENANT + "/channels/new", page(adding.new, "sessions")),
        ("POST", _TENANT + "/channels", page(adding.create, "sessions")),
        ("GET", _SESSION, page(channels.show_one, "read")),
        ("GET", _SESSION + "/stream", page(one.stream, "read")),
        ("GET", _SESSION + "/credentials", page(adding.credentials_form, "sessions")),
        ("POST", _SESSION + "/credentials", page(adding.change_credentials, "sessions")),
        ("POST", _SESSION + "/pair", page(channels.pair, "sessions")),
        ("POST", _SESSION + "/pair-by-code", page(channels.pair_by_code, "sessions")),
        ("POST", _SESSION + "/connect", page(channels.connect, "sessions")),
        ("POST", _SESSION + "/disconnect", page(channels.disconnect, "sessions")),
        ("GET", _SESSION + "/log-out", page(channels.confirm_logout, "sessions")),
        ("POST", _SESSION + "/log-out", page(channels.logout, "sessions")),
        ("GET", _TENANT + "/outbox", page(outbox.listing.show, "read")),
        ("GET", _TENANT + "/outbox/stream", page(outbox.listing.stream, "read")),
        ("GET", _ITEM, page(outbox.one.show, "read")),
        ("GET", _ITEM + "/stream", page(outbox.one.stream, "read")),
        ("POST", _ITEM + "/send-again", page(outbox.send_again, "admin")),
        ("POST", _ITEM + "/arrived", page(outbox.arrived, "admin")),
        ("POST", _ITEM + "/give-up", page(outbox.give_up, "admin")),
        ("GET", _TENANT + "/messages", page(messages.show, "read")),
        ("GET", _TENANT + "/messages/stream", page(messages.stream, "read")),
        ("GET", _TENANT + r"/messages/{message:\d{1,19}}/file", page(files.serve, "read")),
        ("GET", _TENANT + "/threads", page(threads.show, "read")),
        ("GET", _TENANT + "/threads/stream", page(threads.stream, "read")),
        ("GET", _THREAD, page(conversations.thread, "read")),
        ("GET", _THREAD + "/stream", page(conversations.thread_stream, "read")),
        ("POST", _THREAD + "/reply", page(conversations.reply, "send")),
        ("POST", _THREAD + "/take-over", page(conversations.take_over, "send")),
        ("POST", _THREAD + "/give-back", page(conversations.give_back, "send")),
    ]


async def _nowhere(request: web.Request) -> web.StreamResponse:
    raise PageError(404, "There is no such page", "Check the address, or start from the beginning.")


class _Assets:
    """Static files, read once. Their addresses change with their content, so browsers keep them for good."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str]] = {}
        self._urls: dict[str, str] = {}
        for path in sorted(_STATIC.rglob("*")):
            if path.is_file():
                name = path.relative_to(_STATIC).as_posix()
                body = path.read_bytes()
                kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
                self._files[name] = body, kind
                self._urls[name] = f"/console/static/{name}?v={hashlib.sha256(body).hexdigest()[:12]}"

    def url(self, name: str) -> str:
        return self._urls[name]

    async def serve(self, request: web.Request) -> web.StreamResponse:
        found = self._files.get(request.match_info["name"])
        if found is None:
            return await error_page(request, PageError(404, "There is no such file", "Reload the page."))
        body, kind = found
        return self._file(body, kind, "public, max-age=31536000, immutable")

    async def icon(self, request: web.Request) -> web.StreamResponse:
        del request
        return self._file(*self._files["icon.svg"], "public, max-age=86400")

    @staticmethod
    def _file(body: bytes, kind: str, cache: str) -> web.Response:
        text = kind.startswith("text/") or kind.endswith(("javascript", "svg+xml"))
        return web.Response(
            body=body, content_type=kind, charset="utf-8" if text else None, headers={"Cache-Control": cache}
        )
