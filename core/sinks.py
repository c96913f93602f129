"""What a channel's sink may do beyond `core.channel.Sink`: take in history and what was stored before, answer for the
channel itself, keep the place a pull channel has come to, and look up what was said.

A channel asks `isinstance(sink, HistorySink)` and lives without it. Nothing here does IO.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, runtime_checkable

from core.channel import (
    Attempt,
    Cursor,
    InboundMessage,
    Json,
    MessageId,
    Person,
    Quoted,
    StatusUpdate,
)
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
class ReplaySink(Protocol):
    async def again(self, messages: Sequence[InboundMessage], updates: Sequence[StatusUpdate]) -> int:
        """What was stored in an earlier life, once more: a database that was set back gets what it lost. What is there
        costs one look and changes nothing. How many messages were missing and are stored now.

        Raises DatabaseUnavailable (bring it again), Invalid."""
        ...


@runtime_checkable
class ReplySink(Protocol):
    async def automatic_reply(
        self, recipient: str, text: str, *, purpose: str, at_most_every: timedelta
    ) -> bool:
        """Queue a text of the channel's own, once per person and time; False when it was not due yet or may not be sent.

        Raises DatabaseUnavailable."""
        ...


@runtime_checkable
class PullSink(Protocol):
    """For a channel that fetches: where it goes on. `InboundMessage.cursor` moves it together with the message."""

    async def cursors(self) -> Mapping[str, Cursor]:
        """All of this session, by name. Raises DatabaseUnavailable."""
        ...

    async def advance(self, cursor: Cursor) -> None:
        """Move one without a message, after everything that was handed over before. Raises DatabaseUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """A message of ours that is known: to whom it went, and the `payload` it was enqueued with."""

    person: Person
    payload: Json = field(default_factory=dict)


@runtime_checkable
class CredentialSink(Protocol):
    """For a channel whose service gives one secret in place of another (a refresh token that is used once)."""

    async def credential_renewed(self, path: Sequence[str], old: str, new: str) -> bool:
        """Durable when it returns. False: what is kept there is not `old` any more, because somebody entered other
        credentials; they stay. Raises DatabaseUnavailable (say it again, twice does no harm), SecretError."""
        ...


@runtime_checkable
class ConversationSink(Protocol):
    """For a channel whose messages name each other (a mail's References)."""

    async def written(self, channel_message_ids: Sequence[str]) -> Mapping[str, Written]:
        """Those of these ids that are messages we sent from this session. Raises DatabaseUnavailable."""
        ...

    async def last_said(self, message_id: MessageId) -> Quoted | None:
        """What the other side said last in the conversation of this outbound message. Raises DatabaseUnavailable."""
        ...


@runtime_checkable
class IntentSink(Protocol):
    """For a channel that cannot be asked what became of a call: it writes down, before each, that it begins."""

    async def intend(self, attempt: Attempt) -> bool:
        """Durable when it returns: the call may be made now. False: it has been settled that this attempt is never made.
        Raises DatabaseUnavailable."""
        ...

    async def never_called(self, attempt: Attempt) -> bool:
        """True: this attempt's call was not begun, and no `intend` of it will be granted any more. Raises
        DatabaseUnavailable."""
        ...
