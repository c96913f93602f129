"""Every recorded payload becomes what its file says; garbage never raises."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.channel import Converted, InboundMessage, SessionContext, SessionId, StatusUpdate, TenantId
from gateway.whatsapp.convert import convert_event, convert_webhook, unreadable

FIXTURES = Path(__file__).parents[2] / "fixtures" / "whatsapp"
CASES = sorted(path.relative_to(FIXTURES).with_suffix("").as_posix() for path in FIXTURES.glob("*/*.json"))
CONTEXT = SessionContext(TenantId(1), SessionId(2), "whatsapp", "+60123456789", None, {}, {}, Path("unused"))


def convert(kind: str, given_: Any) -> Converted:
    return convert_event(given_, CONTEXT) if kind == "event" else convert_webhook(given_, CONTEXT)


def seen(message: InboundMessage) -> dict[str, Any]:
    return {
        "person": message.person.external_id,
        "kind": message.person.kind,
        "name": message.person.name,
        "aliases": list(message.person.aliases),
        "raw": message.raw_payload,
        **{
            name: getattr(message, name)
            for name in InboundMessage.__slots__
            if name not in ("person", "raw_payload")
        },
    }


def seen_update(update: StatusUpdate) -> dict[str, Any]:
    return {
        "message_ids": list(update.message_ids),
        "status": update.status,
        "chat": update.chat.external_id if update.chat else None,
        "occurred_at": update.occurred_at.timestamp() if update.occurred_at else None,
        "reason": update.reason,
    }


def assert_has(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if name == "raw" and isinstance(value, dict):
            assert_has(actual["raw"], value)
        else:
            assert actual[name] == value, name


def test_there_are_cases_of_every_kind() -> None:
    kinds = {case.partition("/")[0] for case in CASES}
    assert kinds == {"event", "baileys", "cloud"}
    assert len(CASES) > 100


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_payload_becomes_what_its_file_says(case: str) -> None:
    recorded = json.loads((FIXTURES / f"{case}.json").read_text())
    expect = recorded["expect"]
    found = convert(case.partition("/")[0], recorded["given"])
    assert len(found.messages) == len(expect.get("messages", []))
    for message, wanted in zip(found.messages, expect.get("messages", []), strict=True):
        assert_has(seen(message), wanted)
        assert (message.tenant_id, message.session_id, message.channel) == (1, 2, "whatsapp")
        assert message.raw_payload
        orjson.dumps(message.raw_payload)
    assert len(found.updates) == len(expect.get("updates", []))
    for update, wanted in zip(found.updates, expect.get("updates", []), strict=True):
        assert_has(seen_update(update), wanted)
    assert [index for index, _ in found.errors] == [index for index, _ in expect.get("errors", [])]
    for (_, detail), (_, words) in zip(found.errors, expect.get("errors", []), strict=True):
        assert words in detail
    assert found.ignored == expect.get("ignored", 0)


def test_the_whole_original_is_kept_but_for_what_a_database_cannot_hold() -> None:
    body = json.loads((FIXTURES / "baileys" / "image_with_caption.json").read_text())["given"]
    body["message"]["imageMessage"]["caption"] = "a\x00b \ud800"
    [message] = convert_webhook(body, CONTEXT).messages
    assert message.content == "ab ?"
    expected = json.loads(json.dumps(body).replace("a\\u0000b \\ud800", "ab ?"))
    assert message.raw_payload == expected


def test_an_overlong_id_is_shortened_to_one_form() -> None:
    body = json.loads((FIXTURES / "baileys" / "text.json").read_text())["given"]
    body["key"]["id"] = "X" * 5000
    first, second = (convert_webhook(body, CONTEXT).messages[0].channel_message_id for _ in range(2))
    assert first == second
    assert len(first) < 200


def test_a_lid_is_the_phone_it_belongs_to_where_that_is_known() -> None:
    entry = json.loads((FIXTURES / "event" / "text_lid_only.json").read_text())["given"]
    [message] = convert_event(entry, CONTEXT, phone_of={"100000000000002": "60111222333"}.get).messages
    assert message.person.external_id == "whatsapp:+60111222333"
    assert message.person.aliases == ("whatsapp-lid:100000000000002",)


def test_an_entry_that_cannot_be_read_is_stored_with_all_of_it() -> None:
    message = unreadable(b"\xff\xfe", "ID1 100000000000002@lid", 1795299932.25, CONTEXT)
    assert (message.channel_message_id, message.message_type) == ("ID1", "unsupported")
    assert message.person.external_id == "whatsapp-lid:100000000000002"
    assert message.raw_payload == {"payload_base64": "//4="}


# ---- garbage

_text = st.text(max_size=20)
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | _text
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=12,
)


def _shapes() -> Any:
    """Real payloads with something in them replaced by anything."""
    return st.sampled_from(CASES).map(
        lambda case: json.loads((FIXTURES / f"{case}.json").read_text())["given"]
    )


def _spoil(value: Any, path: list[int], junk: Any) -> Any:
    if not path or not isinstance(value, (dict, list)) or not value:
        return junk
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _spoil(value[key], path[1:], junk)
    return copy


def _storable(found: Converted) -> None:
    for message in found.messages:
        text = orjson.dumps(message.raw_payload)
        assert b"\\u0000" not in text
        assert message.channel_message_id
        assert "\x00" not in (message.content or "") + message.channel_message_id + (
            message.person.name or ""
        )
        assert message.channel_timestamp is None or 0 < message.channel_timestamp < 2**63
        (message.content or "").encode()


@settings(deadline=None, max_examples=150)
@given(_json)
def test_anything_at_all_as_a_webhook_body_raises_nothing(body: Any) -> None:
    _storable(convert_webhook(body, CONTEXT))


@settings(deadline=None, max_examples=400)
@given(_shapes(), st.lists(st.integers(0, 9), max_size=7), _json)
def test_a_spoiled_payload_raises_nothing(body: Any, path: list[int], junk: Any) -> None:
    _storable(convert_webhook(_spoil(body, path, junk), CONTEXT))


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([case for case in CASES if case.startswith("event/")]),
    st.lists(st.integers(0, 9), max_size=7),
    _json,
)
def test_a_spoiled_event_is_stored_or_refused_by_name(case: str, path: list[int], junk: Any) -> None:
    entry = json.loads((FIXTURES / f"{case}.json").read_text())["given"]
    spoiled = _spoil(entry, path, junk)
    if not isinstance(spoiled, dict):
        return
    with contextlib.suppress(ValueError):  # it names no sender or no id: the pump stores the entry whole then
        _storable(convert_event(spoiled, CONTEXT))


def test_bottomless_nesting_is_cut_off() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = {"a": deep}
    body = {"key": {"remoteJid": "60111222333@s.whatsapp.net", "id": "A"}, "messageTimestamp": 1795299932}
    found = convert_webhook({**body, "message": {"conversation": "x", "deep": deep}}, CONTEXT)
    assert found.messages[0].content == "x"
