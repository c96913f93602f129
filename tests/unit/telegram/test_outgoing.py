"""What leaves for Telegram is made of the message alone; what Telegram could never take is refused with the field's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.channel import (
    Attempt,
    LocalFile,
    MessageId,
    MessageType,
    OutboundMessage,
    QueueId,
    Quoted,
    SessionId,
    TenantId,
)
from core.errors import RefusedError
from gateway.telegram import outgoing
from gateway.telegram.outgoing import Draft, draft
from gateway.telegram.settings import SessionSettings

MEI = "telegram:700000002"
PLAIN = SessionSettings()


def made(
    kind: str, content: str | None = None, to: str = MEI, settings: SessionSettings = PLAIN, **more: Any
) -> Draft:
    attempt = Attempt(TenantId(1), SessionId(2), QueueId(3), MessageId(4), 1, to)
    return draft(OutboundMessage(attempt, MessageType(kind), content, **more), settings)


def refused(code: str, kind: str, content: str | None = None, **more: Any) -> str:
    with pytest.raises(RefusedError) as error:
        made(kind, content, **more)
    assert error.value.code == code
    return error.value.detail


def file(mime_type: str, size: int = 1000) -> LocalFile:
    return LocalFile(Path("unused"), mime_type, "name.bin", size, "0" * 64)


def test_a_text_of_4096_characters_goes_and_a_longer_one_is_refused() -> None:
    assert made("text", "ü" * 4096).params == {"chat_id": 700000002, "text": "ü" * 4096}
    assert "4096" in refused("too_long", "text", "x" * 4097)
    # Marks are not counted: they are not sent.
    assert len(made("text", "*" + "x" * 4096 + "*", payload={"format": "markup"}).params["text"]) == 4096
    assert "payload.format" in refused("invalid_payload", "text", "x", payload={"format": "html"})
    refused("empty_content", "text", "  \x00 ")


def test_a_caption_has_its_own_limit() -> None:
    assert made("image", "x" * 1024, media=file("image/png")).params["caption"] == "x" * 1024
    assert "1024" in refused("too_long", "image", "x" * 1025, media=file("image/png"))


def test_entities_may_be_given_and_are_checked() -> None:
    bold = {"type": "bold", "offset": 0, "length": 2}
    assert made("text", "hi", payload={"entities": [bold]}).params["entities"] == [bold]
    for wrong in ({"type": "bold"}, {**bold, "type": "mention"}, "x", {**bold, "url": ["http://x"]}):
        assert "payload.entities.0" in refused("invalid_payload", "text", "hi", payload={"entities": [wrong]})


def test_link_previews_can_be_chosen_or_switched_off() -> None:
    silent = SessionSettings(link_previews=False)
    assert made("text", "x", settings=silent).params["link_preview_options"] == {"is_disabled": True}
    preview = {"link_preview": {"url": "https://example.com", "title": "T"}}
    assert made("text", "x", payload=preview).params["link_preview_options"] == {"url": "https://example.com"}


@pytest.mark.parametrize("to", ["whatsapp:+60123456789", "telegram:@mei", "telegram:0", "nonsense"])
def test_only_a_chat_id_is_an_address(to: str) -> None:
    assert "telegram:123456789" in refused("invalid_recipient", "text", "x", to=to)


def test_a_group_is_an_address() -> None:
    assert made("text", "x", to="telegram:-1005000002").chat_id == -1005000002


@pytest.mark.parametrize(
    ("kind", "mime_type", "payload", "method"),
    [
        ("image", "image/jpeg", {}, "sendPhoto"),
        ("video", "video/mp4", {}, "sendVideo"),
        ("video", "image/gif", {}, "sendAnimation"),
        ("audio", "audio/ogg; codecs=opus", {}, "sendVoice"),
        ("audio", "audio/ogg", {"voice": False}, "sendAudio"),
        ("audio", "audio/mpeg", {}, "sendAudio"),
        ("document", "text/html", {}, "sendDocument"),
        ("sticker", "video/webm", {}, "sendSticker"),
    ],
)
def test_a_file_takes_the_method_of_its_kind(kind: str, mime_type: str, payload: Any, method: str) -> None:
    assert made(kind, media=file(mime_type), payload=payload).method == method


def test_what_telegram_takes_no_file_for_is_refused_in_words() -> None:
    assert "JPEG" in refused("media_wrong_type", "image", media=file("image/tiff"))
    assert "10 MB" in refused("media_too_large", "image", media=file("image/png", 11 << 20))
    assert "50 MB" in refused("media_too_large", "document", media=file("application/pdf", 51 << 20))
    assert "media_url" in refused("invalid_payload", "video")
    assert "payload.voice" in refused(
        "invalid_payload", "audio", media=file("audio/mpeg"), payload={"voice": True}
    )
    assert "content" in refused("invalid_payload", "sticker", "words", media=file("image/webp"))


def test_what_telegram_has_no_place_for_is_refused_in_words() -> None:
    place = {"latitude": 1.0, "longitude": 2.0}
    assert "content" in refused("invalid_payload", "location", "here", payload=place)
    assert "phone" in refused(
        "invalid_payload", "contact", payload={"name": "A", "emails": ["a@example.com"]}
    )
    assert "payload.options" in refused(
        "invalid_payload", "poll", payload={"question": "?", "options": ["one"]}
    )
    refused("unsupported_type", "unsupported", "x")


def test_a_place_with_one_name_has_it_twice_because_telegram_wants_both() -> None:
    place = {"latitude": 1.0, "longitude": 2.0, "name": "Bakery"}
    assert made("location", payload=place).params["address"] == "Bakery"
    assert made("location", payload={"latitude": 1.0, "longitude": 2.0}).method == "sendLocation"


def quoted(key: str, *, from_me: bool = True, **raw: Any) -> Quoted:
    return Quoted(key, None if from_me else MEI, "x", from_me, raw)


def test_an_answer_names_its_message_also_in_another_chat() -> None:
    assert made("text", "x", quoted=quoted("700000002:5")).params["reply_parameters"] == {
        "message_id": 5,
        "allow_sending_without_reply": True,
    }
    assert made("text", "x", quoted=quoted("-5:7")).params["reply_parameters"]["chat_id"] == -5
    assert (
        made("text", "x", quoted=quoted("700000002:5:edited:9:1")).params["reply_parameters"]["message_id"]
        == 5
    )
    assert "reply_to_message_id" in refused("invalid_payload", "text", "x", quoted=quoted("out_5"))


def test_what_is_about_a_message_needs_one_of_this_chat() -> None:
    assert made("reaction", "👍", quoted=quoted("700000002:5", from_me=False)).params == {
        "chat_id": 700000002,
        "message_id": 5,
        "reaction": [{"type": "emoji", "emoji": "👍"}],
    }
    assert made("reaction", "", quoted=quoted("700000002:5")).params["reaction"] == []
    assert "reply_to_message_id" in refused("invalid_payload", "reaction", "👍")
    assert "another chat" in refused("invalid_payload", "deleted", quoted=quoted("-5:7"))
    assert "other person" in refused(
        "invalid_payload", "edited", "new", quoted=quoted("700000002:5", from_me=False)
    )


def test_an_edit_of_a_caption_keeps_everything_but_the_names() -> None:
    edit = made("edited", "*new*", quoted=quoted("700000002:5"), payload={"format": "markup"})
    caption = outgoing.as_caption(edit)
    assert (caption.method, caption.params["caption"]) == ("editMessageCaption", "new")
    assert caption.params["caption_entities"] == [{"type": "bold", "offset": 0, "length": 3}]
    with pytest.raises(RefusedError, match="1024"):
        outgoing.as_caption(made("edited", "x" * 1025, quoted=quoted("700000002:5")))


def test_a_group_that_moved_keeps_the_message_and_loses_what_it_answered() -> None:
    moved = made("text", "x", to="telegram:-5", quoted=quoted("-5:7")).to(-1005)
    assert moved.params == {"chat_id": -1005, "text": "x"}
