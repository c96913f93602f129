"""After a start: the last day of a session's journal once more, for a database that was set back to before it.

One pass in the background, in small steps and mostly at rest, so that neither live messages nor other sessions' starts
wait for it. What is stored costs one look; what an earlier life stored and the database has not is stored again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakKeyDictionary

from core import log
from core.channel import InboundMessage, SessionContext, StatusUpdate
from core.errors import DatabaseUnavailable, JournalError
from core.journal import KEEP_SECONDS, Entry, Journal
from core.sinks import ReplaySink
from gateway.whatsapp.timings import Timings

STEP = 50
"""Entries looked at together: some milliseconds of work."""
SHARE = 4.0
"""It rests this many times as long as it worked, and no other session's works meanwhile: however many start together,
this takes a fifth of the process at most."""
STEP_SECONDS = 30.0

_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

Read = Callable[[Sequence[Entry]], Awaitable[tuple[list[InboundMessage], list[StatusUpdate]]]]

logger = log.get(part="whatsapp")


class LookBack:
    """`await run(connected)`, once for each time the journal is opened."""

    def __init__(
        self, context: SessionContext, sink: ReplaySink, journal: Journal, read: Read, timings: Timings
    ) -> None:
        """`read`: what entries say, without telling anybody."""
        self._context, self._sink, self._journal, self._read = context, sink, journal, read
        self._timings = timings
        self._after = 0
        self._through: int | None = None
        self._seen = self._stored = 0

    async def run(self, connected: asyncio.Event) -> None:
        """Until everything that was there at the start has been looked at. Called again, it goes on where it was."""
        if self._through is None:
            self._through = await asyncio.to_thread(self._journal.newest)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timings.settled):
                await connected.wait()
        since = time.time() - KEEP_SECONDS
        wait = self._timings.store_retry
        turn = _TURNS.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        while True:
            try:
                async with turn:
                    began = time.monotonic()
                    async with asyncio.timeout(STEP_SECONDS):
                        if not await self._step(since, self._through):
                            break
                    await asyncio.sleep(max(self._timings.breath, SHARE * (time.monotonic() - began)))
            except (DatabaseUnavailable, JournalError, TimeoutError):
                await asyncio.sleep(wait)
                wait = min(wait * 2, self._timings.store_retry_cap)
                continue
            wait = self._timings.store_retry
        tell = logger.warning if self._stored else logger.info
        tell(
            "journal.looked_back",
            session_id=self._context.session_id,
            count=self._seen,
            result=f"{self._stored} messages were missing and are stored again",
        )

    async def _step(self, since: float, through: int) -> bool:
        """The next entries; False when there are none."""
        entries = await asyncio.to_thread(
            self._journal.released, since, after=self._after, through=through, limit=STEP
        )
        if not entries:
            return False
        messages, updates = await self._read(entries)
        try:
            if messages or updates:
                self._stored += await self._sink.again(messages, updates)
        except (DatabaseUnavailable, TimeoutError):
            raise
        except Exception as error:
            # One that the database refuses does not keep the others out, nor those that follow.
            logger.error(
                "journal.not_replayed",
                session_id=self._context.session_id,
                error=f"{type(error).__name__}: {error}",
                action=f"journal entries {entries[0].number} to {entries[-1].number}: see the error, the rest goes on",
            )
        self._after = entries[-1].number
        self._seen += len(entries)
        return True
