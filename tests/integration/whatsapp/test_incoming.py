"""Everything people can send, once each, through the real client: types, marks, votes, calls, what happens in groups."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from core.channel import InboundMessage, MessageType, OutboundMessage
from gateway.whatsapp.settings import SessionSettings
from sandbox.whatsapp import bodies
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.protos import e2e
from tests.integration.whatsapp.conftest import Session, Template, resume, sandbox_at
from tests.support.media import picture

pytestmark = pytest.mark.asyncio(loop_scope="module")

PNG = picture()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(template: Template, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    """One session for the whole module: none of these tests breaks it."""
    folder = tmp_path_factory.mktemp("incoming")
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


async def send_kind(kind: str, mei: Phone, shop: Phone) -> str:
    target = await mei.send_text(shop, "before")
    match kind:
        case "image":
            return await mei.send_image(shop, PNG, "Do you have this?")
        case "video":
            return await mei.send_media(
                shop, "video", b"film", mimetype="video/mp4", caption="look", seconds=7
            )
        case "audio":
            return await mei.send_media(shop, "audio", b"song", mimetype="audio/mpeg", seconds=90)
        case "voice":
            return await mei.send_voice(shop, b"OggS", 4)
        case "document":
            return await mei.send_media(
                shop, "document", b"%PDF-1.4", mimetype="application/pdf", fileName="order.pdf", pageCount=2
            )
        case "sticker":
            return await mei.send_media(shop, "sticker", b"RIFF", mimetype="image/webp")
        case "location":
            return await mei.send_location(shop, 3.139, 101.687, "Pasar Seni", "Jalan Hang Kasturi")
        case "live":
            return await mei.send_live_location(shop, 3.14, 101.69, "On my way")
        case "contact":
            return await mei.send_contacts(shop, ("Ah Meng", "+60198765432"))
        case "contacts":
            return await mei.send_contacts(shop, ("Ah Meng", "+60198765432"), ("Siti", "+60187654321"))
        case "poll":
            return await mei.send_poll(shop, "When?", ["Mon", "Tue"], choices=1)
        case "reaction":
            return await mei.react(shop, target, "👍")
        case "edit":
            return await mei.edit(shop, target, "after")
        case "revoke":
            return await mei.revoke(shop, target)
        case "ephemeral":
            body = e2e.Message()
            body.ephemeralMessage.message.extendedTextMessage.text = "gone in a week"
            return await mei.send_message(shop, body)
        case "buttons":
            body = e2e.Message()
            body.buttonsResponseMessage.selectedButtonID = "y"
            body.buttonsResponseMessage.selectedDisplayText = "Yes please"
            return await mei.send_message(shop, body)
        case "list":
            body = e2e.Message()
            body.listResponseMessage.title = "Delivery"
            body.listResponseMessage.singleSelectReply.selectedRowID = "d1"
            return await mei.send_message(shop, body)
    raise AssertionError(kind)


KINDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "image": ("image", "Do you have this?", {"mime_type": "image/png", "size": len(PNG), "state": "pending"}),
    "video": ("video", "look", {"mime_type": "video/mp4", "duration": 7}),
    "audio": ("audio", None, {"mime_type": "audio/mpeg", "duration": 90}),
    "voice": ("audio", None, {"voice": True, "duration": 4}),
    "document": ("document", None, {"filename": "order.pdf", "mime_type": "application/pdf", "pages": 2}),
    "sticker": ("sticker", None, {"mime_type": "image/webp"}),
    "location": ("location", "Pasar Seni, Jalan Hang Kasturi", {"latitude": 3.139, "longitude": 101.687}),
    "live": ("location", "On my way", {"live": True}),
    "contact": ("contact", "Ah Meng", {}),
    "contacts": ("contact", "Ah Meng, Siti", {}),
    "poll": ("poll", "When?", {"options": ["Mon", "Tue"], "selectable": 1}),
    "reaction": ("reaction", "👍", {}),
    "edit": ("edited", "after", {}),
    "revoke": ("deleted", None, {}),
    "ephemeral": ("text", "gone in a week", {}),
    "buttons": ("text", "Yes please", {}),
    "list": ("text", "Delivery", {}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_people_send_arrives_as_what_it_is(session: Session, mei: Phone, kind: str) -> None:
    sent = await send_kind(kind, mei, session.shop)
    message = await session.sink.message(sent)
    wanted, content, media = KINDS[kind]
    assert (message.message_type, message.content) == (wanted, content)
    assert message.person.external_id == f"whatsapp:{mei.number}"
    assert media.items() <= (message.media_metadata or {}).items()
    if wanted in ("reaction", "edited", "deleted"):
        assert message.reply_to_message_id
    await session.wa.wait_acked(sent)


async def test_a_forwarded_message_and_an_ads_click_are_marked(session: Session, mei: Phone) -> None:
    forwarded = bodies.forwarded(bodies.text("seen this?"), 3)
    message = await session.sink.message(await mei.send_message(session.shop, forwarded))
    assert (message.content, message.raw_payload["forwarded"]) == ("seen this?", 3)
    body = e2e.Message()
    body.extendedTextMessage.text = "Is it still on offer?"
    ad = body.extendedTextMessage.contextInfo.externalAdReply
    ad.title, ad.sourceID, ad.sourceURL, ad.ctwaClid = "Durian week", "120", "https://fb.me/x", "clid"
    message = await session.sink.message(await mei.send_message(session.shop, body))
    assert message.raw_payload["referral"] == {
        "headline": "Durian week",
        "source_id": "120",
        "source_url": "https://fb.me/x",
        "ctwa_clid": "clid",
    }


async def test_a_view_once_picture_says_where_it_can_be_seen(session: Session, mei: Phone) -> None:
    sent = await mei.send_view_once(session.shop, "image", PNG, mimetype="image/png")
    await session.sink.wait(lambda: any(m.channel_message_id == sent for m in session.sink.messages.values()))
    [message] = [m for m in session.sink.messages.values() if m.channel_message_id == sent]
    assert message.message_type is MessageType.UNSUPPORTED
    assert "open it on the phone" in (message.content or "")


# ---- votes


async def test_votes_name_the_options_that_were_chosen(session: Session, mei: Phone) -> None:
    poll = await mei.send_poll(session.shop, "When?", ["Mon", "Tue", "Wed"], choices=0)
    await session.sink.message(poll)
    vote = await session.sink.message(await mei.vote(session.shop, poll, ["Mon", "Wed"]))
    assert (vote.message_type, vote.content) == (MessageType.POLL, "Voted: Mon, Wed")
    assert vote.reply_to_message_id == poll
    assert vote.media_metadata == {"vote": True, "chosen": ["Mon", "Wed"], "question": "When?"}
    undone = await session.sink.message(await mei.vote(session.shop, poll, []))
    assert undone.content == "Took the vote back"


async def test_a_vote_on_our_own_poll_is_read(session: Session, mei: Phone) -> None:
    await session.sink.message(await mei.send_text(session.shop, "hello"))
    out = OutboundMessage(
        session.attempt(f"whatsapp:{mei.number}"),
        MessageType.POLL,
        payload={"question": "Which size?", "options": ["S", "L"]},
    )
    sent = await session.channel.send(out)
    got = await mei.next_message()
    assert got.id == sent.channel_message_id
    vote = await session.sink.message(await mei.vote(session.shop, got.id, ["L"]))
    assert (vote.content, vote.reply_to_message_id) == ("Voted: L", got.id)


async def test_a_vote_on_a_poll_nobody_saw_is_said_to_be_unreadable(session: Session, mei: Phone) -> None:
    body = bodies.vote(bodies.Target(mei.account.lid, "3EB0NEVERSEEN", True), b"x" * 40, b"i" * 12)
    vote = await session.sink.message(await mei.send_message(session.shop, body))
    assert (vote.message_type, vote.reply_to_message_id) == (MessageType.UNSUPPORTED, "3EB0NEVERSEEN")
    assert "could not be read" in (vote.content or "")


# ---- calls


def call(session: Session, call_id: str) -> InboundMessage | None:
    found = [m for m in session.sink.messages.values() if m.channel_message_id == call_id]
    return found[0] if found else None


@pytest.mark.parametrize(("video", "words"), [(False, "Missed voice call"), (True, "Missed video call")])
async def test_a_missed_call_is_a_message_one_can_read(
    session: Session, mei: Phone, video: bool, words: str
) -> None:
    ring = await mei.call(session.shop, video=video)
    await session.sink.wait(lambda: call(session, ring) is not None)
    ringing = call(session, ring)
    assert ringing is not None
    assert (ringing.placeholder, ringing.content) == (True, words.replace("Missed", "Incoming"))
    await mei.hang_up(session.shop, ring)
    missed = await session.sink.message(ring)
    assert (missed.message_type, missed.content) == (MessageType.UNSUPPORTED, words)
    assert missed.person.external_id == f"whatsapp:{mei.number}"


async def test_a_call_is_declined_where_the_settings_say_so(
    session: Session, mei: Phone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.channel, "_settings", SessionSettings(call_policy="decline"))
    ring = await mei.call(session.shop)
    declined = await session.wa.rings.wait_for(lambda r: r.call == ring and r.what == "reject")
    assert declined.caller == mei.number


# ---- groups


async def test_what_happens_to_a_group_is_said_in_a_sentence(session: Session, mei: Phone) -> None:
    ali = session.wa.person(f"+{60199000000 + len(session.wa.people)}", "Ali", auto_receipts=None)
    for person in (mei, ali):  # so that their phone numbers are known
        await session.sink.message(await person.send_text(session.shop, "hello"))
    session.sink.clear()
    group = session.wa.group([mei, session.shop], "Family")
    begun = time.time()
    await mei.rename_group(group, "Big family")
    await mei.add_to_group(group, ali)
    await mei.describe_group(group, "Only durian")
    await mei.promote_in_group(group, ali)
    await mei.remove_from_group(group, ali)
    await session.sink.wait(lambda: len(session.sink.messages) >= 5)
    notices = sorted(session.sink.calls, key=lambda m: m.arrived_at)
    assert [m.content for m in notices] == [
        f"Group renamed to “Big family” by {mei.number}.",
        f"{ali.number} added by {mei.number}.",
        f"Group description changed by {mei.number}: Only durian.",
        f"{ali.number} made admin by {mei.number}.",
        f"{ali.number} removed by {mei.number}.",
    ]
    for notice in notices:
        assert (notice.message_type, notice.role) == (MessageType.UNSUPPORTED, "system")
        assert notice.person.external_id == f"whatsapp-group:{group.jid}"
        assert abs((notice.channel_timestamp or 0) / 1000 - begun) < 30
