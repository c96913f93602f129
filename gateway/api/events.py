"""`GET /api/v1/events`: what happens in a tenant, as server-sent events that resume without a gap."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from core.database import is_unavailable
from core.store.events import Position
from gateway.api import auth
from gateway.api.feed import FEED, Client, Feed, decode, encode
from gateway.api.feed import now as wall_clock
from gateway.api.models import NoBody, TenantQuery
from gateway.api.problems import Problem
from gateway.api.routing import KEYS, Call, Raw, Routes
from gateway.api.sse import HEARTBEAT_SECONDS, Stream

routes = Routes("events")

KEY_CHECK_SECONDS = 2.0
AWAY_SECONDS = 1.0

_STREAM = Raw(
    {
        "text/event-stream": "Events `message`, `status`, `session`, `decision`, `insight`, `import`; `data` is JSON"
        " with `kind`, `id` (of the message, session, decision, insight or import) and what it is about."
        " One `reset` when `Last-Event-ID` is too old: read the lists anew."
    }
)


@routes.add(
    "GET",
    "/api/v1/events",
    access="query",
    scope="read",
    returns={200: _STREAM},
    headers=(("Last-Event-ID", "Go on behind this event, without a gap."),),
)
async def events(call: Call[TenantQuery, NoBody]) -> web.StreamResponse:
    """The tenant's events as they happen.

    `Last-Event-ID` resumes without a gap within a day. Comments are heartbeats. A client that is slow gets everything
    all the same, later.
    """
    feed = call.request.app[FEED]
    given = call.request.headers.get("Last-Event-ID")
    client, position = await feed.subscribe(call.tenant_id)
    try:
        resume = decode(given, wall_clock()) if given else None
        stream = await Stream.open(call.request)
        await stream.send_raw(b"retry: 2000\n")
        if given and resume is None:
            await stream.send("reset", {"reason": "too_old"}, event_id=encode(position, wall_clock()))
        if resume is not None:
            client.behind = True  # the log first, then what comes
            position = resume
        else:
            # A place to resume from even if the connection breaks before the first event.
            await stream.send_raw(f"id: {encode(position, wall_clock())}\n\n".encode())
        await _pump(call, feed, client, stream, position)
    finally:
        feed.unsubscribe(client)
    return stream.response


async def _pump(
    call: Call[TenantQuery, NoBody], feed: Feed, client: Client, stream: Stream, last: Position
) -> None:
    beat = time.monotonic() + HEARTBEAT_SECONDS
    checked = time.monotonic()
    while not feed.closing.is_set():
        client.wake.clear()
        if client.behind:
            client.behind = False
            client.buffer.clear()
            more = True
            while more and not feed.closing.is_set():
                try:
                    found, more = await feed.backlog(client.tenant_id, last)
                except Exception as error:
                    if not is_unavailable(error):
                        raise
                    client.behind = True  # the database is away: go on from here when it is back
                    await asyncio.sleep(AWAY_SECONDS)
                    break
                for event in found:
                    await stream.send(event.kind, event.data, event_id=event.id)
                    last = event.position
        while client.buffer:
            event = client.buffer.popleft()
            if event.position <= last:
                continue  # the log had it already
            await stream.send(event.kind, event.data, event_id=event.id)
            last = event.position
        now = time.monotonic()
        if now - checked > KEY_CHECK_SECONDS:
            checked = now
            if not await _still_allowed(call):
                return
        if now > beat:
            beat = now + HEARTBEAT_SECONDS
            await stream.heartbeat()
        if client.buffer or client.behind:
            continue
        try:
            async with asyncio.timeout(KEY_CHECK_SECONDS):
                await client.wake.wait()
        except TimeoutError:
            pass


async def _still_allowed(call: Call[TenantQuery, NoBody]) -> bool:
    """A stream lives long: a key revoked meanwhile must not go on reading."""
    key = auth.bearer(call.request)
    if key is None:
        return False
    try:
        principal = await call.request.app[KEYS].principal(key, offline=True)
    except Problem as problem:
        return problem.status == 503  # the database is away: nothing to read either
    return not principal.suspended and bool(call.route.scopes & principal.scopes)
