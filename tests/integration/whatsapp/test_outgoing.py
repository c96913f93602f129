"""Every type of message that can go out, each once through the real client; the customer's phone says what arrived."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import shutil
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from PIL import Image

from core.channel import LocalFile, MessageType, OutboundMessage, Quoted
from core.errors import NotSentError, RefusedError
from gateway.whatsapp import store
from gateway.whatsapp.protocol import store_path
from sandbox.whatsapp import polls, reading
from sandbox.whatsapp.inbox import Received
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.integration.whatsapp.conftest import Session, Template, make_session, resume, sandbox_at

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(template: Template, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    """One session for the whole module: none of these tests breaks it."""
    folder = tmp_path_factory.mktemp("outgoing")
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
    shared.wa.clear_faults()
    return shared


@pytest.fixture
def mei(shared: Session) -> Phone:
    """A customer nobody has heard of, new in each test."""
    number = 60111333000 + len(shared.wa.people)
    return shared.wa.person(f"+{number}", "Mei", auto_receipts=None)


def message(session: Session, mei: Phone, kind: MessageType, **fields: Any) -> OutboundMessage:
    return OutboundMessage(session.attempt(f"whatsapp:{mei.number}"), kind, **fields)


def file(folder: Path, data: bytes, mime_type: str, name: str = "file", **fields: Any) -> LocalFile:
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / sha256).write_bytes(data)
    return LocalFile(folder / sha256, mime_type, name, len(data), sha256, **fields)


def picture(kind: str = "PNG", size: tuple[int, int] = (640, 320)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, kind)
    return out.getvalue()


def opus(seconds: int = 7) -> bytes:
    """The first and the last page of an Ogg Opus file, with nothing to hear between them."""
    head = (
        b"OpusHead" + bytes([1, 1]) + (312).to_bytes(2, "little") + (48_000).to_bytes(4, "little") + bytes(3)
    )
    first = b"OggS\x00\x02" + bytes(8) + bytes(12) + bytes([1, len(head)]) + head
    samples = seconds * 48_000 + 312
    return first + b"OggS\x00\x04" + samples.to_bytes(8, "little") + bytes(12) + b"\x01\x10" + bytes(16)


async def send(
    session: Session, mei: Phone, kind: MessageType, **fields: Any
) -> tuple[Received, OutboundMessage]:
    """What arrived, after a look that the send could have been resolved: its secret is written down with its id."""
    outgoing = message(session, mei, kind, **fields)
    sent = await session.channel.send(outgoing)
    got = await mei.next_message()
    assert got.id == sent.channel_message_id
    row = store.find_secret(
        store_path(session.context.folder), session.channel._handover.secret(outgoing.attempt)
    )
    assert row is not None, f"whatsmeow wrote no secret down for a message of type {kind}"
    assert row.message_id == got.id
    return got, outgoing


async def test_a_picture_arrives_with_its_caption_and_a_preview(
    session: Session, mei: Phone, tmp_path: Path
) -> None:
    data = picture()
    media = file(tmp_path, data, "image/png", "red.png", width=640, height=320)
    got, _ = await send(session, mei, MessageType.IMAGE, content="Our new red", media=media)
    part = got.message.imageMessage
    assert (got.kind, got.text) == ("image", "Our new red")
    assert mei.media_bytes(got.message) == data
    assert (part.mimetype, part.width, part.height) == ("image/png", 640, 320)
    with Image.open(io.BytesIO(part.JPEGThumbnail)) as small:
        assert (small.format, small.size) == ("JPEG", (100, 50))
    # The same file to somebody else is not uploaded again.
    before = len(session.wa.transfers)
    await send(session, mei, MessageType.IMAGE, media=media)
    assert len(session.wa.transfers) == before


async def test_a_video_a_document_and_a_sticker_arrive(session: Session, mei: Phone, tmp_path: Path) -> None:
    clip = file(tmp_path, b"\x00\x00\x00\x18ftypmp42" + b"v" * 5000, "video/mp4", "clip.mp4")
    got, _ = await send(session, mei, MessageType.VIDEO, content="Look", media=clip, payload={"duration": 12})
    assert (got.kind, got.text, got.message.videoMessage.seconds) == ("video", "Look", 12)
    assert mei.media_bytes(got.message) == clip.path.read_bytes()

    price = file(tmp_path, b"%PDF-1.4 price list", "application/pdf", "prices.pdf")
    got, _ = await send(session, mei, MessageType.DOCUMENT, content="Prices", media=price)
    assert (got.kind, got.text, got.about["filename"]) == ("document", "Prices", "prices.pdf")
    assert mei.media_bytes(got.message) == price.path.read_bytes()
    got, _ = await send(session, mei, MessageType.DOCUMENT, media=price)
    assert (got.kind, got.text) == ("document", "")

    webp = file(tmp_path, picture("WEBP", (512, 512)), "image/webp")
    got, _ = await send(session, mei, MessageType.STICKER, media=webp)
    assert (got.kind, mei.media_bytes(got.message)) == ("sticker", webp.path.read_bytes())
    png = file(tmp_path, picture("PNG", (300, 200)), "image/png")
    got, _ = await send(session, mei, MessageType.STICKER, media=png)
    with Image.open(io.BytesIO(mei.media_bytes(got.message))) as made:
        assert (made.format, made.size) == ("WEBP", (512, 512))


async def test_ogg_opus_goes_out_as_a_voice_note_and_music_as_music(
    session: Session, mei: Phone, tmp_path: Path
) -> None:
    note = file(tmp_path, opus(7), "audio/ogg")
    got, _ = await send(session, mei, MessageType.AUDIO, media=note)
    part = got.message.audioMessage
    assert got.kind == "voice"
    assert (part.mimetype, part.seconds) == ("audio/ogg; codecs=opus", 7)
    assert mei.media_bytes(got.message) == note.path.read_bytes()

    song = file(tmp_path, b"ID3" + bytes(2000), "audio/mpeg")
    got, _ = await send(session, mei, MessageType.AUDIO, media=song, payload={"duration": 180})
    assert (got.kind, got.about["seconds"], got.message.audioMessage.mimetype) == ("audio", 180, "audio/mpeg")


async def test_a_place_and_a_contact_arrive(session: Session, mei: Phone) -> None:
    place = {"latitude": 3.139, "longitude": 101.6869, "name": "Shop", "address": "Jalan 1"}
    got, _ = await send(session, mei, MessageType.LOCATION, payload=place)
    assert got.about == place

    card = {"name": "Tan; Ah Kow", "phones": ["+60 12-999 8888"], "emails": ["tan@example.com"]}
    got, _ = await send(session, mei, MessageType.CONTACT, payload=card)
    assert got.kind == "contact"
    assert got.message.contactMessage.displayName == "Tan; Ah Kow"
    lines = got.message.contactMessage.vcard.splitlines()
    assert "FN:Tan\\; Ah Kow" in lines
    assert "TEL;type=CELL;type=VOICE;waid=60129998888:+60 12-999 8888" in lines
    assert "EMAIL;type=INTERNET:tan@example.com" in lines


async def test_votes_on_a_poll_of_ours_open_with_the_attempts_secret(session: Session, mei: Phone) -> None:
    asked = {"question": "Which colour?", "options": ["Red", "Blue", "Green"], "selectable": 2}
    got, outgoing = await send(session, mei, MessageType.POLL, payload=asked)
    assert got.kind == "poll"
    assert got.about == {"question": "Which colour?", "options": ["Red", "Blue", "Green"], "choices": 2}
    secret = session.channel._handover.secret(outgoing.attempt)
    assert reading.secret_of(got.message) == secret

    vote = await mei.vote(session.shop, got.id, ["Blue"])
    arrived = await session.sink.message(vote)
    sealed = arrived.raw_payload["Message"]["pollUpdateMessage"]["vote"]
    me, them = store.device(store_path(session.context.folder)), mei.account
    assert me is not None
    authors = [JID.parse(me.phone), JID.parse(me.lid)]
    opened = polls.open_vote(
        secret, got.id, authors, [them.phone, them.lid],
        b64decode(sealed["encPayload"]), b64decode(sealed["encIV"]),
    )  # fmt: skip
    assert opened == [hashlib.sha256(b"Blue").digest()]


async def test_a_reaction_an_edit_and_a_deletion_reach_their_message(session: Session, mei: Phone) -> None:
    question = await mei.send_text(session.shop, "Are you open?")
    stored = await session.sink.message(question)
    theirs = Quoted(question, stored.sender_identifier, stored.content, False, stored.raw_payload)
    got, _ = await send(session, mei, MessageType.REACTION, payload={"emoji": "👍"}, quoted=theirs)
    assert (got.kind, got.about) == ("reaction", {"emoji": "👍", "target": question})
    assert not got.message.reactionMessage.key.fromMe
    got, _ = await send(session, mei, MessageType.REACTION, content="", quoted=theirs)
    assert got.about == {"emoji": "", "target": question}

    answer, _ = await send(session, mei, MessageType.TEXT, content="Until 6", quoted=theirs)
    assert reading.quoted_of(answer.message) == question
    ours = Quoted(answer.id, None, "Until 6", True, {"origin": "api"})
    got, _ = await send(session, mei, MessageType.EDITED, content="Until 7", quoted=ours)
    assert (got.kind, got.text, got.about["target"]) == ("edit", "Until 7", answer.id)
    got, _ = await send(session, mei, MessageType.DELETED, quoted=ours)
    assert (got.kind, got.about["target"]) == ("revoke", answer.id)
    # One that the gateway has never stored can only have been this number's own.
    got, _ = await send(session, mei, MessageType.DELETED, quoted=Quoted("3EB0OLD", None, None, False))
    assert (got.kind, got.about["target"]) == ("revoke", "3EB0OLD")
    with pytest.raises(RefusedError, match="other person's"):
        await session.channel.send(message(session, mei, MessageType.DELETED, quoted=theirs))


async def test_every_type_can_quote_and_a_link_shows_the_preview_it_was_given(
    session: Session, mei: Phone, tmp_path: Path
) -> None:
    question = await mei.send_text(session.shop, "Photo?")
    stored = await session.sink.message(question)
    quoted = Quoted(question, stored.sender_identifier, stored.content, False, stored.raw_payload)
    media = file(tmp_path, picture("JPEG"), "image/jpeg")
    got, _ = await send(session, mei, MessageType.IMAGE, media=media, quoted=quoted)
    assert reading.quoted_of(got.message) == question
    got, _ = await send(
        session, mei, MessageType.LOCATION, payload={"latitude": 1, "longitude": 2}, quoted=quoted
    )
    assert reading.quoted_of(got.message) == question

    preview = {"url": "https://example.com/red", "title": "Red things", "description": "All of them"}
    text = "See https://example.com/red today"
    got, _ = await send(session, mei, MessageType.TEXT, content=text, payload={"link_preview": preview})
    assert (got.text, got.about["preview"]) == (text, preview)


async def test_a_file_that_cannot_be_brought_to_whatsapp_was_not_sent(
    session: Session, mei: Phone, tmp_path: Path
) -> None:
    media = file(tmp_path, picture("PNG", (31, 17)), "image/png")
    session.wa.fail_media("status", status=500, upload=True)
    outgoing = message(session, mei, MessageType.IMAGE, media=media)
    with pytest.raises(NotSentError) as refused:
        await session.channel.send(outgoing)
    assert refused.value.code == "upload_failed"
    session.wa.clear_faults()
    assert type(await session.channel.resolve(outgoing.attempt)).__name__ == "NotSent"
    got, _ = await send(session, mei, MessageType.IMAGE, media=media)
    assert got.kind == "image"

    media.path.unlink()
    changed = file(tmp_path, b"other bytes", "application/pdf")
    (tmp_path / changed.sha256).write_bytes(b"changed since")
    with pytest.raises(NotSentError, match="not the one"):
        await session.channel.send(message(session, mei, MessageType.DOCUMENT, media=changed))
    broken = file(tmp_path, b"no picture", "image/png")
    with pytest.raises(RefusedError, match="cannot be read"):
        await session.channel.send(message(session, mei, MessageType.STICKER, media=broken))


@contextlib.asynccontextmanager
async def sandbox_process(folder: Path) -> AsyncIterator[str]:
    """The sandbox as a process of its own, so that its work is not taken for the gateway's; its admin API's address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sandbox", "--state", str(folder), "--port", "0",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
        yield first.rpartition(" ")[2].strip()
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)


async def test_twenty_megabytes_go_out_without_work_for_the_gateways_loop(
    template: Template, tmp_path: Path
) -> None:
    shutil.copytree(template.sandbox, tmp_path / "sandbox")
    shutil.copytree(template.session, tmp_path / "session")
    data = bytes(range(256)) * (20 * 4096)
    media = file(tmp_path, data, "application/zip", "big.zip")
    async with sandbox_process(tmp_path / "sandbox") as url:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SANDBOX_WHATSAPP", str(tmp_path / "sandbox" / "launch.json"))
            session = make_session(WhatsAppSandbox(tmp_path / "sandbox"), tmp_path / "session")
            await session.channel.connect()
            try:
                await session.sink.stands("active", timeout=40)
                outgoing = OutboundMessage(
                    session.attempt("whatsapp:+60111222333"), MessageType.DOCUMENT, media=media
                )
                await session.channel.send(session.text("whatsapp:+60111222333", "it comes"))  # all is warm
                began = time.thread_time()
                sent = await session.channel.send(outgoing)
                worked = time.thread_time() - began
            finally:
                await session.channel.disconnect()
        async with aiohttp.ClientSession() as http, http.get(f"{url}/people/60111222333/messages") as answer:
            [got] = [m for m in (await answer.json())["messages"] if m["id"] == sent.channel_message_id]
    assert got["about"]["size"] == len(data)
    # The loop's thread does not even look at the bytes: all its work together is less than one lag of 50 ms.
    assert worked < 0.05
