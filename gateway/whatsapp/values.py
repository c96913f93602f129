"""Untrusted JSON made safe: text PostgreSQL can hold, numbers in range, bytes in their several spellings. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from typing import Any

Json = dict[str, Any]

MAX_ID = 255
MAX_NAME = 200
_MAX_DEPTH = 100
_MIN_MS, _MAX_MS = 946_684_800_000, 4_102_444_800_000
"""2000 and 2100: anything else is not the time of a message."""


def clean(value: Any, depth: int = 0) -> Any:
    """A copy that can be stored as JSONB: no NUL, no lone surrogate, no NaN, no bottomless nesting."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        if depth >= _MAX_DEPTH:
            return {}
        return {clean_text(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [] if depth >= _MAX_DEPTH else [clean(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return clean_text(str(value))


def clean_text(text: str) -> str:
    if "\x00" in text:
        text = text.replace("\x00", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode()
    return text


def obj(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def field(fields: Json, name: str) -> Any:
    """A field by its name, however the writer spells its capitals (`stanzaID` and `stanzaId`, `URL` and `url`)."""
    if name in fields:
        return fields[name]
    low = name.lower()
    for key, value in fields.items():
        if isinstance(key, str) and key.lower() == low:
            return value
    return None


def text_of(value: Any) -> str | None:
    """A non-empty string, else None."""
    return clean_text(value) if isinstance(value, str) and value.strip("\x00") else None


def name_of(value: Any) -> str | None:
    text = text_of(value)
    return text.strip()[:MAX_NAME] or None if text else None


def number_of(value: Any) -> int | None:
    """An integer however it is written: number, string, or a Long `{"low", "high", "unsigned"}`."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isascii() and text.lstrip("-").isdigit() and len(text) <= 20 else None
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high", 0)
        if isinstance(low, int) and isinstance(high, int) and abs(low) < 2**33 and abs(high) < 2**33:
            return ((high & 0xFFFFFFFF) << 32) | (low & 0xFFFFFFFF)
    return None


def decimal_of(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def milliseconds(value: Any) -> int | None:
    """Epoch milliseconds from seconds or milliseconds; None when it cannot be the time of a message."""
    number = number_of(value)
    if number is None:
        return None
    if number < 100_000_000_000:
        number *= 1000
    return number if _MIN_MS <= number <= _MAX_MS else None


def bytes_of(value: Any) -> bytes | None:
    """Base64, `{"type": "Buffer", "data": base64 or numbers}`, a list of numbers, or `{"0": 1, "1": 2, …}`."""
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            return None
    if isinstance(value, dict):
        if "data" in value:
            return bytes_of(value["data"])
        if value and len(value) <= 4096 and all(isinstance(k, str) and k.isdigit() for k in value):
            return bytes_of([value[k] for k in sorted(value, key=lambda k: (len(k), k))])
        return None
    if isinstance(value, list) and len(value) <= 4096 and all(type(n) is int and 0 <= n < 256 for n in value):
        return bytes(value)
    return None


def digest_of(value: Any) -> str | None:
    """A SHA-256 as lower-case hex, from bytes in any spelling or from hex."""
    if isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdefABCDEF" for c in value):
        return value.lower()
    found = bytes_of(value)
    return found.hex() if found and len(found) == 32 else None


def message_id(value: Any) -> str | None:
    """An id that an index can hold: a stranger may choose it, so an overlong one is shortened to a fixed form."""
    text = text_of(value)
    if text is None:
        return None
    if len(text.encode()) <= MAX_ID:
        return text
    return f"{text[:60]}…{hashlib.sha256(text.encode()).hexdigest()}"
