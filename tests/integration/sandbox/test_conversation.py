"""What people and a paired real client say to each other."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal

import pytest
from PIL import Image

from sandbox.whatsapp import bodies
from sandbox.whatsapp.phone import Mode
from tests.integration.sandbox.conftest import Linked
from tests.support.whatsapp_real import ClientError

pytestmark = pytest.mark.asyncio(loop_scope="package")


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "navy").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode", ["lid", "pn", "lid-only"])
async def test_a_text_arrives_in_every_address_form_and_is_acknowledged(linked: Linked, mode: Mode) -> None:
    msg_id = await linked.mei.send_text(linked.shop, f"hi by {mode}", mode=mode)
    event = await linked.client.message(msg_id)
    source = event["info"]["MessageSource"]
    assert event["text"] == f"hi by {mode}"
    assert source["Sender"]["User"] == ("60111222333" if mode == "pn" else linked.mei.lid)
    assert source["AddressingMode"] == ("PN" if mode == "pn" else "LID")
    assert source["SenderAlt"]["User"] == {"lid": "60111222333", "pn": linked.mei.lid, "lid-only": ""}[mode]
    ack = await linked.wa.wait_acked(msg_id)
    assert (ack.how, ack.device) == ("receipt", linked.device.jid)
    assert linked.wa.acked(msg_id, linked.device) == ack
    assert len(linked.wa.written(msg_id)) == 1
    assert msg_id not in linked.wa.unacked(linked.device)


async def test_a_reply_reaches_the_customer_and_the_own_phone_and_receipts_come_back(linked: Linked) -> None:
    sent = await linked.client.do("send", to="60111222333", text="hello Mei")
    got = await linked.mei.wait_for_text("hello Mei")
    copy = await linked.shop.received.wait_for(lambda m: m.id == sent["ID"])
    assert (got.id, got.sender, got.from_me, got.duplicate) == (sent["ID"], "+60123456789", False, False)
    assert (copy.text, copy.from_me, copy.chat) == ("hello Mei", True, "+60111222333")
    call = await linked.wa.calls.wait_for(lambda c: c.id == sent["ID"])
    assert (call.outcome, call.repeat, call.to.user) == ("accepted", False, linked.mei.lid)
    await linked.mei.deliver(got.id)
    await linked.mei.read(got.id)
    for kind in ("DELIVERED", "READ"):
        await linked.client.wait(
            "ReceiptEv",
            lambda e, k=kind: e["data"].get("Type") == k and sent["ID"] in e["data"]["MessageIDs"],
        )


async def test_phones_can_answer_with_receipts_by_themselves(linked: Linked) -> None:
    ali = linked.wa.person("+60111222444", "Ali", auto_receipts="read")
    sent = await linked.client.do("send", to="60111222444", text="are you there?")
    await ali.wait_for_text("there?")
    await linked.client.wait(
        "ReceiptEv", lambda e: e["data"].get("Type") == "READ" and sent["ID"] in e["data"]["MessageIDs"]
    )


async def test_the_client_tells_the_customer_that_it_has_read(linked: Linked) -> None:
    msg_id = await linked.mei.send_text(linked.shop, "read this")
    await linked.client.message(msg_id)
    await linked.client.do("read")
    await linked.mei.receipts.wait_for(lambda r: (r.id, r.kind) == (msg_id, "read"))


async def test_a_quoted_reply_names_what_it_quotes(linked: Linked) -> None:
    sent = await linked.client.do("send", to="60111222333", text="red or blue?")
    question = await linked.mei.wait_for_text("red or blue")
    msg_id = await linked.mei.send_text(linked.shop, "blue", quoted=question)
    event = await linked.client.message(msg_id)
    assert (event["text"], event["quoted"]) == ("blue", sent["ID"])


async def test_text_typed_on_the_phone_is_an_own_echo_at_the_client(linked: Linked) -> None:
    msg_id = await linked.shop.type_text(linked.mei, "typed by hand")
    event = await linked.client.message(msg_id)
    source = event["info"]["MessageSource"]
    assert (event["text"], source["IsFromMe"]) == ("typed by hand", True)
    assert source["Chat"]["User"] == linked.mei.lid
    assert source["RecipientAlt"]["User"] == "60111222333"
    assert (await linked.mei.wait_for_text("typed by hand")).sender == linked.shop.number
    assert (await linked.wa.wait_acked(msg_id)).how == "receipt"


async def test_pictures_go_both_ways(linked: Linked) -> None:
    photo = os.urandom(150_000)
    msg_id = await linked.mei.send_image(linked.shop, photo, "my photo")
    event = await linked.client.message(msg_id)
    assert (event["text"], event["info"]["MediaType"]) == ("my photo", "image")
    assert await linked.client.do("download") == {
        "size": len(photo),
        "sha256": hashlib.sha256(photo).hexdigest(),
    }
    picture = _picture()
    sent = await linked.client.do("image", to="60111222333", data=picture.hex(), caption="ours")
    got = await linked.mei.received.wait_for(lambda m: m.id == sent["ID"])
    assert got.text == "ours"
    assert linked.mei.media_bytes(got.message) == picture


async def test_a_group_talks_both_ways(linked: Linked) -> None:
    zoe = linked.wa.person("+60111222555", "Zoe", auto_receipts=None)
    group = linked.wa.group([linked.mei, linked.shop, zoe], "Family")
    for text in ("first in group", "second in group"):  # the first one carries the sender's key
        msg_id = await linked.mei.send_group(group, text)
        event = await linked.client.wait(
            "MessageEv", lambda e, i=msg_id, t=text: (e["id"], e["text"]) == (i, t)
        )
        source = event["info"]["MessageSource"]
        assert (source["IsGroup"], source["Chat"]["User"], source["Sender"]["User"]) == (
            True,
            group.id,
            linked.mei.lid,
        )
        await linked.wa.wait_acked(msg_id)
    await linked.client.do("send", to=group.id, server="g.us", text="from the shop")
    for person in (linked.mei, zoe):
        got = await person.wait_for_text("from the shop")
        assert (got.chat, got.sender) == (group.id, linked.shop.number)
    assert (await linked.client.do("group", group=group.id))["GroupName"]["Name"] == "Family"
    own = await linked.shop.send_group(group, "typed in the group")
    event = await linked.client.wait(
        "MessageEv", lambda e: (e["id"], e["text"]) == (own, "typed in the group")
    )
    assert event["info"]["MessageSource"]["IsFromMe"] is True


async def test_other_bodies_arrive_as_they_were_sent(linked: Linked) -> None:
    first = await linked.mei.send_text(linked.shop, "typo hree")
    await linked.client.message(first)
    edited = await linked.mei.edit(linked.shop, first, "typo here")
    assert (await linked.client.message(edited))["info"]["Edit"] == "1"
    for send in (
        linked.mei.react(linked.shop, first, "👍"),
        linked.mei.revoke(linked.shop, first),
        linked.mei.send_message(linked.shop, bodies.location(3.1, 101.6, "Shop")),
        linked.mei.send_message(linked.shop, bodies.contact("Ali", "+60111222444")),
        linked.mei.send_media(
            linked.shop, "document", b"%PDF", fileName="price.pdf", mimetype="application/pdf"
        ),
    ):
        await linked.client.message(await send)


async def test_the_same_id_from_two_people_and_again_from_one(linked: Linked) -> None:
    ali = linked.wa.person("+60111222444", "Ali")
    for person, text in ((linked.mei, "one"), (ali, "two"), (linked.mei, "one again")):
        start = len(linked.client.events)
        await person.send_text(linked.shop, text, msg_id="3EB0SAMEIDSAMEID")
        event = await linked.client.message("3EB0SAMEIDSAMEID", start=start)
        assert event["text"] == text
    await linked.wa.wait_drained(linked.device)


async def test_numbers_are_looked_up(linked: Linked) -> None:
    found = await linked.client.do("check", numbers=["60111222333", "19990000000"])
    assert {item["Query"]: item.get("IsIn", False) for item in found} == {
        "60111222333": True,
        "19990000000": False,
    }
    with pytest.raises(ClientError, match="no LID found"):
        await linked.client.do("send", to="19990000000", text="hello?")


@pytest.mark.parametrize("code", [463, 475])
async def test_a_refused_send_names_its_code_and_the_next_one_passes(linked: Linked, code: int) -> None:
    linked.wa.fail_sends("nack", code=code, times=1)
    with pytest.raises(ClientError, match=str(code)):
        await linked.client.do("send", to="60111222333", text=f"refused {code}")
    assert linked.wa.calls[-1].outcome == f"nack:{code}"
    await linked.client.do("send", to="60111222333", text=f"accepted after {code}")
    await linked.mei.wait_for_text(f"accepted after {code}")
    assert not any(m.text == f"refused {code}" for m in linked.mei.received)


async def test_a_late_acknowledgement_holds_the_send_up(linked: Linked) -> None:
    linked.wa.fail_sends("delay_ack", seconds=0.5, times=1, to=linked.mei)
    sent = await linked.client.do("send", to="60111222333", text="slowly")
    assert sent["DebugTimings"]["Resp"] is not None
    call = linked.wa.calls[-1]
    assert call.outcome == "delay_ack"
    reply = linked.client.events[-1]
    assert reply["t"] - call.at >= 0.5


async def test_an_unreadable_message_is_repaired_by_the_senders_phone(linked: Linked) -> None:
    msg_id = await linked.mei.send_garbage(linked.shop, "now you can read it")
    await linked.client.wait("UndecryptableMessageEv", lambda e: e["data"]["Info"]["ID"] == msg_id)
    assert (await linked.client.message(msg_id))["text"] == "now you can read it"
    assert [retry.id for retry in linked.wa.retries].count(msg_id) == 1
    await linked.wa.wait_drained(linked.device)
    ack = linked.wa.acked(msg_id)
    assert ack is not None
    assert ack.how == "receipt"


async def test_a_phone_asks_again_for_what_it_cannot_read(linked: Linked) -> None:
    await linked.client.do("send", to="60111222333", text="readable")
    await linked.mei.wait_for_text("readable")
    linked.mei.forget_sessions()
    await linked.mei.send_text(linked.shop, "a new session for the answer")
    linked.mei.forget_sessions()
    sent = await linked.client.do("send", to="60111222333", text="once more please")
    got = await linked.mei.wait_for_text("once more please")
    assert (got.id, got.duplicate) == (sent["ID"], False)
    assert sent["ID"] in linked.mei.undecryptable.items
    first, *repeats = [c.repeat for c in linked.wa.calls if c.id == sent["ID"]]
    assert not first
    assert repeats
    assert all(repeats)


async def test_a_group_member_asks_again_for_the_senders_key(linked: Linked) -> None:
    group = linked.wa.group([linked.mei, linked.shop], "Two")
    await linked.client.do("send", to=group.id, server="g.us", text="with the key")
    await linked.mei.wait_for_text("with the key")
    linked.mei.forget_sessions()
    sent = await linked.client.do("send", to=group.id, server="g.us", text="without the key")
    got = await linked.mei.wait_for_text("without the key")
    assert (got.id, got.chat) == (sent["ID"], group.id)


async def test_an_unreadable_message_may_stay_so(linked: Linked) -> None:
    msg_id = await linked.mei.send_garbage(linked.shop, repair="never")
    await linked.wa.retries.wait_for(lambda retry: retry.id == msg_id)
    await linked.mei.send_text(linked.shop, "and life goes on")
    await linked.client.wait("MessageEv", lambda e: e["text"] == "and life goes on")
    assert not any(e.get("id") == msg_id for e in linked.client.events if e["ev"] == "MessageEv")


async def test_a_client_gives_up_when_every_repair_is_unreadable_too(linked: Linked) -> None:
    msg_id = await linked.mei.send_garbage(linked.shop, repair="garbage")

    def asked() -> int:
        return [retry.id for retry in linked.wa.retries].count(msg_id)

    await linked.wa.retries.wait_for(lambda _: asked() >= 4)
    await linked.wa.wait_drained(linked.device)
    await linked.mei.send_text(linked.shop, "and life still goes on")
    await linked.client.wait("MessageEv", lambda e: e["text"] == "and life still goes on")
    assert asked() <= 5


async def test_a_status_comes_from_its_own_address(linked: Linked) -> None:
    msg_id = await linked.mei.send_status(linked.shop, "on holiday")
    source = (await linked.client.message(msg_id))["info"]["MessageSource"]
    assert (source["Chat"]["User"], source["Chat"]["Server"]) == ("status", "broadcast")
    await linked.wa.wait_acked(msg_id)


async def test_a_hundred_people_write_at_once_and_each_ones_order_is_kept(linked: Linked) -> None:
    crowd = [linked.wa.person(f"+6017000{number:04}") for number in range(100)]
    sent: dict[str, list[str]] = {person.lid: [] for person in crowd}
    for round_number in range(3):
        for person in crowd:
            sent[person.lid].append(await person.send_text(linked.shop, f"round {round_number}"))
    await linked.wa.wait_drained(linked.device, timeout=30)
    last = [ids[-1] for ids in sent.values()]
    for msg_id in last:
        await linked.client.message(msg_id)
    got: dict[str, list[str]] = {lid: [] for lid in sent}
    for event in linked.client.events:
        if event["ev"] == "MessageEv":
            got.get(event["info"]["MessageSource"]["Sender"]["User"], []).append(event["id"])
    assert got == sent


async def test_a_stopped_client_holds_nobody_up(linked: Linked) -> None:
    linked.client.process.send_signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(5):
            ids = [await linked.mei.send_text(linked.shop, "x" * 10_000) for _ in range(200)]
    finally:
        linked.client.process.send_signal(signal.SIGCONT)
    await linked.client.message(ids[-1])
    await linked.wa.wait_drained(linked.device)


async def test_typing_is_seen(linked: Linked) -> None:
    start = len(linked.client.events)
    await linked.mei.typing(linked.shop)
    await linked.client.wait("ChatPresenceEv", start=start, timeout=5)


async def test_nothing_went_wrong_inside_the_sandbox(linked: Linked) -> None:
    assert [e for e in linked.wa.events if e.kind in ("connection_failed", "task_failed")] == []
