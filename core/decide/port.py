"""The decider port: what a decider is shown (`Context`) and what it answers (`Decision`).

A decider sees only what stands here. It never touches the database, a channel or the clock: the worker acts on its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, get_args
from zoneinfo import ZoneInfo

from core.channel import LeadId, MessageId, MessageType, SessionId, TenantId, ThreadId

Action = Literal["auto_reply", "follow_up", "human_takeover", "ignore"]
Consent = Literal["opt_out", "opt_in"]
Author = Literal["customer", "agent", "person", "system"]

ACTIONS: frozenset[str] = frozenset(get_args(Action))

LABELS = (
    "greeting",
    "question",
    "complaint",
    "opt_out",
    "opt_in",
    "human_request",
    "price",
    "order",
    "thanks",
    "follow_up",
    "automatic",
    "other",
)
"""The labels of the built-in rules. A tenant's rule or a model may use its own; they are short words."""

MAX_REPLY_CHARS = 4096
MAX_WORD_CHARS = 64


@dataclass(frozen=True, slots=True)
class Tenant:
    id: TenantId
    name: str
    status: Literal["active", "suspended"] = "active"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Agent:
    """Who answers, in whose words."""

    id: int
    name: str
    instructions: str = ""
    decider: str = "rules"
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Thread:
    id: ThreadId
    channel: str
    session_id: SessionId
    handled_by: Literal["agent", "human"] = "agent"


@dataclass(frozen=True, slots=True)
class Lead:
    id: LeadId
    external_id: str
    kind: Literal["person", "group"] = "person"
    name: str | None = None
    timezone: str | None = None
    tags: tuple[str, ...] = ()
    opted_out_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message that waits for a decision."""

    id: MessageId
    message_type: MessageType
    content: str | None
    occurred_at: datetime
    received_at: datetime
    """When the row was stored, on the database's clock."""
    channel_message_id: str = ""
    reply_to_message_id: str | None = None
    media: Mapping[str, Any] | None = None
    direction: Literal["inbound", "outbound"] = "inbound"
    is_history: bool = False
    placeholder: bool = False
    automatic: bool = False
    """The channel knows that a machine wrote it (mail headers): `raw_payload.auto_submitted`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier message of the thread, with edits applied and deletions and reactions left out; oldest first."""

    author: Author
    message_type: MessageType
    content: str | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Traffic:
    """Automatic replies that this thread already got and a person did not interrupt."""

    automatic_10min: int = 0
    automatic_day: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a decider may look at. `messages` is the burst: all that waits in the thread, oldest first."""

    tenant: Tenant
    agent: Agent | None
    thread: Thread
    lead: Lead
    messages: tuple[Incoming, ...]
    now: datetime
    """Aware, the database's clock."""
    timezone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    """The workspace's."""
    history: tuple[Turn, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)
    said_at: Mapping[str, datetime] = field(default_factory=dict)
    """When each named text (`out_of_hours`, …) was last part of a reply on this thread."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a model's answer cost."""

    provider: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a burst. Raises ValueError when it contradicts itself, so a worker never acts on nonsense.

    `reply` may also come with `follow_up` (a confirmation) and `human_takeover` (a colleague will answer).
    `reason` is a short code. `said` names the built-in texts that the reply holds (see `Context.said_at`).
    """

    action: Action
    reason: str
    label: str = "other"
    reply: str | None = None
    confidence: float | None = None
    next_step: str | None = None
    follow_up_at: datetime | None = None
    model: str | None = None
    usage: Usage | None = None
    consent: Consent | None = None
    """Only the gates set it: consent is never a model's guess."""
    said: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}")
        for name, word in (("reason", self.reason), ("label", self.label)):
            if not word or len(word) > MAX_WORD_CHARS:
                raise ValueError(f"{name} must be 1 to {MAX_WORD_CHARS} characters")
        if self.action == "auto_reply" and not (self.reply and self.reply.strip()):
            raise ValueError("auto_reply needs a reply")
        if self.action == "ignore" and self.reply is not None:
            raise ValueError("ignore carries no reply")
        if self.reply is not None and len(self.reply) > MAX_REPLY_CHARS:
            raise ValueError(f"a reply is at most {MAX_REPLY_CHARS} characters")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError("confidence is from 0 to 1")
        if self.follow_up_at is not None and self.follow_up_at.tzinfo is None:
            raise ValueError("follow_up_at needs a time zone")
        if self.action == "follow_up" and self.follow_up_at is None:
            raise ValueError("follow_up needs follow_up_at")


class Decider(Protocol):
    """One way to decide. `name` lands in `et_decisions.decider`.

    An exception or 30 s without an answer is an error of the decider: tried again, then handed to a person.
    """

    @property
    def name(self) -> str: ...

    async def decide(self, context: Context) -> Decision: ...
