"""Pairing by QR and by code, and how a pairing fails."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from core.errors import Conflict
from gateway.whatsapp import store
from gateway.whatsapp.protocol import store_path
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.integration.whatsapp.conftest import QUICK, Opener, Session
from tests.support.whatsapp_sink import alive, until


async def test_a_scan_of_the_qr_makes_the_session_active(session_of: Opener) -> None:
    session, began = session_of(), datetime.now(UTC)
    await session.channel.connect()  # never paired: connecting offers a code
    assert session.channel.state.status == "pairing"
    device = await session.shop.scan(await session.sink.code())
    state = await session.sink.stands("active")
    assert state.identifier == "+60123456789"
    first = session.sink.pairings[0]
    assert first.kind == "qr"
    assert first.expires_at is not None
    assert began + timedelta(seconds=55) < first.expires_at
    paired = session.sink.pairings[-1]
    assert (paired.kind, paired.identifier) == ("paired", "+60123456789")
    with pytest.raises(Conflict):
        await session.channel.pair_qr()
    # The keys stay: the next connect needs no code.
    await session.channel.disconnect()
    assert session.sink.states[-1].status == "disconnected"
    await session.channel.connect()
    await session.sink.stands("active")
    await session.wa.wait_online(device)
    assert session.sink.pairings[-1] is paired


async def test_a_phone_code_makes_the_session_active(session_of: Opener) -> None:
    session = session_of()
    await session.channel.pair_qr()
    await session.sink.code()
    await session.channel.pair_code("+60 12-345 6789")  # instead of the QR that was shown
    await session.sink.wait(lambda: session.sink.pairings[-1].kind == "code")
    code = await session.sink.code()
    assert len(code) == 9
    assert code[4] == "-"
    await session.shop.enter_code(code)
    assert (await session.sink.stands("active")).identifier == "+60123456789"


async def test_a_code_that_nobody_scans_ends_the_child_and_says_so(session_of: Opener) -> None:
    session = session_of(timings=dataclasses.replace(QUICK, pairing=2.0))
    await session.channel.pair_qr()
    await session.sink.code()
    pid = session.pid
    state = await session.sink.stands("disconnected", "qr_timeout")
    assert state.action is not None
    await session.sink.wait(lambda: session.sink.pairings[-1].kind == "timeout")
    assert not alive(pid)
    # It can be started again, with more time to scan it.
    session.channel._supervisor._timings = QUICK
    await session.channel.pair_qr()
    await session.sink.wait(lambda: session.sink.pairings[-1].kind == "qr")
    await session.shop.scan(await session.sink.code())
    await session.sink.stands("active")


async def test_codes_that_run_out_are_a_timeout_too(session_of: Opener) -> None:
    session = session_of()
    session.wa.pairing.lifetime = 1.0  # the server closes the connection
    await session.channel.pair_qr()
    await session.sink.stands("disconnected", "qr_timeout")


async def test_another_number_than_expected_is_logged_out_again(
    session_of: Opener, wa: WhatsAppSandbox
) -> None:
    session = session_of("+60155555555", metadata={"expected_identifier": "+60123456789"})
    mei = wa.person("+60111222333", "Mei", auto_receipts=None)
    await session.channel.pair_qr()
    device = await session.shop.scan(await session.sink.code())
    await until(lambda: bool(device.one_time))  # its keys are there: it can be written to
    private = await mei.send_text(session.shop, "for the owner of that number alone")
    state = await session.sink.stands("logged_out", "wrong_number")
    assert device not in session.shop.devices
    await session.channel.disconnect()
    assert private not in {m.channel_message_id for m in session.sink.calls}
    assert "+60123456789" in (state.action or "")
    assert session.shop.devices == []
    assert [u.kind for u in session.sink.pairings if u.kind != "qr"] == ["failed"]
    assert not any(s.status == "active" for s in session.sink.states)
    assert store.device(store_path(session.context.folder)) is None


async def test_logging_out_frees_the_phone_and_deletes_the_keys(session: Session) -> None:
    await session.channel.logout()
    assert session.shop.devices == []
    assert not store_path(session.context.folder).exists()
    assert session.channel.state.status == "logged_out"
    await session.channel.logout()  # idempotent


async def test_logging_out_a_stopped_session_tells_whatsapp_too(session: Session) -> None:
    await session.channel.disconnect()
    await session.channel.logout()
    assert session.shop.devices == []
    assert not store_path(session.context.folder).exists()


async def test_keys_that_cannot_be_read_are_said_and_not_replaced(session_of: Opener) -> None:
    session = session_of()
    store_path(session.context.folder).write_bytes(b"not a database" * 100)
    await session.channel.connect()
    state = await session.sink.stands("disconnected", "store_unreadable")
    assert "pair the number again" in (state.action or "")
    assert store_path(session.context.folder).read_bytes().startswith(b"not a database")


async def test_a_slow_first_login_is_not_cut_off(session_of: Opener) -> None:
    """Between the pairing and the first login whatsmeow makes 812 keys, each of them on the disk before the next."""
    session = session_of(timings=dataclasses.replace(QUICK, ping=0.1, reconnect=0.1))
    await session.pair()
    assert session.metrics.child_exits.labels("whatsapp")._value.get() == 0
