"""A conversation as people read it: the append-only log with edits, reactions and deletions folded in. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

from asyncpg import Record

from gateway.console import files, words

SNIPPET = 120


@dataclass(slots=True)
class Bubble:
    """One message, with what later rows did to it."""

    id: int
    channel_message_id: str
    inbound: bool
    content: str | None
    kind: str | None
    """“Picture”, “Document”, …; None for plain text."""
    file: str | None
    time: str
    author: str | None
    """In a group who wrote it; of ours, where it came from."""
    origin: str | None
    tick: words.Tick | None
    decision: str | None
    quote: str | None = None
    edited: bool = False
    deleted: bool = False
    shown_as: str | None = None
    """`image`, `video`, `audio` or `file` when there is a file to show."""
    size: tuple[int, int] | None = None
    """Of a picture, in pixels, so that nothing jumps when it comes."""
    reactions: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Day:
    name: str
    bubbles: list[Bubble]


def fold(rows: Sequence[Record], where: ZoneInfo, *, group: bool = False) -> list[Day]:
    """`rows` oldest first. A reaction, edit or deletion of a message that is not among them stays a line of its own."""
    days: list[Day] = []
    by_id: dict[str, Bubble] = {}
    for row in rows:
        target = by_id.get(row["reply_to_message_id"] or "")
        if target is not None and _apply(row, target):
            continue
        bubble = _bubble(row, where, group=group)
        if target is not None:
            bubble.quote = snippet(target.content, target.kind)
        by_id[bubble.channel_message_id] = bubble
        name = words.day(row["occurred_at"], where)
        if not days or days[-1].name != name:
            days.append(Day(name, []))
        days[-1].bubbles.append(bubble)
    return days


def _apply(row: Record, target: Bubble) -> bool:
    """True when the row only says something about `target`. Ours count once they are out, or they would look done."""
    ours_pending = row["direction"] == "outbound" and row["delivery_status"] not in (
        "sent",
        "delivered",
        "read",
    )
    if ours_pending:
        return False
    content = row["content"]
    match row["message_type"]:
        case "reaction":
            if content and content not in target.reactions:
                target.reactions.append(content)
        case "edited":
            target.content, target.edited = content, True
        case "deleted":
            target.content, target.deleted = None, True
        case _:
            return False
    return True


def _bubble(row: Record, where: ZoneInfo, *, group: bool) -> Bubble:
    inbound = row["direction"] == "inbound"
    media: dict[str, Any] = row["media_metadata"] or {}
    return Bubble(
        id=row["id"],
        channel_message_id=row["channel_message_id"],
        inbound=inbound,
        content=row["content"],
        kind=words.kind(row["message_type"]),
        file=_file(media),
        time=words.clock(row["occurred_at"], where),
        author=row["sender_identifier"] if inbound and group else None,
        origin=words.origin(row),
        tick=words.tick(row),
        decision=words.decision(row) if inbound else None,
        shown_as=files.shown_as(media),
        size=_size(media),
    )


def _file(media: dict[str, Any]) -> str | None:
    parts = [str(media["filename"])] if media.get("filename") else []
    size = media.get("size")
    if isinstance(size, int) and size > 0:
        parts.append(f"{size / 1e6:.1f} MB" if size >= 1_000_000 else f"{max(1, round(size / 1000))} kB")
    if media.get("state") == "failed":
        parts.append("could not be fetched")
    return ", ".join(parts) or None


def _size(media: dict[str, Any]) -> tuple[int, int] | None:
    width, height = media.get("width"), media.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


def snippet(content: str | None, kind: str | None) -> str:
    """One line of a message, for lists and quotes."""
    text = " ".join((content or "").split())
    if len(text) > SNIPPET:
        text = text[:SNIPPET].rstrip() + "…"
    if kind is None:
        return text or "Empty message"
    return f"{kind}: {text}" if text else kind
