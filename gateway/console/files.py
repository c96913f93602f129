"""The file of a message, for the page that shows it. Pictures, sound and video of known kinds are shown; all else is saved.

Never lets a file act as a page of ours: no script, no sniffing, its own sandbox.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from aiohttp import web

from core.store.media import File
from gateway.console.page import Page, PageError

SHOWN = {
    "image/jpeg": "image",
    "image/png": "image",
    "image/gif": "image",
    "image/webp": "image",
    "video/mp4": "video",
    "audio/ogg": "audio",
    "audio/mpeg": "audio",
    "audio/mp4": "audio",
    "audio/aac": "audio",
}
"""What browsers show and what cannot hold a script."""


class Store(Protocol):
    def path(self, sha256: str, /) -> Path: ...


class Media(Protocol):
    """What `gateway.media` offers."""

    @property
    def store(self) -> Store: ...

    async def of_message(self, tenant_id: int, message_id: int, /) -> File | None: ...


def shown_as(metadata: dict[str, Any]) -> str | None:
    """`image`, `video`, `audio`, `file`; None while there is no file."""
    if metadata.get("state") != "stored":
        return None
    return SHOWN.get(_kind(metadata.get("mime_type")), "file")


def _kind(mime_type: object) -> str:
    return str(mime_type or "").partition(";")[0].strip().lower()


async def serve(page: Page) -> web.StreamResponse:
    media = page.console.media
    file = None if media is None else await media.of_message(page.tenant_id, page.id("message"))
    if media is None or file is None:
        raise PageError(
            404, "There is no file here", "It is still on its way, could not be had, or was never there."
        )
    path = media.store.path(file.sha256)
    if not await asyncio.to_thread(path.is_file):
        raise PageError(404, "The file is not on this machine", "Another gateway holds it; ask its operator.")
    kind = _kind(file.mime_type)
    known = kind in SHOWN
    name = quote(file.filename or "file", safe="")
    return web.FileResponse(
        path,
        headers={
            "Content-Type": kind if known else "application/octet-stream",
            "Content-Disposition": f"{'inline' if known else 'attachment'}; filename*=UTF-8''{name}",
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "Cache-Control": "private, max-age=3600",
        },
    )
