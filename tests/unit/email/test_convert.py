"""Recorded mails through parse and convert: one JSON file each, what is given and what must come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.channel import Converted
from gateway.email import parse
from tests.support.mail import IDS, convert_given, raw_of

FIXTURES = Path(__file__).parents[2] / "fixtures" / "email"
CASES = sorted(FIXTURES.glob("*.json"))


def shown(converted: Converted) -> dict[str, Any]:
    """What a reader of the row cares about, without what is empty; our Message-IDs as §n§."""
    messages = []
    for message in converted.messages:
        raw = message.raw_payload
        messages.append(
            {
                "type": str(message.message_type),
                "content": message.content,
                "person": message.person.external_id,
                "name": message.person.name,
                "sender": message.sender_identifier,
                "chat": message.chat_identifier,
                "about": message.reply_to_message_id,
                "role": message.role if message.role != "user" else None,
                "direction": message.direction if message.direction != "inbound" else None,
                "id": message.channel_message_id if message.direction != "inbound" else None,
                "automatic": raw.get("auto_submitted"),
                "origin": raw.get("origin"),
                "queue_ref": raw.get("queue_ref"),
                "media": message.media_metadata,
                "timestamp": message.channel_timestamp,
            }
        )
    always = ("type", "content", "person")
    kept = [{k: v for k, v in one.items() if v is not None or k in always} for one in messages]
    updates = [
        {"status": one.status, "ids": list(one.message_ids), "reason": one.reason}
        for one in converted.updates
    ]
    text = json.dumps({"messages": kept, "updates": updates}, ensure_ascii=False)
    for number in range(1, 10):
        text = text.replace(IDS.of(number), f"§{number}§")
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_recorded_mail_becomes_what_its_file_says(path: Path) -> None:
    case = json.loads(path.read_bytes())
    assert shown(convert_given(case["given"])) == case["expect"]


def test_there_are_cases() -> None:
    assert len(CASES) > 25


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_everything_is_kept(path: Path) -> None:
    """Whatever `content` leaves out stands in `raw_payload`."""
    given = json.loads(path.read_bytes())["given"]
    payload = convert_given(given).messages[0].raw_payload
    if "unreadable" in given:
        assert payload["original_base64"]
        return
    parsed = parse.parse(raw_of(given))
    assert payload.get("text", "") == parsed["text"]
    assert payload.get("html") == parsed["html"]
    assert payload["headers"] == parsed["headers"]


def test_the_id_of_a_mail_does_not_depend_on_the_way_it_came() -> None:
    mail = b"Message-ID: <a b@c>\r\nFrom: x@y.example\r\nDate: Mon, 1 Jun 2026 10:00:00 +0000\r\n\r\nhi\r\n"
    moved = b"Received: from elsewhere\r\nX-Spam: no\r\n" + mail.replace(b"hi", b"hi\r\n-- \r\nlist footer")
    assert parse.digest(mail) == parse.digest(moved) == parse.digest(mail.replace(b"\r\n", b"\n"))
    other = mail.replace(b"x@y", b"z@y")
    assert parse.digest(mail) != parse.digest(other), "two people may use one Message-ID"


def test_a_mail_without_a_message_id_is_known_by_its_words() -> None:
    mail = b"From: x@y.example\r\n\r\nhi\r\n"
    assert parse.digest(mail) == parse.digest(b"Received: by somebody\r\n" + mail)
    assert parse.digest(mail) != parse.digest(mail + b"more")
