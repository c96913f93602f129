"""Mail goes out over SMTP at most once; what became of it is proven by Sent, by a returned mail, or said to be unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from asyncpg import Record

from core.channel import Sent, SessionStatus, Unknown
from gateway.email import parse
from sandbox.mail import Letter, Person
from tests.contract.email_peer import EmailCustomer
from tests.integration.email.conftest import Shop, letter
from tests.support.outbound import fetch, value

pytestmark = pytest.mark.asyncio(loop_scope="module")


def person(shop: Shop, name: str) -> EmailCustomer:
    found = shop.peer.customer(name)
    assert isinstance(found, EmailCustomer)
    return found


async def send(shop: Shop, to: str, text: str, payload: Mapping[str, Any] | None = None) -> int:
    """Enqueue; the queue id."""
    async with shop.db.worker() as conn, conn.transaction():
        row = await conn.fetchrow(
            "SELECT message_id, queue_id FROM et_enqueue_outbound($1, $2, $3, $4, 'text', NULL, NULL)",
            shop.tenant_id,
            shop.session.id,
            to,
            text,
        )
        if payload:
            await conn.execute(
                "UPDATE et_messages SET raw_payload = raw_payload || jsonb_build_object('payload', $2::JSONB) WHERE id = $1",
                row["message_id"],
                dict(payload),
            )
        return int(row["queue_id"])


async def rows_of(shop: Shop, to: str) -> list[Record]:
    return await fetch(
        shop.db,
        """
        SELECT m.*, t.handled_by
        FROM et_messages m
        JOIN et_leads l ON l.id = m.lead_id
        JOIN et_threads t ON t.id = m.thread_id
        WHERE l.external_id = $1
        ORDER BY m.id
        """,
        f"email:{to}",
    )


async def test_a_copy_lies_in_sent_and_is_no_second_message(shop: Shop) -> None:
    mei = person(shop, "copied")
    row = await shop.reached(await send(shop, mei.address, "with a copy"), "sent")
    shop.deliver("a sign that Sent was looked at", sender="sign <sign@customer.example>")

    async def kept() -> bool:
        return any(b"with a copy" in mail for mail in shop.dovecot.mails("Sent"))

    await shop.until(kept, "the copy in Sent")
    await shop.arrived(mei, 1)
    found = await shop.resolve(row)
    assert isinstance(found, Sent)
    assert found.channel_message_id == row["channel_message_id"]
    assert len(await rows_of(shop, mei.address)) == 1


async def test_an_answer_continues_the_conversation_on_both_sides(shop: Shop) -> None:
    mei = person(shop, "threaded")
    queue_id = await send(shop, mei.address, "Your cake is ready", {"subject": "Your cake"})
    sent = await shop.reached(queue_id, "sent")
    await shop.arrived(mei, 1)
    first = mei.person.letters[0]
    assert first.subject == "Your cake"
    # They answer from another address: it is still this conversation.
    raw = letter(
        "I fetch it at five",
        sender="Phone <another@customer.example>",
        subject="Re: Your cake",
        In_Reply_To=first.message_id,
    )
    shop.dovecot.deliver(raw)
    row = await shop.stored(parse.digest(raw))
    assert row["thread_id"] == sent["thread_id"]
    assert (row["reply_to_message_id"], row["sender_identifier"]) == (
        sent["channel_message_id"],
        "another@customer.example",
    )
    elsewhere = shop.peer.mail.person("Phone", "another@customer.example")
    queue_id = await value(
        shop.db,
        """
        WITH m AS (
            INSERT INTO et_messages (tenant_id, channel_session_id, lead_id, channel, direction, role, message_type,
                                     content, delivery_status)
            SELECT tenant_id, channel_session_id, lead_id, channel, 'outbound', 'assistant', 'text', 'See you', 'queued'
            FROM et_messages WHERE id = $1
            RETURNING id, tenant_id, channel_session_id
        )
        INSERT INTO et_outbound_queue (tenant_id, message_id, channel, channel_session_id)
        SELECT tenant_id, id, 'email', channel_session_id FROM m
        RETURNING id
        """,
        row["id"],
    )
    await shop.reached(queue_id, "sent")
    answer: Letter = await elsewhere.letter()
    assert answer.subject == "Re: Your cake"
    assert answer.in_reply_to == row["raw_payload"]["message_id"]
    assert str(answer.message["References"]).split()[-1] == row["raw_payload"]["message_id"]


@pytest.mark.parametrize("where", ["mail", "data", "accepted"])
async def test_a_connection_cut_anywhere_never_sends_twice(shop: Shop, where: Any) -> None:
    mei = person(shop, f"cut-{where}")
    shop.peer.mail.cut_next(where)
    queue_id = await send(shop, mei.address, f"cut at {where}")
    row = await shop.hurry(queue_id, "sent", "unknown", "failed")
    await shop.reached(await send(shop, mei.address, "the next one"), "sent")
    await shop.until(lambda: _has(mei.person, "the next one"), "the next one")
    arrived = [one.text for one in mei.person.letters].count(f"cut at {where}")
    if where == "mail":
        # Nothing had gone out: tried again by itself.
        assert (row["status"], row["retry_count"], row["claim_epoch"], arrived) == ("sent", 1, 2, 1)
        return
    assert (row["status"], row["claim_epoch"], arrived) == ("unknown", 1, 1 if where == "accepted" else 0)
    assert "proves" in row["last_error"]
    found = await shop.resolve(row)
    assert isinstance(found, Unknown), "not found in Sent proves nothing"
    if where == "accepted":
        # The provider's own copy comes to light: the item moves on by itself.
        shop.dovecot.deliver(mei.person.letters[0].raw, folder="Sent")
        await shop.reached(queue_id, "sent")
        assert isinstance(await shop.resolve(row), Sent)
        assert [m["direction"] for m in await rows_of(shop, mei.address)] == ["outbound", "outbound"]


async def _has(who: Person, text: str) -> bool:
    return any(one.text == text for one in who.letters)


async def test_a_returned_mail_marks_its_message_failed_in_words(shop: Shop) -> None:
    mei = person(shop, "bounced")
    row = await shop.reached(await send(shop, mei.address, "comes back"), "sent")
    await shop.arrived(mei, 1)
    report = f"""From: MAILER-DAEMON@mx.example
To: shop@example.com
Subject: Undelivered
Message-ID: <dsn-1@mx.example>
Return-Path: <>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary=d

--d
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example

Final-Recipient: rfc822; {mei.address}
Action: failed
Status: 5.2.2
Diagnostic-Code: smtp; 552 5.2.2 The mailbox is full

--d
Content-Type: message/rfc822

Message-ID: {row["channel_message_id"]}

comes back
--d--
"""
    shop.dovecot.deliver(report.encode())

    async def failed() -> Record | None:
        now = await shop.item(row["id"])
        return now if now["delivery_status"] == "failed" else None

    await shop.until(failed, "the message marked failed")
    bounce = await shop.stored(parse.digest(report.replace("\n", "\r\n").encode()))
    assert bounce["thread_id"] == row["thread_id"]
    assert (bounce["role"], bounce["raw_payload"]["auto_submitted"]) == ("system", True)
    assert "The mailbox is full" in bounce["content"]


async def test_nobody_gets_a_mail_of_which_a_copy_is_refused(shop: Shop) -> None:
    mei = person(shop, "main")
    shop.peer.mail.refuse("gone@customers.example")
    queue_id = await send(shop, mei.address, "to two", {"cc": ["gone@customers.example"], "subject": "Two"})
    row = await shop.reached(queue_id, "failed")
    assert (row["error_code"], row["claim_epoch"]) == ("recipient_refused", 1)
    assert "gone@customers.example" in row["last_error"]
    tan = person(shop, "tan")
    queue_id = await send(shop, mei.address, "to both", {"cc": [tan.address], "subject": "Both"})
    await shop.reached(queue_id, "sent")
    await shop.arrived(tan, 1)
    await shop.arrived(mei, 1)
    assert [one.text for one in mei.person.letters] == ["to both"]
    assert str(mei.person.letters[0].message["Cc"]) == tan.address


async def test_what_a_person_sends_from_another_program_is_theirs(shop: Shop) -> None:
    mei = person(shop, "answered-elsewhere")
    shop.dovecot.deliver(letter("Anybody there?", sender=mei.address))

    async def written() -> list[Record]:
        return await rows_of(shop, mei.address)

    await shop.until(written, "the question")
    raw = letter("Ada here, I call you.", sender="shop@example.com", To=mei.address)
    shop.dovecot.deliver(raw, folder="Sent")

    async def both() -> list[Record] | None:
        rows = await rows_of(shop, mei.address)
        return rows if len(rows) == 2 else None

    question, answer = await shop.until(both, "the answer of a person")
    assert (answer["direction"], answer["delivery_status"], answer["raw_payload"]["origin"]) == (
        "outbound",
        "sent",
        "phone",
    )
    assert answer["thread_id"] == question["thread_id"]
    assert answer["handled_by"] == "human"


async def test_a_header_cannot_be_smuggled_in(shop: Shop) -> None:
    mei = person(shop, "injected")
    for payload in (
        {"subject": "Hello\r\nBcc: victim@elsewhere.example"},
        {"subject": "ok", "cc": ["x@y.example\r\nBcc: victim@elsewhere.example"]},
    ):
        row = await shop.reached(await send(shop, mei.address, "x", payload), "failed")
        assert row["error_code"] == "invalid_payload"
    assert mei.person.letters == []


async def test_a_wrong_smtp_password_holds_mail_back_and_says_so(shop: Shop) -> None:
    mei = person(shop, "patient")
    mail = shop.peer.mail
    mail.log_ins_refused = True
    mail.kill_connections()
    queue_id = await send(shop, mei.address, "when it works again")
    row = await shop.stands(lambda row: row.status is not SessionStatus.ACTIVE, "a session that says so")
    assert (row.status_reason, "password" in (row.action or "")) == ("smtp_auth_failed", True)
    # Reading goes on meanwhile.
    shop.deliver("still read", sender="Tan <tan@customer.example>")
    await shop.said("still read")
    mail.log_ins_refused = False
    await shop.active()
    item = await shop.hurry(queue_id, "sent", "failed", "unknown")
    assert (item["status"], item["retry_count"]) == ("sent", 0)
