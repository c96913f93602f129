"""Untrusted JSON made safe, and the ids a Telegram message has here. Pure."""

from __future__ import annotations

import math
import re
from typing import Any

Json = dict[str, Any]

MAX_NAME = 200
_MAX_DEPTH = 100
_KEY = re.compile(r"(-?[1-9][0-9]{0,18}):([1-9][0-9]{0,18})(:.*)?")


def clean(value: Any, depth: int = 0) -> Any:
    """A copy that can be stored as JSONB: no NUL, no lone surrogate, no NaN, no bottomless nesting."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        if depth >= _MAX_DEPTH:
            return {}
        return {clean_text(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [] if depth >= _MAX_DEPTH else [clean(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else clean_text(str(value))


def clean_text(text: str) -> str:
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def obj(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def text_of(value: Any) -> str | None:
    """A non-empty string, else None."""
    return (clean_text(value) or None) if isinstance(value, str) else None


def name_of(value: Any) -> str | None:
    return ((text_of(value) or "").strip()[:MAX_NAME]) or None


def number_of(value: Any) -> int | None:
    """A whole number that the database can hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def decimal_of(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def known(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def milliseconds(seconds: Any) -> int | None:
    number = number_of(seconds)
    return number * 1000 if number is not None and 0 < number < 253_402_300_800 else None


def message_key(chat_id: int, message_id: int) -> str:
    """`chat_id:message_id`: Telegram counts messages per chat."""
    return f"{chat_id}:{message_id}"


def parse_key(key: str | None) -> tuple[int, int] | None:
    """Chat and message of an id as we store it, also of an edit or reaction (they carry their message's)."""
    match = _KEY.fullmatch(key or "")
    return (int(match[1]), int(match[2])) if match else None
