"""The inbound worker: waits for messages, claims them thread by thread, keeps its claims alive, has each decided.

LISTEN is only a hint; a poll finds what it missed. It holds no message longer than its claim, and sends nothing itself.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from itertools import groupby
from typing import TypeVar

from asyncpg import Record

from core import faults
from core import log as logs
from core.channel import MessageId
from core.database import Database, is_transient
from core.decide.port import Decider
from core.deciding import Burst, DeciderFailed, Deciding
from core.metrics import Metrics
from core.rush import Rush
from core.store import inbound as store

log = logs.get(part="inbound")
_T = TypeVar("_T")

STOP_SECONDS = 5.0
BACKOFF_FIRST = 0.2
BACKOFF_MOST = 5.0
GIVE_WAY_SECONDS = 0.5
"""The longest that a rush of messages puts the next claim off, unless there is more than one claim's worth to decide."""
STUCK_SECONDS = 120.0
"""Every statement has a time limit far below this, so a loop that has not turned for so long is stuck."""


class InboundWorker:
    """One per process. `await start()`, `await stop()`, `healthy`.

    A claim is good for `lease_seconds` on the database's clock and renewed while its burst is being decided, however
    slow the decider is; a worker that died loses it after that time, one that was frozen finds it gone and drops its
    answer. `batch` bounds threads per claim, `concurrency` bursts at once. While messages come in a `rush`, claims wait for
    a moment: what one person writes meanwhile is decided together, once.
    """

    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        deciders: Mapping[str, Decider],
        *,
        owner: str,
        poll_seconds: float = 30.0,
        clock: Callable[[], datetime] | None = None,
        batch: int = 20,
        concurrency: int = 16,
        lease_seconds: float = 30.0,
        decide_seconds: float = 30.0,
        attempts: int = 3,
        backoff_seconds: float = 1.0,
        placeholder_seconds: float = 600.0,
        rush: Rush | None = None,
    ) -> None:
        self._db = db
        # One name per start: an earlier life of the same gateway is somebody else, whose claims run out.
        self._claimant = f"{owner}:{secrets.token_hex(4)}"
        self._deciding = Deciding(
            db, metrics, deciders, owner=self._claimant, decide_seconds=decide_seconds, clock=clock
        )
        self._poll = poll_seconds
        self._batch = batch
        self._concurrency = concurrency
        self._lease = timedelta(seconds=lease_seconds)
        self._attempts = attempts
        self._backoff = backoff_seconds
        self._rush = rush
        self._placeholder_age = timedelta(seconds=placeholder_seconds)
        self._loops: list[asyncio.Task[None]] = []
        self._bursts: dict[asyncio.Task[None], Burst] = {}
        self._turned: dict[str, float] = {}
        self._stopping = False
        self._wake: Callable[[], None] = lambda: None

    @property
    def healthy(self) -> bool:
        """False when a loop has died or has not turned for long. A database that is away is no fault of this worker."""
        now = time.monotonic()
        return (
            bool(self._loops)
            and not any(loop.done() for loop in self._loops)
            and all(now - turned < STUCK_SECONDS + self._poll for turned in self._turned.values())
        )

    @property
    def busy(self) -> int:
        """Bursts being decided right now."""
        return len(self._bursts)

    async def start(self) -> None:
        """Returns at once; the database may still be away."""
        if self._loops:
            return
        self._stopping = False
        self._loops = [
            asyncio.create_task(self._supervise("pump", self._pump), name="inbound.pump"),
            asyncio.create_task(self._supervise("sweep", self._sweep), name="inbound.sweep"),
            asyncio.create_task(self._supervise("renew", self._renew), name="inbound.renew"),
        ]
        log.info("inbound.started", owner=self._claimant)

    async def stop(self) -> None:
        """Takes nothing new, gives what is being decided a few seconds, and gives the rest back. Below 10 s."""
        if not self._loops:
            return
        self._stopping = True
        pump, sweep, renew = self._loops
        await _cancelled(pump, sweep)
        if self._bursts:
            await asyncio.wait(list(self._bursts), timeout=STOP_SECONDS)
        await _cancelled(renew, *self._bursts)
        self._bursts.clear()
        self._loops = []
        self._turned.clear()
        try:
            async with asyncio.timeout(3), self._db.worker() as conn:
                released = await store.release_owned(conn, self._claimant)
        except Exception as error:
            # They run out by themselves.
            log.warning("inbound.not_released", error=repr(error))
        else:
            log.info("inbound.stopped", owner=self._claimant, released=released)

    # ---- the loops ----

    async def _supervise(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop for ever: what ends it is logged and it is begun again, a lost database quietly."""
        delay = BACKOFF_FIRST
        while True:
            began = self._turned[name] = time.monotonic()
            try:
                await loop()
            except Exception as error:
                level = log.warning if is_transient(error) else log.error
                level("inbound.interrupted", action=name, error=repr(error))
            if time.monotonic() - began > 60:
                delay = BACKOFF_FIRST
            await asyncio.sleep(delay * random.uniform(0.75, 1.25))  # noqa: S311
            delay = min(delay * 2, BACKOFF_MOST)

    async def _pump(self) -> None:
        """Claim while there is something and room for it; else wait to be woken, or for the poll."""
        subscription = self._db.hub.subscribe("et_inbound")
        self._wake = subscription.wake
        behind = False
        try:
            while True:
                self._turned["pump"] = time.monotonic()
                if not behind and self._rush is not None:
                    await self._rush.over(within=GIVE_WAY_SECONDS)
                room = min(self._concurrency - len(self._bursts), self._batch)
                taken = await self._take(room) if room > 0 else 0
                if room > 0:
                    behind = taken >= room
                if taken:
                    continue
                # A burst that ends wakes us too: its thread may have more, and there is room again.
                await subscription.wait(self._poll)
        finally:
            subscription.close()

    async def _take(self, threads: int) -> int:
        """Claim and set to work; in how many threads something waited."""
        async with self._db.worker() as conn:
            rows = await store.claim(conn, self._claimant, threads=threads, lease=self._lease)
        faults.point("inbound.claimed")
        self._set_to_work(rows)
        return len({row["thread_id"] for row in rows})

    async def _sweep(self) -> None:
        """Give back what dead workers hold, and give up on what nobody could read."""
        pause = max(0.05, min(self._poll, self._lease.total_seconds() / 2))
        while True:
            self._turned["sweep"] = time.monotonic()
            async with self._db.worker() as conn:
                released = await store.release_expired(conn)
                if released:
                    log.warning("inbound.released", count=released)
                    self._wake()
                rows = await store.claim_unreadable(
                    conn, self._claimant, older_than=self._placeholder_age, lease=self._lease
                )
            if rows:
                log.warning("inbound.unreadable", message_ids=[row["id"] for row in rows])
            self._set_to_work(rows)
            await asyncio.sleep(pause)

    async def _renew(self) -> None:
        """Say that we are still at it, for exactly what we are at."""
        while True:
            self._turned["renew"] = time.monotonic()
            await asyncio.sleep(self._lease.total_seconds() / 3)
            ids = [message_id for burst in self._bursts.values() for message_id in burst.message_ids]
            if ids:
                async with self._db.worker() as conn:
                    await store.renew(conn, self._claimant, ids, lease=self._lease)

    # ---- a burst ----

    def _set_to_work(self, rows: list[Record]) -> None:
        now = time.monotonic()
        for thread_id, group in groupby(rows, key=lambda row: int(row["thread_id"])):
            messages = list(group)
            burst = Burst(
                thread_id,
                messages[0]["tenant_id"],
                messages[0]["channel"],
                tuple(MessageId(row["id"]) for row in messages),
                now,
            )
            log.debug(
                "inbound.claimed",
                tenant_id=burst.tenant_id,
                thread_id=thread_id,
                message_ids=burst.message_ids,
            )
            task = asyncio.create_task(self._decide(burst), name=f"inbound.burst.{thread_id}")
            self._bursts[task] = burst
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        burst = self._bursts.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its claims are renewed no longer: they run out, and somebody tries again.
            log.error("inbound.failed", message_ids=burst and burst.message_ids, error=repr(error))
        if not self._stopping:
            self._wake()

    async def _decide(self, burst: Burst) -> None:
        """Bring a burst to its end: decided, dropped because it is not ours any more, or given up to a person."""
        for attempt in range(1, self._attempts + 1):
            failed = await self._try(burst)
            if failed is None:
                return
            log.warning(
                "decision.failed",
                tenant_id=burst.tenant_id,
                thread_id=burst.thread_id,
                message_id=burst.message_ids[-1],
                action="retry" if attempt < self._attempts else "give_up",
                error=failed.kind,
                exc_info=failed.__cause__ or failed,
            )
            if attempt == self._attempts:
                give_up = partial(self._deciding.give_up, burst, failed, attempt)
                await self._through_outages(give_up)
                return
            await asyncio.sleep(self._backoff * 4 ** (attempt - 1) * random.uniform(0.75, 1.25))  # noqa: S311

    async def _try(self, burst: Burst) -> DeciderFailed | None:
        """One attempt; None when nothing is left to do."""
        try:
            judged = await self._through_outages(partial(self._deciding.judge, burst))
            if judged is not None:
                await self._through_outages(partial(self._deciding.store, burst, judged))
        except DeciderFailed as error:
            return error
        except Exception as error:
            failed = DeciderFailed("worker_error", repr(error))
            failed.__cause__ = error
            return failed
        return None

    async def _through_outages(self, step: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat a step while the database is away or its outcome unknown: every step finds out what is still ours."""
        delay = BACKOFF_FIRST
        while True:
            try:
                return await step()
            except Exception as error:
                if isinstance(error, DeciderFailed) or not is_transient(error):
                    raise
                log.warning("inbound.waiting", error=repr(error))
            await asyncio.sleep(delay * random.uniform(0.75, 1.25))  # noqa: S311
            delay = min(delay * 2, BACKOFF_MOST)


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=STOP_SECONDS / 2)
