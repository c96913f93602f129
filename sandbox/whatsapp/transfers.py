"""The media server: two endpoints, and what a test can make go wrong with them. Ranges are served, never asked for."""

from __future__ import annotations

import asyncio
import base64

from aiohttp import web

from sandbox.whatsapp.faults import MediaAction, MediaFault
from sandbox.whatsapp.hub import Hub, Transfer

_PIECES = 20  # of a slow download


async def upload(hub: Hub, request: web.Request) -> web.Response:
    token = request.match_info["token"]
    blob = await request.read()
    fault = hub.faults.for_media(token, upload=True)
    if fault is not None:
        if fault.action in (MediaAction.SLOW, MediaAction.HANG):
            await asyncio.sleep(fault.seconds)
        if fault.action is not MediaAction.SLOW:
            hub.transfers.add(Transfer("upload", token, fault.status, len(blob)))
            return web.Response(status=fault.status)
    path = hub.media.store(token, blob)
    hub.transfers.add(Transfer("upload", token, 200, len(blob)))
    return web.json_response({"url": f"https://mmg.whatsapp.net{path}", "direct_path": path})


async def download(hub: Hub, request: web.Request) -> web.StreamResponse:
    token = request.match_info["token"]
    found = hub.media.find(token)
    fault = hub.faults.for_media(token, upload=False)
    if isinstance(found, int):
        hub.transfers.add(Transfer("download", token, found, 0))
        return web.Response(status=found)
    if fault is None:
        hub.transfers.add(Transfer("download", token, 200, found.stat().st_size))
        return web.FileResponse(found)
    if fault.action is MediaAction.STATUS:
        hub.transfers.add(Transfer("download", token, fault.status, 0))
        return web.Response(status=fault.status)
    return await _badly(hub, request, token, found.read_bytes(), fault)


async def _badly(
    hub: Hub, request: web.Request, token: str, blob: bytes, fault: MediaFault
) -> web.StreamResponse:
    size = len(blob)
    if fault.action is MediaAction.CORRUPT:
        blob = blob[:-1] + bytes([blob[-1] ^ 1])
    if fault.action is MediaAction.CUT:
        blob = blob[: size // 2]
    if fault.action is MediaAction.HANG:
        await asyncio.sleep(fault.seconds)
        blob = b""
    hub.transfers.add(Transfer("download", token, 200, len(blob)))
    response = web.StreamResponse(headers={"Content-Length": str(size)})
    await response.prepare(request)
    step = max(1, -(-size // _PIECES))
    for start in range(0, len(blob), step):
        if fault.action is MediaAction.SLOW:
            await asyncio.sleep(fault.seconds / _PIECES)
        await response.write(blob[start : start + step])
    if len(blob) < size and request.transport is not None:
        request.transport.close()
    return response


def delete(hub: Hub, request: web.Request) -> web.Response:
    """A client deletes a chunk of history once it has read it; it names the blob by its path, in base64."""
    packed = request.query.get("d_md", "")
    try:
        path = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)).decode()
        hub.media.delete(path)
    except ValueError:
        return web.Response(status=404)
    hub.transfers.add(Transfer("delete", hub.media.token_of(path), 200, 0))
    return web.Response()
