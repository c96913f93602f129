"""The route table: what a handler is called with, what it answers, who may call it. OpenAPI and the walls read it too.

A handler sees only a request whose key, scope, tenant, subject, query and body were already checked here.
"""

from __future__ import annotations

import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, TypeAdapter

from core.audit_trail import AuditTrail
from core.channel import TenantId
from core.database import Database
from core.store import tenants
from gateway.api import auth
from gateway.api.auth import Principal, Scope
from gateway.api.body import parse, read_bytes, require_json, validate, validate_query
from gateway.api.models import MAX_ID, NoBody, NoQuery
from gateway.api.problems import Problem, invalid, not_found
from gateway.api.services import Services

Q = TypeVar("Q", bound=BaseModel)
B = TypeVar("B", bound=BaseModel)

SERVICES: web.AppKey[Services] = web.AppKey("services", Services)
KEYS: web.AppKey[auth.Keys] = web.AppKey("keys", auth.Keys)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
TENANT: web.RequestKey[int | None] = web.RequestKey("tenant_id")
STARTED: web.RequestKey[bool] = web.RequestKey("started", bool)
"""The answer has begun to go out: another one cannot be given any more."""
KEY: web.RequestKey[int] = web.RequestKey("key_id", int)

Access = Literal["open", "own", "platform", "path", "body", "query", "subject"]
"""Whose tenant a call acts on: nobody's (`open`), the handler finds out (`own`), the platform alone, the path's
`{tenant_id}`, the body's or the query's `tenant_id`, or that of the object in the path (`subject`)."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An object in the path: its name in messages, its path parameter, its table."""

    name: str
    parameter: str
    table: tenants.OwnedTable


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer that is not JSON: media type to what it is."""

    content: Mapping[str, str]
    description: str = ""


@dataclass(frozen=True, eq=False)
class Route:
    method: str
    path: str
    handler: Callable[[Any], Awaitable[Any]]
    access: Access
    scopes: frozenset[Scope]
    returns: Mapping[int, Any]
    """Status to a type (JSON), `Raw`, or None (no body)."""
    tag: str
    subject: Subject | None = None
    problems: frozenset[int] = frozenset()
    query: type[BaseModel] = NoQuery
    body: type[BaseModel] = NoBody
    raw_body: str | None = None
    """The handler reads the body itself; what it may be."""
    while_suspended: bool = False
    """Served for a suspended tenant too."""
    tenant_optional: bool = False
    """A platform key that names no tenant acts on the platform itself."""
    headers: tuple[tuple[str, str], ...] = ()
    """Request headers that matter, for the document: name and meaning."""
    raw_types: tuple[str, ...] = ("application/json",)
    """Content types of `raw_body`."""

    @cached_property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().partition("\n")[0].rstrip(".")

    @cached_property
    def description(self) -> str:
        lines = (self.handler.__doc__ or "").strip().partition("\n")[2]
        return "\n".join(line.strip() for line in lines.strip().splitlines())

    @cached_property
    def name(self) -> str:
        return self.handler.__name__

    @cached_property
    def adapters(self) -> dict[int, TypeAdapter[Any]]:
        return {
            status: TypeAdapter(kind)
            for status, kind in self.returns.items()
            if kind is not None and not isinstance(kind, Raw)
        }

    @property
    def status(self) -> int:
        """What a plain return value means."""
        return min(self.returns)


@dataclass(slots=True)
class Call(Generic[Q, B]):
    """One request, checked."""

    request: web.Request
    services: Services
    route: Route
    principal: Principal | None = None
    tenant: TenantId | None = None
    query: Q = field(init=False)
    body: B = field(init=False)

    @property
    def db(self) -> Database:
        return self.services.db

    @property
    def request_id(self) -> str:
        return self.request[REQUEST_ID]

    @property
    def caller(self) -> Principal:
        assert self.principal is not None, "an open route has no caller"
        return self.principal

    @property
    def tenant_id(self) -> TenantId:
        assert self.tenant is not None, "this route names no tenant"
        return self.tenant

    def id(self, parameter: str) -> int:
        """An id of the path. Text that can be no id names nothing: 404."""
        text = self.request.match_info[parameter]
        if not (text.isascii() and text.isdigit() and len(text) <= 19 and 1 <= int(text) <= MAX_ID):
            raise not_found(parameter.removesuffix("_id"))
        return int(text)

    async def own(self, name: str, table: tenants.OwnedTable, object_id: int) -> None:
        """An id in a body or query must be of this tenant, or it names nothing: 404, with an audit row if another's."""
        async with self.db.worker() as conn:
            found = await tenants.owner_of(conn, table, object_id)
        if found is None or (found.tenant_id != self.tenant_id and self.caller.platform):
            raise not_found(name)
        if found.tenant_id != self.tenant_id:
            raise await self.deny(404, "other_tenant", name, object_id)

    async def deny(self, status: int, reason: str, subject_type: str, subject_id: object = None) -> Problem:
        """Write the audit row of a denial; returns the problem to raise."""
        await auth.record_denial(
            self.services.audit or AuditTrail(self.db),
            self.caller,
            reason=reason,
            subject_type=subject_type,
            subject_id=None if subject_id is None else str(subject_id)[:200],
            method=self.route.method,
            route=self.route.path,
            request_id=self.request_id,
        )
        if status == 404:
            return not_found(subject_type)
        details = {
            "missing_scope": f"the key lacks the scope {' or '.join(sorted(self.route.scopes))}; use one that has it",
            "other_tenant": "the key belongs to another tenant; use a key of this tenant",
            "platform_only": "this needs a platform key",
        }
        return Problem(status, reason, details.get(reason, "not allowed"))


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with a status or headers of its own."""

    status: int
    value: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call[Any, Any]], Awaitable[Any]]
ROUTES: web.AppKey[Sequence[Route]] = web.AppKey("routes")


class Routes:
    """A table of routes; one per resource module, joined by `gateway.api.app`."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.table: list[Route] = []

    def add(
        self,
        method: str,
        path: str,
        *,
        access: Access,
        scope: Scope | tuple[Scope, ...] = (),
        returns: Mapping[int, Any],
        subject: Subject | None = None,
        problems: tuple[int, ...] = (),
        raw_body: str | None = None,
        while_suspended: bool = False,
        tenant_optional: bool = False,
        headers: tuple[tuple[str, str], ...] = (),
        raw_types: tuple[str, ...] = ("application/json",),
    ) -> Callable[[Handler], Handler]:
        """The models of query and body are read from the handler's own annotation: `call: Call[Query, Body]`."""

        def register(handler: Handler) -> Handler:
            query, body = typing.get_args(typing.get_type_hints(handler)["call"])
            self.table.append(
                Route(
                    method,
                    path,
                    handler,
                    access,
                    frozenset((scope,) if isinstance(scope, str) else scope),
                    returns,
                    self.tag,
                    subject,
                    frozenset(problems),
                    query,
                    body,
                    raw_body,
                    while_suspended,
                    tenant_optional,
                    headers,
                    raw_types,
                )
            )
            return handler

        return register


def endpoint(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler of a route: check, call, answer."""

    async def handle(request: web.Request) -> web.StreamResponse:
        call: Call[Any, Any] = Call(request, request.app[SERVICES], route)
        if route.access != "open":
            call.principal = await _authenticate(call)
            if call.principal is not None:
                request[KEY] = call.principal.key_id
        call.query = validate_query(route.query, request)
        document = await _document(call)
        await _authorize(call, document)
        request[TENANT] = call.tenant
        if route.body is not NoBody:
            call.body = validate(route.body, document)
        result = await route.handler(call)
        return answer(route, result)

    return handle


def answer(route: Route, result: Any) -> web.StreamResponse:
    if isinstance(result, web.StreamResponse):
        return result
    reply = result if isinstance(result, Reply) else Reply(route.status, result)
    adapter = route.adapters.get(reply.status)
    if adapter is None:
        return web.Response(status=reply.status, headers=reply.headers)
    return web.Response(
        status=reply.status,
        body=adapter.dump_json(reply.value, by_alias=True),
        content_type="application/json",
        headers=reply.headers,
    )


async def _authenticate(call: Call[Any, Any]) -> Principal | None:
    key = auth.bearer(call.request)
    if key is None:
        if call.route.access == "own":
            return None
        raise auth.unauthenticated("a key is needed: send Authorization: Bearer <key>")
    if call.route.access == "own":
        return None  # the handler knows other proofs than keys, and asks for itself
    return await call.request.app[KEYS].principal(key)


async def _document(call: Call[Any, Any]) -> Any:
    if call.route.body is NoBody:
        return None
    require_json(call.request)
    return parse(await read_bytes(call.request))


async def _authorize(call: Call[Any, Any], document: Any) -> None:
    """Scope, then tenant, then the object; each denial leaves its audit row."""
    route = call.route
    if route.access in ("open", "own"):
        return
    caller = call.caller
    if route.scopes and not route.scopes & caller.scopes:
        raise await call.deny(403, "missing_scope", "route", route.path)
    match route.access:
        case "platform":
            if not caller.platform:
                raise await call.deny(403, "platform_only", "route", route.path)
        case "path":
            await _act_on(call, call.id("tenant_id"))
        case "body":
            await _named_tenant(call, _tenant_of(document), "needed with a platform key")
        case "query":
            await _named_tenant(
                call, getattr(call.query, "tenant_id", None), "needed with a platform key: ?tenant_id="
            )
    if route.subject is not None:
        await _find_subject(call, route.subject)


def _tenant_of(document: Any) -> int | None:
    """Looked at before the body is checked as a whole: whose tenant it is comes first. A wrong one fails that check."""
    named = document.get("tenant_id") if isinstance(document, dict) else None
    return named if type(named) is int and 1 <= named <= MAX_ID else None


async def _named_tenant(call: Call[Any, Any], named: int | None, needed: str) -> None:
    if named is None:
        named = call.caller.tenant_id
    if named is not None:
        await _act_on(call, named)
    elif not call.route.tenant_optional:
        raise invalid("tenant_id", needed)


async def _act_on(call: Call[Any, Any], tenant_id: int) -> None:
    caller = call.caller
    if caller.tenant_id is not None:
        if caller.tenant_id != tenant_id:
            raise await call.deny(403, "other_tenant", "tenant", tenant_id)
        _refuse_suspended(call, caller.suspended)
    else:
        async with call.db.worker() as conn:
            status = await tenants.status(conn, tenant_id)
        if status is None:
            raise not_found("tenant")
        _refuse_suspended(call, status == "suspended")
    call.tenant = TenantId(tenant_id)


async def _find_subject(call: Call[Any, Any], subject: Subject) -> None:
    """404 for an object that is not of the caller's (or the path's) tenant, with an audit row when it is another's."""
    object_id = call.id(subject.parameter)
    caller = call.caller
    if caller.tenant_id is not None and call.tenant is None:
        _refuse_suspended(call, caller.suspended)
    async with call.db.worker() as conn:
        found = await tenants.owner_of(conn, subject.table, object_id)
    if found is None:
        raise not_found(subject.name)
    wanted = call.tenant if call.tenant is not None else caller.tenant_id
    if caller.platform and call.tenant is None:
        if found.tenant_id is not None:
            _refuse_suspended(call, found.status == "suspended")
            call.tenant = TenantId(found.tenant_id)
        return
    if found.tenant_id != wanted:
        if caller.platform:
            raise not_found(subject.name)
        raise await call.deny(404, "other_tenant", subject.name, object_id)
    call.tenant = TenantId(found.tenant_id) if found.tenant_id is not None else None


def _refuse_suspended(call: Call[Any, Any], suspended: bool) -> None:
    """The platform may look at a suspended tenant and mend it, but sends nothing and starts nothing for it."""
    if not suspended or call.route.while_suspended:
        return
    if call.caller.platform and (call.route.method == "GET" or "admin" in call.route.scopes):
        return
    raise Problem(403, "tenant_suspended", "this tenant is suspended; the platform's operator can lift that")
