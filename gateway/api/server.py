"""What answers when a request is so broken that no route ever sees it: the same kind of problem as everything else.

aiohttp would answer in plain text and log a traceback for every such request. Leans on two of its internals; the
version is pinned and a test watches.
"""

from __future__ import annotations

import uuid

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from core import log as logs
from gateway.api.problems import Problem

log = logs.get(part="http")


class _Handler(RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        request_id = uuid.uuid4().hex
        problem = _problem(status)
        fields = {"result": problem.status, "request_id": request_id, "error": type(exc).__name__}
        if problem.status == 500:
            log.error("http.failed", **fields, exc_info=exc)
        else:
            log.info("http.broken_request", **fields)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun")
        response = problem.response(request_id)
        response.headers["X-Request-ID"] = request_id
        response.force_close()
        return response


def _problem(status: int) -> Problem:
    if 400 <= status < 500:
        detail = "this is no valid HTTP request, or its first line or a header is longer than 8 KiB"
        return Problem(status, "broken_request", detail)
    return Problem(500, "internal", "this is a fault of the gateway; report it with the request_id")


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Use it in place of `web.AppRunner`."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server
