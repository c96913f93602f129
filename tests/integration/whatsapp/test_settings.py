"""A session's own settings through the real client: typing, read marks, groups, name, proxy; and the silent phone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway.whatsapp.phone_sign import DAY, FILE
from sandbox.whatsapp.inbox import ReceiptSeen
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.protos import e2e
from tests.integration.whatsapp.conftest import Session, Template, resume, sandbox_at
from tests.support.whatsapp_sink import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = {"typing": True, "read_receipts": True, "groups": False, "display_name": "Shop & Co"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(template: Template, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(template.sandbox, folder / "sandbox")
    shutil.copytree(template.session, folder / "session")
    silent = time.time() - 11 * DAY
    sign = folder / "session" / FILE
    sign.touch()
    os.utime(sign, (silent, silent))
    async with sandbox_at(folder / "sandbox") as wa:
        proxy = json.loads(Path(wa.launch_file).read_text())["proxy"]
        metadata: dict[str, Any] = {"settings": SETTINGS, "proxy": "http://127.0.0.1:9"}
        # With its password the proxy is a credential, and that one leads to the sandbox.
        session = await resume(
            wa,
            folder / "session",
            metadata=metadata,
            credentials={"proxy": proxy.replace("://", "://user:secret@")},
        )
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
    number = 60111444000 + len(shared.wa.people)
    return shared.wa.person(f"+{number}", "Mei", auto_receipts=None)


async def test_a_phone_without_a_sign_for_ten_days_is_warned_of_until_it_gives_one(shared: Session) -> None:
    """First in the module: later tests let the phone give signs."""
    [active] = [s for s in shared.sink.states if s.status == "active"]
    assert active.action is not None
    assert "no sign for 11 days" in active.action
    assert "open WhatsApp on the phone" in active.action
    labels = {"tenant_id": "1", "session_id": "7"}
    seen = shared.metrics.registry.get_sample_value("gateway_phone_seen_timestamp_seconds", labels)
    assert seen == pytest.approx(time.time() - 11 * DAY, abs=60)

    mei = shared.wa.person("+60111444999", "Mei", auto_receipts=None)
    hello = await shared.shop.type_text(mei, "typed on the phone")
    await shared.sink.message(hello)
    await shared.channel._sink.look_again()
    assert shared.sink.states[-1].status == "active"
    assert shared.sink.states[-1].action is None
    assert os.stat(shared.context.folder / FILE).st_mtime == pytest.approx(time.time(), abs=60)


async def test_typing_is_shown_before_a_text_and_stops_with_it(session: Session, mei: Phone) -> None:
    began = time.monotonic()
    await session.channel.send(session.text(f"whatsapp:{mei.number}", "x" * 20))
    assert 1.0 <= time.monotonic() - began < 2.5
    got = await mei.next_message()
    assert next(iter(mei.typing_seen)) == "composing"
    await mei.typing_seen.wait_for(lambda state: state == "paused")
    assert got.text == "x" * 20


async def test_a_send_cancelled_while_typing_was_never_sent(session: Session, mei: Phone) -> None:
    message = session.text(f"whatsapp:{mei.number}", "x" * 500)
    task = asyncio.create_task(session.channel.send(message))
    await mei.typing_seen.wait_for(lambda state: state == "composing")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert type(await session.channel.resolve(message.attempt)).__name__ == "NotSent"
    await mei.typing_seen.wait_for(lambda state: state == "paused")
    assert not mei.received


def _is_read(message_id: str, seen: ReceiptSeen) -> bool:
    return (seen.id, seen.kind) == (message_id, "read")


async def test_what_was_answered_is_marked_as_read_and_nothing_before(session: Session, mei: Phone) -> None:
    first = await mei.send_text(session.shop, "hello", mode="lid")
    second = await mei.send_text(session.shop, "anybody there?", mode="pn")
    for sent in (first, second):
        await session.sink.message(sent)
    assert not [r for r in mei.receipts if r.kind == "read"]
    await session.channel.send(session.text(f"whatsapp:{mei.number}", "yes"))
    for sent in (first, second):
        await mei.receipts.wait_for(partial(_is_read, sent))
    # Answered again: there is nothing left to mark.
    await session.channel.send(session.text(f"whatsapp:{mei.number}", "still"))
    third = await mei.send_text(session.shop, "thanks")
    await session.sink.message(third)
    assert [r.id for r in mei.receipts if r.kind == "read"] == [first, second]


async def test_groups_that_are_switched_off_are_acknowledged_and_not_stored(
    session: Session, mei: Phone
) -> None:
    group = session.wa.group([mei, session.shop], "Team")
    in_group = await mei.send_group(group, "hello group")
    await session.wa.wait_acked(in_group)
    direct = await mei.send_text(session.shop, "hello you")
    await session.sink.message(direct)
    assert [m.content for m in session.sink.calls] == ["hello you"]


async def test_the_display_name_is_written_once_the_phone_has_handed_over_its_keys(
    session: Session,
) -> None:
    share = e2e.Message()
    share.protocolMessage.type = e2e.ProtocolMessage.APP_STATE_SYNC_KEY_SHARE
    key = share.protocolMessage.appStateSyncKeyShare.keys.add()
    key.keyID.keyID, key.keyData.keyData = b"\0\0\0\0\0\1", os.urandom(32)
    key.keyData.timestamp, key.keyData.fingerprint.rawID = 1_700_000_000_000, 1
    assert session.device is not None
    session.shop.send_to_own(session.device, share)
    await until(lambda: session.channel._manners._named is not None, 20)
    assert session.channel._manners._named == "Shop & Co"
