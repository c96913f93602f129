"""What `payload` may hold, by type: the field that is wrong is always named."""

from __future__ import annotations

from typing import Any

import pytest

from core import payloads
from core.channel import MessageType


@pytest.mark.parametrize(
    ("kind", "payload", "field"),
    [
        ("location", {"latitude": 1}, "payload.longitude"),
        ("location", {"latitude": "1", "longitude": 2}, "payload.latitude"),
        ("location", {"latitude": True, "longitude": 2}, "payload.latitude"),
        ("location", {"latitude": float("nan"), "longitude": 2}, "payload.latitude"),
        ("location", {"latitude": 1, "longitude": 2, "lat": 3}, "payload.lat"),
        ("contact", {"name": " ", "phones": ["+60123456789"]}, "payload.name"),
        ("contact", {"name": "Tan"}, "payload.phones"),
        ("contact", {"name": "Tan", "phones": [5]}, "payload.phones.0"),
        ("poll", {"question": "?", "options": ["a", "A"]}, "payload.options"),
        ("poll", {"question": "?", "options": ["a", "b"], "selectable": 3}, "payload.selectable"),
        ("poll", {"question": "?", "options": [str(n) for n in range(13)]}, "payload.options"),
        ("poll", {"question": "?", "options": ["a", " "]}, "payload.options.1"),
        ("reaction", {}, "payload.emoji"),
        ("reaction", {"emoji": "ok"}, "payload.emoji"),
        ("text", {"link_preview": {"url": "ftp://x", "title": "X"}}, "payload.link_preview.url"),
        ("text", {"link_preview": {"url": "https://x"}}, "payload.link_preview.title"),
        ("audio", {"voice": "yes"}, "payload.voice"),
    ],
)
def test_the_wrong_field_is_named(kind: str, payload: dict[str, Any], field: str) -> None:
    with pytest.raises(payloads.BadPayload) as error:
        payloads.read(kind, payload)
    assert error.value.field == field
    assert error.value.detail.startswith(f"{field}: ")
    assert error.value.code == "invalid_payload"


def test_what_is_right_is_read() -> None:
    assert payloads.read("location", {"latitude": 3, "longitude": -1.5}).latitude == 3.0
    assert (
        payloads.read("poll", {"question": " Which \n one? ", "options": ["a", "b"]}).question == "Which one?"
    )
    assert payloads.read("contact", {"name": "Tan", "emails": ["a@b.co"]}).phones == []
    assert payloads.read("reaction", None, "👍").emoji == "👍"
    assert payloads.read("reaction", {"emoji": ""}, "ignored").emoji == ""
    assert payloads.read("reaction", {"emoji": "1️⃣"}).emoji == "1️⃣"
    # Other channels' names are not this module's business where a type is open.
    assert payloads.read(MessageType.TEXT, {"subject": "Hello", "html": "<p>"}).link_preview is None
    assert payloads.read("image", {"anything": 1}) is not None
