"""Writes what sessions say about themselves into their rows, in the background and until it is committed.

States are coalesced: only the newest counts. Never changes what a person wants, but to stop a pairing that has ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from core import log as logs
from core.channel import PairingUpdate, SessionId, SessionState
from core.database import Database, is_transient
from core.store import audit
from core.store import sessions as store
from core.store.audit import Conn
from core.store.sessions import SessionRow

log = logs.get(part="sessions")

Step = Callable[[Conn], Awaitable[None]]
RETRY_FIRST, RETRY_MOST = 0.1, 2.0


class StateWriter:
    def __init__(self, db: Database, owner: str) -> None:
        self._db = db
        self._owner = owner
        self._states: dict[SessionId, SessionState] = {}
        self._steps: deque[tuple[SessionId, Step]] = deque()
        self._writing: set[SessionId] = set()
        self._work = asyncio.Event()
        self._idle = asyncio.Condition()

    def state(self, session_id: SessionId, state: SessionState) -> None:
        self._states[session_id] = state
        self._work.set()

    def pairing(self, session_id: SessionId, update: PairingUpdate, *, stop: bool = False) -> None:
        async def step(conn: Conn) -> None:
            await store.show_pairing(
                conn,
                session_id,
                update.kind,
                qr=update.qr,
                code=update.code,
                expires_at=update.expires_at,
                reason=update.reason,
                stop=stop,
            )

        self._steps.append((session_id, step))
        self._work.set()

    def audit(
        self, row: SessionRow, event: Literal["session_paired", "session_logged_out"], detail: dict[str, Any]
    ) -> None:
        async def step(conn: Conn) -> None:
            await audit.write(
                conn,
                event,
                tenant_id=row.tenant_id,
                actor=f"session:{row.id}",
                subject_type="session",
                subject_id=row.id,
                detail=detail,
            )

        self._steps.append((row.id, step))
        self._work.set()

    async def run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._steps or self._states:
                await self._write()
            async with self._idle:
                self._idle.notify_all()

    def _busy(self, session_id: SessionId | None = None) -> bool:
        if session_id is None:
            return bool(self._states or self._steps or self._writing)
        return (
            session_id in self._states
            or session_id in self._writing
            or any(waiting == session_id for waiting, _ in self._steps)
        )

    async def settled(self, session_id: SessionId) -> None:
        """Wait until nothing of this session waits any more."""
        async with self._idle:
            await self._idle.wait_for(lambda: not self._busy(session_id))

    async def flush(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until everything is written; False when that took too long."""
        try:
            async with asyncio.timeout(timeout), self._idle:
                await self._idle.wait_for(lambda: not self._busy())
        except TimeoutError:
            log.warning("session.state_unwritten", session_ids=sorted(self._states))
            return False
        return True

    async def _write(self) -> None:
        """Everything that waits, in one transaction; tried again until it is committed or proves to be impossible."""
        delay = RETRY_FIRST
        while True:
            steps = list(self._steps)
            states = dict(self._states)
            self._writing = {s for s, _ in steps} | set(states)
            try:
                async with self._db.worker() as conn, conn.transaction():
                    for _, step in steps:
                        await step(conn)
                    for session_id, state in sorted(states.items()):
                        await store.write_state(conn, session_id, state)
            except Exception as error:
                if not is_transient(error):
                    log.error("session.state_lost", error=repr(error), exc_info=error)
                    self._forget(len(steps), states)
                    return
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MOST)
                continue
            self._forget(len(steps), states)
            return

    def _forget(self, steps: int, states: dict[SessionId, SessionState]) -> None:
        for _ in range(steps):
            self._steps.popleft()
        for session_id, state in states.items():
            if self._states.get(session_id) is state:
                del self._states[session_id]
        self._writing = set()
