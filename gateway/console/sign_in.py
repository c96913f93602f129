"""Signing in and out, and choosing a tenant. The key is in one POST and nowhere else: no page, no address, no cookie."""

from __future__ import annotations

from datetime import UTC, datetime

import aiohttp_jinja2
from aiohttp import web

from core import log as logs
from core.store import leases, tenants
from gateway.console.access import COOKIE, FORM_COOKIE, LIFE_SECONDS, SignInRefused, Visitor
from gateway.console.page import CONSOLE, Page, PageError, fields, html, local

log = logs.get(part="console")

TENANTS_SHOWN = 500
ALIVE_SECONDS = 30.0
"""A gateway says every 10 s that it lives; after this long without a word its sessions may be taken."""


async def front(request: web.Request) -> web.StreamResponse:
    """`/`: the form, or straight on for somebody who is signed in."""
    console = request.app[CONSOLE]
    visitor = await console.visitors.find(request.cookies.get(COOKIE))
    if visitor is not None:
        return web.Response(status=303, headers={"Location": _home(visitor)})
    return _form(request, going_to=local(request.query.get("next")))


async def sign_in(request: web.Request) -> web.StreamResponse:
    console = request.app[CONSOLE]
    form = await fields(request)
    going_to = local(form.get("next"))
    if not console.guard.matches(request.cookies.get(FORM_COOKIE), form.get("csrf", "")):
        return _form(
            request,
            going_to=going_to,
            status=403,
            error="This form had grown old, or your browser refuses cookies. Please try again.",
        )
    key = form.get("key", "").strip()
    if not key:
        return _form(request, going_to=going_to, status=422, error="Enter an API key.")
    try:
        principal = await console.authenticate(key)
    except SignInRefused as refused:
        log.warning("console.sign_in_refused", result=refused.status)
        return _form(request, going_to=going_to, status=refused.status, error=refused.detail)
    token = console.visitors.enter(principal)
    log.info("console.signed_in", key_id=principal.key_id, tenant_id=principal.tenant_id)
    home = "/console" if principal.tenant_id is None else f"/console/{principal.tenant_id}"
    response = web.Response(status=303, headers={"Location": going_to or home})
    _set(request, response, COOKIE, token)
    response.del_cookie(FORM_COOKIE, path="/")
    return response


async def sign_out(page: Page) -> web.StreamResponse:
    token = page.request.cookies.get(COOKIE)
    if token is not None:
        page.console.visitors.leave(token)
    response = web.Response(status=303, headers={"Location": "/"})
    response.del_cookie(COOKIE, path="/")
    return response


async def choose(page: Page) -> web.StreamResponse:
    """`/console`: a tenant's own key goes on at once."""
    if page.visitor.tenant_id is not None:
        return page.go(_home(page.visitor))
    async with page.db.worker() as conn:
        rows = await tenants.list_tenants(conn, None, TENANTS_SHOWN)
        gateways = await leases.gateways(conn, alive_seconds=ALIVE_SECONDS)
    now = datetime.now(UTC)
    return page.show(
        "tenants.html",
        tenants=rows,
        more=len(rows) == TENANTS_SHOWN,
        gateways=[
            {**row, "silent": max(0, round((now - row["heartbeat_at"]).total_seconds()))} for row in gateways
        ],
    )


async def create_tenant(page: Page) -> web.StreamResponse:
    """For the first start, when there is none."""
    if not page.visitor.platform:
        raise PageError(403, "Your key may not do this", "Only a platform key makes tenants.")
    name = page.form.get("name", "").strip()
    if not 1 <= len(name) <= 200:
        raise PageError(422, "A tenant needs a name", "Enter one of 1 to 200 characters.")
    async with page.db.worker() as conn:
        row = await tenants.create_tenant(conn, name, {})
    log.info("tenant.created", tenant_id=row["id"], key_id=page.visitor.key_id)
    return page.go(f"/console/{row['id']}", "The tenant is there. Add its first channel.")


def _form(
    request: web.Request, *, going_to: str | None, status: int = 200, error: str | None = None
) -> web.Response:
    cookie, field = request.app[CONSOLE].guard.issue()
    context = {
        "csrf": field,
        "going_to": going_to,
        "error": error,
        "visitor": None,
        "tenant": None,
        "notice": None,
    }
    response = html(aiohttp_jinja2.render_string("sign_in.html", request, context), status)
    _set(request, response, FORM_COOKIE, cookie, seconds=3600)
    return response


def _set(
    request: web.Request, response: web.Response, name: str, value: str, *, seconds: float = LIFE_SECONDS
) -> None:
    proxied = request.headers.get("X-Forwarded-Proto", "").split(",")[0].strip()
    response.set_cookie(
        name,
        value,
        path="/",
        max_age=int(seconds),
        httponly=True,
        samesite="Strict",
        secure=request.secure or proxied == "https",
    )


def _home(visitor: Visitor) -> str:
    return "/console" if visitor.tenant_id is None else f"/console/{visitor.tenant_id}"
