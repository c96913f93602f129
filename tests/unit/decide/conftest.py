"""A context to decide about, with everything that a test does not care about filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from core.channel import LeadId, MessageId, MessageType, SessionId, TenantId, ThreadId
from core.decide.port import Agent, Context, Incoming, Lead, Tenant, Thread, Traffic, Turn

NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)  # a Wednesday

MakeContext = Callable[..., Context]


def incoming(text: str | None, number: int = 1, **fields: Any) -> Incoming:
    kind = fields.pop("message_type", MessageType.TEXT)
    at = fields.pop("at", NOW - timedelta(seconds=5))
    return Incoming(MessageId(number), kind, text, occurred_at=at, received_at=at, **fields)


def turn(author: Any, text: str, seconds_ago: float = 60) -> Turn:
    return Turn(author, MessageType.TEXT, text, NOW - timedelta(seconds=seconds_ago))


@pytest.fixture
def context() -> MakeContext:
    def make(
        *texts: str | Incoming,
        settings: dict[str, Any] | None = None,
        agent: bool = True,
        handled_by: Any = "agent",
        name: str | None = "Aisha",
        kind: Any = "person",
        opted_out: bool = False,
        status: Any = "active",
        history: tuple[Turn, ...] = (),
        traffic: Traffic | None = None,
        said_at: dict[str, datetime] | None = None,
        now: datetime = NOW,
        timezone: str = "UTC",
    ) -> Context:
        messages = tuple(
            text if isinstance(text, Incoming) else incoming(text, n, at=now - timedelta(seconds=5))
            for n, text in enumerate(texts, 1)
        )
        return Context(
            tenant=Tenant(TenantId(1), "Kedai", status),
            agent=Agent(1, "Sam", settings=settings or {}) if agent else None,
            thread=Thread(ThreadId(1), "whatsapp", SessionId(1), handled_by),
            lead=Lead(
                LeadId(1), "whatsapp:+60123456789", kind, name, opted_out_at=NOW if opted_out else None
            ),
            messages=tuple(replace(m, id=MessageId(n)) for n, m in enumerate(messages, 1)),
            now=now,
            timezone=ZoneInfo(timezone),
            history=history,
            traffic=traffic or Traffic(),
            said_at=said_at or {},
        )

    return make
