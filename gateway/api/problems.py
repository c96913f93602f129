"""Errors as RFC 9457 problems: one exception to raise, one place that turns every other error into one.

Never shows an internal error's text to a caller: a bug is a 500 with the request's id, and the log has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg
import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core import errors
from core.database_errors import is_transient

TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    409: "Conflict",
    410: "Gone",
    413: "Body too large",
    415: "Wrong content type",
    416: "Range not in the file",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    502: "Refused by the channel",
    503: "Not available now",
    504: "Outcome unknown",
}
CONTENT_TYPE = "application/problem+json"


class ProblemBody(BaseModel):
    """An error. `detail` says what to do about it."""

    model_config = ConfigDict(extra="allow", title="Problem")

    type: str = Field(description="`about:blank`, or a URI reference that names the kind of problem.")
    title: str
    status: int
    detail: str
    code: str = Field(description="A short stable word for programs.")
    request_id: str
    errors: list[dict[str, str]] | None = Field(None, description="Per wrong field: `field` and `detail`.")
    action: str | None = Field(None, description="What a person must do now.")


class Problem(Exception):
    """Raise it anywhere in a handler. `extra` members stand beside the standard ones."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.extra = {name: value for name, value in extra.items() if value is not None}

    def response(self, request_id: str) -> web.Response:
        body = {
            "type": f"/docs#problem-{self.code}",
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
            **self.extra,
        }
        return web.Response(
            status=self.status, body=orjson.dumps(body), content_type=CONTENT_TYPE, headers=self.headers
        )


def invalid(field: str, detail: str) -> Problem:
    """422 with the field named."""
    return Problem(
        422, "invalid", f"{field}: {detail}" if field else detail, errors=[{"field": field, "detail": detail}]
    )


def not_found(what: str) -> Problem:
    return Problem(404, "not_found", f"there is no such {what} here; check the id and whose key this is")


def unavailable(detail: str | None = None) -> Problem:
    return Problem(
        503,
        "database_unavailable",
        detail or "the database cannot be reached right now; nothing was done, try again in a few seconds",
        headers={"Retry-After": "5"},
    )


def from_validation(error: ValidationError, where: str = "") -> Problem:
    """pydantic's findings, each with the field's path; the first one is the sentence."""
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:20]:
        # Names of union members are pydantic's business, not the caller's.
        path = ".".join(
            str(part) for part in item["loc"] if not str(part).startswith(("function-", "tagged-"))
        )
        field = path or where or "body"
        text = {
            "extra_forbidden": "this field is not known here; leave it out",
            "missing": "this field is required",
        }.get(item["type"], item["msg"].removeprefix("Value error, "))
        found.append({"field": _printable(field), "detail": _printable(text)})
    first = found[0]
    return Problem(422, "invalid", f"{first['field']}: {first['detail']}", errors=found)


def from_exception(error: BaseException) -> Problem | None:
    """The problem an error of another part means to a caller, or None when it is a bug."""
    match error:
        case Problem():
            return error
        case ValidationError():
            return None  # a model of ours that did not fit its own row is a bug, not the caller's fault
        case errors.DatabaseUnavailable():
            return unavailable()
        case errors.NotFound():
            return Problem(404, error.code, error.detail)
        case errors.Conflict():
            return Problem(409, error.code, error.detail, action=error.action)
        case errors.InvalidField():
            found = {"field": _printable(error.field), "detail": _printable(error.reason)}
            return Problem(422, error.code, error.detail, errors=[found])
        case errors.Invalid():
            return Problem(422, error.code, error.detail, action=error.action)
        case errors.JournalError():
            return Problem(503, "journal", error.detail, headers={"Retry-After": "5"})
        case errors.ThrottledError():
            wait = str(max(1, round(error.retry_after)))
            return Problem(429, error.code, error.detail, headers={"Retry-After": wait})
        case errors.NotSentError():
            return Problem(503, error.code, error.detail, headers={"Retry-After": "5"}, action=error.action)
        case errors.UnknownOutcomeError():
            return Problem(504, error.code, error.detail)
        case errors.ChannelError():
            return Problem(502, error.code, error.detail, action=error.action)
        case web.HTTPException():
            return _from_http(error)
        case asyncpg.PostgresError():
            return _from_postgres(error)
    if is_transient(error):
        return unavailable()
    return None


def _from_http(error: web.HTTPException) -> Problem | None:
    if isinstance(error, web.HTTPNotFound):
        return Problem(404, "no_such_route", "there is no such route; GET /openapi.json lists them all")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        detail = f"this route answers {allowed}"
        return Problem(405, "method_not_allowed", detail, headers={"Allow": allowed})
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return too_large()
    if error.status < 400:
        return None
    return Problem(error.status, "http", TITLES.get(error.status, error.reason or "error"))


def too_large(limit: int = 1024 * 1024) -> Problem:
    # The rest of the body is not read: the connection cannot be used again.
    return Problem(
        413,
        "too_large",
        f"the body is over the limit of {limit} bytes; send less at a time",
        headers={"Connection": "close"},
    )


def _from_postgres(error: asyncpg.PostgresError) -> Problem | None:
    """What the schema itself refuses. Texts without a constraint are our own functions' and meant for people."""
    lines = str(error).splitlines()
    text = _printable(lines[0] if lines else "")
    hint = getattr(error, "hint", None)
    if hint:
        text = f"{text}. {_printable(hint)}"
    native = getattr(error, "constraint_name", None) is not None
    match error:
        case asyncpg.UniqueViolationError():
            return Problem(409, "already_exists", "something with this name or identifier exists already")
        case asyncpg.ForeignKeyViolationError():
            return Problem(
                422, "invalid", "this names something that does not exist in this tenant" if native else text
            )
        case asyncpg.ObjectNotInPrerequisiteStateError():
            return Problem(409, "conflict", text)
        case asyncpg.NoDataFoundError():
            return Problem(404, "not_found", text)
        case asyncpg.CheckViolationError() if str(getattr(error, "constraint_name", "")).endswith("_graph"):
            return Problem(409, "conflict", text)
        case asyncpg.CheckViolationError() | asyncpg.RaiseError():
            return Problem(422, "invalid", "the database refused this value" if native else text)
        case asyncpg.InvalidParameterValueError():
            return Problem(422, "invalid", text)
        case asyncpg.DataError():
            return Problem(422, "invalid", f"a value cannot be stored: {text}")
    return unavailable() if is_transient(error) else None


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:500]
