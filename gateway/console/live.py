"""Pages that change by themselves: parts of a page are rendered again when something happens, and sent when they differ.

What is sent is always the whole part as it is now, so a stream that was cut, slow or asleep has nothing to catch up on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

from core import log as logs
from core.database import is_unavailable
from gateway.console.access import COOKIE
from gateway.console.page import Page

log = logs.get(part="console")

POLL_SECONDS = 2.0
"""Notifications are hints; this is how long a lost one delays."""
GAP_SECONDS = 0.15
"""Between two renderings, however much happens."""
HEARTBEAT_SECONDS = 15.0
WRITE_SECONDS = 20.0
"""A browser that takes nothing for so long is gone."""

Context = dict[str, Any]
Load = Callable[[Page], Awaitable[Context]]


@dataclass(frozen=True, slots=True)
class Part:
    """One element of a page that lives: its id, and the template of what is in it."""

    target: str
    template: str


@dataclass(frozen=True, slots=True)
class LiveView:
    """A page and its stream, from one function that reads what both show."""

    template: str
    parts: Sequence[Part]
    load: Load
    wakes: Literal["et_events", "et_sessions"]

    async def show(self, page: Page) -> web.StreamResponse:
        query = page.request.query_string
        stream = f"{page.request.path}/stream" + (f"?{query}" if query else "")
        return page.show(self.template, stream=stream, **await self.load(page))

    async def stream(self, page: Page) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(page.request)
        subscription = page.db.hub.subscribe(self.wakes)
        shown: dict[str, str] = {}
        beat = 0.0
        try:
            while not page.console.closing.is_set():
                try:
                    if await page.console.visitors.find(page.request.cookies.get(COOKIE), idle=True) is None:
                        await _write(response, b"event: signed-out\ndata:\n\n")
                        break
                    chunk = await self._changes(page, shown)
                except ConnectionResetError:
                    break  # the browser has gone
                except Exception as error:
                    if not is_unavailable(error):
                        log.error("console.stream_failed", error=repr(error)[:300])
                        break  # the browser comes back, and gets the error page when it is reloaded
                    chunk = b""
                now = time.monotonic()
                if chunk or now > beat:
                    beat = now + HEARTBEAT_SECONDS
                    await _write(response, chunk or b": alive\n\n")
                await asyncio.sleep(GAP_SECONDS)
                await _first(subscription.wait(POLL_SECONDS), page.console.closing.wait())
        except ConnectionResetError:
            pass  # the browser has gone; nobody is left to answer
        finally:
            subscription.close()
        return response

    async def _changes(self, page: Page, shown: dict[str, str]) -> bytes:
        context = await self.load(page)
        changed = []
        for part in self.parts:
            text = page.text(part.template, **context)
            if shown.get(part.target) != text:
                shown[part.target] = text
                changed.append(
                    f'<hx-partial hx-target="#{part.target}" hx-swap="innerMorph">{text}</hx-partial>'
                )
        if not changed:
            return b""
        lines = "".join(changed).splitlines()
        return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"


async def _first(*waiting: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(one) for one in waiting]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _write(response: web.StreamResponse, chunk: bytes) -> None:
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(chunk)
    except TimeoutError:
        raise ConnectionResetError("the browser takes nothing any more") from None
