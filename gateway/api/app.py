"""The HTTP application: joins the resources' routes, and starts and stops what lives as long as it does."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from gateway.api import (
    agents,
    audit,
    checks,
    docs,
    events,
    health,
    history,
    imports,
    keys,
    leads,
    media,
    messages,
    metrics,
    outbound,
    pairing,
    send,
    sessions,
    tenants,
    threads,
    uploads,
    webhook,
    workspaces,
)
from gateway.api.auth import Keys
from gateway.api.body import LIMIT
from gateway.api.feed import FEED, Feed
from gateway.api.health import OVERVIEW, Overview
from gateway.api.imports import SLOTS, Slots
from gateway.api.middleware import add_headers, edge
from gateway.api.routing import KEYS, ROUTES, SERVICES, Route, endpoint
from gateway.api.services import Services
from gateway.api.uploads import MEDIA
from gateway.api.webhook import CACHE, SessionCache
from gateway.media import MediaStore, OutgoingMedia

RESOURCES = (
    send,
    health,
    metrics,
    sessions,
    checks,
    pairing,
    webhook,
    outbound,
    threads,
    messages,
    media,
    uploads,
    leads,
    history,
    imports,
    events,
    audit,
    tenants,
    workspaces,
    agents,
    keys,
    docs,
)


def all_routes() -> list[Route]:
    """Every route there is: what is served, documented, and walled."""
    return [route for resource in RESOURCES for route in resource.routes.table]


def make_app(services: Services) -> web.Application:
    app = web.Application(middlewares=[edge(services.limits)], client_max_size=LIMIT)
    app[SERVICES] = services
    app[KEYS] = Keys(services.db)
    app[FEED] = Feed(services.db)
    app[OVERVIEW] = Overview(services.db)
    app[CACHE] = SessionCache()
    app[SLOTS] = Slots()
    app[MEDIA] = services.media or OutgoingMedia(services.db, MediaStore(services.settings.media_dir))
    app[ROUTES] = table = tuple(all_routes())
    for route in table:
        app.router.add_route(route.method, route.path, endpoint(route))
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(_close_streams)
    app.cleanup_ctx.append(_background)
    return app


async def _background(app: web.Application) -> AsyncIterator[None]:
    await app[KEYS].start()
    await app[FEED].start()
    yield
    await app[FEED].stop()
    await app[KEYS].stop()


async def _close_streams(app: web.Application) -> None:
    """Before the server waits for its handlers: streams would otherwise keep it waiting."""
    app[FEED].close_clients()
