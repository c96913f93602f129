"""Media from WhatsApp's servers into a file, through the real child: whole, resumed, dropped, spoilt, large."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from core.channel import InboundMessage, MessageId, StoredMedia
from core.errors import MediaExpired, NotSentError, RefusedError
from sandbox.whatsapp.phone import Phone
from tests.integration.whatsapp.conftest import Session, Template, resume, sandbox_at

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Target:
    """A file to download into, as the media worker gives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def offset(self) -> int:
        return self.path.stat().st_size

    async def write(self, chunk: bytes) -> None:
        raise AssertionError("the child writes the file itself")

    async def restart(self) -> None:
        os.truncate(self.path, 0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(template: Template, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    folder = tmp_path_factory.mktemp("downloads")
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
    number = 60111333000 + len(shared.wa.people)
    return shared.wa.person(f"+{number}", "Mei", auto_receipts=None)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path / "file")


def stored(message: InboundMessage) -> StoredMedia:
    return StoredMedia(
        message.tenant_id,
        message.session_id,
        MessageId(1),
        message.channel,
        message.channel_message_id,
        message.message_type,
        message.direction,
        message.chat_identifier,
        message.sender_identifier,
        message.media_metadata or {},
        message.raw_payload,
    )


async def arrived(session: Session, sent: str) -> StoredMedia:
    return stored(await session.sink.message(sent))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100_000])
async def test_a_file_arrives_as_it_was_sent(session: Session, mei: Phone, target: Target, size: int) -> None:
    data = os.urandom(size)
    sent = await mei.send_media(session.shop, "document", data, mimetype="application/x", fileName="a")
    await session.channel.download(await arrived(session, sent), target)
    assert target.path.read_bytes() == data


@pytest.mark.parametrize("kind", ["image", "video", "audio", "sticker"])
async def test_every_kind_has_keys_of_its_own(
    session: Session, mei: Phone, target: Target, kind: str
) -> None:
    sent = await mei.send_media(session.shop, kind, b"bytes of a " + kind.encode(), mimetype=f"{kind}/x")
    await session.channel.download(await arrived(session, sent), target)
    assert target.path.read_bytes() == b"bytes of a " + kind.encode()


async def test_a_broken_off_download_goes_on_where_it_was(
    session: Session, mei: Phone, target: Target
) -> None:
    data = os.urandom(3_000_000)
    sent = await mei.send_media(session.shop, "document", data, mimetype="application/x", fileName="a")
    message = await arrived(session, sent)
    session.wa.fail_media("cut", times=1, message_id=sent)
    with pytest.raises(NotSentError) as raised:
        await session.channel.download(message, target)
    assert raised.value.code == "media_later"
    have = target.offset
    assert 0 < have < len(data)
    assert target.path.read_bytes() == data[:have]
    before = len(session.wa.transfers)
    await session.channel.download(message, target)
    assert target.path.read_bytes() == data
    assert len(session.wa.transfers) == before + 1


async def test_a_part_that_is_not_its_own_does_not_spoil_it(
    session: Session, mei: Phone, target: Target
) -> None:
    data = os.urandom(200_000)
    sent = await mei.send_media(session.shop, "document", data, mimetype="application/x", fileName="a")
    target.path.write_bytes(os.urandom(64_000))
    await session.channel.download(await arrived(session, sent), target)
    assert target.path.read_bytes() == data


@pytest.mark.parametrize("status", [404, 410])
async def test_what_whatsapp_has_dropped_is_said_to_be_gone(
    session: Session, mei: Phone, target: Target, status: int
) -> None:
    sent = await mei.send_media(session.shop, "image", b"old picture", mimetype="image/png")
    message = await arrived(session, sent)
    session.wa.drop_media(sent, status)
    with pytest.raises(MediaExpired) as raised:
        await session.channel.download(message, target)
    assert "ask the sender" in raised.value.detail


async def test_spoilt_bytes_are_refused_and_not_kept(session: Session, mei: Phone, target: Target) -> None:
    sent = await mei.send_media(session.shop, "image", os.urandom(50_000), mimetype="image/png")
    message = await arrived(session, sent)
    session.wa.fail_media("corrupt", message_id=sent)
    with pytest.raises(RefusedError) as raised:
        await session.channel.download(message, target)
    assert raised.value.code == "media_broken"
    assert target.offset == 0


async def test_a_server_in_trouble_is_asked_again_later(session: Session, mei: Phone, target: Target) -> None:
    sent = await mei.send_media(session.shop, "image", b"picture", mimetype="image/png")
    message = await arrived(session, sent)
    session.wa.fail_media("status", status=503, times=1, message_id=sent)
    with pytest.raises(NotSentError):
        await session.channel.download(message, target)
    await session.channel.download(message, target)
    assert target.path.read_bytes() == b"picture"


async def test_a_download_nobody_waits_for_ends_and_the_next_one_takes_over(
    session: Session, mei: Phone, target: Target
) -> None:
    data = os.urandom(2_000_000)
    sent = await mei.send_media(session.shop, "document", data, mimetype="application/x", fileName="a")
    message = await arrived(session, sent)
    session.wa.fail_media("slow", seconds=20, times=1, message_id=sent)
    first = asyncio.create_task(session.channel.download(message, target))
    async with asyncio.timeout(10):
        while not target.offset:  # noqa: ASYNC110 - nothing tells when a file grows
            await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    async with asyncio.timeout(10):
        await session.channel.download(message, target)
    assert target.path.read_bytes() == data


async def test_twenty_megabytes_hold_up_neither_the_loop_nor_what_people_write(
    session: Session, mei: Phone, target: Target
) -> None:
    data = os.urandom(20 << 20)
    digest = hashlib.sha256(data).hexdigest()
    sent = await mei.send_media(session.shop, "video", data, mimetype="video/mp4")
    message = await arrived(session, sent)
    del data
    download = asyncio.create_task(session.channel.download(message, target))
    waits = []
    while not download.done():
        began = time.monotonic()
        await session.sink.message(await mei.send_text(session.shop, f"still there? {len(waits)}"))
        waits.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    await download
    assert waits
    # Two busy cores and a sandbox that encrypts 20 MB on the same loop: the bound tells "held up" from "busy".
    assert sorted(waits)[len(waits) // 2] < 0.5
    assert hashlib.sha256(target.path.read_bytes()).hexdigest() == digest
