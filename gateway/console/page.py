"""Around every page: who asks, may they, is the form theirs; and every error as a page that says what to do.

Holds no page of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import aiohttp_jinja2
import asyncpg
from aiohttp import web
from asyncpg import Record

from core import log as logs
from core.channel import ChannelKind
from core.database import Database, is_unavailable
from core.errors import GatewayError, NotFound
from core.secrets import KeyRing
from core.store import audit, tenants
from core.store.sessions import SessionRow
from gateway.console import words
from gateway.console.access import COOKIE, FormGuard, Notice, Principal, Scope, Visitor, Visitors, same

if TYPE_CHECKING:
    from gateway.console.files import Media

log = logs.get(part="console")

Authenticate = Callable[[str], Awaitable[Principal]]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
MAX_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Console:
    """What the pages need of the process."""

    db: Database
    authenticate: Authenticate
    visitors: Visitors
    kinds: Mapping[str, ChannelKind]
    """Those that a session can be added for."""
    keys: KeyRing
    """Seals credentials that are entered here."""
    media: Media | None = None
    guard: FormGuard = field(default_factory=FormGuard)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server stops: open streams end."""

    def pairs(self, channel: str) -> bool:
        """Whether a phone is linked to sessions of this channel; others log in with credentials."""
        kind = self.kinds.get(channel)
        return kind is not None and kind.check_credentials is None

    def standing(self, session: SessionRow) -> words.Standing:
        return words.standing(session, pairs=self.pairs(session.channel_type))


CONSOLE: web.AppKey[Console] = web.AppKey("console", Console)


class PageError(Exception):
    """Ends a handler with an error page. `detail` says what to do."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail


@dataclass(slots=True)
class Page:
    """One request of somebody who is signed in. `tenant` is set on every path that names one."""

    request: web.Request
    console: Console
    visitor: Visitor
    tenant: Record | None
    form: dict[str, str]

    @property
    def db(self) -> Database:
        return self.console.db

    @property
    def tenant_id(self) -> int:
        assert self.tenant is not None
        return int(self.tenant["id"])

    @property
    def zone(self) -> ZoneInfo:
        return words.zone(self.request.cookies.get("tz"))

    @property
    def base(self) -> str:
        return f"/console/{self.tenant_id}"

    @property
    def htmx(self) -> bool:
        return "HX-Request" in self.request.headers

    def id(self, name: str) -> int:
        """A number of the path. Raises the 404 page for one that no row can have."""
        return _id(self.request, name)

    def context(self, **more: Any) -> dict[str, Any]:
        return {
            "visitor": self.visitor,
            "tenant": self.tenant,
            "base": self.base if self.tenant is not None else None,
            "zone": self.zone,
            **more,
        }

    def text(self, template: str, **context: Any) -> str:
        return aiohttp_jinja2.render_string(template, self.request, self.context(**context))

    def show(self, template: str, *, status: int = 200, **context: Any) -> web.Response:
        context.setdefault("notice", self.visitor.take_notice())
        return html(self.text(template, **context), status)

    def go(self, url: str, notice: str | None = None) -> web.Response:
        """See other: a reload must not post again."""
        if notice is not None:
            self.visitor.notice = Notice(notice)
        if self.htmx:
            return web.Response(status=200, headers={"HX-Redirect": url})
        return web.Response(status=303, headers={"Location": url})

    async def audit(self, event: audit.Event, subject: str, subject_id: int) -> None:
        async with self.db.tenant(self.tenant_id) as conn:
            await audit.write(
                conn,
                event,
                tenant_id=self.tenant_id,
                actor=self.visitor.actor,
                subject_type=subject,
                subject_id=subject_id,
            )


Handler = Callable[[Page], Awaitable[web.StreamResponse]]
Plain = Callable[[web.Request], Awaitable[web.StreamResponse]]


def html(text: str, status: int = 200) -> web.Response:
    return web.Response(
        text=text, status=status, content_type="text/html", headers={"Content-Security-Policy": POLICY}
    )


def page(handler: Handler, scope: Scope | None) -> Plain:
    """A handler for somebody signed in whose key has this scope, in the tenant of the path if it names one."""

    async def run(request: web.Request) -> web.StreamResponse:
        console = request.app[CONSOLE]
        visitor = await console.visitors.find(request.cookies.get(COOKIE))
        if visitor is None:
            return _to_sign_in(request)
        form = await _form(request, visitor) if request.method == "POST" else {}
        tenant = await _tenant(request, console, visitor) if "tenant" in request.match_info else None
        if scope is not None and not visitor.may(scope):
            await deny(request, visitor, "missing_scope")
            raise PageError(
                403,
                "Your key may not do this",
                f"It takes a key with the scope “{scope}”. Ask whoever gave you the key for another one.",
            )
        return await handler(Page(request, console, visitor, tenant, form))

    return plain(run)


def plain(handler: Plain) -> Plain:
    """Errors as pages; for handlers that look after the rest themselves."""

    async def run(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception as error:
            return await error_page(request, _explained(error))

    return run


async def error_page(request: web.Request, error: PageError) -> web.Response:
    # Nothing here may ask the database: it may be what is away.
    context = {"error": error, "visitor": None, "tenant": None, "base": None, "notice": None, "zone": None}
    response = html(aiohttp_jinja2.render_string("error.html", request, context), error.status)
    if "HX-Request" in request.headers:
        response.headers["HX-Retarget"] = "body"
        response.headers["HX-Reswap"] = "innerHTML"
    return response


def _explained(error: Exception) -> PageError:
    if isinstance(error, PageError):
        return error
    if is_unavailable(error):
        return PageError(
            503,
            "The database cannot be reached",
            "Nothing was changed, and messages that arrive meanwhile are kept. Reload this page in a few seconds.",
        )
    if isinstance(error, NotFound):
        return PageError(
            404, "There is no such thing here", f"{words.sentence(error.detail)} It may have been removed."
        )
    if isinstance(error, GatewayError):
        return PageError(409, "That cannot be done now", words.sentence(error.action or error.detail))
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return PageError(413, "That is too long", "Send less at a time.")
    if isinstance(error, asyncpg.RaiseError | asyncpg.ObjectNotInPrerequisiteStateError):
        # Texts of our own functions, meant for people.
        return PageError(409, "That cannot be done now", words.sentence(str(error).splitlines()[0]))
    if isinstance(error, asyncpg.DataError | asyncpg.IntegrityConstraintViolationError):
        return PageError(422, "That cannot be stored", "Check what you entered and try again.")
    log.error("console.failed", error=repr(error)[:500], exc_info=error)
    return PageError(
        500,
        "This is a fault of the gateway",
        "Nothing you did wrong. Its log says more; report what it says.",
    )


async def fields(request: web.Request) -> dict[str, str]:
    """What a form of ours posted. Raises the 415 or 422 page for anything that no form of ours sends."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise PageError(
            415, "That is not a form of this console", "For programs there is the API: see /docs."
        )
    try:
        posted = await request.post()
    except (ValueError, LookupError):  # an encoding that does not fit, or that nobody knows
        raise PageError(422, "This form could not be read", "Go back, reload the page, try again.") from None
    return {name: value for name, value in posted.items() if isinstance(value, str)}


async def _form(request: web.Request, visitor: Visitor) -> dict[str, str]:
    form = await fields(request)
    if not same(form.get("csrf", ""), visitor.csrf):
        raise PageError(
            403,
            "This form is out of date",
            "You signed in again since it was opened. Go back, reload the page, try again.",
        )
    return form


async def _tenant(request: web.Request, console: Console, visitor: Visitor) -> Record:
    tenant_id = _id(request, "tenant")
    if visitor.tenant_id is not None and visitor.tenant_id != tenant_id:
        await deny(request, visitor, "other_tenant", tenant_id)
        raise PageError(
            403,
            "This is another tenant’s",
            "Your key belongs to one tenant, and this page to another. Go back to yours.",
        )
    if visitor.suspended:
        raise PageError(
            403,
            "This tenant is suspended",
            "Messages are still stored, but nothing is sent. Ask the platform’s operator.",
        )
    async with console.db.worker() as conn:
        tenant = await tenants.read_tenant(conn, tenant_id)
    if tenant is None:
        raise NotFound(f"tenant {tenant_id} does not exist")
    return tenant


async def deny(request: web.Request, visitor: Visitor, reason: str, tenant_id: int | None = None) -> None:
    """The audit row of a refusal, in the log of the tenant whose key it was."""
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else request.path
    log.warning("access.denied", action=f"{request.method} {route}", result=reason, key_id=visitor.key_id)
    async with request.app[CONSOLE].db.worker() as conn:
        await audit.write(
            conn,
            "access_denied",
            tenant_id=visitor.tenant_id,
            actor=visitor.actor,
            subject_type="tenant" if tenant_id is not None else "page",
            subject_id=tenant_id,
            detail={"reason": reason, "method": request.method, "route": route},
        )


def _id(request: web.Request, name: str) -> int:
    value = int(request.match_info[name])  # the route takes digits only
    if value > MAX_ID:
        raise NotFound(f"{name} {value} does not exist")
    return value


def _to_sign_in(request: web.Request) -> web.Response:
    if "text/event-stream" in request.headers.get("Accept", ""):
        return web.Response(status=401)
    # Only what was looked at comes back after signing in, never what was posted.
    path = request.path_qs if request.method == "GET" else ""
    url = f"/?next={quote(path, safe='/')}" if path.startswith("/console") else "/"
    if "HX-Request" in request.headers:
        return web.Response(status=401, headers={"HX-Redirect": "/"})
    return web.Response(status=303, headers={"Location": url})


def local(path: str | None) -> str | None:
    """A path of the console to go on to, or None: never another site."""
    if path is None or not path.startswith("/console") or any(c in path for c in "\\\r\n"):
        return None
    return path
