"""An in-process channel that keeps `core.channel.Channel`: scripted outcomes, and a ledger of every call.

The `FakePlatform` stands for the world outside: it outlives channels, managers and workers, so that a test can ask what
really went out, how often, and whether two sessions were ever connected at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from core.channel import (
    Attempt,
    Channel,
    ChannelKind,
    InboundMessage,
    MessageType,
    NotSent,
    OutboundMessage,
    PairingUpdate,
    Person,
    Sent,
    SessionContext,
    SessionId,
    SessionState,
    SessionStatus,
    Sink,
    Stored,
    TenantId,
    Unknown,
)

Step = BaseException | str | Callable[[OutboundMessage], Awaitable[Sent]]
"""One scripted outcome: an exception to raise before anything leaves, a way of behaving, or a function.

`sent`, `sent_then_lost` (it goes out, then the call fails in an unexpected way), `hang` (it goes out, the call never
returns), `hang_unsent`, `deaf` (never returns, and ignores being cancelled)."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `send`."""

    message: OutboundMessage
    at: datetime

    @property
    def attempt(self) -> Attempt:
        return self.message.attempt


@dataclass
class FakePlatform:
    """What every fake channel talks to."""

    calls: list[Call] = field(default_factory=list)
    delivered: dict[tuple[int, int], str] = field(default_factory=dict)
    """What really went out, by (queue id, claim epoch), with the id it got."""
    scripts: dict[str, deque[Step]] = field(default_factory=dict)
    """By recipient (external id); `*` for everybody without a script of their own. Empty: `sent`."""
    connected: Counter[str] = field(default_factory=Counter)
    overlaps: list[str] = field(default_factory=list)
    """Identifiers that were connected twice at the same time: must stay empty."""
    channels: dict[int, FakeChannel] = field(default_factory=dict)
    """The newest channel of each session."""
    made: list[FakeChannel] = field(default_factory=list)
    resolvable: bool = True
    """False: the channel cannot say what became of an old call (email, Telegram)."""
    delay: float = 0.0
    connect_errors: deque[BaseException] = field(default_factory=deque)
    next_number: str = "+60123456789"
    """The number that the next scanned QR pairs."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def kind(self, name: str = "fake", *, files: bool = False) -> ChannelKind:
        return ChannelKind(name, self.factory, files=files)

    def factory(self, context: SessionContext, sink: Sink) -> Channel:
        channel = FakeChannel(context, sink, self)
        self.channels[context.session_id] = channel
        self.made.append(channel)
        return channel

    def script(self, *steps: Step, to: str = "*") -> None:
        self.scripts.setdefault(to, deque()).extend(steps)

    def hold(self) -> None:
        """Calls wait inside `send`, before anything leaves, until `release`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    @property
    def texts(self) -> list[str | None]:
        """What was handed over, in order."""
        return [call.message.content for call in self.calls]

    def calls_per_item(self) -> Counter[int]:
        return Counter(int(call.attempt.queue_id) for call in self.calls)

    async def take(self, message: OutboundMessage) -> Sent:
        """One call of `send`, whoever makes it."""
        self.calls.append(Call(message, datetime.now(UTC)))
        if not self._open.is_set():
            await self._open.wait()
        if self.delay:
            await asyncio.sleep(self.delay)
        script = self.scripts.get(message.attempt.recipient) or self.scripts.get("*")
        step: Step = script.popleft() if script else "sent"
        match step:
            case BaseException():
                raise step
            case "sent":
                return self._deliver(message)
            case "sent_then_lost":
                self._deliver(message)
                raise ConnectionResetError("cut off after the message left")
            case "hang":
                self._deliver(message)
                await asyncio.Event().wait()
            case "hang_unsent":
                await asyncio.Event().wait()
            case "deaf":
                return await self._deaf(message)
            case str():
                raise ValueError(f"no such step: {step}")
            case _:
                return await step(message)
        raise AssertionError("unreachable")

    async def _deaf(self, message: OutboundMessage) -> Sent:
        """Ignores being cancelled; answers once the platform is released again."""
        self._open.clear()
        while not self._open.is_set():
            try:
                await self._open.wait()
            except asyncio.CancelledError:
                continue
        return self._deliver(message)

    def _deliver(self, message: OutboundMessage) -> Sent:
        attempt = message.attempt
        channel_id = f"FAKE{attempt.queue_id:012d}{attempt.claim_epoch:04d}"
        self.delivered[attempt.queue_id, attempt.claim_epoch] = channel_id
        return Sent(channel_id, datetime.now(UTC))

    def find(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        if not self.resolvable:
            return Unknown("no_way_to_tell")
        channel_id = self.delivered.get((attempt.queue_id, attempt.claim_epoch))
        return Sent(channel_id, datetime.now(UTC)) if channel_id else NotSent()


class FakeChannel:
    """Keeps `Channel` and `Pairable`. Active as soon as it is connected, unless its number is not known yet."""

    def __init__(self, context: SessionContext, sink: Sink, platform: FakePlatform) -> None:
        self.context = context
        self.sink = sink
        self.platform = platform
        self.healthy = True
        self.qrs = 0
        self.logged_out = False
        self._state = SessionState(SessionStatus.DISCONNECTED)
        self._connected = False
        self.identifier = context.identifier

    @property
    def state(self) -> SessionState:
        return self._state

    async def say(
        self,
        status: SessionStatus,
        reason: str | None = None,
        *,
        identifier: str | None = None,
        action: str | None = None,
    ) -> None:
        """Report a state."""
        self._state = SessionState(status, reason, identifier=identifier, action=action)
        await self.sink.state(self._state)

    async def connect(self) -> None:
        if self._connected:
            return
        if self.platform.connect_errors:
            raise self.platform.connect_errors.popleft()
        self._connected = True
        if (self.context.folder / "keys").exists():
            self.identifier = (self.context.folder / "keys").read_text()
        if self.identifier.startswith("pending:"):
            await self.say(SessionStatus.PAIRING)
            return
        await self._online()

    async def _online(self) -> None:
        self.platform.connected[self.identifier] += 1
        if self.platform.connected[self.identifier] > 1:
            self.platform.overlaps.append(self.identifier)
        await self.say(SessionStatus.CONNECTING)
        await self.say(SessionStatus.ACTIVE, identifier=self.identifier)

    async def disconnect(self) -> None:
        if self._connected:
            self._connected = False
            if self.platform.connected[self.identifier]:
                self.platform.connected[self.identifier] -= 1
        self._state = SessionState(SessionStatus.DISCONNECTED)

    async def logout(self) -> None:
        self.logged_out = True
        (self.context.folder / "keys").unlink(missing_ok=True)
        await self.disconnect()

    async def send(self, message: OutboundMessage) -> Sent:
        return await self.platform.take(message)

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        return self.platform.find(attempt)

    # --- pairing

    async def pair_qr(self) -> None:
        self.qrs += 1
        await self.sink.pairing(
            PairingUpdate("qr", qr=f"QR-{self.qrs}", expires_at=datetime.now(UTC) + timedelta(seconds=60))
        )

    async def pair_code(self, phone: str) -> None:
        await self.sink.pairing(
            PairingUpdate("code", code="ABCD-EFGH", expires_at=datetime.now(UTC) + timedelta(seconds=160))
        )

    async def scan(self, number: str | None = None) -> None:
        """Somebody scans the QR with the phone of this number."""
        number = number or self.platform.next_number
        (self.context.folder / "keys").write_text(number)
        self.identifier = number
        await self.sink.pairing(PairingUpdate("paired", identifier=number))
        await self._online()

    # --- what the world does

    async def receive(
        self, text: str, *, sender: str = "+60111222333", message_id: str | None = None
    ) -> list[Stored]:
        """A message comes in."""
        message = InboundMessage(
            tenant_id=TenantId(self.context.tenant_id),
            session_id=SessionId(self.context.session_id),
            channel=self.context.channel,
            channel_message_id=message_id or f"IN-{text}",
            person=Person(f"{self.context.channel}:{sender}"),
            message_type=MessageType.TEXT,
            content=text,
            channel_timestamp=int(datetime.now(UTC).timestamp() * 1000),
            sender_identifier=sender,
        )
        return await self.sink.received([message])


class FakeDispatcher:
    """What the outbound worker needs, over a platform and without a session manager: every session is ours, for as
    long as `until` says."""

    def __init__(self, platform: FakePlatform, sessions: list[int], *, until: float = float("inf")) -> None:
        self.platform = platform
        self.changed = asyncio.Event()
        self.until = until
        self._sessions = {SessionId(s): None for s in sessions}

    def add(self, session_id: int) -> None:
        self._sessions[SessionId(session_id)] = None
        self.changed.set()

    def remove(self, session_id: int) -> None:
        self._sessions.pop(SessionId(session_id), None)

    def sendable(self) -> dict[SessionId, float]:
        return dict.fromkeys(self._sessions, self.until)

    def owned(self) -> frozenset[SessionId]:
        return frozenset(self._sessions)

    async def send(self, message: OutboundMessage) -> Sent:
        return await self.platform.take(message)

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        return self.platform.find(attempt)


def _keeps_the_contract(context: Any, sink: Sink, platform: FakePlatform) -> Channel:
    channel: Channel = FakeChannel(context, sink, platform)
    return channel
