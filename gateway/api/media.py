"""A message's media: bytes for download, in ranges, never shown by the browser as a page of ours."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

from aiohttp import web

from core.channel import Json
from core.store import media as rows
from core.store.media import File
from gateway.api.messages import SUBJECT
from gateway.api.models import NoBody, NoQuery
from gateway.api.problems import Problem, not_found
from gateway.api.routing import Call, Raw, Routes
from gateway.api.uploads import MEDIA
from gateway.media.sniff import OCTETS, normal

routes = Routes("media")

_BYTES = {"*/*": "The file, of the type that its own bytes say."}


@routes.add(
    "GET",
    "/api/v1/messaging/messages/{message_id}/media",
    access="subject",
    subject=SUBJECT,
    scope="read",
    returns={200: Raw(_BYTES), 206: Raw(_BYTES, "The part that `Range` asked for."), 304: None},
    problems=(404, 409, 410, 416),
    headers=(("Range", "One range of bytes, such as `bytes=0-1023`."),),
)
async def download(call: Call[NoQuery, NoBody]) -> web.StreamResponse:
    """Download a message's media.

    409 while it is still on its way from the channel (an event tells when it has come), 410 when it could not be had.
    """
    media = call.request.app[MEDIA]
    message_id = call.id("message_id")
    file = await media.of_message(call.tenant_id, message_id)
    if file is None:
        file = await _waiting_upload(call, message_id)
    path = media.store.path(file.sha256)
    if not await asyncio.to_thread(path.is_file):
        raise Problem(
            404,
            "media_not_here",
            "the file is not on this gateway's disk; gateways on one database must share DATA_DIR/media",
        )
    _check_range(call.request, file.size)
    return web.FileResponse(
        path,
        headers={
            "Content-Type": normal(file.mime_type) or OCTETS,
            "Content-Disposition": _attachment(file.filename),
            "Content-Security-Policy": "sandbox; default-src 'none'",
        },
    )


async def _waiting_upload(call: Call[NoQuery, NoBody], message_id: int) -> File:
    """A message that waits to be sent with an upload has its file already. Raises why there is none."""
    async with call.db.worker() as conn:
        row = await rows.of_message(conn, call.tenant_id, message_id)
        if row is None:
            raise not_found("message")
        number = str(row["media_url"] or "").removeprefix("upload:")
        if row["direction"] == "outbound" and number.isdecimal() and number.isascii() and len(number) < 19:
            file = await rows.upload(conn, call.tenant_id, int(number))
            if file is not None:
                return file
    raise _why_not(row["media_metadata"] or {})


def _why_not(said: Json | Any) -> Problem:
    state = said.get("state") if isinstance(said, dict) else None
    if state == "pending":
        return Problem(
            409,
            "media_pending",
            "the file is still being downloaded from the channel; wait for the message's status event, or try again soon",
            headers={"Retry-After": "5"},
        )
    if state == "failed":
        reason = str(said.get("reason") or "the channel no longer has it")
        return Problem(
            410, str(said.get("error") or "media_gone"), f"the file could not be had: {reason}"[:500]
        )
    return Problem(
        404, "no_media", "this message has no file here; `media_metadata` and `media_url` say what it has"
    )


def _check_range(request: web.Request, size: int) -> None:
    """What the response would answer without words. With If-Range a range may not apply at all."""
    if "If-Range" in request.headers:
        return
    try:
        start = request.http_range.start
    except ValueError:
        start = size
    if "Range" in request.headers and start is not None and start >= size:
        raise Problem(
            416,
            "range_not_satisfiable",
            f"the file has {size} bytes; ask for one range inside it, such as bytes=0-1023",
            headers={"Content-Range": f"bytes */{size}"},
        )


def _attachment(filename: str) -> str:
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
