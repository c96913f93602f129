"""Keeps the pilot's figures: writes down suppressed duplicates, and shows the last day's figures as gauges.

Counts nothing itself; a figure that cannot be written down now is written down later.
"""

from __future__ import annotations

import asyncio

from core import log as logs
from core.database import Database, is_transient
from core.metrics import Metrics
from core.store import pilot

log = logs.get(part="pilot")

EVERY = 30.0
"""Seconds: how much of the count of duplicates a killed gateway takes with it."""
SHOW_EVERY = 60.0
QUERY_SECONDS = 5
STOP_SECONDS = 2.0
DAY = 24


class PilotKeeper:
    """`await start()`, `await stop()`, `healthy`."""

    def __init__(self, db: Database, metrics: Metrics, *, every: float = EVERY) -> None:
        self._db = db
        self._metrics = metrics
        self._every = every
        self._told: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="pilot")

    async def stop(self) -> None:
        """Write down what is left, within two seconds."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task], timeout=1)
        self._task = None
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.write()
        except Exception as error:
            log.warning("pilot.not_written", error=repr(error), result="these duplicates are not counted")

    @property
    def healthy(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _run(self) -> None:
        turns = max(1, round(SHOW_EVERY / self._every))
        turn = 0
        while True:
            try:
                await self.write()
                if turn % turns == 0:
                    await self.show()
                turn += 1
            except Exception as error:
                level = log.warning if is_transient(error) else log.error
                level("pilot.failed", error=repr(error), result="trying again")
            await asyncio.sleep(self._every)

    async def write(self) -> None:
        """Add to the hour's row what was counted since the last time."""
        counted = self._metrics.duplicates_by_channel()
        fresh = {c: n - self._told.get(c, 0) for c, n in counted.items() if n > self._told.get(c, 0)}
        if not fresh:
            return
        before = self._told
        self._told = before | counted  # first, so that two writers never tell the same ones
        try:
            async with self._db.worker() as conn, conn.transaction():
                await pilot.add_duplicates(conn, fresh)
                await pilot.forget_old(conn)
        except Exception:
            self._told = before
            raise

    async def show(self) -> None:
        """The last day as gauges. A queue too large to be read in seconds keeps the figures it had."""
        async with self._db.worker() as conn, conn.transaction():
            await conn.execute(f"SET LOCAL statement_timeout = '{QUERY_SECONDS}s'")
            day = await pilot.figures(conn, hours=DAY)
        for one in day:
            if one.success is not None and one.retries_per_send is not None:
                self._metrics.pilot_success.labels(one.channel).set(one.success)
                self._metrics.pilot_retries.labels(one.channel).set(one.retries_per_send)
            self._metrics.pilot_duplicates.labels(one.channel).set(one.duplicates)
        for channel in self._metrics.pilot_channels() - {one.channel for one in day if one.finished}:
            # Nothing was sent for a day: no figure, rather than an old one.
            self._metrics.pilot_success.remove(channel)
            self._metrics.pilot_retries.remove(channel)
