"""`/openapi.json` and `/docs`: the description, and a page that shows it without asking anybody else for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import orjson
from aiohttp import web

from gateway.api import openapi
from gateway.api.models import NoBody, NoQuery
from gateway.api.routing import ROUTES, Call, Raw, Routes

routes = Routes("docs")

_PAGE = Path(__file__).with_name("docs.html").read_text("utf-8")


def _hashes(tag: str) -> str:
    """Exactly these blocks may run or style; anything else in the page may not."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.S)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


_POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@routes.add("GET", "/openapi.json", access="open", returns={200: Raw({"application/json": "OpenAPI 3.1."})})
async def description(call: Call[NoQuery, NoBody]) -> web.Response:
    """This description."""
    document = openapi.document(call.request.app[ROUTES])
    return web.Response(body=orjson.dumps(document), content_type="application/json")


@routes.add("GET", "/docs", access="open", returns={200: Raw({"text/html": "A page."})})
async def page(call: Call[NoQuery, NoBody]) -> web.Response:
    """The description as a page."""
    return web.Response(text=_PAGE, content_type="text/html", headers={"Content-Security-Policy": _POLICY})
