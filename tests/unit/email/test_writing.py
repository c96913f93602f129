"""What goes out: headers, bodies, files, threading; and nothing a caller writes can end a header."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
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
from gateway.email.compose import Mail, compose
from gateway.email.ids import MessageIds
from gateway.email.settings import SessionSettings

OWN = "shop@example.com"
ATTEMPT = Attempt(TenantId(1), SessionId(2), QueueId(3), MessageId(4), 1, "email:mei@customer.example")
TEXT = OutboundMessage(ATTEMPT, MessageType.TEXT, "Hello")
ASKED = Quoted(
    "digest",
    "mei@customer.example",
    "How much?",
    from_me=False,
    raw_payload={
        "message_id": "<q@customer.example>",
        "subject": "Bread",
        "references": ["<p@customer.example>"],
    },
)


def write(message: OutboundMessage = TEXT, **more: Any) -> Mail:
    given: dict[str, Any] = {
        "own": OWN,
        "name": "The Shop",
        "message_id": "<g.3.x@example.com>",
        "now": datetime(2026, 6, 1, tzinfo=UTC),
        "settings": SessionSettings(),
        "answered": None,
        "file": None,
        **more,
    }
    return compose(message, **given)


def read(mail: Mail) -> EmailMessage:
    return message_from_bytes(mail.raw, policy=policy.default)


def test_a_first_mail_says_who_writes_and_has_the_items_own_id() -> None:
    mail = write()
    message = read(mail)
    assert message["From"] == "The Shop <shop@example.com>"
    assert (message["To"], message["Subject"]) == ("mei@customer.example", "Message from The Shop")
    assert message["Message-ID"] == mail.message_id == "<g.3.x@example.com>"
    assert message["Auto-Submitted"] is None
    assert mail.recipients == ("mei@customer.example",)
    assert message.get_content() == "Hello\r\n"


def test_an_answer_carries_what_mail_programs_thread_by() -> None:
    message = read(write(answered=ASKED))
    assert message["Subject"] == "Re: Bread"
    assert message["In-Reply-To"] == "<q@customer.example>"
    assert message["References"] == "<p@customer.example> <q@customer.example>"


def test_an_answer_to_an_answer_does_not_pile_up_res() -> None:
    for subject in ("Re: Bread", "AW: Bread", "re : Bread", "RE[2]: Bread"):
        answered = replace(ASKED, raw_payload={**ASKED.raw_payload, "subject": subject})
        assert read(write(answered=answered))["Subject"] == subject


def test_a_machines_answer_says_so() -> None:
    message = read(write(replace(TEXT, automatic=True), answered=ASKED))
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["X-Auto-Response-Suppress"] == "All"
    assert message["In-Reply-To"]


def test_an_answer_goes_where_it_was_asked_to_go() -> None:
    elsewhere = replace(ASKED, raw_payload={**ASKED.raw_payload, "reply_to": ["desk@customer.example"]})
    assert write(answered=elsewhere).recipients == ("desk@customer.example",)
    other = replace(elsewhere, sender_identifier="tan@customer.example")
    assert write(answered=other).recipients == ("mei@customer.example",)
    ours = replace(ASKED, raw_payload={**ASKED.raw_payload, "reply_to": [OWN]})
    assert write(answered=ours).recipients == ("mei@customer.example",)


def test_text_and_html_go_together() -> None:
    message = read(write(replace(TEXT, payload={"html": "<p>Hello <b>you</b></p>", "subject": "S"})))
    assert message.get_content_type() == "multipart/alternative"
    plain, rich = message.iter_parts()
    assert (plain.get_content_type(), rich.get_content_type()) == ("text/plain", "text/html")
    only = read(write(replace(TEXT, content=None, payload={"html": "<p>Hello <b>you</b></p>"})))
    body = only.get_body(("plain",))
    assert body is not None
    assert body.get_content().strip() == "Hello you"


def test_words_of_every_script_and_length_arrive() -> None:
    words = "Grüße 你好 🎂\n" + "x" * 5000 + "\n.\n..dots\nFrom here"
    body = read(write(replace(TEXT, content=words)))
    assert body.get_content().replace("\r\n", "\n") == words + "\n"
    assert max(map(len, write(replace(TEXT, content=words)).raw.split(b"\r\n"))) < 998


def test_copies_are_in_the_envelope_and_the_header() -> None:
    mail = write(replace(TEXT, payload={"cc": ["Tan@customer.example", "mei@customer.example"]}))
    assert mail.recipients == ("mei@customer.example", "tan@customer.example")
    assert read(mail)["Cc"] == "tan@customer.example"
    blind = write(settings=SessionSettings(bcc_self=True))
    assert blind.recipients == ("mei@customer.example", OWN)
    assert read(blind)["Bcc"] is None


def test_a_file_goes_along_under_its_name() -> None:
    file = LocalFile(Path("x"), "application/pdf", "Angebot für Mei.pdf", 5, "0" * 64)
    message = read(write(OutboundMessage(ATTEMPT, MessageType.DOCUMENT, "See", media=file), file=b"%PDF-"))
    [part] = message.iter_attachments()
    assert (part.get_filename(), part.get_content_type()) == ("Angebot für Mei.pdf", "application/pdf")
    assert part.get_content() == b"%PDF-"
    text = LocalFile(Path("x"), "text/csv", "a.csv", 4, "0" * 64)
    message = read(
        write(OutboundMessage(ATTEMPT, MessageType.DOCUMENT, None, media=text), file=b"\xff,1\r\n")
    )
    [part] = message.iter_attachments()
    assert part.get_payload(decode=True) == b"\xff,1\r\n"


def test_places_and_contacts_become_words_and_a_card() -> None:
    place = {"latitude": 3.1, "longitude": 101.7, "name": "Bakery", "address": "Jalan 1"}
    body = read(write(OutboundMessage(ATTEMPT, MessageType.LOCATION, None, payload=place))).get_content()
    assert "Bakery\nJalan 1\nhttps://www.openstreetmap.org/?mlat=3.1&mlon=101.7" in body.replace("\r\n", "\n")
    contact = {"name": "Tan; Ah", "phones": ["+60123456789"], "emails": []}
    message = read(write(OutboundMessage(ATTEMPT, MessageType.CONTACT, None, payload=contact)))
    [card] = message.iter_attachments()
    assert b"FN:Tan\\; Ah\r\n" in card.get_payload(decode=True)


@pytest.mark.parametrize("bad", ["\r", "\n", "\0", "\u2028", "\x85"])
@pytest.mark.parametrize("field", ["subject", "cc", "from_name", "name"])
def test_no_value_can_end_a_header(field: str, bad: str) -> None:
    value = f"x{bad}Bcc: victim@elsewhere.example"
    message = replace(TEXT, payload={field: value})
    more = {
        "name": {"name": value},
        "from_name": {"settings": SessionSettings.model_construct(from_name=value)},
    }.get(field, {})
    with pytest.raises(RefusedError) as refused:
        write(message, **more)
    assert refused.value.code == "invalid_payload"


def test_what_they_wrote_cannot_end_our_headers_either() -> None:
    for raw in (
        {"subject": "x\r\nBcc: victim@elsewhere.example", "message_id": "<a\r\nBcc: v@e.example>"},
        {
            "subject": "\u2028Bcc: v@e.example",
            "references": ["<x>\r\nBcc: v@e.example"],
            "message_id": "<ü@x>",
        },
    ):
        message = read(write(answered=replace(ASKED, raw_payload=raw)))
        assert message["Bcc"] is None
        assert "victim" not in (message["Cc"] or "")


@pytest.mark.parametrize(
    "message",
    [
        OutboundMessage(ATTEMPT, MessageType.POLL, None, payload={"question": "?", "options": ["a", "b"]}),
        OutboundMessage(ATTEMPT, MessageType.REACTION, "👍"),
        OutboundMessage(ATTEMPT, MessageType.IMAGE, "no file"),
        OutboundMessage(ATTEMPT, MessageType.LOCATION, None, payload={"latitude": 91.0, "longitude": 0.0}),
        replace(TEXT, payload={"cc": ["nobody"]}),
        replace(TEXT, payload={"cc": 7}),
        replace(TEXT, payload={"html": 7}),
    ],
)
def test_what_cannot_be_a_mail_is_refused_for_good(message: OutboundMessage) -> None:
    with pytest.raises(RefusedError):
        write(message)


def test_our_ids_are_known_again_and_nobody_can_make_one() -> None:
    ids = MessageIds(b"k" * 32, OWN)
    assert ids.of(7) == ids.of(7) != ids.of(8)
    assert ids.queue_id(ids.of(7)) == 7
    assert MessageIds(b"other" * 8, OWN).queue_id(ids.of(7)) is None
    assert ids.queue_id(ids.of(7).replace("g.7.", "g.8.")) is None
    assert ids.queue_id("<a@b>") is None
    assert ids.queue_id(None) is None
