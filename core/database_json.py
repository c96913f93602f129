"""JSON and JSONB as Python objects on every connection, by orjson; what PostgreSQL cannot store is replaced, not refused.

A message from outside may carry a NUL or half a surrogate pair; losing that character is better than losing the message.
"""

from __future__ import annotations

import json
from typing import Any

import asyncpg
import orjson

_REPLACEMENT = "\ufffd"


def encode(value: Any) -> str:
    """The text of `value`. NUL and lone surrogates become U+FFFD; integers over 64 bits keep every digit.

    Raises TypeError for what has no JSON form.
    """
    try:
        data = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return json.dumps(clean(value), ensure_ascii=False)
    if b"\\u0000" in data:  # also a literal backslash followed by u0000; cleaning that is harmless
        data = orjson.dumps(clean(value), option=orjson.OPT_NON_STR_KEYS)
    return data.decode()


def clean(value: Any) -> Any:
    """`value` with every string made storable."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def clean_text(text: str) -> str:
    """`text` as a PostgreSQL TEXT can hold it: no NUL, no lone surrogate."""
    if text.isascii() and "\0" not in text:
        return text
    text = text.replace("\0", _REPLACEMENT)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join(_REPLACEMENT if "\ud800" <= char <= "\udfff" else char for char in text)
    return text


async def set_codecs(conn: asyncpg.Connection[Any]) -> None:
    """No round trip: both types are built in."""
    for name in ("json", "jsonb"):
        await conn.set_type_codec(
            name, schema="pg_catalog", encoder=encode, decoder=orjson.loads, format="text"
        )
