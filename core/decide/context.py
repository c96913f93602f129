"""From rows to a `Context`: what the worker read becomes what gates and deciders see. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Protocol
from zoneinfo import ZoneInfo

from core.channel import LeadId, MessageId, MessageType, SessionId, TenantId, ThreadId
from core.decide.port import Agent, Author, Context, Incoming, Lead, Tenant, Thread, Traffic, Turn


class Row(Protocol):
    """A database row, or in tests a dictionary."""

    def __getitem__(self, key: str, /) -> Any: ...


def zone(name: str | None) -> ZoneInfo | None:
    """None for no name and for one that this machine does not know."""
    if not name:
        return None
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # not found is a KeyError, an odd name one of the others
        return None


def build(
    thread: Row,
    burst: Iterable[Row],
    history: Iterable[Row],
    traffic: Row | None,
    *,
    now: datetime,
    people: Sequence[str],
) -> Context:
    return Context(
        tenant=Tenant(
            TenantId(thread["tenant_id"]),
            thread["tenant_name"],
            thread["tenant_status"],
            thread["tenant_settings"] or {},
        ),
        agent=_agent(thread),
        thread=Thread(
            ThreadId(thread["thread_id"]),
            thread["channel"],
            SessionId(thread["channel_session_id"]),
            thread["handled_by"],
        ),
        lead=Lead(
            LeadId(thread["lead_id"]),
            thread["external_id"],
            thread["kind"],
            thread["lead_name"],
            thread["lead_timezone"],
            tuple(thread["tags"] or ()),
            thread["opted_out_at"],
        ),
        messages=tuple(_incoming(row) for row in burst),
        now=now,
        timezone=zone(thread["workspace_timezone"]) or ZoneInfo("UTC"),
        history=fold(history, people=people),
        traffic=Traffic(traffic["in_10min"], traffic["in_a_day"]) if traffic else Traffic(),
        said_at={
            name: datetime.fromisoformat(at)
            for name, at in ((traffic["said"] if traffic else None) or {}).items()
        },
    )


def fold(rows: Iterable[Row], *, people: Sequence[str]) -> tuple[Turn, ...]:
    """The log as a person sees it: edits applied, deletions and reactions gone. Rows come oldest first."""
    rows = list(rows)
    edits: dict[tuple[str, str], str | None] = {}
    deleted: set[tuple[str, str]] = set()
    for row in rows:
        target = (row["direction"], row["reply_to_message_id"] or "")
        if row["message_type"] == MessageType.EDITED:
            edits[target] = row["content"]
        elif row["message_type"] == MessageType.DELETED:
            deleted.add(target)
    turns = []
    for row in rows:
        kind = MessageType(row["message_type"])
        key = (row["direction"], row["channel_message_id"])
        if kind in (MessageType.EDITED, MessageType.DELETED, MessageType.REACTION) or key in deleted:
            continue
        turns.append(Turn(_author(row, people), kind, edits.get(key, row["content"]), row["occurred_at"]))
    return tuple(turns)


def by_thread(rows: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["thread_id"]].append(row)
    return found


def _author(row: Row, people: Sequence[str]) -> Author:
    if row["role"] == "system":
        return "system"
    if row["direction"] == "inbound":
        return "customer"
    return "person" if row["origin"] in people else "agent"


def _agent(row: Row) -> Agent | None:
    if row["agent_id"] is None:
        return None
    return Agent(
        row["agent_id"],
        row["agent_name"],
        row["instructions"] or "",
        row["decider"],
        row["model"],
        row["agent_settings"] if isinstance(row["agent_settings"], dict) else {},
    )


def _incoming(row: Row) -> Incoming:
    return Incoming(
        MessageId(row["id"]),
        MessageType(row["message_type"]),
        row["content"],
        occurred_at=row["occurred_at"],
        received_at=row["created_at"],
        channel_message_id=row["channel_message_id"],
        reply_to_message_id=row["reply_to_message_id"],
        media=row["media_metadata"],
        direction=row["direction"],
        is_history=row["is_history"],
        placeholder=row["placeholder"],
        automatic=bool(row["automatic"]),
    )
