"""Between the channel and the sink: passes everything on unchanged, and lets the session notice what it needs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from core.channel import (
    InboundMessage,
    PairingUpdate,
    SessionState,
    SessionStatus,
    Sink,
    StatusUpdate,
    Stored,
)


class Listening:
    """A sink before the sink. `warning`: what a person should know of a session that is active otherwise."""

    def __init__(
        self,
        sink: Sink,
        *,
        on_stored: Callable[[Sequence[InboundMessage]], None],
        on_paired: Callable[[], None],
        on_active: Callable[[SessionState], None],
        warning: Callable[[], str | None],
    ) -> None:
        self._sink = sink
        self._on_stored, self._on_paired = on_stored, on_paired
        self._on_active, self._warning = on_active, warning
        self._state: SessionState | None = None
        self._said: SessionState | None = None

    async def received(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        stored = await self._sink.received(messages)
        self._on_stored(messages)
        return stored

    async def status(self, updates: Sequence[StatusUpdate]) -> None:
        await self._sink.status(updates)

    async def state(self, state: SessionState) -> None:
        self._state = state
        said = self._with_warning(state)
        await self._sink.state(said)
        self._said = said
        if state.status is SessionStatus.ACTIVE:
            self._on_active(state)

    async def pairing(self, update: PairingUpdate) -> None:
        if update.kind == "paired":
            self._on_paired()
        await self._sink.pairing(update)

    async def look_again(self) -> None:
        """Say the state once more when its warning has come or gone."""
        if self._state is not None and self._with_warning(self._state) != self._said:
            await self.state(self._state)

    def _with_warning(self, state: SessionState) -> SessionState:
        if state.status is not SessionStatus.ACTIVE or state.action is not None:
            return state
        return replace(state, action=self._warning())


def _contract(listening: Listening) -> Sink:
    return listening
