"""JSON lines of history: what a line means, what is wrong with one, and that no way of cutting the bytes changes it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.history import Entry, Wrong
from core.history_lines import LINE_LIMIT, LineReader, LineSplitter

WHEN = 1_600_000_000
GROUP = "120363000000000001@g.us"


def reader(channel: str = "whatsapp", own_address: str | None = "+60100000001") -> LineReader:
    return LineReader(tenant_id=1, session_id=2, channel=channel, own_address=own_address)


def line(**fields: Any) -> bytes:
    whole = {"channel_message_id": "M1", "sender": "+60 11-122 2333", "timestamp": WHEN} | fields
    return orjson.dumps({name: value for name, value in whole.items() if value is not ...})


def read(raw: bytes, channel: str = "whatsapp") -> Any:
    found = reader(channel).read(1, raw)
    assert isinstance(found, Entry), found
    return found.message


def wrong(raw: bytes | None) -> str:
    found = reader().read(7, raw)
    assert isinstance(found, Wrong), found
    assert found.line == 7
    return found.detail


def test_an_inbound_line() -> None:
    message = read(
        line(
            content="hello",
            name="Ann",
            reply_to_message_id="M0",
            payload={"latitude": 1},
            raw={"origin": "agent"},
        )
    )
    assert (message.tenant_id, message.session_id, message.channel) == (1, 2, "whatsapp")
    assert (message.direction, message.role, message.is_history) == ("inbound", "user", True)
    assert (message.person.external_id, message.person.name) == ("whatsapp:+60111222333", "Ann")
    assert (message.sender_identifier, message.chat_identifier) == ("+60111222333", None)
    assert (message.content, message.message_type, message.reply_to_message_id) == ("hello", "text", "M0")
    assert message.channel_timestamp == WHEN * 1000
    # What a line brings along can never pose as the gateway's own marks.
    assert message.raw_payload == {
        "origin": "import",
        "payload": {"latitude": 1},
        "original": {"origin": "agent"},
    }


def test_an_outbound_line() -> None:
    message = read(line(sender=..., recipient="+60111222333", message_type="image"))
    assert (message.direction, message.role, message.message_type) == ("outbound", "assistant", "image")
    assert message.person.external_id == "whatsapp:+60111222333"
    assert message.sender_identifier == "+60100000001"


def test_null_is_as_good_as_nothing() -> None:
    message = read(
        line(sender=None, recipient="+60111222333", name=None, payload=None, raw=None, content=None)
    )
    assert (message.direction, message.content, message.raw_payload) == (
        "outbound",
        None,
        {"origin": "import"},
    )


def test_a_contact_and_a_direction_will_do() -> None:
    for direction in ("inbound", "outbound"):
        message = read(line(sender=..., contact="+60111222333", direction=direction))
        assert (message.direction, message.person.external_id) == (direction, "whatsapp:+60111222333")


def test_whoever_names_both_sides_says_the_direction() -> None:
    message = read(line(recipient="+60100000001", direction="inbound"))
    assert message.person.external_id == "whatsapp:+60111222333"
    message = read(line(sender="+60100000001", recipient="+60111222333", direction="outbound"))
    assert message.person.external_id == "whatsapp:+60111222333"


def test_a_group_has_an_author() -> None:
    message = read(line(contact=GROUP, name="Family"))
    assert (message.person.external_id, message.person.kind) == (f"whatsapp-group:{GROUP}", "group")
    assert (message.sender_identifier, message.chat_identifier) == ("+60111222333", GROUP)


def test_other_channels_have_other_addresses() -> None:
    assert read(line(sender="John@Example.com"), "email").person.external_id == "email:john@example.com"
    message = read(line(sender="telegram:123", channel_message_id=42), "telegram")
    assert (message.person.external_id, message.channel_message_id) == ("telegram:123", "42")


@pytest.mark.parametrize(
    "value",
    [WHEN, WHEN * 1000, float(WHEN), str(WHEN), str(WHEN * 1000), "2020-09-13T12:26:40Z", "2020-09-13T20:26:40+08:00",
     "2020-09-13 12:26:40+00:00", 1.6e9],
)  # fmt: skip
def test_a_time_in_any_of_its_forms(value: Any) -> None:
    assert read(line(timestamp=value)).channel_timestamp == WHEN * 1000


def test_a_part_of_a_second_is_kept() -> None:
    assert read(line(timestamp=WHEN + 0.25)).channel_timestamp == WHEN * 1000 + 250
    assert read(line(timestamp="2020-09-13T12:26:40.250Z")).channel_timestamp == WHEN * 1000 + 250


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (None, "longer than 262144 bytes"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON: str is not valid UTF-8"),
        (b'{"content": "\xe9"}', "not valid JSON: str is not valid UTF-8"),
        (b'{"content": "\\ud800"}', "not valid JSON"),
        (b'{"timestamp": 1e999}', "not valid JSON"),
        (b"[" * 3000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (line(content="a\0b"), "content: holds a NUL character"),
        (line(raw={"a": [{"b": "\0"}]}), "raw.a.0.b: holds a NUL character"),
        (line(raw={"\0": 1}), "a field's name holds a NUL character"),
        (line(raw={}).replace(b'"raw":{}', b'"raw":' + b'[' * 80 + b']' * 80), "nested deeper than 64 levels"),
        (line(raw={}).replace(b'"raw":{}', b'"raw":99999999999999999999'), "raw: a number of more than 18 digits"),
        (line(timestmap=1), "'timestmap': there is no such field; there are channel_message_id, contact"),
        (line(channel_message_id=...), "channel_message_id: missing"),
        (line(channel_message_id=""), "channel_message_id: missing"),
        (line(channel_message_id=True), "channel_message_id: must be text"),
        (line(channel_message_id="x" * 501), "channel_message_id: longer than 500 characters"),
        (line(channel_message_id="out_1"), "the gateway's own"),
        (line(sender=...), "direction: missing"),
        (line(recipient="+60111222333"), "direction: missing"),
        (line(direction="in"), "direction: must be inbound or outbound"),
        (line(sender=..., direction="inbound"), "contact: missing; an inbound message needs it, or sender"),
        (line(sender="Ann"), "sender: phone number 'Ann'"),
        (line(sender=5), "sender: must be text"),
        (line(contact="+60111222444"), "sender: another person than contact"),
        (line(timestamp=...), "timestamp: missing"),
        (line(timestamp=True), "timestamp: must be a number or text"),
        (line(timestamp="yesterday"), "timestamp: not a time"),
        (line(timestamp="2020-09-13T12:26:40"), "timestamp: has no zone"),
        (line(timestamp=5), "timestamp: lies before 1990"),
        (line(timestamp=-1), "timestamp: lies before 1990"),
        (line(timestamp=WHEN * 1_000_000), "timestamp: neither seconds nor milliseconds"),
        (line(timestamp=4_102_444_800), "timestamp: lies in the future"),
        (line(message_type="fax"), "message_type: must be one of text, image"),
        (line(message_type=["text"]), "message_type: must be one of"),
        (line(content=5), "content: must be text"),
        (line(name="x" * 201), "name: longer than 200 characters"),
        (line(payload=[1]), "payload: must be an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said(raw: bytes | None, says: str) -> None:
    assert says in wrong(raw)


def test_what_is_wrong_quotes_no_text_of_a_message() -> None:
    assert "secret" not in wrong(b'{"content": "secret')
    assert "secret" not in wrong(line(content=["secret"]))


async def _items(pieces: list[bytes]) -> list[Entry | Wrong]:
    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return [item async for item in reader().items(chunks())]


async def test_lines_are_numbered_as_an_editor_does() -> None:
    body = b"\xef\xbb\xbf" + line() + b"\r\n\n   \nnonsense\n" + line(channel_message_id="M2")
    found = await _items([body])
    assert [item.line for item in found] == [1, 4, 5]
    assert [type(item) for item in found] == [Entry, Wrong, Entry]


LINES = [b"one", b"", b"two\r", b"x" * 30, b" ", b"three", b"y" * 21, b"z" * 20, b"\xef\xbb\xbf"]


@given(st.lists(st.integers(0, 120)), st.booleans())
def test_however_the_bytes_are_cut(cuts: list[int], ended: bool) -> None:
    body = b"\n".join(LINES) + (b"\n" if ended else b"")
    splitter = LineSplitter(limit=20)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    found: list[tuple[int, bytes | None]] = []
    for start, end in itertools.pairwise(edges):
        found += splitter.feed(body[start:end])
    found += splitter.end()
    assert found == [
        (1, b"one"), (3, b"two"), (4, None), (6, b"three"), (7, None), (8, b"z" * 20), (9, b"\xef\xbb\xbf"),
    ]  # fmt: skip


def test_an_endless_line_is_not_kept() -> None:
    splitter = LineSplitter()
    for _ in range(64):
        assert list(splitter.feed(b"x" * 65536)) == []
        assert sum(map(len, splitter._held)) <= LINE_LIMIT
    assert list(splitter.end()) == [(1, None)]
