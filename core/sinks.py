"""What a channel's sink may do beyond `core.channel.Sink`: take in history, and answer for the channel itself.

A channel asks `isinstance(sink, HistorySink)` and lives without it. Nothing here does IO.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Mapping
from datetime import timedelta
from typing import Protocol, runtime_checkable

from core.history import Counts, Item


@runtime_checkable
class HistorySink(Protocol):
    async def history(
        self, source: AsyncIterable[Item], committed: Callable[[int], None], *, kind: str = "sync"
    ) -> Counts:
        """Store messages of the past, in bulk and behind live traffic. `committed` is told how many of the source's
        items are settled so far, after each commit. What is there already is counted, not stored again.

        Raises DatabaseUnavailable (bring it again), Conflict, and whatever the source raises."""
        ...

    async def names(self, names: Mapping[str, str]) -> None:
        """Names for people that are known without one, by external id. Raises DatabaseUnavailable."""
        ...


@runtime_checkable
class ReplySink(Protocol):
    async def automatic_reply(
        self, recipient: str, text: str, *, purpose: str, at_most_every: timedelta
    ) -> bool:
        """Queue a text of the channel's own, once per person and time; False when it was not due yet or may not be sent.

        Raises DatabaseUnavailable."""
        ...
