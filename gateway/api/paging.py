"""Keyset paging: opaque cursors that name the last row of a page, and pages cut from one row too many."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

import orjson

from gateway.api.models import EARLIEST, LATEST, MAX_ID, Page
from gateway.api.problems import Problem, invalid

R = TypeVar("R")
T = TypeVar("T")


def encode(*parts: int | datetime) -> str:
    raw = orjson.dumps([part.isoformat() if isinstance(part, datetime) else part for part in parts])
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_id(cursor: str | None) -> int | None:
    """The cursor of a list ordered by id alone. Raises 422 for anything we did not make."""
    if cursor is None:
        return None
    parts = _parts(cursor, 1)
    return _id(parts[0])


def decode_moment(cursor: str | None) -> tuple[datetime | None, int | None]:
    """The cursor of a list ordered by a time and an id."""
    if cursor is None:
        return None, None
    parts = _parts(cursor, 2)
    try:
        moment = datetime.fromisoformat(parts[0]) if isinstance(parts[0], str) else None
        if moment is None or moment.tzinfo is None or not EARLIEST <= moment <= LATEST:
            raise _wrong()
    except (ValueError, OverflowError):
        raise _wrong() from None
    return moment, _id(parts[1])


def page(
    rows: Sequence[R], limit: int, view: Callable[[R], T], key: Callable[[R], tuple[int | datetime, ...]]
) -> Page[T]:
    """`rows` were asked for with `limit + 1`: the one too many says that there is a next page."""
    kept = rows[:limit]
    following = encode(*key(kept[-1])) if len(rows) > limit else None
    return Page(items=[view(row) for row in kept], next_cursor=following)


def _parts(cursor: str, count: int) -> list[object]:
    try:
        value = orjson.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error):
        raise _wrong() from None
    if not isinstance(value, list) or len(value) != count:
        raise _wrong()
    return value


def _id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ID:
        raise _wrong()
    return value


def _wrong() -> Problem:
    return invalid(
        "cursor", "this is not a cursor of this list; start without one, then pass `next_cursor` on"
    )
