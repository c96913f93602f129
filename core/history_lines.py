"""JSON lines to messages of the past: a line at a time, in bounded memory; what is wrong with a line is told by its number.

Pure: no IO of its own. The fields are described in docs/import.md.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import orjson

from core.channel import InboundMessage, MessageType, Person, SessionId, TenantId
from core.errors import Invalid
from core.history import Entry, Wrong
from core.identity import address_of, external_id, kind_of

LINE_LIMIT = 256 << 10
MAX_DEPTH = 64
DAY = 86_400

FIELDS = (
    "channel_message_id", "contact", "sender", "recipient", "direction", "timestamp", "message_type", "content", "name",
    "reply_to_message_id", "payload", "raw",
)  # fmt: skip
_KNOWN = frozenset(FIELDS)
_TYPES = {kind.value: kind for kind in MessageType}
_UNSAFE_NUMBER = re.compile(rb"\d{19}|\d[eE]")
_EARLIEST, _SECONDS_END, _MILLISECONDS_END = 631_152_000, 10**11, 10**14
"""1990; from 10¹¹ on it is milliseconds (1973), from 10¹⁴ on neither."""


class _Bad(Exception):
    """What is wrong with a line, for whoever made it."""


class LineSplitter:
    """Bytes in pieces of any size to numbered lines; blank ones are left out. An overlong line is not kept: None."""

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        self._held: list[bytes] = []
        self._size = 0
        self._number = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes | None]]:
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._hold(piece)
            yield from self.end()
        self._hold(rest)

    def end(self) -> Iterator[tuple[int, bytes | None]]:
        """The line so far is a whole one."""
        self._number += 1
        size, line = self._size, b"".join(self._held)
        self._held, self._size = [], 0
        if size > self._limit:
            yield self._number, None
            return
        if self._number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line := line.strip():
            yield self._number, line

    def _hold(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            self._held = []
        elif piece:
            self._held.append(piece)


class LineReader:
    """Lines of one session: `async for item in LineReader(…).items(chunks)` is what `HistoryImport.run` takes."""

    def __init__(
        self, *, tenant_id: int, session_id: int, channel: str, own_address: str | None = None
    ) -> None:
        """`own_address`: what outbound messages carry as their sender."""
        self._tenant_id = TenantId(tenant_id)
        self._session_id = SessionId(session_id)
        self._channel = channel
        self._own_address = own_address
        # A file names the same people again and again.
        self._external_id = lru_cache(maxsize=4096)(external_id)

    async def items(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[Entry | Wrong]:
        splitter = LineSplitter()
        async for chunk in chunks:
            for number, line in splitter.feed(chunk):
                yield self.read(number, line)
        for number, line in splitter.end():
            yield self.read(number, line)

    def read(self, number: int, line: bytes | None) -> Entry | Wrong:
        if line is None:
            return Wrong(number, f"longer than {LINE_LIMIT} bytes")
        try:
            return Entry(number, self._message(_parsed(line)))
        except _Bad as error:
            return Wrong(number, str(error))
        except Invalid as error:
            return Wrong(number, error.detail)

    def _message(self, line: dict[str, Any]) -> InboundMessage:
        if not line.keys() <= _KNOWN:
            unknown = sorted(line.keys() - _KNOWN)[0]
            raise _Bad(f"{unknown[:60]!r}: there is no such field; there are {', '.join(FIELDS)}")
        direction = _direction(line)
        contact, sender = self._people(line, direction)
        group = kind_of(contact) == "group"
        raw: dict[str, Any] = {"origin": "import"}
        # Below a name of its own: what stands beside `origin` means something to the gateway.
        if (payload := _object(line, "payload")) is not None:
            raw["payload"] = payload
        if (original := line.get("raw")) is not None:
            raw["original"] = original
        inbound = direction == "inbound"
        return InboundMessage(
            tenant_id=self._tenant_id,
            session_id=self._session_id,
            channel=self._channel,
            channel_message_id=_id(line),
            person=Person(contact, "group" if group else "person", _text(line, "name", 200)),
            message_type=_type(line),
            content=_text(line, "content"),
            channel_timestamp=_milliseconds(line.get("timestamp")),
            direction=direction,
            role="user" if inbound else "assistant",
            sender_identifier=address_of(sender) if inbound else self._own_address,
            chat_identifier=address_of(contact) if group else None,
            reply_to_message_id=_text(line, "reply_to_message_id", 2000),
            raw_payload=raw,
            is_history=True,
        )

    def _people(self, line: dict[str, Any], direction: str) -> tuple[str, str]:
        """External ids: whose conversation it is, and who wrote (the same but in a group)."""
        other = "sender" if direction == "inbound" else "recipient"
        named = {name: _text(line, name, 320) for name in ("contact", other)}
        found = {name: self._address(name, text) for name, text in named.items() if text is not None}
        if not found:
            raise _Bad(f"contact: missing; an {direction} message needs it, or {other}")
        contact = found.get("contact") or found[other]
        author = found.get(other) or contact
        if author != contact and kind_of(contact) != "group":
            raise _Bad(f"{other}: another person than contact; leave one out")
        return contact, author

    def _address(self, name: str, text: str) -> str:
        try:
            return self._external_id(self._channel, text)
        except Invalid as error:
            raise _Bad(f"{name}: {error.detail}") from None


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        # The message quotes nothing of the line.
        raise _Bad(f"not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise _Bad("not a JSON object")
    if (
        b"\\u0000" in line
        or line.count(b"{") + line.count(b"[") > MAX_DEPTH
        or _UNSAFE_NUMBER.search(line) is not None
    ):
        _walk(value)
    return value


def _walk(root: dict[str, Any]) -> None:
    """What JSON allows and a database does not. Without recursion."""
    stack: list[tuple[Any, str, int]] = [(root, "", 1)]
    while stack:
        node, path, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _Bad(f"{path[:100]}: nested deeper than {MAX_DEPTH} levels")
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            name = f"{path}.{key}" if path else str(key)
            if isinstance(key, str) and "\x00" in key:
                raise _Bad("a field's name holds a NUL character")
            if isinstance(value, dict | list):
                stack.append((value, name, depth + 1))
            elif isinstance(value, str) and "\x00" in value:
                raise _Bad(f"{name[:100]}: holds a NUL character")
            elif isinstance(value, float | int) and abs(value) >= 2**63:
                raise _Bad(f"{name[:100]}: a number of more than 18 digits loses some; write it as text")


def _text(line: dict[str, Any], name: str, limit: int | None = None) -> str | None:
    value = line.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _Bad(f"{name}: must be text")
    if limit is not None and len(value) > limit:
        raise _Bad(f"{name}: longer than {limit} characters")
    return value


def _object(line: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = line.get(name)
    if value is not None and not isinstance(value, dict):
        raise _Bad(f"{name}: must be an object")
    return value


def _id(line: dict[str, Any]) -> str:
    value = line.get("channel_message_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(line, "channel_message_id", 500)
    if text is None:
        raise _Bad("channel_message_id: missing; without it a repeat could not be told from a new message")
    if text.startswith("out_"):
        raise _Bad("channel_message_id: ids that begin with out_ are the gateway's own")
    return text


def _direction(line: dict[str, Any]) -> Literal["inbound", "outbound"]:
    value = line.get("direction")
    if value == "inbound" or value == "outbound":
        return value  # type: ignore[no-any-return]
    if value is not None:
        raise _Bad("direction: must be inbound or outbound")
    sender, recipient = line.get("sender") is not None, line.get("recipient") is not None
    if sender == recipient:
        raise _Bad("direction: missing; say inbound or outbound, or give sender or recipient alone")
    return "inbound" if sender else "outbound"


def _type(line: dict[str, Any]) -> MessageType:
    value = line.get("message_type")
    if value is None:
        return MessageType.TEXT
    kind = _TYPES.get(value) if isinstance(value, str) else None
    if kind is None:
        raise _Bad(f"message_type: must be one of {', '.join(_TYPES)}")
    return kind


def _milliseconds(value: Any) -> int:
    """Seconds, milliseconds, or ISO 8601 with a zone."""
    if value is None:
        raise _Bad("timestamp: missing; when was it written?")
    if isinstance(value, str):
        text = value.strip()
        seconds = _seconds(float(text)) if re.fullmatch(r"\d{1,15}(\.\d{1,9})?", text) else _iso(text)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        seconds = _seconds(value)
    else:
        raise _Bad("timestamp: must be a number or text such as 2024-01-31T09:00:00Z")
    if seconds < _EARLIEST:
        raise _Bad("timestamp: lies before 1990; give seconds, milliseconds or ISO 8601")
    if seconds > time.time() + DAY:
        raise _Bad("timestamp: lies in the future")
    return round(seconds * 1000)


def _seconds(value: float) -> float:
    if value >= _MILLISECONDS_END:
        raise _Bad("timestamp: neither seconds nor milliseconds")
    return value / 1000 if value >= _SECONDS_END else value


def _iso(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _Bad("timestamp: not a time; write it as 2024-01-31T09:00:00Z") from None
    if moment.tzinfo is None:
        raise _Bad("timestamp: has no zone; end it with Z or an offset such as +08:00")
    return moment.timestamp()
