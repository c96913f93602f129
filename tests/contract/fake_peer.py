"""The in-process channel as the suite meets it: a server that is an object, customers that are lists.

Shows that the suite asks nothing that only a network has; what it does not exercise is said in `cannot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from core.channel import (
    Channel,
    ChannelKind,
    Converted,
    InboundMessage,
    Json,
    MediaTarget,
    MessageType,
    OutboundMessage,
    Person,
    Sent,
    SessionContext,
    SessionId,
    SessionStatus,
    Sink,
    StatusUpdate,
    StoredMedia,
    TenantId,
)
from core.errors import DatabaseUnavailable, NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from core.metrics import Metrics
from core.settings import Settings
from tests.contract.peer import Arrival, Can, LogIn, Peer
from tests.support.fake_channel import FakeChannel, FakePlatform

SECRET = "fake-token-6b1c2f"
LOCKED_OUT = "The token was refused: enter a new one."


@dataclass
class FakeServer(FakePlatform):
    """The world outside: keeps what was said until a session has stored it."""

    waiting: deque[InboundMessage] = field(default_factory=deque)
    people: dict[str, FakeCustomer] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    condition: str = "up"
    """`up`, `down`, `refusing`."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def factory(self, context: SessionContext, sink: Sink) -> Channel:
        session = FakeSession(context, sink, self)
        self.channels[context.session_id] = session
        return session

    def become(self, condition: str) -> None:
        self.condition = condition
        self.changed.set()

    def _deliver(self, message: OutboundMessage) -> Sent:
        if message.attempt.recipient not in self.people:
            raise RefusedError("There is nobody of that name.", code="unknown_person")
        sent = super()._deliver(message)
        media = hashlib.sha256(message.media.path.read_bytes()).hexdigest() if message.media else None
        self.people[message.attempt.recipient].arrivals.append(
            Arrival(
                sent.channel_message_id,
                message.content,
                message.message_type,
                media,
                message.quoted.channel_message_id if message.quoted else None,
            )
        )
        return sent


class FakeSession(FakeChannel):
    """Keeps `Channel` and `MediaSource`. What was said is taken off the server only after its commit."""

    platform: FakeServer

    def __init__(self, context: SessionContext, sink: Sink, server: FakeServer) -> None:
        super().__init__(context, sink, server)
        self.token = context.credentials.get("token")
        self._task: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._live(), name="fake.live")

    async def disconnect(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await super().disconnect()

    async def _live(self) -> None:
        while True:
            self.platform.changed.clear()
            if self.platform.condition == "refusing" or self.token != SECRET:
                await self.say(SessionStatus.DISCONNECTED, "auth_failed", action=LOCKED_OUT)
            elif self.platform.condition == "down":
                await self.say(SessionStatus.CONNECTING, "unreachable")
            else:
                if self.state.status is not SessionStatus.ACTIVE:
                    await self.say(SessionStatus.ACTIVE, identifier=self.identifier)
                await self._take()
            await self.platform.changed.wait()

    async def _take(self) -> None:
        while self.platform.waiting:
            message = self.platform.waiting[0]
            try:
                await self.sink.received([self._ours(message)])
            except DatabaseUnavailable:
                await asyncio.sleep(0.1)
                continue
            self.platform.waiting.popleft()

    def _ours(self, message: InboundMessage) -> InboundMessage:
        return replace(message, tenant_id=self.context.tenant_id, session_id=self.context.session_id)

    async def send(self, message: OutboundMessage) -> Sent:
        if self.state.status is not SessionStatus.ACTIVE:
            raise ThrottledError("The session is not connected.", retry_after=0.2, code="not_connected")
        return await super().send(message)

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        await target.write(self.platform.files[message.channel_message_id])


@dataclass
class FakeCustomer:
    server: FakeServer
    name: str
    arrivals: list[Arrival] = field(default_factory=list)
    said: dict[str, InboundMessage] = field(default_factory=dict)

    @property
    def external_id(self) -> str:
        return f"fake:{self.name}"

    @property
    def address(self) -> str:
        return self.name

    async def say(self, text: str, *, reply_to: str | None = None) -> str:
        return self._post(MessageType.TEXT, text, reply_to_message_id=reply_to)

    async def send_media(
        self, kind: MessageType, data: bytes, *, mime_type: str, filename: str, caption: str | None = None
    ) -> str:
        about = {"state": "pending", "mime_type": mime_type, "filename": filename, "size": len(data)}
        self.server.files[self._next()] = data
        return self._post(kind, caption, media_metadata=about)

    async def redeliver(self, message_id: str) -> None:
        self.server.waiting.append(self.said[message_id])
        self.server.changed.set()

    def _next(self) -> str:
        return f"{self.name}/{len(self.said) + 1}"

    def _post(self, kind: MessageType, text: str | None, **more: Any) -> str:
        message = InboundMessage(
            tenant_id=TenantId(0),
            session_id=SessionId(0),
            channel="fake",
            channel_message_id=self._next(),
            person=Person(self.external_id),
            message_type=kind,
            content=text,
            channel_timestamp=int(time.time() * 1000),
            sender_identifier=self.name,
            raw_payload={"text": text},
            **more,
        )
        self.said[message.channel_message_id] = message
        self.server.waiting.append(message)
        self.server.changed.set()
        return message.channel_message_id


class FakePeer:
    channel: ClassVar[str] = "fake"
    cannot: ClassVar[Mapping[Can, str]] = {
        Can.CHECK: "its sessions are made by the tests, not by a person who may mistype",
        Can.HANG: "there is no connection that could fall silent: a call in one process always returns",
    }
    never: ClassVar[Mapping[MessageType, str]] = {}

    def __init__(self) -> None:
        self.server = FakeServer()

    async def open(self, folder: Path) -> None: ...

    async def close(self) -> None: ...

    def settings(self) -> Mapping[str, str]:
        return {}

    def kind(self, settings: Settings, metrics: Metrics) -> ChannelKind:
        return self.server.kind("fake")

    def log_in(self) -> LogIn:
        return LogIn("@shop", {"token": SECRET})

    async def scan(self, qr: str) -> None:
        raise AssertionError("this channel is not paired")

    def secrets(self) -> Sequence[str]:
        return [SECRET]

    def wrong_credentials(self) -> Mapping[str, Json]:
        return {}

    def customer(self, name: str) -> FakeCustomer:
        made = FakeCustomer(self.server, name)
        self.server.people[made.external_id] = made
        return made

    def unreachable(self) -> str:
        return "nobody"

    def recorded(self) -> Iterator[tuple[str, Converted]]:
        """It has no payloads: a message of each type as the tests make them."""
        for kind in MessageType:
            writer = FakeCustomer(self.server, f"writer-of-{kind}")
            message_id = writer._post(kind, str(kind))
            self.server.waiting.clear()
            yield kind, Converted(messages=(writer.said[message_id],))

    async def throttle_next(self) -> None:
        self.server.script(ThrottledError("Too many messages; wait.", retry_after=0.1))

    async def fail_next(self) -> None:
        self.server.script(NotSentError("The server is being restarted; try again.", code="restarting"))

    async def cut_before_acceptance(self) -> None:
        self.server.script(ConnectionResetError("cut off"))

    async def cut_after_acceptance(self) -> None:
        async def cut(message: OutboundMessage) -> Sent:
            sent = self.server._deliver(message)
            self._receipt = asyncio.create_task(self._deliver_receipt(message, sent.channel_message_id))
            raise UnknownOutcomeError("The call was cut off.", channel_message_id=sent.channel_message_id)

        self.server.script(cut)

    async def _deliver_receipt(self, message: OutboundMessage, message_id: str) -> None:
        attempt = message.attempt
        await self.server.channels[attempt.session_id].sink.status(
            [StatusUpdate(attempt.tenant_id, attempt.session_id, "fake", (message_id,), "delivered")]
        )

    async def drop_connections(self) -> None:
        self.server.become("down")

    async def hang(self) -> None:
        raise AssertionError(self.cannot[Can.HANG])

    async def refuse_login(self) -> None:
        self.server.become("refusing")

    async def come_back(self) -> None:
        self.server.become("up")


def _keeps_the_contract() -> Peer:
    peer: Peer = FakePeer()
    return peer
