"""A channel on a sandbox, with a sink in memory that keeps cursors and intents as the real one does."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.channel import (
    Attempt,
    Cursor,
    InboundMessage,
    LocalFile,
    MessageId,
    MessageType,
    OutboundMessage,
    QueueId,
    SessionContext,
    SessionId,
    SessionState,
    SessionStatus,
    Stored,
    TenantId,
)
from core.errors import DatabaseUnavailable, Invalid
from gateway.telegram.api import Timings
from gateway.telegram.channel import TelegramChannel
from gateway.telegram.pace import Limits
from sandbox.telegram import TelegramSandbox
from sandbox.telegram.people import Person
from sandbox.telegram.world import Bot, Chat
from tests.support.whatsapp_sink import MemorySink

QUICK = Timings(
    poll=1, slack=0.7, connect=1.0, read=0.7, upload=3.0, first_wait=0.05, most_wait=0.2, look=0.2, stop=2.0
)
UNHURRIED = Limits(per_second=1000, chat_seconds=0.0, group_per_minute=1000)


class Sink(MemorySink):
    """Moves a cursor only with the message that carries it, all of a call or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Cursor] = {}
        self.intents: dict[tuple[int, int], str] = {}
        self.bad: set[str] = set()
        """Contents that cannot be stored."""

    async def received(self, messages: Sequence[InboundMessage]) -> list[Stored]:
        if not self.away and any(message.content in self.bad for message in messages):
            raise Invalid("the row cannot be written")
        stored = await super().received(messages)
        for message in messages:
            if message.cursor is not None:
                self.places[message.cursor.name] = message.cursor
        return stored

    async def cursors(self) -> dict[str, Cursor]:
        return dict(self.places)

    async def advance(self, cursor: Cursor) -> None:
        if self.away:
            raise DatabaseUnavailable("the database is away")
        self.places[cursor.name] = cursor
        await self._notify()

    async def intend(self, attempt: Attempt) -> bool:
        if self.away:
            raise DatabaseUnavailable("the database is away")
        key = (attempt.queue_id, attempt.claim_epoch)
        return key not in self.intents and self.intents.setdefault(key, "called") == "called"

    async def never_called(self, attempt: Attempt) -> bool:
        return self.intents.setdefault((attempt.queue_id, attempt.claim_epoch), "withdrawn") == "withdrawn"

    @property
    def contents(self) -> list[str | None]:
        return [message.content for message in self.messages.values()]

    @property
    def now(self) -> SessionState:
        return self.states[-1]

    async def stands(self, status: str, reason: str | None = None) -> SessionState:
        """The first state of this kind from now on, or the present one."""
        wanted = SessionStatus(status)
        await self.wait(
            lambda: bool(self.states) and self.now.status is wanted and reason in (None, self.now.reason)
        )
        return self.now


class Session:
    """One bot's session: the channel, its sink and the sandbox behind it."""

    def __init__(self, tg: TelegramSandbox, bot: Bot, **context: Any) -> None:
        self.tg, self.bot, self.sink = tg, bot, Sink()
        self.context = SessionContext(
            TenantId(1), SessionId(2), "telegram", bot.address, None, {}, {"token": bot.token}, Path("unused")
        )
        self.context = replace(self.context, **context)
        self.numbers = itertools.count(1)
        self.limits = UNHURRIED
        self.channel = self.make()

    def make(self) -> TelegramChannel:
        return TelegramChannel(
            self.context, self.sink, base_url=self.tg.url, timings=QUICK, limits=self.limits
        )

    async def restart(self) -> None:
        """As after a kill: nothing of the old channel is used again but what the database keeps."""
        await self.channel.disconnect()
        self.channel = self.make()
        await self.channel.connect()
        await self.sink.stands("active")

    def message(
        self, to: Person | Chat | str, content: str | None = None, kind: str = "text", **more: Any
    ) -> OutboundMessage:
        recipient = to if isinstance(to, str) else f"telegram:{to.id}"
        number = next(self.numbers)
        attempt = Attempt(TenantId(1), SessionId(2), QueueId(number), MessageId(number), 1, recipient)
        return OutboundMessage(attempt, MessageType(kind), content, **more)

    async def send(
        self, to: Person | Chat | str, content: str | None = None, kind: str = "text", **more: Any
    ) -> str:
        """The id it got."""
        return (await self.channel.send(self.message(to, content, kind, **more))).channel_message_id


@pytest.fixture
async def tg() -> AsyncIterator[TelegramSandbox]:
    async with TelegramSandbox() as sandbox:
        yield sandbox


@pytest.fixture
async def session(tg: TelegramSandbox) -> AsyncIterator[Session]:
    async with running(tg) as made:
        yield made


@asynccontextmanager
async def running(tg: TelegramSandbox, **context: Any) -> AsyncIterator[Session]:
    made = Session(tg, tg.bot(), **context)
    await made.channel.connect()
    try:
        await made.sink.stands("active")
        yield made
    finally:
        await made.channel.disconnect()


@pytest.fixture
async def mei(session: Session) -> Person:
    """A person the bot may write to."""
    person = session.tg.person("Mei Lim")
    await session.sink.message(await person.say(session.bot, "hello"))
    return person


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., LocalFile]:
    def make(mime_type: str, filename: str, data: bytes = b"0123456789" * 1000, **more: Any) -> LocalFile:
        path = tmp_path / filename
        path.write_bytes(data)
        return LocalFile(path, mime_type, filename, len(data), "unused", **more)

    return make
