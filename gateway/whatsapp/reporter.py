"""Hands a session's states and pairing steps to the sink, in order, without ever holding up who reports them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from core import log
from core.channel import PairingUpdate, SessionState, Sink
from core.errors import DatabaseUnavailable

RETRY_SECONDS = 1.0

logger = log.get(part="whatsapp")


class Reporter:
    def __init__(self, sink: Sink, session_id: int) -> None:
        self._sink, self._session_id = sink, session_id
        self._waiting: deque[SessionState | PairingUpdate] = deque()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def state(self, state: SessionState) -> None:
        # Only the newest state matters to a reader that was away.
        for old in [item for item in self._waiting if isinstance(item, SessionState)]:
            self._waiting.remove(old)
        self._add(state)

    def pairing(self, update: PairingUpdate) -> None:
        self._add(update)

    def _add(self, item: SessionState | PairingUpdate) -> None:
        self._waiting.append(item)
        self._empty.clear()
        self._wake.set()

    async def flush(self, seconds: float) -> None:
        """Wait until everything was handed over, at most this long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                item = self._waiting.popleft()
                try:
                    if isinstance(item, SessionState):
                        await self._sink.state(item)
                    else:
                        await self._sink.pairing(item)
                except DatabaseUnavailable:
                    # A code that waited is stale; a state is still true unless a newer one came.
                    if isinstance(item, SessionState) and not any(
                        isinstance(other, SessionState) for other in self._waiting
                    ):
                        self._waiting.appendleft(item)
                    await asyncio.sleep(RETRY_SECONDS)
                except Exception as error:
                    logger.error(
                        "session.report_failed",
                        session_id=self._session_id,
                        error=f"{type(error).__name__}: {error}",
                    )
            self._empty.set()
