"""`GET /metrics`: Prometheus text. Counters live in the process; gauges nobody keeps are brought up to date when asked."""

from __future__ import annotations

import hmac
import ipaddress

from aiohttp import web
from prometheus_client import generate_latest

from gateway.api import auth
from gateway.api.health import OVERVIEW
from gateway.api.models import NoBody, NoQuery
from gateway.api.routing import KEYS, Call, Raw, Routes

routes = Routes("metrics")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@routes.add(
    "GET", "/metrics", access="open", returns={200: Raw({"text/plain": "Prometheus text."})}, problems=(401,)
)
async def metrics(call: Call[NoQuery, NoBody]) -> web.Response:
    """Prometheus metrics. Open on loopback; from elsewhere a key or `METRICS_TOKEN` as bearer."""
    await _allow(call)
    await _refresh(call)
    return web.Response(
        body=generate_latest(call.services.metrics.registry), headers={"Content-Type": CONTENT_TYPE}
    )


async def _allow(call: Call[NoQuery, NoBody]) -> None:
    if _loopback(call.request.remote):
        return
    token = auth.bearer(call.request)
    if token is None:
        raise auth.unauthenticated("from other machines /metrics needs METRICS_TOKEN or a key as bearer")
    secret = call.services.settings.metrics_token
    if secret is not None and hmac.compare_digest(
        token.encode("utf-8", "surrogateescape"), secret.get_secret_value().encode()
    ):
        return
    await call.request.app[KEYS].principal(token, offline=True)


def _loopback(remote: str | None) -> bool:
    """A local address proves nothing behind a proxy on the same host: such a proxy must not pass /metrics on."""
    if not remote:
        return True  # a unix socket
    try:
        address = ipaddress.ip_address(remote.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


async def _refresh(call: Call[NoQuery, NoBody]) -> None:
    """What no part keeps by itself: the spool's depth, and sessions that are wanted and that nobody runs.

    From the database at most once a second; while it is away the last values stay.
    """
    view = call.request.app[OVERVIEW]
    await view.look()
    gauges = call.services.metrics
    gauges.journal_depth.labels("spool").set(call.services.spool.depth)
    manager = call.services.sessions
    owned = manager.owned() if manager is not None else frozenset()
    orphans = {
        (str(row["tenant_id"]), str(row["session_id"]), str(row["channel_type"])): row["session_id"]
        for row in view.rows
        if row["wanted"] == "connected" and row["owner"] is None and row["session_id"] not in owned
    }
    for labels in orphans:
        gauges.session_up.labels(*labels).set(0)
    for labels, session_id in view.orphans.items() - orphans.items():
        if session_id not in owned:  # another gateway has it now, and tells
            gauges.session_up.remove(*labels)
    view.orphans = orphans
