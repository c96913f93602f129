"""Links that drop, children that hang, sessions that end: noticed, said with what to do, and healed where that is right."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from core.channel import LocalFile, MessageType, NotSent, OutboundMessage, Unknown
from core.errors import NotSentError, ThrottledError, UnknownOutcomeError
from gateway.whatsapp import store
from gateway.whatsapp.folder import FolderLock
from gateway.whatsapp.process import ChildGone
from gateway.whatsapp.protocol import Exit, store_path
from sandbox.whatsapp.phone import Phone
from tests.integration.whatsapp.conftest import QUICK, Session, make_session
from tests.support.whatsapp_sink import alive, until


async def gone(pid: int, seconds: float = 10) -> None:
    await until(lambda: not alive(pid), seconds)


async def relinked(session: Session, logins: int) -> None:
    """Until WhatsApp has seen a further login and it is usable."""
    await until(lambda: len(session.wa.logins) > logins and session.channel._supervisor.link.is_set(), 20)


# ---- links and children


@pytest.mark.parametrize("abort", [False, True])
async def test_a_dropped_link_comes_back_without_a_word(session: Session, mei: Phone, abort: bool) -> None:
    assert session.device is not None
    states, logins = len(session.sink.states), len(session.wa.logins)
    await session.wa.drop(session.device, abort=abort)
    await relinked(session, logins)
    await session.sink.message(await mei.send_text(session.shop, "back?"))
    await session.channel.send(session.text("whatsapp:+60111222333", "back"))
    assert len(session.sink.states) == states  # shorter than the grace: nobody was bothered


async def test_a_link_that_stays_away_is_reported_and_returns_with_whatsapp(
    session: Session, mei: Phone
) -> None:
    await session.wa.go_down()
    state = await session.sink.stands("connecting")
    assert (state.reason, state.identifier) == ("disconnected", "+60123456789")
    with pytest.raises(ThrottledError) as error:
        await session.channel.send(session.text("whatsapp:+60111222333", "too early"))
    assert error.value.code == "websocket_not_connected"
    sent = await mei.send_text(session.shop, "while you were away")
    await session.wa.come_back()
    await session.sink.stands("active")
    await session.sink.message(sent)


@pytest.mark.parametrize("how", ["dead", "deaf"])
async def test_a_session_that_hears_nothing_is_found_and_restarted(
    session: Session, mei: Phone, how: str
) -> None:
    assert session.device is not None
    pid, logins = session.pid, len(session.wa.logins)
    session.wa.silence(session.device, how)
    sent = await mei.send_text(session.shop, "anybody there?")
    await gone(pid)
    session.wa.unsilence(session.device)
    await relinked(session, logins)
    await session.sink.message(sent)


async def test_a_frozen_child_is_replaced(session: Session, mei: Phone) -> None:
    pid = session.pid
    os.kill(pid, signal.SIGSTOP)
    sent = await mei.send_text(session.shop, "wake up")
    await gone(pid)
    assert (await session.sink.message(sent)).content == "wake up"


async def test_a_quiet_healthy_session_is_left_alone(session: Session) -> None:
    pid, logins = session.pid, len(session.wa.logins)
    await asyncio.sleep(3.5)  # several silences long: the probes are answered
    assert (session.pid, len(session.wa.logins)) == (pid, logins)


async def test_the_child_dies_with_its_parent(session: Session, tmp_path: Path) -> None:
    await session.channel.disconnect()
    argv = session.wa.child_command()[0]
    program = textwrap.dedent(
        """
        import subprocess, sys, time
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(600)
        """
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        *argv,
        "--folder",
        str(session.context.folder),
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 20))
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await gone(pid, 2)
    with FolderLock(session.context.folder):
        pass


async def test_a_taker_ends_the_recorded_child_and_gets_the_folder(session: Session) -> None:
    old = session.pid
    taker = make_session(session.wa, session.context.folder)
    os.kill(old, signal.SIGSTOP)  # its gateway is hung as well, as far as anyone can see
    session.channel._supervisor._timings = dataclasses.replace(QUICK, pong=30.0)
    try:
        await taker.channel.connect()
        await taker.sink.stands("active")
        await gone(old)
    finally:
        await session.channel.disconnect()
        await taker.channel.disconnect()


async def test_a_child_does_not_work_in_a_folder_that_somebody_holds(session: Session) -> None:
    await session.channel.disconnect()
    with FolderLock(session.context.folder):  # held by us: no child that may be ended
        process = await asyncio.create_subprocess_exec(
            *session.wa.child_command()[0],
            "--folder",
            str(session.context.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        said, _ = await asyncio.wait_for(process.communicate(), 20)
    assert b'"ev":"locked"' in said
    assert f'"pid":{os.getpid()}'.encode() in said
    assert process.returncode == Exit.LOCKED


# ---- ends


async def test_a_replaced_stream_is_not_taken_back_until_somebody_says_so(
    session: Session, mei: Phone
) -> None:
    assert session.device is not None
    pid, logins = session.pid, len(session.wa.logins)
    await session.wa.kick(session.device, "replaced")
    state = await session.sink.stands("disconnected", "stream_replaced")
    assert state.action
    await gone(pid)
    await asyncio.sleep(1)
    assert len(session.wa.logins) == logins
    await session.channel.connect()
    await session.sink.stands("active")
    await session.sink.message(await mei.send_text(session.shop, "here again"))


async def test_a_log_out_by_the_phone_is_final_and_asks_for_a_new_pairing(session: Session) -> None:
    assert session.device is not None
    pid = session.pid
    await session.wa.kick(session.device, "removed")
    state = await session.sink.stands("logged_out", "logged_out_by_phone")
    assert "Pair the number again" in (state.action or "")
    await gone(pid)
    await session.pair()  # and that works


async def test_a_device_forgotten_while_away_is_logged_out_at_the_next_login(session: Session) -> None:
    assert session.device is not None
    await session.channel.disconnect()
    session.wa.forget_device(session.device)
    await session.channel.connect()
    await session.sink.stands("logged_out", "logged_out_by_phone")


async def test_a_ban_says_until_when_and_ends_by_itself(session: Session) -> None:
    assert session.device is not None
    session.wa.ban(expire=2)
    await session.wa.drop(session.device)
    state = await session.sink.stands("suspended", "temporary_ban")
    assert "until 20" in (state.action or "")
    session.wa.clear_faults()
    await session.sink.stands("active")


async def test_an_outdated_client_waits_for_an_update(session: Session) -> None:
    assert session.device is not None
    session.wa.refuse_logins(405)
    await session.wa.drop(session.device)
    state = await session.sink.stands("disconnected", "client_outdated")
    assert "Update" in (state.action or "")


async def test_a_refused_connection_is_tried_again_until_it_works(session: Session) -> None:
    assert session.device is not None
    session.wa.refuse_logins(503, seconds=2.0)
    await session.wa.drop(session.device)
    await session.sink.stands("connecting")
    await session.sink.stands("active")


# ---- sends that are cut off


async def test_a_send_cut_off_after_it_left_is_unknown_with_its_id_and_a_receipt_settles_it(
    session: Session, mei: Phone
) -> None:
    session.wa.fail_sends("swallow_ack", times=1)
    message = session.text("whatsapp:+60111222333", "did it go?")
    pid = session.pid
    with pytest.raises(UnknownOutcomeError) as error:
        await session.channel.send(message)  # the watchdog of the quick timings ends it
    await gone(pid)
    got = await mei.wait_for_text("did it go?")
    assert error.value.channel_message_id == got.id
    assert await session.channel.resolve(message.attempt) == Unknown("cut_off", got.id)
    await mei.read(got.id)
    await session.sink.wait(lambda: any(got.id in u.message_ids for u in session.sink.updates))
    # The same item's next attempt has its own secret, and the session works.
    again = dataclasses.replace(message, attempt=dataclasses.replace(message.attempt, claim_epoch=2))
    assert await session.channel.resolve(again.attempt) == NotSent()
    async with asyncio.timeout(10):
        await session.channel._supervisor.link.wait()
    await session.channel.send(session.text("whatsapp:+60111222333", "next"))


@pytest.mark.parametrize(("point", "left"), [("whatsapp.send.before", False), ("whatsapp.send.after", True)])
async def test_a_child_killed_around_the_send_leaves_proof_of_what_it_did(
    session: Session, mei: Phone, monkeypatch: pytest.MonkeyPatch, point: str, left: bool
) -> None:
    await session.channel.disconnect()
    monkeypatch.setenv("FAULTS", f"{point}=kill")
    await session.channel.connect()
    await session.sink.stands("active")
    monkeypatch.delenv("FAULTS")
    message = session.text("whatsapp:+60111222333", "to be or not")
    expected = UnknownOutcomeError if left else NotSentError
    with pytest.raises(expected) as error:
        await session.channel.send(message)
    # The same answer in a later life, from the files alone.
    await session.channel.disconnect()
    found = await session.channel.resolve(message.attempt)
    if left:
        got = await mei.wait_for_text("to be or not")
        assert isinstance(error.value, UnknownOutcomeError)
        assert error.value.channel_message_id == got.id
        assert found == Unknown("cut_off", got.id)
    else:
        assert found == NotSent()
        assert not mei.received


async def test_nothing_is_called_unsent_while_another_process_holds_the_folder(session: Session) -> None:
    await session.channel.disconnect()
    with FolderLock(session.context.folder):
        found = await session.channel.resolve(session.attempt("whatsapp:+60111222333"))
    assert found == Unknown("folder_taken")
    assert await session.channel.resolve(session.attempt("whatsapp:+60111222333")) == NotSent()


async def test_many_questions_at_once_about_a_dead_gateways_sends_are_all_answered(session: Session) -> None:
    await session.channel.disconnect()
    attempts = [session.attempt("whatsapp:+60111222333") for _ in range(8)]
    lock = FolderLock(session.context.folder)  # as a child that is ending has it
    asyncio.get_running_loop().call_later(0.2, lock.release)
    assert await asyncio.gather(*map(session.channel.resolve, attempts)) == [NotSent()] * 8


async def test_after_a_log_out_missing_secrets_prove_nothing(session: Session, mei: Phone) -> None:
    session.wa.fail_sends("swallow_ack", times=1)
    message = session.text("whatsapp:+60111222333", "before the log-out")
    with pytest.raises(UnknownOutcomeError):
        await session.channel.send(message)
    await session.channel.logout()
    assert await session.channel.resolve(message.attempt) == Unknown("keys_gone")


async def test_a_child_that_dies_under_a_send_costs_the_message_an_attempt_only_after_many_times(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.whatsapp.handover.CUT_OFF_FREE", 1)
    await session.channel.disconnect()
    monkeypatch.setenv("FAULTS", "whatsapp.send.before=kill")
    await session.channel.connect()
    await session.sink.stands("active")
    message = session.text("whatsapp:+60111222333", "poison?")
    errors: list[NotSentError] = []
    while len(errors) < 2:
        async with asyncio.timeout(30):
            await session.channel._supervisor.link.wait()
        with pytest.raises(NotSentError) as error:
            await session.channel.send(message)
        if error.value.code == "cut_off":
            errors.append(error.value)
    assert [isinstance(error, ThrottledError) for error in errors] == [True, False]


async def test_asking_a_child_that_has_closed_its_ear_is_answered_at_once(session: Session) -> None:
    child = session.channel._supervisor.child
    assert child is not None
    assert child._process.stdin is not None
    child._process.stdin.close()  # as a child does that is being killed, a moment before it is gone
    with pytest.raises(ChildGone):
        await child.ask("ping", seconds=30)


async def test_a_caller_that_gives_up_leaves_the_send_watched(session: Session, mei: Phone) -> None:
    session.wa.fail_sends("delay_ack", seconds=1.0, times=1)
    message = session.text("whatsapp:+60111222333", "slow one")
    send = asyncio.create_task(session.channel.send(message))
    await mei.wait_for_text("slow one")
    send.cancel()
    await asyncio.gather(send, return_exceptions=True)
    assert await session.channel.resolve(message.attempt) == Unknown("still_sending")
    await until(lambda: not session.channel._handover.in_flight)
    found = await session.channel.resolve(message.attempt)
    assert isinstance(found, Unknown)
    assert found.channel_message_id == mei.received[0].id


async def test_disconnecting_ends_within_ten_seconds_even_when_the_child_hangs(session: Session) -> None:
    pid = session.pid
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        await session.channel.disconnect()
    assert not alive(pid)


async def test_a_child_killed_around_a_send_of_media_leaves_the_same_proof(
    session: Session, mei: Phone, tmp_path: Path
) -> None:
    """While the file goes up nothing is sent; once the message is on the wire its secret names it."""
    data = os.urandom(200_000)
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / sha256).write_bytes(data)
    media = LocalFile(tmp_path / sha256, "application/pdf", "prices.pdf", len(data), sha256)

    def outgoing() -> OutboundMessage:
        attempt = session.attempt("whatsapp:+60111222333")
        return OutboundMessage(attempt, MessageType.DOCUMENT, "Prices", media=media)

    session.wa.fail_media("hang", seconds=20, upload=True)
    uploading = outgoing()
    task = asyncio.create_task(session.channel.send(uploading))
    await until(lambda: bool(session.channel._handover.uploads._locks))
    assert await session.channel.resolve(uploading.attempt) == Unknown("still_sending")
    os.kill(session.pid, signal.SIGKILL)
    with pytest.raises(NotSentError) as error:
        await task
    assert error.value.code == "upload_failed"
    assert await session.channel.resolve(uploading.attempt) == NotSent()

    session.wa.clear_faults()
    await until(session.channel._supervisor.link.is_set, 15)
    session.wa.fail_sends("swallow_ack", times=1)
    sent = outgoing()
    task = asyncio.create_task(session.channel.send(sent))
    got = await mei.next_message()
    os.kill(session.pid, signal.SIGKILL)
    with pytest.raises(UnknownOutcomeError) as cut_off:
        await task
    assert cut_off.value.channel_message_id == got.id
    assert await session.channel.resolve(sent.attempt) == Unknown("cut_off", got.id)
    assert mei.media_bytes(got.message) == data


async def test_a_look_at_whatsmeows_file_leaves_its_locks_alone(session: Session, mei: Phone) -> None:
    """Closing a file drops every POSIX lock its process holds on it: a look from inside the child would let the next
    reader take a running transaction's journal for a dead one's, and roll it back."""
    child = session.channel._supervisor.child
    assert child is not None
    over = asyncio.Event()

    async def probe() -> None:
        while not over.is_set():
            await child.ask("probe", seconds=20)

    async def read() -> None:
        while not over.is_set():
            assert await asyncio.to_thread(store.device, store_path(session.context.folder))
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        for look in (probe, probe, read, read):
            group.create_task(look())
        try:
            for number in range(40):
                await session.channel.send(session.text(f"whatsapp:{mei.number}", f"{number}"))
        finally:
            over.set()
    assert [(await mei.next_message()).text for _ in range(40)] == [str(n) for n in range(40)]


async def test_whatsmeows_file_has_a_write_ahead_log(session: Session) -> None:
    """The default, a journal that is deleted at every commit, halves what a session can send. Bytes 18 and 19 of the
    file say how it is written (sqlite.org/fileformat2.html)."""
    head = store_path(session.context.folder).read_bytes()[:20]
    assert head[:15] == b"SQLite format 3"
    assert tuple(head[18:20]) == (2, 2)
