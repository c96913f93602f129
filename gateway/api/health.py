"""`GET /health`: open and cheap; with a key also who owns what and how every part is."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web
from asyncpg import Record
from pydantic import Field

from core.database import Database, is_unavailable
from core.store import leases, overview
from gateway.api import auth
from gateway.api.auth import Principal
from gateway.api.models import NoBody, NoQuery, View
from gateway.api.problems import Problem
from gateway.api.routing import KEYS, Call, Reply, Routes
from gateway.api.services import Services

routes = Routes("health")

FRESH_SECONDS = 1.0
SHOWN_SESSIONS = 1000
ALIVE_SECONDS = 30.0
"""A gateway says every 10 s that it lives; after this long without a word its sessions may be taken."""


class OwnedSession(View):
    session_id: int
    tenant_id: int
    channel_type: str
    status: str
    status_reason: str | None
    wanted: str
    owner: str | None
    here: bool
    possible_loss: int | None = Field(None, description="As `possible_loss` below, of this session.")


class GatewayState(View):
    owner: str
    host: str
    started_at: datetime
    heartbeat_at: datetime
    alive: bool = Field(
        description="It has said so in the last 30 s. One that was stopped is not listed at all."
    )
    here: bool = Field(description="It is the one that answers.")
    sessions: int = Field(description="How many it holds; a tenant's key counts the tenant's own.")


class JournalState(View):
    spool: int = Field(description="Webhook bodies on disk that wait for the database.")
    writable: bool


class Health(View):
    status: Literal["ok", "degraded", "error"]
    database: Literal["connected", "disconnected"]
    platform: Literal["connected", "disconnected", "none"] = Field(
        description="Whether any session is connected to its channel; `none`: none is meant to be."
    )
    timestamp: datetime
    sessions: list[OwnedSession] | None = None
    gateways: list[GatewayState] | None = Field(
        None, description="Those on this database; to a tenant's key, those that hold its sessions."
    )
    workers: dict[str, bool] | None = None
    journal: JournalState | None = None
    queue: dict[str, int] | None = None
    possible_loss: int | None = Field(
        None,
        description="Inbound messages of the last 24 hours that could not be read and whose sender's phone has not sent them"
        " again yet; each is stored as an unreadable placeholder.",
    )


class Overview:
    """The sessions of everybody, looked at once a second at most, remembered through an outage."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._at = 0.0
        self.reachable = True
        self.rows: list[Record] = []
        self.orphans: dict[tuple[str, str, str], int] = {}
        """Wanted and run by nobody, as `/metrics` last said."""

    async def look(self) -> None:
        if time.monotonic() - self._at < FRESH_SECONDS:
            return
        if not self._db.connected:
            self.reachable = False
            return
        try:
            async with self._db.worker() as conn:
                self.rows = await overview.sessions(conn, None, 100_000)
        except Exception as error:
            if not is_unavailable(error):
                raise
            self.reachable = False
            return
        self.reachable = True
        self._at = time.monotonic()


OVERVIEW: web.AppKey[Overview] = web.AppKey("overview", Overview)


def workers_of(services: Services) -> dict[str, bool]:
    """Which core tasks live. A part that this process does not run is left out."""
    parts: dict[str, Any] = {
        "database": services.db,
        "ingest": services.ingest,
        "sessions": services.sessions,
        "inbound": services.inbound,
        "outbound": services.outbound,
        "downloads": services.downloads,
        "spool": services.spool,
        "audit": services.audit,
    }
    return {name: bool(part.healthy) for name, part in parts.items() if part is not None}


@routes.add("GET", "/health", access="open", returns={200: Health, 503: Health}, problems=(401,))
async def health(call: Call[NoQuery, NoBody]) -> Reply:
    """Whether the gateway works, and with a key how each part of it is.

    Database down but messages still made durable: `degraded`, 200. 503 only when a message could not be made durable
    or a core task is dead.
    """
    services = call.services
    view = call.request.app[OVERVIEW]
    await view.look()
    workers = workers_of(services)
    broken = not all(workers.values()) or not _durable(services)
    status: Literal["ok", "degraded", "error"] = "error" if broken else "ok" if view.reachable else "degraded"
    wanted = [row for row in view.rows if row["wanted"] == "connected"]
    platform: Literal["connected", "disconnected", "none"] = "none"
    if wanted or view.rows:
        platform = "connected" if any(row["status"] == "active" for row in view.rows) else "disconnected"
    base: dict[str, Any] = {
        "status": status,
        "database": "connected" if view.reachable else "disconnected",
        "platform": platform,
        "timestamp": datetime.now(UTC),
    }
    principal = await _caller(call)
    if principal is not None:
        base |= await _details(services, view, workers, principal)
    return Reply(503 if broken else 200, Health(**base))


def _durable(services: Services) -> bool:
    """False when a message could not be made durable a moment ago: its sender was told so, and will bring it again."""
    return services.spool.writable and (services.sessions is None or services.sessions.durable)


async def _caller(call: Call[NoQuery, NoBody]) -> Principal | None:
    """A key that is shown must be good; one that cannot be checked right now gets the open answer."""
    key = auth.bearer(call.request)
    if key is None:
        return None
    try:
        return await call.request.app[KEYS].principal(key, offline=True)
    except Problem as problem:
        if problem.status == 503:
            return None
        raise


async def _details(
    services: Services, view: Overview, workers: dict[str, bool], principal: Principal
) -> dict[str, Any]:
    owned = services.sessions.owned() if services.sessions is not None else frozenset()
    seen = [row for row in view.rows if principal.platform or row["tenant_id"] == principal.tenant_id]
    queue: dict[str, int] | None = None
    gateways: list[GatewayState] | None = None
    lost: dict[tuple[int, int], int] | None = None
    try:
        if view.reachable:
            async with services.db.worker() as conn:
                queue = await overview.queue(conn, principal.tenant_id)
                lost = await overview.possible_loss(conn, principal.tenant_id)
                known = await leases.gateways(conn, alive_seconds=ALIVE_SECONDS)
            gateways = _gateways(services, known, principal, Counter(row["owner"] for row in seen))
    except Exception as error:
        if not is_unavailable(error):
            raise
    return {
        "sessions": [
            OwnedSession(
                **dict(row),
                here=row["session_id"] in owned,
                possible_loss=None if lost is None else lost.get((row["tenant_id"], row["session_id"]), 0),
            )
            for row in seen[:SHOWN_SESSIONS]
        ],
        "gateways": gateways,
        "workers": workers,
        "journal": JournalState(spool=services.spool.depth, writable=_durable(services)),
        "queue": queue,
        "possible_loss": None if lost is None else sum(lost.values()),
    }


def _gateways(
    services: Services, known: list[Record], principal: Principal, holding: Counter[str | None]
) -> list[GatewayState]:
    """A tenant learns of the gateways that run its own sessions, and counts these alone."""
    return [
        GatewayState(
            **{name: row[name] for name in ("owner", "host", "started_at", "heartbeat_at", "alive")},
            here=row["owner"] == services.owner,
            sessions=row["sessions"] if principal.platform else holding[row["owner"]],
        )
        for row in known
        if principal.platform or holding[row["owner"]]
    ]
