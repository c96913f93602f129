"""Text, headers, signs of machines, invitations: what mails really look like, and what is meant to hurt."""

from __future__ import annotations

import asyncio
import time
from email import message_from_string

import pytest

from gateway.email import calendar, headers, parse, signs, text
from gateway.email.parser import MailParser, Unreadable


@pytest.mark.parametrize(
    ("written", "reply"),
    [
        ("Yes\n\nOn Mon, 1 Jun 2026 at 10:00, Bob <b@c.d> wrote:\n> Will you?\n", "Yes"),
        ("Ja\n\nAm 01.06.2026 um 10:00 schrieb Bob <b@c.d>:\n> Kommst du?\n", "Ja"),
        ("Oui\n\nLe lun. 1 juin 2026 à 10:00, Bob <b@c.d> a écrit :\n> Tu viens ?\n", "Oui"),
        ("Fine\n\n-----Original Message-----\nFrom: Bob\nSent: Monday\nTo: Ada\n\nold", "Fine"),
        ("Fine\n\nFrom: Bob <b@c.d>\nSent: Monday, June 1\nTo: Ada\nSubject: x\n\nold", "Fine"),
        ("> Will you?\nYes I will\n> And then?\nThen we eat\n", "Yes I will\nThen we eat"),
        ("STOP\n\n-- \nMei Lin\nBakery", "STOP"),
        ("Just a text.\nTwo lines.", "Just a text.\nTwo lines."),
        ("> only a quote", "> only a quote"),
    ],
)
def test_a_reply_is_what_was_written_anew(written: str, reply: str) -> None:
    assert text.reply_of(written, "Re: x") == reply


def test_a_forwarded_mail_stays_whole() -> None:
    written = "See below\n\nFrom: Bob <b@c.d>\nSent: Monday\nTo: Ada\nSubject: x\n\nold"
    assert text.reply_of(written, "Fwd: x") == written
    assert text.reply_of(written, "WG: x") == written


def test_twenty_thousand_line_ends_do_not_stop_the_reading() -> None:
    began = time.monotonic()
    assert text.reply_of("hi" + "\n" * 20_000 + "there", "x") == "hi\n\nthere"
    assert text.reply_of("x " * 90_000, "x").startswith("x x")
    assert time.monotonic() - began < 4


def test_what_takes_too_long_is_left_as_it_is() -> None:
    assert text.limited(0.05, lambda: time.sleep(2) or "late", lambda: "plain") == "plain"


@pytest.mark.parametrize(
    ("markup", "words"),
    [
        ("<p>a</p><p>b</p>", "a\n\nb"),
        ("one<br>two", "one\ntwo"),
        ("<div>Yes</div><blockquote type='cite'>old</blockquote>", "Yes"),
        ("<div>Yes</div><div id='divRplyFwdMsg'>From: Bob</div><div>old</div>", "Yes"),
        ("<div class='gmail_quote'>all of it is quoted</div>", "all of it is quoted"),
        ("<", "<"),
        ("", ""),
        ("<table><tr><td>1</td><td>2</td></tr></table>", "1  2"),
        ("<p>unclosed <b>bold", "unclosed bold"),
        ("<script>x</script><style>y</style>z", "z"),
    ],
)
def test_html_becomes_text_without_what_it_quotes(markup: str, words: str) -> None:
    assert text.from_html(markup)[1] == words


def test_html_that_is_a_tower_is_read_all_the_same() -> None:
    assert "deep" in text.from_html("<div>" * 50_000 + "deep")[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Mei <mei@c.example>", [("mei@c.example", "Mei")]),
        ('"Lin, Mei" <mei@c.example>, tan@c.example', [("mei@c.example", "Lin, Mei"), ("tan@c.example", "")]),
        ("=?utf-8?q?J=C3=B6rg?= <j@c.example>", [("j@c.example", "Jörg")]),
        ("<[abc]@[def>", []),
        ("undisclosed-recipients:;", []),
        ("mei@c.example, MEI@C.example", [("mei@c.example", "")]),
        ("broken <mei@c.example", [("mei@c.example", "broken")]),
        ("'mei@c.example'", [("mei@c.example", "")]),
    ],
)
def test_addresses_are_read_from_whatever_stands_there(value: str, expected: list[tuple[str, str]]) -> None:
    assert [(one["address"], one["name"]) for one in headers.addresses([value])] == expected


def test_twenty_thousand_addresses_take_no_time() -> None:
    began = time.monotonic()
    assert len(headers.addresses([", ".join(f"a{n}@b.example" for n in range(20_000))])) == 100
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("=?utf-8?b?R3LDvMOfZQ==?=", "Grüße"),
        ("=?no-such-charset?q?=E4?=", "ä"),
        ("=?utf-8?q?half", "=?utf-8?q?half"),
        ("a\r\n\tb", "a b"),
        ("nul\x00and\x07bell", "nul and bell"),
    ],
)
def test_headers_are_decoded_or_left(value: str, expected: str) -> None:
    assert headers.decoded(value) == expected


def test_message_ids_are_kept_as_they_were_written() -> None:
    assert headers.message_id(" <a b@c> ") == "<a b@c>"
    assert headers.message_id("<[abc]@[def>") == "<[abc]@[def>"
    assert headers.message_id("no-brackets@c") == "no-brackets@c"
    assert headers.ids("<1@a>\r\n <2@b> junk <1@a>") == ["<1@a>", "<2@b>"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("From: mei@c.example", None),
        ("Auto-Submitted: auto-generated", "auto_submitted"),
        ("Auto-Submitted: no", None),
        ("Precedence: bulk", "bulk"),
        ("List-Id: <x>", "list"),
        ("Return-Path: <>", "bounce"),
        ("X-Auto-Response-Suppress: OOF, AutoReply", "auto_submitted"),
        ("X-Failed-Recipients: mei@c.example", "bounce"),
        ("Subject: Automatic reply: x", "subject"),
        ("Subject: Abwesenheitsnotiz: x", "subject"),
        ("Subject: automatic doors", None),
    ],
)
def test_machines_are_known_by_their_headers(lines: str, why: str | None) -> None:
    message = message_from_string(lines + "\n\nhello")
    assert signs.automatic(message, "mei@c.example", headers.raw(message, "Subject")) == why


@pytest.mark.parametrize(
    "local", ["no-reply", "noreply", "do-not-reply", "MAILER-DAEMON", "postmaster", "bounces+x=y"]
)
def test_machines_are_known_by_their_name(local: str) -> None:
    assert signs.automatic(message_from_string("\n\n"), f"{local}@c.example", "x") == "machine"


def test_an_invitation_without_an_end_or_a_name_is_read() -> None:
    event = calendar.read("BEGIN:VEVENT\r\nDTSTART:20260605\r\nEND:VEVENT")
    assert event is not None
    assert calendar.sentence(event) == "Event: without a title, 2026-06-05"
    assert calendar.read("BEGIN:VCALENDAR\nEND:VCALENDAR") is None
    assert calendar.read("rubbish") is None


def test_an_attachment_is_found_again_by_its_number() -> None:
    raw = (
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\nhi\r\n"
        b"--b\r\nContent-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\nJVBERi0=\r\n--b--\r\n"
    )
    [one] = parse.parse(raw)["attachments"]
    assert parse.attachment(raw, one["index"]) == b"%PDF-"
    with pytest.raises(LookupError):
        parse.attachment(raw, 9)


async def test_a_mail_that_hangs_or_kills_the_reader_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = MailParser(seconds=20.0)
    parser.hold()
    good = b"Subject: fine\r\n\r\nhello\r\n"
    try:
        assert (await parser.parse(good))["content"] == "hello"
        assert parser._worker is not None
        first = parser._worker.process
        first.kill()
        await first.wait()
        # The next one gets a new process.
        assert (await parser.parse(good))["content"] == "hello"
        parser._seconds = 0.0
        with pytest.raises(Unreadable, match="more than"):
            await parser.parse(good)
        parser._seconds = 20.0
        assert (await parser.parse(good))["subject"] == "fine"
        # Killed in the middle of a mail.
        asyncio.get_running_loop().call_soon(parser._worker.process.kill)
        with pytest.raises(Unreadable, match="ended"):
            await parser.parse(b"Subject: x\r\n\r\n" + b"words " * 2_000_000)
        assert (await parser.parse(good))["subject"] == "fine"
    finally:
        worker = parser._worker
        parser.let_go()
        if worker is not None:
            await worker.process.wait()
