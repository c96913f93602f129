"""Text both ways through the real client: LID and phone form, quotes, groups, own echo, receipts."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from core.channel import MessageType, Quoted
from core.errors import RefusedError, ThrottledError
from sandbox.whatsapp.phone import Phone
from tests.integration.whatsapp.conftest import Session, Template, resume, sandbox_at

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(template: Template, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    """One session for the whole module: none of these tests breaks it."""
    folder = tmp_path_factory.mktemp("messages")
    shutil.copytree(template.sandbox, folder / "sandbox")
    shutil.copytree(template.session, folder / "session")
    async with sandbox_at(folder / "sandbox") as wa:
        session = await resume(wa, folder / "session")
        try:
            yield session
        finally:
            await session.channel.disconnect()


@pytest.fixture
def session(shared: Session) -> Session:
    shared.sink.clear()
    return shared


@pytest.fixture
def mei(shared: Session) -> Phone:
    """A customer nobody has heard of, new in each test."""
    number = 60111222000 + len(shared.wa.people)
    return shared.wa.person(f"+{number}", "Mei", auto_receipts=None)


async def test_text_arrives_once_whichever_address_form_the_sender_uses(session: Session, mei: Phone) -> None:
    for mode in ("lid", "pn"):
        sent = await mei.send_text(session.shop, f"hello by {mode}", mode=mode)
        message = await session.sink.message(sent)
        assert (message.content, message.message_type) == (f"hello by {mode}", MessageType.TEXT)
        assert message.person.external_id == f"whatsapp:{mei.number}"
        assert message.person.aliases == (f"whatsapp-lid:{mei.lid}",)
        assert message.person.name == "Mei"
        assert message.sender_identifier == mei.number
        assert message.direction == "inbound"
        assert abs((message.channel_timestamp or 0) / 1000 - message.arrived_at) < 3
        ack = await session.wa.wait_acked(sent)
        assert ack.at >= message.arrived_at
    assert len(session.sink.calls) == 2


async def test_a_sender_who_hides_the_number_is_known_by_lid(session: Session, mei: Phone) -> None:
    sent = await mei.send_text(session.shop, "who am I", mode="lid-only")
    message = await session.sink.message(sent)
    assert message.person.external_id == f"whatsapp-lid:{mei.lid}"
    answer = await session.channel.send(session.text(f"whatsapp-lid:{mei.lid}", "found you"))
    assert (await mei.next_message()).id == answer.channel_message_id


async def test_text_goes_out_and_receipts_come_back(session: Session, mei: Phone) -> None:
    sent = await session.channel.send(session.text(f"whatsapp:{mei.number}", "Good morning"))
    got = await mei.next_message()
    assert (got.id, got.text) == (sent.channel_message_id, "Good morning")
    await mei.deliver(got.id)
    await mei.read(got.id)
    await session.sink.wait(lambda: len(session.sink.updates) >= 2)
    delivered, read = session.sink.updates[:2]
    assert (delivered.status, delivered.message_ids) == ("delivered", (got.id,))
    assert (read.status, read.message_ids) == ("read", (got.id,))
    assert read.chat is not None
    assert read.chat.external_id == f"whatsapp:{mei.number}"
    assert read.occurred_at is not None
    assert abs(read.occurred_at.timestamp() - sent.sent_at.timestamp()) < 5


async def test_quotes_keep_their_target_both_ways(session: Session, mei: Phone) -> None:
    question = await mei.send_text(session.shop, "How much?")
    stored = await session.sink.message(question)
    quoted = Quoted(question, stored.sender_identifier, stored.content, False, stored.raw_payload)
    answer = await session.channel.send(session.text(f"whatsapp:{mei.number}", "RM 10", quoted=quoted))
    got = await mei.next_message()
    context = got.message.extendedTextMessage.contextInfo
    assert (context.stanzaID, context.quotedMessage.conversation) == (question, "How much?")
    assert context.participant.partition("@")[0] in (mei.lid, mei.number.lstrip("+"))

    reply = await mei.send_text(session.shop, "Deal", quoted=got)
    assert (await session.sink.message(reply)).reply_to_message_id == answer.channel_message_id


async def test_a_group_is_one_chat_with_named_authors(session: Session, mei: Phone) -> None:
    eve = session.wa.person("+60199888777", "Eve", auto_receipts=None)
    group = session.wa.group([mei, session.shop, eve], "Team")
    first = await mei.send_group(group, "hello group")
    second = await mei.send_group(group, "again")
    for sent in (first, second):
        message = await session.sink.message(sent)
        assert message.person.kind == "group"
        assert message.person.external_id == f"whatsapp-group:{group.jid}"
        assert message.chat_identifier == str(group.jid)
        assert message.sender_identifier == mei.number
        await session.wa.wait_acked(sent)
    # The key hand-over that came with the first is no message.
    assert [m.content for m in session.sink.calls] == ["hello group", "again"]

    answer = await session.channel.send(session.text(f"whatsapp-group:{group.jid}", "hi all"))
    assert (await eve.wait_for_text("hi all")).id == answer.channel_message_id


async def test_a_text_typed_on_the_phone_is_our_own_and_not_a_customers(session: Session, mei: Phone) -> None:
    sent = await session.shop.type_text(mei, "I will call you")
    message = await session.sink.message(sent)
    assert (message.direction, message.role) == ("outbound", "assistant")
    assert message.raw_payload["origin"] == "phone"
    assert message.person.external_id == f"whatsapp:{mei.number}"
    await session.wa.wait_acked(sent)


async def test_an_unreadable_message_is_a_placeholder_until_the_phone_sends_it_again(
    session: Session, mei: Phone
) -> None:
    mei.retry_delay = 0.5
    sent = await mei.send_garbage(session.shop, "now readable", repair="yes")
    await session.sink.wait(lambda: bool(session.sink.calls))
    placeholder = session.sink.calls[0]
    assert placeholder.placeholder
    assert (placeholder.message_type, placeholder.content) == (MessageType.UNSUPPORTED, None)
    assert (await session.sink.message(sent)).content == "now readable"
    assert len(session.sink.messages) == 1


async def test_whatsapps_refusals_say_what_to_do(session: Session, mei: Phone) -> None:
    with pytest.raises(RefusedError) as unknown:
        await session.channel.send(session.text("whatsapp:+19998887777", "x"))
    assert unknown.value.code == "not_on_whatsapp"
    for code, word in ((463, "reachout_limit"), (475, "reachout_capped")):
        session.wa.fail_sends("nack", code=code, times=1)
        with pytest.raises(ThrottledError) as throttled:
            await session.channel.send(session.text(f"whatsapp:{mei.number}", "x"))
        assert throttled.value.code == word
        assert throttled.value.first_contacts_only
    with pytest.raises(RefusedError, match="no text"):
        await session.channel.send(session.text(f"whatsapp:{mei.number}", "  "))
    with pytest.raises(RefusedError, match="Split it"):
        await session.channel.send(session.text(f"whatsapp:{mei.number}", "x" * 70_000))
    # The session is none the worse.
    sent = await session.channel.send(session.text(f"whatsapp:{mei.number}", "still here"))
    assert (await mei.wait_for_text("still here")).id == sent.channel_message_id


async def test_numbers_are_checked_and_small_gestures_reach_the_phone(session: Session, mei: Phone) -> None:
    found = await session.channel.check([mei.number, "+19998887777"])
    assert found == {mei.number: True, "+19998887777": False}
    sent = await mei.send_text(session.shop, "read me")
    await session.sink.message(sent)
    await session.channel.mark_read(f"whatsapp:{mei.number}", [sent])
    await session.channel.typing(f"whatsapp:{mei.number}", True)
    await mei.receipts.wait_for(lambda seen: seen.id == sent and seen.kind == "read")
