"""What the outbound worker needs of live sessions, how one call is built and what its end means.

Pure but for the clock that is handed in: no SQL, no IO.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from asyncpg import Record

from core.channel import (
    Attempt,
    MessageId,
    MessageType,
    NotSent,
    OutboundMessage,
    QueueId,
    Quoted,
    Sent,
    SessionId,
    TenantId,
    Unknown,
)
from core.errors import Invalid, NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from core.identity import external_id
from core.store.dispatching import Mark


class NotReady(NotSentError):
    """The session cannot send or be asked at the moment: the message waits, and no attempt is spent."""

    code = "session_not_ready"


class Hint(Protocol):
    """What `asyncio.Event` is: set when something may have changed."""

    def clear(self) -> None: ...
    async def wait(self) -> bool: ...


class Dispatcher(Protocol):
    """The outbound worker's way to the sessions of this process."""

    @property
    def changed(self) -> Hint:
        """Set when a session became sendable."""
        ...

    def sendable(self) -> Mapping[SessionId, float]:
        """Sessions that are active under a lease we can prove, with the monotonic time at which the proof ends."""
        ...

    def owned(self) -> frozenset[SessionId]:
        """Sessions whose lease is ours, active or not: `resolve` may be asked about them."""
        ...

    async def send(self, message: OutboundMessage) -> Sent:
        """As `Channel.send`; raises NotReady when the session is not ours or not active (any more)."""
        ...

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        """As `Channel.resolve`; raises NotReady when it cannot be asked yet."""
        ...


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. Tests shorten them."""

    poll: float = 1.0
    """Finds what a lost notification hid, and rows that have come due."""
    watchdog: float = 120.0
    """After this a call counts as cut off, whether or not it ever returns: time for a large file to go up."""
    watchdog_text: float = 55.0
    """The same for a message without a file. Nothing hangs for longer than two leases live."""
    backoff: tuple[float, ...] = (5.0, 30.0, 120.0)
    """Wait before the second, third, … attempt."""
    tend: float = 1.0
    """Sweep of expired rows, look at the watchdog."""
    recover: float = 5.0
    """Look for rows that a dead owner left."""
    resolve: float = 30.0
    """One question to the channel about such a row."""
    resolve_patience: float = 60.0
    """Asked that long in vain: unknown."""
    owner_alive: float = 30.0
    """A gateway whose heart beat within this time may still be calling."""
    abandoned: float = 300.0
    """After this long without any owner a row becomes unknown."""
    settings: float = 2.0
    """Until a changed setting of a session's pacing counts."""
    held: float = 5.0
    """Between two looks for rows to put off, once there were none."""
    gauges: float = 10.0
    stop: float = 8.0
    """How long a stop waits for calls in flight."""
    margin: float = 1.0
    """No call is begun when the lease's proof ends within this time."""
    inflight: int = 1000
    batch: int = 250


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row that is ours to call: committed as `dispatching`."""

    queue_id: QueueId
    claim_epoch: int
    tenant_id: TenantId
    session_id: SessionId
    message_id: MessageId
    channel: str
    retry_count: int
    due_at: datetime | None = None
    """Since when it could have gone out; None when that is not known any more."""

    @property
    def key(self) -> Key:
        return self.queue_id, self.claim_epoch


Key = tuple[int, int]
"""Queue id and claim epoch: one try at one item."""


def read_claimed(row: Record) -> Claimed:
    return Claimed(
        queue_id=row["id"],
        claim_epoch=row["claim_epoch"],
        tenant_id=row["tenant_id"],
        session_id=row["channel_session_id"],
        message_id=row["message_id"],
        channel=row["channel"],
        retry_count=row["retry_count"],
        due_at=row["next_attempt_at"],
    )


def read_message(row: Record) -> OutboundMessage:
    """Raises Invalid, in words for `last_error`, when the row cannot become a message."""
    channel: str = row["channel"]
    address = row["recipient"] or row["last_address"] or row["identity"]
    if not address:
        raise Invalid(
            f"this person has no {channel} address that could be written to; set recipient",
            code="no_recipient",
        )
    attempt = Attempt(
        tenant_id=row["tenant_id"],
        session_id=row["channel_session_id"],
        queue_id=row["id"],
        message_id=row["message_id"],
        claim_epoch=row["claim_epoch"],
        recipient=external_id(channel, address),
    )
    payload = row["payload"]
    message = OutboundMessage(
        attempt=attempt,
        message_type=MessageType(row["message_type"]),
        content=row["content"],
        media_url=row["media_url"],
        payload=payload if isinstance(payload, dict) else {},
        quoted=_quoted(row),
        first_contact=row["first_contact"],
        automatic=row["automatic"],
    )
    if (
        message.message_type is MessageType.TEXT
        and not (message.content or "").strip()
        and not message.payload.get("html")
    ):
        raise Invalid("the message has no text", code="empty_content")
    return message


def _quoted(row: Record) -> Quoted | None:
    wanted = row["reply_to_message_id"]
    if not wanted:
        return None
    if row["quoted_id"] is None:
        # Not stored (older than the gateway): the channel may still know the id.
        return Quoted(channel_message_id=wanted, sender_identifier=None, content=None, from_me=False)
    return Quoted(
        channel_message_id=row["quoted_id"],
        sender_identifier=row["quoted_sender"],
        content=row["quoted_content"],
        from_me=row["quoted_direction"] == "outbound",
        raw_payload=row["quoted_payload"] or {},
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A mark, and what the metrics call it: sent, retried, throttled, refused, failed, unknown, not_called."""

    mark: Mark
    outcome: str

    @property
    def audited(self) -> bool:
        """A failed send leaves a trace, a postponed one does not."""
        return self.outcome in ("retried", "refused", "failed", "unknown")


def sent(claimed: Claimed, result: Sent) -> Verdict:
    mark = Mark(
        claimed.queue_id,
        claimed.claim_epoch,
        "sent",
        channel_message_id=result.channel_message_id or None,
        sent_at=result.sent_at if result.sent_at.tzinfo else result.sent_at.replace(tzinfo=UTC),
    )
    return Verdict(mark, "sent")


def not_called(claimed: Claimed, *, after: float = 0.0) -> Verdict:
    """We know that the channel was never asked: back to the queue, no attempt spent."""
    return Verdict(Mark(claimed.queue_id, claimed.claim_epoch, "queued", retry_in=after), "not_called")


def cut_off(claimed: Claimed, code: str, words: str, channel_message_id: str | None = None) -> Verdict:
    return Verdict(
        Mark(
            claimed.queue_id,
            claimed.claim_epoch,
            "unknown",
            code,
            words,
            channel_message_id=channel_message_id,
        ),
        "unknown",
    )


def failed(
    claimed: Claimed, error: BaseException, *, max_attempts: int, timings: Timings, jitter: float
) -> Verdict:
    """What an exception of `send` means. `jitter` from 0 to 1 spreads retries. Anything unexpected is unknown: it may
    have happened after the message left."""
    key = (claimed.queue_id, claimed.claim_epoch)
    match error:
        case NotReady():
            return not_called(claimed, after=1.0)
        case ThrottledError():
            wait = max(0.1, error.retry_after)
            return Verdict(Mark(*key, "queued", error.code, error.detail, retry_in=wait), "throttled")
        case NotSentError():
            failures = claimed.retry_count + 1
            if failures >= max_attempts:
                words = f"gave up after {failures} attempts: {error.detail}"
                return Verdict(Mark(*key, "failed", error.code, words, counts=True), "failed")
            steps = timings.backoff
            wait = steps[min(failures, len(steps)) - 1] * (0.8 + 0.4 * jitter)
            return Verdict(
                Mark(*key, "queued", error.code, error.detail, retry_in=wait, counts=True), "retried"
            )
        case RefusedError():
            return Verdict(Mark(*key, "failed", error.code, error.detail), "refused")
        case UnknownOutcomeError():
            return cut_off(claimed, error.code, error.detail, error.channel_message_id)
        case _:
            words = "the channel ended the call in an unexpected way and may have sent the message; look before retrying"
            return cut_off(claimed, "outcome_unknown", f"{words} ({type(error).__name__})")


class Windows:
    """How many calls of a session may be open at once: as many as come back within a tenth of a second.

    A channel that sends one after the other is not given a pile of rows: a reply that comes in would wait behind it,
    and a crash would leave every one of them to be resolved. Nor is a single place filled as soon as it is free: while
    most of a session's calls are open it claims again only after a moment, several rows with one commit.
    """

    LEAST, FIRST, MOST = 16, 32, 512
    AIM = 0.1
    MOMENT = 0.03

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._size: dict[SessionId, float] = {}
        self._began: dict[SessionId, float] = {}
        self.open: Counter[SessionId] = Counter()

    def room(self, session_id: SessionId) -> int:
        size = int(self._size.get(session_id, self.FIRST))
        free = max(0, size - self.open[session_id])
        if free * 2 < size and self._clock() - self._began.get(session_id, -self.MOMENT) < self.MOMENT:
            return 0
        return free

    def began(self, session_id: SessionId) -> None:
        self.open[session_id] += 1
        self._began[session_id] = self._clock()

    def ended(self, session_id: SessionId, seconds: float) -> None:
        """`seconds` from call to answer."""
        size = self._size.get(session_id, float(self.FIRST))
        if seconds > self.AIM:
            size = max(self.LEAST, size * 0.9)
        elif self.open[session_id] > size / 2:
            size = min(self.MOST, size + 1)
        self._size[session_id] = size
        self.open[session_id] -= 1
        if self.open[session_id] <= 0:
            del self.open[session_id]
            self._began.pop(session_id, None)
