"""Reading what a caller sends: bounded, JSON only, and nothing in it that PostgreSQL or a recursion could choke on."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, ValidationError

from gateway.api.problems import Problem, from_validation, invalid, too_large

LIMIT = 1024 * 1024
MAX_DEPTH = 64

M = TypeVar("M", bound=BaseModel)


async def read_bytes(request: web.Request) -> bytes:
    """The whole body. 413 over the limit, also when it only shows after decompression."""
    if (request.content_length or 0) > LIMIT:
        raise too_large(LIMIT)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(LIMIT) from None
    except (web.RequestPayloadError, HttpProcessingError, web.PayloadAccessError):
        raise invalid("", "the body could not be read to its end; check its length and encoding") from None


def require_json(request: web.Request) -> None:
    kind = request.content_type
    stated = hdrs.CONTENT_TYPE in request.headers
    if not stated or not (kind == "application/json" or kind.endswith("+json")):
        shown = f"{kind!r}" if stated else "no content type"
        raise Problem(
            415, "wrong_content_type", f"{shown}: send the body with Content-Type: application/json"
        )
    charset = (request.charset or "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise Problem(415, "wrong_content_type", f"charset {charset[:40]!r}: JSON is sent as UTF-8")


def parse(raw: bytes, *, nul: str = "refuse") -> Any:
    """JSON to Python. NUL characters fit no text column: refused with their field, or dropped (`nul="drop"`)."""
    if not raw:
        raise invalid("", "the body is empty; a JSON document is needed")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The message quotes nothing of the body.
        raise Problem(422, "malformed_json", f"the body is not valid JSON: {str(error)[:200]}") from None
    return _checked(value, has_nul=b"\\u0000" in raw, drop=nul == "drop")


def validate(model: type[M], value: Any) -> M:
    if not isinstance(value, dict):
        raise invalid("", "a JSON object is needed")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


def validate_query(model: type[M], request: web.Request) -> M:
    values: dict[str, str] = {}
    for name, text in request.query.items():
        if "\x00" in text or "\x00" in name:
            raise invalid(name.replace("\x00", "")[:60] or "query", "must not hold a NUL character")
        if name in values:
            raise invalid(name[:60], "given twice; give it once")
        values[name] = text
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise from_validation(error, "query") from None


def _checked(root: Any, *, has_nul: bool, drop: bool) -> Any:
    """Walks the document without recursion, for depth always and for NUL when there may be one."""
    if not isinstance(root, dict | list):
        return root
    stack: list[tuple[Any, str, int]] = [(root, "", 1)]
    while stack:
        node, path, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise invalid(path[:100], f"nested deeper than {MAX_DEPTH} levels")
        if has_nul and isinstance(node, dict) and any("\x00" in name for name in node):
            if not drop:
                raise invalid(path, "a field's name holds a NUL character")
            cleaned = {name.replace("\x00", ""): value for name, value in node.items()}
            node.clear()
            node.update(cleaned)
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items) if has_nul else items:
            if isinstance(value, dict | list):
                stack.append((value, f"{path}.{key}" if path else str(key), depth + 1))
            elif has_nul and isinstance(value, str) and "\x00" in value:
                if not drop:
                    raise invalid(f"{path}.{key}".lstrip("."), "must not hold a NUL character")
                node[key] = value.replace("\x00", "")
    return root
