"""Messages from outside: proven by key or signature, converted, stored, or spooled while the database is away."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web
from pydantic import ConfigDict, Field

from core import log as logs
from core.channel import Converted, SessionContext, TenantId
from core.database import is_unavailable
from core.errors import DatabaseUnavailable, NotFound
from core.secrets import SecretError
from core.store import credentials, sessions
from gateway.api import auth
from gateway.api.body import parse, read_bytes, require_json
from gateway.api.models import NoBody, Query, View
from gateway.api.problems import Problem, unavailable
from gateway.api.routing import KEY, KEYS, TENANT, Call, Raw, Routes
from gateway.api.spool import context_of, convert

routes = Routes("webhook")
log = logs.get(part="webhook")

FRESH_SECONDS = 2.0
CACHE_SIZE = 4096


class WebhookError(View):
    index: int
    detail: str


class Received(View):
    received: Literal[True] = True
    stored: int
    duplicates: int
    spooled: int = Field(description="On disk until the database is back, then stored.")
    errors: list[WebhookError]


class AnyQuery(Query):
    """Providers add what they like."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Challenge(AnyQuery):
    mode: str = Field("", alias="hub.mode", max_length=50)
    verify_token: str = Field("", alias="hub.verify_token", max_length=500)
    challenge: str = Field("", alias="hub.challenge", max_length=500)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a session: enough to prove a sender and to convert, also while the database is away."""

    context: SessionContext
    secrets: dict[str, Any]
    at: float


class SessionCache:
    """The last look at each session that gets webhooks."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], Known] = OrderedDict()

    async def get(self, call: Call[Any, Any], tenant_id: int, session_id: int) -> Known | None:
        """None: there is no such session. Raises 503 when that cannot be known."""
        key = (tenant_id, session_id)
        known = self._known.get(key)
        if known is not None and time.monotonic() - known.at < FRESH_SECONDS:
            return known
        try:
            async with call.db.worker() as conn:
                session = await sessions.get(conn, tenant_id, session_id)
                secrets = await credentials.get(
                    conn, call.services.keys, tenant_id=tenant_id, session_id=session_id
                )
        except NotFound:
            self._known.pop(key, None)
            return None
        except SecretError as error:
            log.error("webhook.secrets_unreadable", session_id=session_id, error=error.detail)
            secrets = {}
        except Exception as error:
            if not is_unavailable(error):
                raise
            if known is not None:
                return known
            raise unavailable(
                "the database cannot be reached, and this session was not seen since the start: send it again soon"
            ) from error
        known = Known(context_of(session), secrets, time.monotonic())
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        return known


CACHE: web.AppKey[SessionCache] = web.AppKey("webhook_sessions", SessionCache)


@routes.add(
    "POST",
    "/webhook/{tenant_id}/{session_id}",
    access="own",
    scope="sessions",
    returns={200: Received},
    problems=(401, 403),
    raw_body="A Baileys object, a list of them or `{messages: […]}`; a WhatsApp Cloud API notification; a Telegram update.",
    while_suspended=True,
    headers=(
        ("X-Hub-Signature-256", "`sha256=` and the HMAC of the body with the session's `app_secret`."),
        ("X-Telegram-Bot-Api-Secret-Token", "The session's `webhook_secret`."),
    ),
)
async def receive(call: Call[AnyQuery, NoBody]) -> Received:
    """Take messages from outside.

    Good messages are stored, bad ones named by index; 422 only when all are bad. While the database is away they are
    spooled to disk and received all the same.
    """
    tenant_id, session_id = call.id("tenant_id"), call.id("session_id")
    require_json(call.request)
    raw = await read_bytes(call.request)
    known = await _proven(call, tenant_id, session_id, raw)
    call.request[TENANT] = tenant_id
    body = parse(raw, nul="drop")
    converted = convert(call.services.registry, known.context, body)
    errors = [WebhookError(index=index, detail=detail) for index, detail in converted.errors]
    if errors and not (converted.messages or converted.updates or converted.ignored):
        raise Problem(
            422,
            "nothing_usable",
            f"none of the messages can be used; the first: {errors[0].detail}",
            errors=[{"field": str(error.index), "detail": error.detail} for error in errors],
        )
    if not (converted.messages or converted.updates):
        return Received(stored=0, duplicates=0, spooled=0, errors=errors)
    spool = call.services.spool
    if call.db.connected and not spool.holds(tenant_id, session_id):
        try:
            stored = await spool.store(converted)
        except DatabaseUnavailable as error:
            log.warning("webhook.database_away", session_id=session_id, action="spooling", error=error.detail)
        else:
            duplicates = sum(one.duplicate for one in stored)
            return Received(stored=len(stored) - duplicates, duplicates=duplicates, spooled=0, errors=errors)
    await spool.append(tenant_id, session_id, body)
    return Received(stored=0, duplicates=0, spooled=_count(converted), errors=errors)


def _count(converted: Converted) -> int:
    return len(converted.messages) + len(converted.updates)


async def _proven(call: Call[Any, Any], tenant_id: int, session_id: int, raw: bytes) -> Known:
    """The session, once the sender has shown a key, a signature or a secret of it."""
    cache = call.request.app[CACHE]
    key = auth.bearer(call.request)
    if key is not None:
        await _check_key(call, key, tenant_id)
        known = await cache.get(call, tenant_id, session_id)
        if known is None:
            raise await _missing(call, session_id)
        return known
    headers = call.request.headers
    signature, token = headers.get("X-Hub-Signature-256"), headers.get("X-Telegram-Bot-Api-Secret-Token")
    if signature is None and token is None:
        raise auth.unauthenticated(
            "send a key (Authorization: Bearer …) or sign the body (X-Hub-Signature-256)"
        )
    known = await cache.get(call, tenant_id, session_id)
    secrets = known.secrets if known is not None else {}
    if signature is not None:
        secret = secrets.get("app_secret")
        expected = _signature(secret if isinstance(secret, str) else "", raw)
        proven = isinstance(secret, str) and bool(secret) and _same(signature, expected)
    else:
        secret = secrets.get("webhook_secret")
        proven = isinstance(secret, str) and bool(secret) and _same(token or "", secret)
    if known is None or not proven:
        # The same answer for a session that does not exist: ids are not for guessing.
        name = "app_secret" if signature is not None else "webhook_secret"
        raise auth.unauthenticated(f"it does not fit; check the session's {name}")
    return known


async def _check_key(call: Call[Any, Any], key: str, tenant_id: int) -> None:
    principal = await call.request.app[KEYS].principal(key, offline=True)
    call.principal = principal
    call.request[KEY] = principal.key_id
    if not call.route.scopes & principal.scopes:
        raise await call.deny(403, "missing_scope", "route", call.route.path)
    if not principal.platform and principal.tenant_id != tenant_id:
        raise await call.deny(403, "other_tenant", "tenant", tenant_id)
    call.tenant = TenantId(tenant_id)


async def _missing(call: Call[Any, Any], session_id: int) -> Problem:
    """404, with the audit row when the session is another tenant's."""
    try:
        await call.own("session", "et_channel_sessions", session_id)
    except Problem as problem:
        return problem
    return Problem(404, "not_found", "there is no such session here")


def _signature(secret: str, raw: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(
        one.encode("utf-8", "surrogateescape"), other.encode("utf-8", "surrogateescape")
    )


@routes.add(
    "GET",
    "/webhook/{tenant_id}/{session_id}",
    access="own",
    returns={200: Raw({"text/plain": "`hub.challenge` as it came."})},
    problems=(403,),
    while_suspended=True,
)
async def verify(call: Call[Challenge, NoBody]) -> web.Response:
    """The Cloud API's verification challenge, answered when `hub.verify_token` is the session's."""
    known = await call.request.app[CACHE].get(call, call.id("tenant_id"), call.id("session_id"))
    expected = known.secrets.get("verify_token") if known is not None else None
    query = call.query
    good = isinstance(expected, str) and bool(expected) and _same(query.verify_token, expected)
    if query.mode != "subscribe" or not good:
        raise Problem(403, "verification_failed", "hub.mode or hub.verify_token does not fit this session")
    return web.Response(text=query.challenge, content_type="text/plain")
