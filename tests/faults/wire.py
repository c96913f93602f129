"""The scripted channel's protocol: one JSON object a line, over TCP. Shared by its two ends, `peer` and `scripted`.

A connection opens with `{"hello": session, "owner": …, "kind": …}`; whoever opens with `{"control": …}` is the harness.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

LIMIT = 1 << 24


def pack(message: dict[str, Any]) -> bytes:
    return orjson.dumps(message) + b"\n"


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None at the end, however it came."""
    try:
        line = await reader.readline()
    except (OSError, ValueError):
        return None
    if not line.endswith(b"\n"):
        return None  # the end, or a line that was cut off
    message: dict[str, Any] = orjson.loads(line)
    return message
