"""A session manager with fake channels on a real database, several of them side by side when a test wants that."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.channel import (
    Cursor,
    InboundMessage,
    LeadId,
    MessageId,
    SessionId,
    SessionStatus,
    StatusUpdate,
    Stored,
    ThreadId,
)
from core.database import Database
from core.metrics import Metrics
from core.secrets import KeyRing, generate
from core.settings import Settings, load
from core.store import sessions as store
from core.store.sessions import SessionRow
from gateway.session_runner import RunnerTimings
from gateway.sessions import ManagerTimings, SessionManager
from tests.support.fake_channel import FakePlatform
from tests.support.outbound import eventually, value

KEYS = KeyRing.parse(generate())
QUICK = ManagerTimings(
    poll=0.2,
    bury=0.2,
    ttl=3.0,
    renew=0.5,
    margin=0.5,
    stop=5,
    runner=RunnerTimings(start=5, disconnect=2, logout=2, backoff_first=0.05, backoff_most=0.2, watch=0.05),
)


@dataclass
class Inbox:
    """Stands where ingest stands, and remembers."""

    messages: list[InboundMessage] = field(default_factory=list)

    async def submit(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        self.messages.extend(messages)
        return [Stored(MessageId(1), ThreadId(1), LeadId(1)) for _ in messages]

    async def apply_status(self, updates: Sequence[StatusUpdate]) -> None: ...
    async def advance(self, session_id: SessionId, cursor: Cursor) -> None: ...


def settings_for(data_dir: Path) -> Settings:
    return load({"DATA_DIR": str(data_dir)})


def manager(
    db: Database,
    platform: FakePlatform,
    data_dir: Path,
    *,
    owner: str = "gw-1",
    files: bool = True,
    timings: ManagerTimings = QUICK,
    metrics: Metrics | None = None,
    inbox: Inbox | None = None,
    **more: Any,
) -> SessionManager:
    registry = {name: platform.kind(name, files=files) for name in ("fake", "whatsapp")}
    return SessionManager(
        db,
        inbox or Inbox(),
        metrics or Metrics(),
        registry,
        settings_for(data_dir),
        owner=owner,
        keys=KEYS,
        timings=timings,
        **more,
    )


@asynccontextmanager
async def managing(*args: Any, **more: Any) -> AsyncIterator[SessionManager]:
    made = manager(*args, **more)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def abandon(made: SessionManager) -> None:
    """What `kill -9` leaves: no good-bye, no row changed, the lock freed by the operating system, sockets closed."""
    made._stopping = True
    for task in made._tasks:
        task.cancel()
    made._tasks = []
    ownership = made.ownership
    if ownership._task is not None:
        ownership._task.cancel()
        ownership._task = None
    if ownership._lock is not None:
        os.close(ownership._lock._fd)
        ownership._lock = None
    for runner in list(made._runners.values()):
        await runner.stop()
    made._runners.clear()


async def new_tenant(db: Database, name: str = "shop") -> int:
    found: int = await value(db, "INSERT INTO et_tenants (name) VALUES ($1) RETURNING id", name)
    return found


async def new_session(
    db: Database, tenant_id: int, *, channel: str = "fake", identifier: str | None = None, **more: Any
) -> SessionRow:
    async with db.worker() as conn:
        return await store.create(conn, tenant_id, channel, identifier=identifier, **more)


async def want(db: Database, row: SessionRow, wanted: store.Wanted, **more: Any) -> None:
    async with db.worker() as conn:
        await store.want(conn, row.id, wanted, **more)


async def read(db: Database, row: SessionRow) -> SessionRow:
    async with db.worker() as conn:
        return await store.get(conn, row.tenant_id, row.id)


async def becomes(
    db: Database, row: SessionRow, status: SessionStatus, reason: str | None = None, *, seconds: float = 10
) -> SessionRow:
    """The session's row, once it says so."""

    async def check() -> SessionRow | None:
        now = await read(db, row)
        return now if now.status is status and (reason is None or now.status_reason == reason) else None

    found: SessionRow = await eventually(
        check, seconds=seconds, what=f"session {row.id} {status} {reason or ''}"
    )
    return found
