"""The channel inside the gateway that talks to the scripted platform: a thin, honest adapter, as a real one would be.

`scripted` can say what became of a send and is replaced by a newer connection (as WhatsApp); `mute` neither (as mail).
Both acknowledge after the commit. `journaled` acknowledges once its journal has it (as a push channel).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import deque
from datetime import UTC, datetime
from typing import Any

import orjson

from core.channel import (
    Attempt,
    Channel,
    ChannelKind,
    InboundMessage,
    MessageType,
    NotSent,
    OutboundMessage,
    Person,
    Sent,
    SessionContext,
    SessionState,
    SessionStatus,
    Sink,
    Unknown,
)
from core.dispatch import NotReady
from core.errors import DatabaseUnavailable, JournalError, NotSentError, RefusedError, UnknownOutcomeError
from core.journal import Journal
from tests.faults import wire

KINDS = ("scripted", "mute", "journaled")
RETRY = 0.2


def kinds(port: int) -> dict[str, ChannelKind]:
    """Lines for the registry of a gateway under test."""

    def factory(context: SessionContext, sink: Sink) -> Channel:
        if context.channel == "journaled":
            return JournaledChannel(context, sink, port)
        return ScriptedChannel(context, sink, port)

    return {name: ChannelKind(name, factory, files=name == "journaled") for name in KINDS}


class ScriptedChannel:
    def __init__(self, context: SessionContext, sink: Sink, port: int) -> None:
        self._context, self._sink, self._port = context, sink, port
        self._state = SessionState(SessionStatus.DISCONNECTED)
        self._writer: asyncio.StreamWriter | None = None
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = 0
        self._task: asyncio.Task[None] | None = None
        self._storing: asyncio.Task[None] | None = None
        self._came: deque[dict[str, Any]] = deque()
        self._more = asyncio.Event()

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def healthy(self) -> bool:
        return not any(t is not None and t.done() for t in (self._task, self._storing))

    async def connect(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._live())
            self._storing = asyncio.create_task(self._store_forever())

    async def disconnect(self) -> None:
        tasks = [t for t in (self._task, self._storing) if t is not None]
        self._task = self._storing = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        self._hang_up()
        self._state = SessionState(SessionStatus.DISCONNECTED)

    async def logout(self) -> None:
        await self.disconnect()

    # ---- the line ----

    async def _live(self) -> None:
        while True:
            replaced = False
            with contextlib.suppress(OSError):
                replaced = await self._talk()
            self._hang_up()
            if self._state.status is not SessionStatus.DISCONNECTED:
                await self._say(SessionStatus.DISCONNECTED, "stream_replaced" if replaced else None)
            if replaced:
                # Never again without being told to: somebody else has this session.
                await asyncio.Event().wait()
            await asyncio.sleep(random.uniform(0.05, 0.15))

    async def _talk(self) -> bool:
        """One connection; whether it ended because another one took its place."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=wire.LIMIT)
        try:
            hello = {"hello": self._context.session_id, "owner": os.getpid(), "kind": self._context.channel}
            writer.write(wire.pack(hello))
            while (message := await wire.receive(reader)) is not None:
                match message["op"]:
                    case "welcome":
                        self._writer = writer
                        await self._welcome()
                    case "offer":
                        await self._offered(message["items"])
                    case "answer":
                        future = self._open.pop(message["id"], None)
                        if future is not None and not future.done():
                            future.set_result(message)
                    case "replaced":
                        return True
            return False
        finally:
            writer.transport.abort()

    async def _welcome(self) -> None:
        await self._say(SessionStatus.ACTIVE)

    def _hang_up(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        waiting, self._open = self._open, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(
                    UnknownOutcomeError("the line broke before the answer", code="line_broke")
                )

    async def _say(self, status: SessionStatus, reason: str | None = None) -> None:
        self._state = SessionState(status, reason)
        await self._sink.state(self._state)

    # ---- in ----

    async def _offered(self, items: list[dict[str, Any]]) -> None:
        self._came.extend(items)
        self._more.set()

    async def _store_forever(self) -> None:
        """In the order they came; what cannot be stored now is tried again before anything newer."""
        while True:
            while not self._came:
                self._more.clear()
                await self._more.wait()
            batch = [self._came.popleft() for _ in range(min(100, len(self._came)))]
            while True:
                try:
                    await self._sink.received([self._convert(item) for item in batch])
                    break
                except DatabaseUnavailable:
                    await asyncio.sleep(RETRY)
            self._acknowledge(batch)

    def _acknowledge(self, items: list[dict[str, Any]]) -> None:
        if self._writer is not None:
            self._writer.write(wire.pack({"op": "ack", "items": [item["id"] for item in items]}))

    def _convert(self, item: dict[str, Any]) -> InboundMessage:
        sender = f"s{item['sender']}"
        return InboundMessage(
            tenant_id=self._context.tenant_id,
            session_id=self._context.session_id,
            channel=self._context.channel,
            channel_message_id=item["id"],
            person=Person(f"{self._context.channel}:{sender}"),
            message_type=MessageType.TEXT,
            content=str(item["place"]),
            channel_timestamp=item["ms"],
            sender_identifier=sender,
            raw_payload={"place": item["place"]},
        )

    # ---- out ----

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None:
            raise NotReady("the scripted platform is not connected")
        self._numbers += 1
        number = self._numbers
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        self._writer.write(wire.pack(message | {"id": number}))
        try:
            return await future
        finally:
            self._open.pop(number, None)

    async def send(self, message: OutboundMessage) -> Sent:
        attempt = message.attempt
        answer = await self._ask(
            {
                "op": "send",
                "item": attempt.queue_id,
                "epoch": attempt.claim_epoch,
                "recipient": attempt.recipient,
                "content": message.content,
            }
        )
        match answer["outcome"]:
            case "sent":
                return Sent(answer["message_id"], datetime.now(UTC))
            case "refused":
                raise RefusedError("the scripted platform refuses this for good")
            case "not_sent":
                raise NotSentError("the scripted platform did not take it this time")
        raise UnknownOutcomeError(f"the scripted platform says {answer['outcome']}")

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        answer = await self._ask({"op": "resolve", "item": attempt.queue_id, "epoch": attempt.claim_epoch})
        match answer["outcome"]:
            case "sent":
                return Sent(answer["message_id"], datetime.now(UTC))
            case "not_sent":
                return NotSent()
        return Unknown("cannot_tell")


class JournaledChannel(ScriptedChannel):
    """Tells the platform that it has a message once the disk has it; the database gets it afterwards."""

    def __init__(self, context: SessionContext, sink: Sink, port: int) -> None:
        super().__init__(context, sink, port)
        self._journal: Journal | None = None

    async def connect(self) -> None:
        if self._journal is None:
            self._journal = await asyncio.to_thread(Journal, self._context.folder / "journal.db")
        await super().connect()

    async def disconnect(self) -> None:
        await super().disconnect()
        if self._journal is not None:
            journal, self._journal = self._journal, None
            await asyncio.to_thread(journal.close)

    async def _welcome(self) -> None:
        if self._state.reason != "journal_failed":
            await super()._welcome()

    async def _offered(self, items: list[dict[str, Any]]) -> None:
        assert self._journal is not None
        entries = [("message", item["id"], orjson.dumps(item)) for item in items]
        try:
            await asyncio.to_thread(self._journal.append_many, entries)
        except JournalError as error:
            # Not acknowledged: the platform offers it again on the next connection.
            await self._say(SessionStatus.DISCONNECTED, "journal_failed")
            raise ConnectionResetError(error.detail) from error
        self._acknowledge(items)
        self._more.set()
        if self._state.status is not SessionStatus.ACTIVE:
            await self._say(SessionStatus.ACTIVE)

    async def _store_forever(self) -> None:
        after = 0
        while True:
            assert self._journal is not None
            self._more.clear()
            entries = await asyncio.to_thread(self._journal.pending, after, 100)
            if not entries:
                await self._more.wait()
                continue
            try:
                await self._sink.received([self._convert(orjson.loads(e.payload)) for e in entries])
            except DatabaseUnavailable:
                await asyncio.sleep(RETRY)
                continue
            after = entries[-1].number
            await asyncio.to_thread(self._journal.release, [e.number for e in entries])
