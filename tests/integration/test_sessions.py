"""The session manager with fake channels: wishes in rows, answers in rows, and the way to a channel."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from core.channel import (
    Attempt,
    MessageId,
    MessageType,
    NumberCheck,
    OutboundMessage,
    Pairable,
    PairingUpdate,
    QueueId,
    SessionStatus,
)
from core.database import Database
from core.dispatch import NotReady
from core.errors import Conflict, NotFound
from core.metrics import Metrics
from core.outbound import OutboundWorker
from core.store import credentials, session_moves
from core.store import sessions as store
from tests.support.fake_channel import FakePlatform
from tests.support.outbound import QUICK as QUICK_SENDS
from tests.support.outbound import Place, enqueue, eventually, fetch, reached, value
from tests.support.sessions import (
    KEYS,
    Inbox,
    abandon,
    becomes,
    manager,
    managing,
    new_session,
    new_tenant,
    read,
    want,
)

ACTIVE, DISCONNECTED, LOGGED_OUT = SessionStatus.ACTIVE, SessionStatus.DISCONNECTED, SessionStatus.LOGGED_OUT
PAIRING = SessionStatus.PAIRING


@pytest.fixture
def platform() -> FakePlatform:
    return FakePlatform()


@pytest.fixture
async def tenant(database: Database) -> int:
    return await new_tenant(database)


# --- connect and disconnect


async def test_a_wanted_session_is_started_and_says_so(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    metrics = Metrics()
    async with managing(database, platform, tmp_path, metrics=metrics) as sessions:
        assert not platform.made, "creating does not start it"
        await want(database, row, "connected")
        now = await becomes(database, row, ACTIVE)
        assert now.last_connected_at is not None
        assert list(sessions.sendable()) == [row.id]
        assert sessions.owned() == {row.id}
        assert sessions.healthy
        folder = platform.channels[row.id].context.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        assert metrics.session_up.labels(tenant, row.id, "fake")._value.get() == 1
        await want(database, row, "disconnected")
        await becomes(database, row, DISCONNECTED)
        await eventually(_true(lambda: not sessions.owned()))
        # Not 0: nobody wants it connected, so nobody is to be woken.
        assert not [sample for metric in metrics.session_up.collect() for sample in metric.samples]
        assert platform.connected["+60111"] == 0
        assert sessions.sendable() == {}
        with pytest.raises(NotReady):
            await sessions.send(_message(row))
    assert not platform.overlaps


async def test_sessions_come_back_by_themselves_after_a_restart(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, channel="whatsapp", identifier="+60111")
    await want(database, row, "connected")
    metrics = Metrics()
    async with managing(database, platform, tmp_path, owner="one", metrics=metrics):
        await becomes(database, row, ACTIVE)
        assert metrics.sessions_active.labels(tenant)._value.get() == 1
    assert (await read(database, row)).status_reason == "gateway_stopped"
    assert metrics.sessions_active.labels(tenant)._value.get() == 0
    async with managing(database, platform, tmp_path, owner="two"):
        await becomes(database, row, ACTIVE, seconds=2)


async def test_a_killed_gateways_sessions_are_taken_over_at_once_in_the_same_folder(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    await want(database, row, "connected")
    dead = manager(database, platform, tmp_path, owner="dead")
    await dead.start()
    await becomes(database, row, ACTIVE)
    await abandon(dead)
    await fetch(database, "UPDATE et_session_leases SET expires_at = now() + INTERVAL '1 hour'")
    began = time.monotonic()
    async with managing(database, platform, tmp_path, owner="next"):
        await eventually(_true(lambda: platform.connected["+60111"] == 1))
        assert time.monotonic() - began < 2, "it does not wait for the lease to run out"
        assert await value(database, "SELECT epoch FROM et_session_leases WHERE session_id = $1", row.id) == 2
    assert not platform.overlaps


async def test_a_session_in_files_stays_where_its_files_are(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    moving = await new_session(database, tenant, identifier="+60222")
    async with managing(database, platform, tmp_path / "a", owner="a"):
        await want(database, row, "connected")
        await becomes(database, row, ACTIVE)
    async with managing(database, platform, tmp_path / "b", owner="b") as elsewhere:
        await want(database, moving, "connected")
        await becomes(database, moving, ACTIVE)
        assert elsewhere.owned() == {moving.id}
    async with managing(database, platform, tmp_path / "c", owner="c", files=False):
        await becomes(database, row, ACTIVE)


async def test_three_gateways_never_connect_a_session_twice(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    rows = [await new_session(database, tenant, identifier=f"+6011{n}") for n in range(8)]
    for row in rows:
        await want(database, row, "connected")
    gateways = [manager(database, platform, tmp_path, owner=f"gw-{n}") for n in range(3)]
    await asyncio.gather(*(g.start() for g in gateways))
    try:
        for row in rows:
            await becomes(database, row, ACTIVE)
        owned = [g.owned() for g in gateways]
        assert sum(map(len, owned)) == 8
        assert frozenset().union(*owned) == {row.id for row in rows}
        await gateways[0].stop()
        for row in rows:
            await eventually(_true(lambda r=row: platform.connected[r.identifier] == 1))
    finally:
        await asyncio.gather(*(g.stop() for g in gateways))
    assert not platform.overlaps


async def test_a_lost_lease_ends_the_session_here(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    await want(database, row, "connected")
    async with managing(database, platform, tmp_path) as sessions:
        await becomes(database, row, ACTIVE)
        await fetch(
            database,
            "UPDATE et_session_leases SET owner = 'other', epoch = epoch + 1, expires_at = now() + INTERVAL '1 hour'",
        )
        await eventually(_true(lambda: not sessions.owned() and not platform.connected["+60111"]))
        assert sessions.sendable() == {}


# --- channels that fail


async def test_a_channel_that_dies_is_started_again(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    await want(database, row, "connected")
    metrics = Metrics()
    async with managing(database, platform, tmp_path, metrics=metrics):
        await becomes(database, row, ACTIVE)
        first = platform.channels[row.id]
        first.healthy = False
        await eventually(_true(lambda: platform.channels[row.id] is not first))
        await becomes(database, row, ACTIVE)
        assert metrics.reconnects.labels("fake")._value.get() == 1
    assert not platform.overlaps


async def test_a_channel_that_cannot_start_says_why_and_is_tried_again(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    platform.connect_errors.extend([Conflict("the peer says no", code="auth_failed")] * 3)
    await want(database, row, "connected")
    async with managing(database, platform, tmp_path):
        broken = await becomes(database, row, DISCONNECTED, "auth_failed")
        assert broken.action == "check the credentials and enter them again"
        await becomes(database, row, ACTIVE)


async def test_changed_settings_reach_the_channel(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60111")
    await want(database, row, "connected")
    async with managing(database, platform, tmp_path):
        await becomes(database, row, ACTIVE)
        async with database.worker() as conn:
            await store.patch(conn, tenant, row.id, metadata={"proxy": "socks5://proxy"})
        await eventually(
            _true(lambda: platform.channels[row.id].context.metadata == {"proxy": "socks5://proxy"})
        )
        await becomes(database, row, ACTIVE)


async def test_a_channel_gets_its_credentials_and_a_wrong_key_is_said_in_words(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row, bad = [await new_session(database, tenant, identifier=f"+6011{n}") for n in range(2)]
    async with database.worker() as conn:
        for session in (row, bad):
            await credentials.put(
                conn, KEYS, tenant_id=tenant, session_id=session.id, credentials={"token": "t0ps3cret"}
            )
        stored = await conn.fetchval(
            "SELECT ciphertext FROM et_session_credentials WHERE session_id = $1", row.id
        )
        assert b"t0ps3cret" not in stored
        await conn.execute(
            "UPDATE et_session_credentials SET ciphertext = $2 WHERE session_id = $1", bad.id, stored
        )
    async with managing(database, platform, tmp_path):
        await want(database, row, "connected")
        await want(database, bad, "connected")
        await becomes(database, row, ACTIVE)
        assert platform.channels[row.id].context.credentials == {"token": "t0ps3cret"}
        await becomes(database, bad, DISCONNECTED, "secret_damaged")


# --- pairing


async def test_a_pairing_by_qr_names_the_session(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant)
    inbox = Inbox()
    async with managing(database, platform, tmp_path, inbox=inbox) as sessions:
        await want(database, row, "connected", login_method="qr")
        shown = await eventually(lambda: _with_qr(database, row))
        assert (shown.qr, shown.pairing_state, shown.status) == ("QR-1", "qr", PAIRING)
        assert shown.qr_expires_at is not None
        assert sessions.capability(row.id, Pairable) is not None  # type: ignore[type-abstract]
        assert sessions.capability(row.id, NumberCheck) is None  # type: ignore[type-abstract]
        await platform.channels[row.id].scan("+60123")
        paired = await becomes(database, row, ACTIVE)
        assert paired.identifier == "+60123"
        done = await eventually(lambda: _pairing(database, row, "paired"))
        assert done.qr is None
        await platform.channels[row.id].receive("hello")
        assert [m.content for m in inbox.messages] == ["hello"]
        assert await _audited(database, "session_paired") == 1


async def test_a_pairing_code_is_shown(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant)
    async with managing(database, platform, tmp_path):
        await want(database, row, "connected", login_method="code", phone="+60123")
        shown = await eventually(lambda: _pairing(database, row, "code"))
        assert shown.pairing_code == "ABCD-EFGH"
        assert shown.pairing_code_expires_at is not None


async def test_a_pairing_that_times_out_ends_and_can_be_begun_again(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant)
    async with managing(database, platform, tmp_path):
        await want(database, row, "connected", login_method="qr")
        await eventually(lambda: _with_qr(database, row))
        channel = platform.channels[row.id]
        await channel.say(DISCONNECTED, "qr_timeout")
        await channel.sink.pairing(PairingUpdate("timeout"))
        ended = await eventually(lambda: _pairing(database, row, "timeout"))
        assert (ended.wanted, ended.qr) == ("disconnected", None)
        await becomes(database, row, DISCONNECTED, "qr_timeout")
        await want(database, row, "connected", login_method="qr")
        again = await eventually(lambda: _with_qr(database, row))
        assert (again.pairing_state, again.wanted) == ("qr", "connected")


async def test_another_number_than_expected_is_logged_out_again(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(
        database, tenant, channel="whatsapp", metadata={"expected_identifier": "60 12-345 6789"}
    )
    inbox = Inbox()
    async with managing(database, platform, tmp_path, inbox=inbox) as sessions:
        await want(database, row, "connected", login_method="qr")
        await eventually(lambda: _with_qr(database, row))
        channel = platform.channels[row.id]
        await channel.scan("+60111222333")
        ended = await becomes(database, row, LOGGED_OUT, "wrong_number")
        assert ended.identifier.startswith("pending:")
        assert ended.action is not None
        await eventually(_true(lambda: channel.logged_out))
        assert (await eventually(lambda: _pairing(database, row, "failed"))).pairing_reason == "wrong_number"
        assert sessions.sendable() == {}
        assert not inbox.messages
        await want(database, row, "connected", login_method="qr")
        await eventually(lambda: _with_qr(database, row))
        await platform.channels[row.id].scan("+60123456789")
        await becomes(database, row, ACTIVE)


async def test_a_number_this_tenant_had_before_goes_on_under_its_old_row(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    old = await new_session(database, tenant, identifier="+60123", name="Front desk")
    await fetch(
        database,
        "SELECT et_enqueue_outbound($1, $2, 'alice', 'said before', send_at => now() + INTERVAL '1 hour')",
        tenant,
        old.id,
    )
    pending = await new_session(database, tenant, metadata={"default_workspace_id": 7})
    inbox = Inbox()
    async with managing(database, platform, tmp_path, inbox=inbox) as sessions:
        await want(database, pending, "connected", login_method="qr")
        await eventually(lambda: _with_qr(database, pending))
        await platform.channels[pending.id].scan("+60123")
        alive = await becomes(database, old, ACTIVE)
        assert alive.metadata["default_workspace_id"] == 7
        assert (alive.name, alive.wanted) == ("Front desk", "connected")
        assert (await eventually(lambda: _pairing(database, old, "paired"))).identifier == "+60123"
        with pytest.raises(NotFound):
            await read(database, pending)
        async with database.worker() as conn:
            assert await session_moves.survivor(conn, tenant, pending.id) == old.id
        assert sessions.owned() == {old.id}
        assert platform.channels[old.id].context.folder.name == str(old.id)
        assert not (tmp_path / "whatsapp" / str(pending.id)).exists()
        await platform.channels[old.id].receive("hello again")
        assert [m.session_id for m in inbox.messages] == [old.id]
        assert (
            await value(database, "SELECT count(*) FROM et_threads WHERE channel_session_id = $1", old.id)
            == 1
        )
    assert not platform.overlaps
    async with managing(database, platform, tmp_path):
        await becomes(database, old, ACTIVE)


async def test_a_number_that_is_live_already_is_logged_out_again(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    live = await new_session(database, tenant, identifier="+60123")
    pending = await new_session(database, tenant)
    async with managing(database, platform, tmp_path) as sessions:
        await want(database, live, "connected")
        await becomes(database, live, ACTIVE)
        first = platform.channels[live.id]
        await want(database, pending, "connected", login_method="qr")
        await eventually(lambda: _with_qr(database, pending))
        second = platform.channels[pending.id]
        await second.scan("+60123")
        await becomes(database, pending, LOGGED_OUT, "already_live")
        await eventually(_true(lambda: second.logged_out))
        assert not first.logged_out
        assert (await read(database, live)).status is ACTIVE
        assert list(sessions.sendable()) == [live.id]


async def test_the_same_number_of_another_tenant_is_nobodys_business(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    other = await new_tenant(database, "other")
    theirs = await new_session(database, other, identifier="+60123")
    mine = await new_session(database, tenant)
    async with managing(database, platform, tmp_path):
        await want(database, mine, "connected", login_method="qr")
        await eventually(lambda: _with_qr(database, mine))
        await platform.channels[mine.id].scan("+60123")
        await becomes(database, mine, ACTIVE)
    assert (await read(database, theirs)).identifier == "+60123"


# --- the end of a session


async def test_a_deleted_session_is_logged_out_and_forgotten_but_not_its_messages(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60123")
    await fetch(
        database, "SELECT et_enqueue_outbound($1, $2, 'alice', 'x', send_at => 'tomorrow')", tenant, row.id
    )
    async with database.worker() as conn:
        await credentials.put(conn, KEYS, tenant_id=tenant, session_id=row.id, credentials={"token": "t"})
    async with managing(database, platform, tmp_path) as sessions:
        await want(database, row, "connected")
        await becomes(database, row, ACTIVE)
        channel = platform.channels[row.id]
        await want(database, row, "deleted")
        gone = await becomes(database, row, LOGGED_OUT, "deleted")
        assert (gone.wanted, gone.data_dir_id) == ("disconnected", None)
        assert channel.logged_out
        await eventually(_true(lambda: not sessions.owned()))
    assert await value(database, "SELECT count(*) FROM et_session_credentials") == 0
    assert await value(database, "SELECT count(*) FROM et_messages") == 1
    assert not (tmp_path / "whatsapp" / str(row.id)).exists()
    assert await _audited(database, "session_deleted") == 1


async def test_a_log_out_by_the_phone_is_told(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60123")
    await want(database, row, "connected")
    async with managing(database, platform, tmp_path) as sessions:
        await becomes(database, row, ACTIVE)
        await platform.channels[row.id].say(LOGGED_OUT, "logged_out_by_phone")
        told = await becomes(database, row, LOGGED_OUT, "logged_out_by_phone")
        assert told.action is not None
        assert told.last_connected_at is not None
        assert sessions.sendable() == {}
        assert await _audited(database, "session_logged_out") == 1


async def test_stopping_takes_less_than_ten_seconds_even_when_channels_hang(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    rows = [await new_session(database, tenant, identifier=f"+6012{n}") for n in range(3)]
    sessions = manager(database, platform, tmp_path)
    await sessions.start()
    for row in rows:
        await want(database, row, "connected")
        await becomes(database, row, ACTIVE)

    async def hang() -> None:
        await asyncio.sleep(60)

    platform.channels[rows[0].id].disconnect = hang  # type: ignore[method-assign]
    began = time.monotonic()
    await sessions.stop()
    assert time.monotonic() - began < 5
    assert await value(database, "SELECT count(*) FROM et_session_leases WHERE expires_at > now()") == 0


# --- with the outbound worker


async def test_rows_go_out_through_the_manager_and_wait_while_it_is_disconnected(
    database: Database, platform: FakePlatform, tenant: int, tmp_path: Path
) -> None:
    row = await new_session(database, tenant, identifier="+60123")
    place = Place(tenant, row.id, "gw-1")
    waiting = await enqueue(database, place, "waits")
    async with managing(database, platform, tmp_path) as sessions:
        worker = OutboundWorker(database, Metrics(), sessions, owner="gw-1", timings=QUICK_SENDS)
        await worker.start()
        try:
            await want(database, row, "connected")
            await reached(database, waiting, "sent")
            await platform.channels[row.id].say(DISCONNECTED, "stream_replaced")
            queue_id = await enqueue(database, place, "later")
            await asyncio.sleep(0.4)
            assert len(platform.calls) == 1
            await platform.channels[row.id].say(ACTIVE)
            done = await reached(database, queue_id, "sent")
            assert done["retry_count"] == 0
        finally:
            await worker.stop()


# --- helpers


def _message(row: store.SessionRow) -> OutboundMessage:
    attempt = Attempt(row.tenant_id, row.id, QueueId(1), MessageId(1), 1, "fake:alice")
    return OutboundMessage(attempt, MessageType.TEXT, "x")


async def _with_qr(db: Database, row: store.SessionRow) -> store.SessionRow | None:
    now = await read(db, row)
    return now if now.qr else None


async def _pairing(db: Database, row: store.SessionRow, state: str) -> store.SessionRow | None:
    now = await read(db, row)
    return now if now.pairing_state == state else None


async def _audited(db: Database, event: str) -> int:
    async def look() -> int:
        count: int = await value(db, "SELECT count(*) FROM et_audit_log WHERE event = $1", event)
        return count

    found: int = await eventually(look)
    return found


def _true(check: object) -> object:
    async def ask() -> bool:
        return bool(check())  # type: ignore[operator]

    return ask


async def test_a_journal_that_takes_nothing_is_told_until_it_does_again(
    database: Database, platform: FakePlatform, tmp_path: Path, tenant: int
) -> None:
    row = await new_session(database, tenant, identifier="+60123456789")
    async with managing(database, platform, tmp_path) as manager:
        await want(database, row, "connected")
        await becomes(database, row, ACTIVE)
        assert manager.durable
        await platform.channels[row.id].say(DISCONNECTED, "journal_failed")
        assert not manager.durable
        await platform.channels[row.id].say(ACTIVE)
        assert manager.durable


async def test_a_session_that_outlived_an_outage_is_not_shown_as_gone(
    database: Database, platform: FakePlatform, tmp_path: Path, tenant: int
) -> None:
    """A database that was away for longer than a lease comes back with leases that have run out, and whoever looks
    first takes their owner for dead."""
    row = await new_session(database, tenant, identifier="+60123456789")
    async with managing(database, platform, tmp_path) as manager:
        await want(database, row, "connected")
        await becomes(database, row, ACTIVE)
        async with database.worker() as conn:
            await conn.execute(
                "UPDATE et_session_leases SET expires_at = now() - INTERVAL '6 seconds' WHERE session_id = $1",
                row.id,
            )
            await store.mark_orphans(conn)
        assert (await read(database, row)).status_reason == store.ORPHANED
        found = await becomes(database, row, ACTIVE)
        assert found.status_reason is None
        assert len(platform.made) == 1, "the channel itself went on"
        assert manager.sendable()
