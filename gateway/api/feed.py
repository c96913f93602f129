"""The event feed: one reader of `et_events` for every client of every tenant that listens.

A client that cannot keep up is never buffered without bound: it falls back to reading the log from its own position.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from asyncpg import Record

from core import log as logs
from core.database import Database, is_unavailable
from core.store import events as store
from core.store.events import Position

log = logs.get(part="events")

BATCH = 500
BUFFER = 1000
GATHER_SECONDS = 0.02
"""Between two reads, so that a thousand messages a second are not a thousand queries."""
UNSETTLED_SECONDS = 0.05
"""How soon to look again when a running transaction holds events back: its end notifies nobody."""
POLL_SECONDS = 2.0
PRUNE_SECONDS = 600.0
TOO_OLD_SECONDS = (store.KEPT_HOURS - 0.5) * 3600


@dataclass(frozen=True, slots=True)
class Event:
    position: Position
    kind: str
    created: float
    data: dict[str, Any]

    @property
    def id(self) -> str:
        return encode(self.position, self.created)


def encode(position: Position, created: float) -> str:
    """`Last-Event-ID`: the place, and when it was, which tells whether the log still reaches back to it."""
    return f"{position.xid}.{position.id}.{int(created)}"


def decode(text: str, now: float) -> Position | None:
    """The place a client wants to go on from; None when that is too far back, or nothing we ever said."""
    parts = text.strip().split(".")
    if len(parts) != 3 or not all(_number(part) for part in parts):
        return None
    xid, event_id, created = (int(part) for part in parts)
    if xid >= 2**63 or abs(event_id) >= 2**63 or not now - TOO_OLD_SECONDS < created <= now + 60:
        return None
    return Position(xid, event_id)


def _number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii() and len(text) <= 20


@dataclass(eq=False, slots=True)
class Client:
    """One stream's end of the feed. `behind`: its buffer ran over, it must read the log from where it is."""

    tenant_id: int
    buffer: deque[Event] = field(default_factory=deque)
    behind: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, events: list[Event]) -> None:
        if len(self.buffer) + len(events) > BUFFER:
            self.buffer.clear()
            self.behind = True
        elif not self.behind:
            self.buffer.extend(events)
        self.wake.set()


@dataclass(slots=True)
class _Tenant:
    position: Position
    clients: list[Client] = field(default_factory=list)


class Feed:
    """`subscribe` and `unsubscribe` are cheap; the reading task sleeps while nobody listens."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._tenants: dict[int, _Tenant] = {}
        self._busy = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.closing = asyncio.Event()

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._read_forever(), name="events-feed"),
            asyncio.create_task(self._prune_forever(), name="events-prune"),
        ]

    async def stop(self) -> None:
        self.close_clients()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []

    def close_clients(self) -> None:
        self.closing.set()
        for tenant in self._tenants.values():
            for client in tenant.clients:
                client.wake.set()

    async def subscribe(self, tenant_id: int) -> tuple[Client, Position]:
        """A client and the place from which on it gets everything."""
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            async with self._db.worker() as conn:
                position = await store.now_position(conn)
            # Another client may have come while we asked: its position is the older one, and holds.
            tenant = self._tenants.setdefault(tenant_id, _Tenant(position))
        client = Client(tenant_id)
        tenant.clients.append(client)
        self._busy.set()
        return client, tenant.position

    def unsubscribe(self, client: Client) -> None:
        tenant = self._tenants.get(client.tenant_id)
        if tenant is None:
            return
        tenant.clients.remove(client)
        if not tenant.clients:
            del self._tenants[client.tenant_id]
        if not self._tenants:
            self._busy.clear()

    async def backlog(self, tenant_id: int, position: Position) -> tuple[list[Event], bool]:
        """What is behind a position, up to a batch, and whether there may be more right away."""
        async with self._db.worker() as conn:
            rows = await store.after(conn, {tenant_id: position}, limit=BATCH)
        found = _settled(rows)
        return found, len(found) == BATCH

    async def _read_forever(self) -> None:
        subscription = self._db.hub.subscribe("et_events")
        try:
            while True:
                await self._busy.wait()
                try:
                    wait = await self._read()
                except Exception as error:
                    if not is_unavailable(error):
                        log.error("events.read_failed", error=repr(error)[:300])
                    wait = 1.0
                if wait > 0:
                    await subscription.wait(wait)
                await asyncio.sleep(GATHER_SECONDS)
        finally:
            subscription.close()

    async def _read(self) -> float:
        """One round for every tenant; how long to wait for the next when nothing is notified."""
        positions = {tenant_id: tenant.position for tenant_id, tenant in self._tenants.items()}
        if not positions:
            return POLL_SECONDS
        async with self._db.worker() as conn:
            rows = await store.after(conn, positions, limit=BATCH)
        by_tenant: dict[int, list[Record]] = {}
        for row in rows:
            by_tenant.setdefault(row["tenant_id"], []).append(row)
        wait = POLL_SECONDS
        for tenant_id, found in by_tenant.items():
            settled = _settled(found)
            if len(found) == BATCH and settled:
                wait = 0.0
            elif len(settled) < len(found):
                wait = min(wait, UNSETTLED_SECONDS)
            tenant = self._tenants.get(tenant_id)
            # The tenant may have left and come back while we read: then its place is a newer one.
            if not settled or tenant is None or tenant.position != positions[tenant_id]:
                continue
            tenant.position = settled[-1].position
            for client in tenant.clients:
                client.push(settled)
        return wait

    async def _prune_forever(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_SECONDS)
            try:
                async with self._db.worker() as conn:
                    gone = await store.prune(conn)
                if gone:
                    log.info("events.pruned", result=gone)
            except Exception as error:
                if not is_unavailable(error):
                    log.error("events.prune_failed", error=repr(error)[:300])


def _settled(rows: list[Record]) -> list[Event]:
    """Up to the first one that a running transaction might still precede."""
    events: list[Event] = []
    for row in rows:
        if not row["settled"]:
            break
        events.append(_event(row))
    return events


_ABOUT = (
    "thread_id", "lead_id", "session_id", "message_id", "direction", "message_type", "delivery_status", "action",
    "label", "session_status", "session_reason",
)  # fmt: skip


def _event(row: Record) -> Event:
    created = row["created_at"]
    data = {"kind": row["kind"], "id": row["ref_id"], "tenant_id": row["tenant_id"], "created_at": created}
    data |= {name: row[name] for name in _ABOUT if row[name] is not None}
    return Event(Position(row["xid"], row["id"]), row["kind"], created.timestamp(), data)


def now() -> float:
    return time.time()


FEED: web.AppKey[Feed] = web.AppKey("feed", Feed)
