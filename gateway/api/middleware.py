"""Around every request: its id, its log line and metrics, the rate limit, and every error as a problem.

Never logs a query string (it may carry tokens) or a body.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import OrderedDict

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from core import log as logs
from core.database_errors import is_unavailable
from gateway.api.auth import bearer, prefix_of
from gateway.api.problems import Problem, from_exception
from gateway.api.routing import KEY, REQUEST_ID, SERVICES, STARTED, TENANT
from gateway.api.services import Limits

log = logs.get(part="http")

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_UNLIMITED = frozenset({"/health", "/metrics"})


class RateLimit:
    """A token bucket per caller. Callers are many and come and go: the least recently seen are forgotten."""

    SIZE = 10_000

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Seconds this caller must wait; 0 when the request was counted and may go on."""
        now = time.monotonic()
        tokens, last = self._buckets.get(caller, (float(self._limits.burst), now))
        tokens = min(float(self._limits.burst), tokens + (now - last) * self._limits.rate)
        missing = max(0.0, 1.0 - tokens)
        self._buckets[caller] = (tokens if missing else tokens - 1.0, now)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > self.SIZE:
            self._buckets.popitem(last=False)
        return missing / self._limits.rate


def edge(limits: Limits) -> Middleware:
    """The one middleware."""
    limiter = RateLimit(limits)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-ID", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        request[REQUEST_ID] = request_id
        started = time.monotonic()
        status = 499  # the client went away before there was an answer
        error: str | None = None
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                _count(limiter, request)
                response = await handler(request)
                status = response.status
                return response
            except asyncio.CancelledError:
                raise
            except ConnectionResetError:
                # Writing to a client that has gone: nobody is left to answer.
                raise
            except Exception as cause:
                problem = from_exception(cause) or _bug(cause)
                if is_unavailable(cause) or problem.status == 500:
                    error = repr(cause)[:300]
                if request.get(STARTED):
                    # A stream that breaks is cut off: a second answer inside it would be read as part of it.
                    raise ConnectionResetError("the answer had begun") from cause
                status = problem.status
                return problem.response(request_id)
            finally:
                _finish(request, status, time.monotonic() - started, error)

    return middleware


def _count(limiter: RateLimit, request: web.Request) -> None:
    if request.path in _UNLIMITED:
        return
    key = bearer(request)
    caller = f"key {prefix_of(key)}" if key is not None and len(key) <= 512 else f"peer {request.remote}"
    wait = limiter.wait(caller)
    if wait > 0:
        raise Problem(
            429,
            "too_many_requests",
            "too many requests with this key; wait as long as Retry-After says, then go on more slowly",
            headers={"Retry-After": str(max(1, round(wait + 0.5)))},
        )


def _bug(cause: BaseException) -> Problem:
    log.error("http.failed", error=repr(cause)[:500], exc_info=cause)
    return Problem(500, "internal", "this is a fault of the gateway; report it with the request_id")


def _finish(request: web.Request, status: int, seconds: float, error: str | None) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "(unknown)"
    method = request.method if len(request.method) <= 7 and request.method.isalpha() else "(other)"
    metrics = request.app[SERVICES].metrics
    metrics.http_requests.labels(method, route, str(status)).inc()
    metrics.http_latency.labels(method, route).observe(seconds)
    fields: dict[str, object] = {
        "action": f"{method} {request.path}"[:300],
        "result": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    for name, value in (("tenant_id", request.get(TENANT)), ("key_id", request.get(KEY))):
        if value is not None:
            fields[name] = value
    if error is not None:
        fields["error"] = error
    (log.info if status < 500 else log.warning)("http.request", **fields)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For every response, streams too: headers that must stand before the first byte."""
    request[STARTED] = True
    headers = response.headers
    headers["X-Request-ID"] = request.get(REQUEST_ID) or uuid.uuid4().hex
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Cache-Control", "no-store")
    headers.pop("Server", None)
