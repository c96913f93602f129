"""OpenAPI 3.1 from the route table: the same models that check a request describe it. Nothing is written twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from gateway.api.models import MAX_ID, NoBody, NoQuery
from gateway.api.problems import CONTENT_TYPE, TITLES, ProblemBody
from gateway.api.routing import Raw, Route

VERSION = "0.1.0"
_RAW_SCHEMAS: dict[str, Any] = {
    "multipart/form-data": {
        "type": "object",
        "properties": {"file": {"type": "string", "contentMediaType": "application/octet-stream"}},
        "required": ["file"],
    },
    "text/plain": {"type": "string"},
}
_PARAMETER = re.compile(r"\{(\w+)\}")
_REF = "#/components/schemas/{model}"

_DESCRIPTION = """\
WhatsApp, email and Telegram over one HTTP API and plain SQL. Errors are RFC 9457 problems whose `detail` says what to do.
Lists are paged: pass `next_cursor` back as `cursor`. Every response carries `X-Request-ID`.
"""


def document(routes: Sequence[Route]) -> dict[str, Any]:
    return _document(tuple(routes))


@lru_cache(maxsize=4)
def _document(routes: tuple[Route, ...]) -> dict[str, Any]:
    adapters: list[tuple[tuple[str, int], JsonSchemaMode, TypeAdapter[Any]]] = []
    for index, route in enumerate(routes):
        if route.body is not NoBody:
            adapters.append((("body", index), "validation", TypeAdapter(route.body)))
        for status, adapter in route.adapters.items():
            adapters.append(((f"returns {status}", index), "serialization", adapter))
    adapters.append((("problem", -1), "serialization", TypeAdapter(ProblemBody)))
    schemas, definitions = TypeAdapter.json_schemas(
        [(key, mode, adapter) for key, mode, adapter in adapters],
        ref_template=_REF,
        schema_generator=GenerateJsonSchema,
    )
    paths: dict[str, dict[str, Any]] = {}
    for index, route in enumerate(routes):
        operation = _operation(
            route,
            body=schemas.get((("body", index), "validation")),
            returns={
                status: schemas.get(((f"returns {status}", index), "serialization"))
                for status in route.returns
            },
            problem=schemas[(("problem", -1), "serialization")],
        )
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "channel-gateway",
            "version": VERSION,
            "description": _DESCRIPTION,
            "license": {"name": "GPL-3.0-or-later", "identifier": "GPL-3.0-or-later"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key."},
                "signature": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-Hub-Signature-256",
                    "description": "Over the body, with the session's `app_secret`.",
                },
            },
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(route.tag for route in routes)],
    }


def _operation(route: Route, *, body: Any, returns: dict[int, Any], problem: Any) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.tag}_{route.name}".replace(" ", "_").replace("-", "_"),
        "summary": route.summary,
        "tags": [route.tag],
        "responses": {},
    }
    if route.description:
        operation["description"] = route.description
    if route.scopes:
        scopes = " or ".join(f"`{scope}`" for scope in sorted(route.scopes))
        note = f"Scope: {scopes}." + (" Platform keys only." if route.access == "platform" else "")
        operation["description"] = f"{operation.get('description', '')}\n\n{note}".strip()
    parameters = _parameters(route)
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    elif route.raw_body is not None:
        operation["requestBody"] = {
            "required": True,
            "description": route.raw_body,
            "content": {kind: {"schema": _RAW_SCHEMAS.get(kind, {})} for kind in route.raw_types},
        }
    operation["security"] = _security(route)
    for status, kind in sorted(route.returns.items()):
        operation["responses"][str(status)] = _success(status, kind, returns[status])
    for status in sorted(_problem_statuses(route)):
        headers = dict(_REQUEST_ID)
        if status in (429, 503):
            headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "string"}}
        content = {CONTENT_TYPE: {"schema": problem}}
        existing = operation["responses"].get(str(status))
        if existing is not None:  # /health answers 503 with its own body, or a problem
            existing.setdefault("content", {}).update(content)
            continue
        operation["responses"][str(status)] = {
            "description": TITLES[status],
            "headers": headers,
            "content": content,
        }
    return operation


_REQUEST_ID = {
    "X-Request-ID": {"description": "Names this request in the log.", "schema": {"type": "string"}}
}


def _success(status: int, kind: Any, schema: Any) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": {201: "Created", 202: "Accepted, not finished yet", 204: "Nothing"}.get(status, "OK"),
        "headers": dict(_REQUEST_ID),
    }
    if isinstance(kind, Raw):
        response["content"] = {
            media: {
                "schema": {"type": "object" if media.endswith("json") else "string", "description": meaning}
            }
            for media, meaning in kind.content.items()
        }
        if kind.description:
            response["description"] = kind.description
    elif kind is not None:
        response["content"] = {"application/json": {"schema": schema}}
        extra = getattr(kind, "also", None)
        if isinstance(extra, dict):
            response["content"].update(
                {media: {"schema": {"type": "string", "description": text}} for media, text in extra.items()}
            )
    return response


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_ID},
        }
        for name in _PARAMETER.findall(route.path)
    ]
    found += _query(route.query)
    found += [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": meaning,
            "schema": {"type": "string"},
        }
        for name, meaning in route.headers
    ]
    return found


def _query(model: type[BaseModel]) -> list[dict[str, Any]]:
    if model is NoQuery:
        return []
    schema = model.model_json_schema(by_alias=True, mode="validation", ref_template=_REF)
    required = set(schema.get("required", ()))
    parameters = []
    for name, detail in schema.get("properties", {}).items():
        detail = dict(detail)
        detail.pop("title", None)
        text = detail.pop("description", "")
        detail.pop("default", None) if detail.get("default", 0) is None else None
        # Absent is how a query says null.
        options = [option for option in detail.get("anyOf", ()) if option.get("type") != "null"]
        if len(options) == 1:
            detail.pop("anyOf")
            detail.update(options[0])
        parameter: dict[str, Any] = {
            "name": name,
            "in": "query",
            "required": name in required,
            "schema": detail,
        }
        if text:
            parameter["description"] = text
        parameters.append(parameter)
    return parameters


def _security(route: Route) -> list[dict[str, list[str]]]:
    if route.access == "open":
        return [{}, {"key": []}]
    if route.access == "own":
        return [{"key": []}, {"signature": []}, {}] if route.tag == "webhook" else [{"key": []}, {}]
    return [{"key": []}]


def _problem_statuses(route: Route) -> set[int]:
    statuses = {422, 429, 500, 503, *route.problems}
    if route.access not in ("open",):
        statuses |= {401, 403}
    if "{" in route.path:
        statuses.add(404)
    if route.access in ("path", "body", "query"):
        statuses.add(404)
    if route.body is not NoBody or route.raw_body is not None:
        statuses |= {413, 415}
    return statuses
