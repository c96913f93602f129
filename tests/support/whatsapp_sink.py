"""A sink in memory that keeps the promises of the real one: unique by lead and id, and it can be away."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence

from core.channel import (
    InboundMessage,
    LeadId,
    MessageId,
    PairingUpdate,
    SessionState,
    StatusUpdate,
    Stored,
    ThreadId,
)
from core.errors import DatabaseUnavailable


class MemorySink:
    """`messages` holds what a table with the dedupe key would; `calls` every hand-over, repeats included."""

    def __init__(self) -> None:
        self.messages: dict[tuple[str, str], InboundMessage] = {}
        self.calls: list[InboundMessage] = []
        self.batches: list[int] = []
        self.updates: list[StatusUpdate] = []
        self.states: list[SessionState] = []
        self.pairings: list[PairingUpdate] = []
        self.away = False
        self.refuse: Callable[[InboundMessage], bool] = lambda _message: False
        self._codes_taken = 0
        self._changed = asyncio.Condition()

    async def received(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        if self.away:
            raise DatabaseUnavailable("the database is away")
        if any(map(self.refuse, messages)):
            raise ValueError("refused by the test")
        stored = []
        for message in messages:
            key = (message.person.external_id, message.channel_message_id)
            self.calls.append(message)
            held = self.messages.get(key)
            duplicate = held is not None and not (held.placeholder and not message.placeholder)
            if not duplicate:
                self.messages[key] = message
            stored.append(Stored(MessageId(len(self.calls)), ThreadId(1), LeadId(1), duplicate))
        self.batches.append(len(messages))
        await self._notify()
        return stored

    async def status(self, updates: Sequence[StatusUpdate]) -> None:
        if self.away:
            raise DatabaseUnavailable("the database is away")
        self.updates.extend(updates)
        await self._notify()

    async def state(self, state: SessionState) -> None:
        self.states.append(state)
        await self._notify()

    async def pairing(self, update: PairingUpdate) -> None:
        self.pairings.append(update)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def wait(self, condition: Callable[[], bool], timeout: float = 30) -> None:
        """Until the condition holds; looked at after every report."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)

    async def message(self, channel_message_id: str, timeout: float = 40) -> InboundMessage:
        """The message with this id, once it is stored and readable."""

        def find() -> InboundMessage | None:
            found = (m for m in self.messages.values() if m.channel_message_id == channel_message_id)
            return next((m for m in found if not m.placeholder), None)

        await self.wait(lambda: find() is not None, timeout)
        found = find()
        assert found is not None
        return found

    async def all_of(self, ids: Sequence[str], timeout: float = 90) -> None:
        wanted = set(ids)
        await self.wait(
            lambda: wanted <= {m.channel_message_id for m in self.messages.values() if not m.placeholder},
            timeout,
        )

    async def stands(self, status: str, reason: str | None = None, timeout: float = 60) -> SessionState:
        """The newest state, once it is this one."""

        def reached() -> bool:
            last = self.states[-1] if self.states else None
            return last is not None and last.status == status and (reason is None or last.reason == reason)

        await self.wait(reached, timeout)
        return self.states[-1]

    async def code(self, timeout: float = 40) -> str:
        """The next QR or phone code; each is handed out once, an older one that nobody took is passed over."""

        def fresh() -> list[PairingUpdate]:
            return [update for update in self.pairings[self._codes_taken :] if update.qr or update.code]

        await self.wait(lambda: bool(fresh()), timeout)
        newest = fresh()[-1]
        self._codes_taken = len(self.pairings)
        return newest.qr or newest.code or ""

    def clear(self) -> None:
        """Forget messages and receipts, for a test that shares the session with others."""
        self.messages.clear()
        self.calls.clear()
        self.updates.clear()


async def until(condition: Callable[[], bool], timeout: float = 15) -> None:
    """Until the condition holds, for what nothing reports."""
    deadline = time.monotonic() + timeout
    while True:
        if condition():
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s")
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
