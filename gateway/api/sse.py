"""Server-sent events: one prepared response, bounded writes, heartbeats so that proxies and dead clients show."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web

HEARTBEAT_SECONDS = 15.0
WRITE_SECONDS = 20.0
"""A client that takes nothing for this long is gone."""


class Stream:
    """Opened by `open`; `send` and `heartbeat` raise ConnectionResetError once the client has gone."""

    def __init__(self, response: web.StreamResponse) -> None:
        self.response = response

    @classmethod
    async def open(cls, request: web.Request) -> Stream:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(request)
        return cls(response)

    async def send(self, event: str, data: Any, *, event_id: str | None = None) -> None:
        head = f"id: {event_id}\n" if event_id is not None else ""
        await self._write(f"{head}event: {event}\ndata: ".encode() + orjson.dumps(data) + b"\n\n")

    async def send_raw(self, chunk: bytes) -> None:
        await self._write(chunk)

    async def heartbeat(self) -> None:
        await self._write(b": alive\n\n")

    async def _write(self, chunk: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self.response.write(chunk)
        except TimeoutError:
            raise ConnectionResetError("the client takes nothing any more") from None
