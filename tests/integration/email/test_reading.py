"""Mail comes in from a real Dovecot: once each, in order, whatever happens to the connection, the server or the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from core import faults
from core.channel import (
    MediaSource,
    MessageId,
    MessageType,
    SessionId,
    SessionStatus,
    StoredMedia,
    TenantId,
)
from core.errors import RefusedError
from gateway.email import parse
from tests.integration.email.conftest import Shop, letter
from tests.support.outbound import fetch, value

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_first_start_takes_new_mail_and_the_span_asked_for_as_history(shop: Shop) -> None:
    async def imported() -> bool:
        return (
            await value(
                shop.db,
                "SELECT count(*) = 1 FROM et_imports WHERE session_id = $1 AND status = 'finished'",
                shop.session.id,
            )
            is True
        )

    await shop.until(imported, "the history imported")
    shop.deliver("the first new one")
    await shop.said("the first new one")
    rows = await fetch(
        shop.db,
        "SELECT content, is_history, delivery_status FROM et_messages WHERE channel_session_id = $1 ORDER BY content",
        shop.session.id,
    )
    assert [(row["content"], row["is_history"]) for row in rows] == [
        ("also from before", True),
        ("from before", True),
        ("in the other folder from before", True),
        ("the first new one", False),
    ]


async def test_several_folders_are_read(shop: Shop) -> None:
    shop.deliver("an order", folder="Orders")
    await shop.said("an order")


async def test_what_came_while_nobody_was_connected_is_fetched_in_order(shop: Shop) -> None:
    await shop.pause()
    lines = [f"outage {number}" for number in range(60)]
    for line in lines:
        shop.deliver(line)
    await shop.resume()
    await shop.said(*lines)


async def test_a_server_killed_in_the_middle_of_idle_costs_nothing(shop: Shop) -> None:
    shop.deliver("before the crash")
    await shop.said("before the crash")
    await asyncio.to_thread(shop.dovecot.kill)
    shop.deliver("during the crash 1")
    shop.deliver("during the crash 2")
    row = await shop.stands(lambda row: row.status is SessionStatus.DISCONNECTED, "a state that says so")
    assert (row.status_reason, bool(row.action)) == ("connection_refused", True)
    await asyncio.to_thread(shop.dovecot.start)
    await shop.active()
    shop.deliver("after the crash")
    await shop.said("before the crash", "during the crash 1", "during the crash 2", "after the crash")


async def test_a_new_uidvalidity_brings_nothing_twice_and_nothing_old(shop: Shop) -> None:
    await shop.pause()
    before = await shop.texts()
    await asyncio.to_thread(shop.dovecot.kill)
    shop.dovecot.renumber()
    shop.deliver("renumbered")
    await asyncio.to_thread(shop.dovecot.start)
    await shop.resume()
    await shop.said("renumbered")
    shop.deliver("after the renumbering")
    await shop.said("after the renumbering")
    assert await shop.texts() == [*before, "renumbered", "after the renumbering"]


@pytest.mark.parametrize("point", ["email.fetched", "email.store.before", "email.store.after"])
async def test_a_crash_around_the_store_brings_each_mail_once(shop: Shop, point: str) -> None:
    """The cursor moves with the message or not at all: wherever it stops, the next start goes on rightly."""
    hits: list[int] = []

    def once() -> None:
        if not hits:
            hits.append(1)
            raise faults.InjectedFault(point)

    faults.arm(point, once)
    try:
        shop.deliver(f"crash at {point} 1")
        shop.deliver(f"crash at {point} 2")
        await shop.said(f"crash at {point} 1", f"crash at {point} 2")
        assert hits
    finally:
        faults.disarm(point)
    await shop.active()


async def test_a_mail_nobody_can_read_is_kept_and_holds_back_nothing(shop: Shop) -> None:
    head = letter("x", subject="tower").split(b"Content-Type")[0]
    raw = head + b"Content-Type: multipart/mixed; boundary=b0\r\n\r\n"
    for n in range(1500):
        raw += b"--b%d\r\nContent-Type: multipart/mixed; boundary=b%d\r\n\r\n" % (n, n + 1)
    shop.dovecot.deliver(raw)
    shop.deliver("right behind it")
    await shop.said("right behind it")
    row = await shop.stored(parse.digest(raw))
    assert (row["message_type"], row["external_id"]) == ("unsupported", "email:mei@customer.example")
    assert row["raw_payload"]["quarantined"]
    assert row["raw_payload"]["original_base64"]
    assert row["raw_payload"]["subject"] == "tower"


async def test_a_mail_over_the_limit_keeps_its_words(shop: Shop) -> None:
    limit = 64 * 1024
    await shop.pause()
    async with shop.db.worker() as conn:
        await conn.execute(
            "UPDATE et_channel_sessions SET metadata = jsonb_set(metadata, '{settings,max_mail_bytes}', $2) WHERE id = $1",
            shop.session.id,
            limit,
        )
    await shop.resume()
    data = os.urandom(3 << 20)
    raw = letter("see the film", files=(("film.bin", "application/octet-stream", data),))
    shop.dovecot.deliver(raw)
    row = await shop.stored(parse.digest(raw))
    assert row["content"] == "see the film"
    async with shop.db.worker() as conn:
        await conn.execute(
            "UPDATE et_channel_sessions SET metadata = metadata #- '{settings,max_mail_bytes}' WHERE id = $1",
            shop.session.id,
        )
    [file] = await fetch(
        shop.db,
        "SELECT * FROM et_messages WHERE channel_message_id LIKE $1 || '/%'",
        parse.digest(raw),
    )
    assert (file["media_metadata"]["state"], file["media_metadata"]["error"]) == ("failed", "mail_too_large")


async def test_every_file_of_a_mail_is_stored_also_when_the_mail_is_deleted(shop: Shop) -> None:
    await shop.active()
    first, second = os.urandom(200_000), os.urandom(1000)
    raw = letter(
        "two files", files=(("a.bin", "application/zip", first), ("b.bin", "application/zip", second))
    )
    shop.dovecot.deliver(raw)
    row = await shop.stored(parse.digest(raw))
    assert (row["message_type"], row["content"]) == (MessageType.TEXT, "two files")

    async def fetched() -> list[str]:
        rows = await fetch(
            shop.db,
            "SELECT media_metadata->>'sha256' AS sha FROM et_messages "
            "WHERE channel_message_id LIKE $1 || '/%' AND media_metadata->>'state' = 'stored' ORDER BY id",
            parse.digest(raw),
        )
        return [one["sha"] for one in rows] if len(rows) == 2 else []

    found = await shop.until(fetched, "both files")
    assert found == [hashlib.sha256(first).hexdigest(), hashlib.sha256(second).hexdigest()]


class Target:
    """Where a download goes, in memory."""

    offset = 0
    path = Path("unused")

    def __init__(self) -> None:
        self.data = b""

    async def write(self, chunk: bytes) -> None:
        self.data += chunk

    async def restart(self) -> None:
        self.data = b""


async def test_a_file_comes_from_the_mailbox_where_the_disk_does_not_have_it(shop: Shop) -> None:
    data = os.urandom(50_000)
    raw = letter("one file", files=(("a.bin", "application/zip", data),))
    shop.dovecot.deliver(raw)
    await shop.stored(parse.digest(raw))
    [row] = await fetch(
        shop.db, "SELECT * FROM et_messages WHERE channel_message_id LIKE $1 || '/%'", parse.digest(raw)
    )
    media = StoredMedia(
        TenantId(row["tenant_id"]),
        SessionId(row["channel_session_id"]),
        MessageId(row["id"]),
        "email",
        row["channel_message_id"],
        MessageType(row["message_type"]),
        "inbound",
        None,
        row["sender_identifier"],
        row["media_metadata"],
        row["raw_payload"],
    )
    source = shop.sessions.capability(shop.session.id, MediaSource)
    assert source is not None
    elsewhere = replace(media, raw_payload={**media.raw_payload, "part_of": "not on this disk"})
    target = Target()
    await source.download(elsewhere, target)
    assert target.data == data
    # Its place has changed since: then its Message-ID finds it.
    moved = {**elsewhere.raw_payload, "imap": {"folder": "INBOX", "uidvalidity": 1, "uid": 1}}
    target = Target()
    await source.download(replace(elsewhere, raw_payload=moved), target)
    assert target.data == data
    gone = {**moved, "message_id": "<nobody-has@this>"}
    with pytest.raises(RefusedError, match="deleted"):
        await source.download(replace(elsewhere, raw_payload=gone), Target())
