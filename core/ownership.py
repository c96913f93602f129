"""This gateway's leases: takes them, renews them, knows until when they can be proven, and finds gateways that died.

Knows no channel. Deadlines are on the monotonic clock and count from before the request that renewed them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import faults
from core import log as logs
from core.channel import SessionId
from core.database import Database, is_transient
from core.store import leases
from core.store.leases import Bid

log = logs.get(part="ownership")

TTL, RENEW, MARGIN = 30.0, 10.0, 3.0
"""Seconds a lease lives, between renewals, and how much earlier than the database we stop believing in it."""
RETRY = 1.0
SILENT = 86_400.0


@dataclass(frozen=True, slots=True)
class Lease:
    epoch: int
    until: float


class Ownership:
    """`await start()`, `await stop()`. `on_lost` hears of sessions that another gateway has now."""

    def __init__(
        self,
        db: Database,
        owner: str,
        data_dir: Path,
        *,
        on_lost: Callable[[Collection[SessionId]], None] = lambda _: None,
        ttl: float = TTL,
        renew: float = RENEW,
        margin: float = MARGIN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.owner = owner
        self.ttl = ttl
        self.data_dir_id = ""
        self._db = db
        self._data_dir = data_dir.resolve()
        self._on_lost = on_lost
        self._renew_every = renew
        self._margin = margin
        self._clock = clock
        self._held: dict[SessionId, Lease] = {}
        self._lock: _OwnerLock | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Become known. Raises OSError when `DATA_DIR` cannot be used, and what the database raises."""
        self.data_dir_id = await asyncio.to_thread(_folder_id, self._data_dir)
        self._lock = await asyncio.to_thread(_OwnerLock, self._data_dir, self.owner)
        async with self._db.worker() as conn:
            await leases.beat(conn, self.owner, socket.gethostname(), self.data_dir_id)
            await leases.forget_silent(conn, seconds=SILENT)
        await self.bury_dead()
        self._task = asyncio.create_task(self._keep(), name="ownership.renew")

    async def stop(self) -> None:
        """Free everything at once, so that nobody has to wait for the leases to run out."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1)
            self._task = None
        self._held.clear()
        try:
            async with asyncio.timeout(2), self._db.worker() as conn:
                await leases.forget_gateway(conn, self.owner)
        except Exception as error:
            log.warning("lease.release_failed", error=repr(error), result="they run out by themselves")
        if self._lock is not None:
            self._lock.release(forget=True)
            self._lock = None

    @property
    def healthy(self) -> bool:
        return self._task is not None and not self._task.done()

    # --- what is ours

    @property
    def held(self) -> frozenset[SessionId]:
        """Ours as far as we know; whether that can be proven now is `until`'s answer."""
        return frozenset(self._held)

    def until(self, session_id: SessionId) -> float:
        """The monotonic time at which the proof ends; 0 when the session is not ours."""
        lease = self._held.get(session_id)
        return lease.until if lease is not None else 0.0

    async def take(self, bids: Sequence[Bid]) -> frozenset[SessionId]:
        """Those of the bids that were free and are ours now."""
        if not bids:
            return frozenset()
        asked = self._clock()
        async with self._db.worker() as conn, conn.transaction():
            taken = await leases.take(conn, self.owner, bids, ttl=self.ttl)
        for session_id, epoch in taken.items():
            self._held[session_id] = Lease(epoch, asked + self.ttl - self._margin)
        if taken:
            log.info("lease.taken", count=len(taken), session_ids=sorted(taken))
        return frozenset(taken)

    def granted(self, session_id: SessionId, epoch: int, asked: float) -> None:
        """A lease that somebody else's transaction took for us at the monotonic time `asked` or later."""
        self._held[session_id] = Lease(epoch, asked + self.ttl - self._margin)

    async def give_up(self, sessions: Collection[SessionId]) -> None:
        """First here, then in the database: at no moment do we believe in what somebody else may have."""
        for session_id in sessions:
            self._held.pop(session_id, None)
        async with self._db.worker() as conn:
            await leases.give_up(conn, self.owner, sessions)

    def drop(self, session_id: SessionId) -> None:
        """Its row is gone, and the lease with it."""
        self._held.pop(session_id, None)

    # --- keeping it

    async def _keep(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._renew_every):
                    await self.renew()
                pause = self._renew_every
            except Exception as error:
                if not is_transient(error):
                    log.error("lease.renew_failed", error=repr(error))
                pause = min(RETRY, self._renew_every)
            await asyncio.sleep(pause)

    async def renew(self) -> None:
        """One heartbeat and one renewal of everything held."""
        asked = self._clock()
        before = dict(self._held)
        async with self._db.worker() as conn, conn.transaction():
            await leases.beat(conn, self.owner, socket.gethostname(), self.data_dir_id)
            ours = await leases.renew(
                conn, self.owner, {s: lease.epoch for s, lease in before.items()}, ttl=self.ttl
            )
            faults.point("lease.renew.before_commit")
        lost = []
        for session_id, lease in before.items():
            if self._held.get(session_id) is not lease:
                continue  # given up, or taken anew, while we asked
            if session_id in ours:
                self._held[session_id] = Lease(lease.epoch, asked + self.ttl - self._margin)
            else:
                del self._held[session_id]
                lost.append(session_id)
        if lost:
            log.warning("lease.lost", session_ids=sorted(lost))
            self._on_lost(lost)

    async def bury_dead(self) -> list[str]:
        """Owners on our own data folder whose lock is free are dead for certain: their leases are free now, not when
        they run out. Returns their names."""
        async with self._db.worker() as conn:
            others = await leases.neighbours(conn, self.owner, self.data_dir_id)
        dead = [o for o in others if await asyncio.to_thread(_is_dead, self._data_dir, o)]
        for owner in dead:
            async with self._db.worker() as conn, conn.transaction():
                await leases.forget_gateway(conn, owner)
            await asyncio.to_thread(_lock_path(self._data_dir, owner).unlink, missing_ok=True)
            log.warning("gateway.found_dead", owner=owner)
        return dead


class _OwnerLock:
    """An flock that the operating system frees however the process ends."""

    def __init__(self, data_dir: Path, owner: str) -> None:
        self._path = _lock_path(data_dir, owner)
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise

    def release(self, *, forget: bool) -> None:
        if forget:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)


def _lock_path(data_dir: Path, owner: str) -> Path:
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in owner)
    return data_dir / "owners" / f"{safe}.lock"


def _is_dead(data_dir: Path, owner: str) -> bool:
    """The lock file is made before the owner's row and removed only in a clean stop, so a missing one proves it too."""
    try:
        fd = os.open(_lock_path(data_dir, owner), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _folder_id(data_dir: Path) -> str:
    """The name of this folder, made once: two gateways with one folder agree, a copy of it elsewhere should not exist."""
    path = data_dir / "gateway.id"
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        aside.write_text(uuid.uuid4().hex + "\n", "ascii")
        try:
            os.link(aside, path)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    return path.read_text("ascii").strip()
