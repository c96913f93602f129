"""A real client's life: pairing, losing its connection, being refused, silenced, replaced, removed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox.whatsapp.pairing import PairingRefused
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.integration.sandbox.conftest import Linked, a_sandbox, link, linking, quick_folder
from tests.support.whatsapp_real import RealClient

pytestmark = pytest.mark.asyncio(loop_scope="package")


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def linked() -> AsyncIterator[Linked]:
    """Its own, because these tests interrupt it in every way."""
    async with linking() as found:
        yield found


@asynccontextmanager
async def a_client(wa: WhatsAppSandbox) -> AsyncIterator[RealClient]:
    client = await RealClient.start(wa)
    try:
        yield client
    finally:
        await client.kill()


async def reconnected(linked: Linked, start: int) -> None:
    await linked.client.wait("ConnectedEv", start=start)
    await linked.wa.wait_online(linked.device)


async def arrives(linked: Linked, text: str) -> None:
    msg_id = await linked.mei.send_text(linked.shop, text)
    await linked.client.message(msg_id)
    await linked.wa.wait_acked(msg_id)


# --- one linked client, interrupted in many ways; it must be usable after each ---


@pytest.mark.parametrize("abort", [False, True], ids=["closed", "cut"])
async def test_a_dropped_client_comes_back_and_gets_what_was_sent_meanwhile_in_order(
    linked: Linked, abort: bool
) -> None:
    start = len(linked.client.events)
    await linked.wa.go_down()
    ids = [await linked.mei.send_text(linked.shop, f"meanwhile {n}") for n in range(5)]
    assert linked.wa.unacked(linked.device) == ids
    await linked.wa.come_back()
    await reconnected(linked, start)
    await linked.wa.wait_drained(linked.device)
    await linked.client.message(ids[-1])
    got = [e["id"] for e in linked.client.events if e["ev"] == "MessageEv" and e["id"] in ids]
    assert got == ids
    assert all(linked.wa.written(i)[0].offline for i in ids)
    start = len(linked.client.events)
    await linked.wa.drop(linked.device, abort=abort)
    await reconnected(linked, start)
    await arrives(linked, "after the drop")


async def test_a_restarted_server_listens_on_the_same_ports(linked: Linked) -> None:
    before, start = linked.wa.launch_file.read_text(), len(linked.client.events)
    await linked.wa.restart()
    await reconnected(linked, start)
    assert linked.wa.launch_file.read_text() == before
    await arrives(linked, "after the restart")


@pytest.mark.parametrize("how", ["dead", "deaf"])
async def test_a_silent_server_hears_and_says_nothing_until_it_talks_again(linked: Linked, how: str) -> None:
    linked.wa.silence(linked.device, how)
    msg_id = await linked.mei.send_text(linked.shop, f"into the silence ({how})")
    text = f"nobody hears this ({how})"
    sending = asyncio.create_task(linked.client.do("send", to="60111222333", text=text, timeout=30))
    await asyncio.sleep(0.3)
    assert not linked.wa.written(msg_id)
    assert linked.wa.is_online(linked.device)
    assert not any(m.text == text for m in linked.mei.received)
    start = len(linked.client.events)
    linked.wa.unsilence(linked.device)
    await linked.client.message(msg_id)
    await linked.wa.drop(linked.device)
    await reconnected(linked, start)
    await sending  # the library sends again what was unanswered when its connection broke
    await linked.mei.wait_for_text(text)
    await arrives(linked, f"after the silence ({how})")


async def test_receipts_lost_on_the_way_bring_the_messages_again(linked: Linked) -> None:
    linked.wa.lose_receipts()
    msg_id = await linked.mei.send_text(linked.shop, "twice on the wire")
    await linked.client.message(msg_id)
    await linked.wa.events.wait_for(lambda e: (e.kind, e.detail) == ("receipt_lost", msg_id))
    assert linked.wa.acked(msg_id) is None
    linked.wa.lose_receipts(False)
    start = len(linked.client.events)
    await linked.wa.drop(linked.device, abort=True)
    await reconnected(linked, start)
    await linked.wa.wait_acked(msg_id)
    assert [w.offline for w in linked.wa.written(msg_id)] == [False, True]


async def test_after_a_swallowed_acknowledgement_the_customer_gets_the_same_id_twice(linked: Linked) -> None:
    linked.wa.fail_sends("swallow_ack", times=1)
    start = len(linked.client.events)
    sending = asyncio.create_task(
        linked.client.do("send", to="60111222333", text="did it arrive?", timeout=30)
    )
    first = await linked.mei.wait_for_text("did it arrive?")
    assert not sending.done()
    await linked.wa.drop(linked.device, abort=True)
    await reconnected(linked, start)
    assert (await sending)["ID"] == first.id
    calls = [call.outcome for call in linked.wa.calls if call.id == first.id]
    assert calls == ["swallow_ack", "accepted"]
    got = [m.duplicate for m in linked.mei.received if m.id == first.id]
    assert got == [False, True]


async def test_a_swallowed_message_reaches_nobody_until_it_is_sent_again(linked: Linked) -> None:
    linked.wa.fail_sends("swallow", times=1)
    start = len(linked.client.events)
    sending = asyncio.create_task(
        linked.client.do("send", to="60111222333", text="into the void", timeout=30)
    )
    call = await linked.wa.calls.wait_for(lambda c: c.outcome == "swallow")
    assert call.to.user == linked.mei.lid
    assert not any(m.text == "into the void" for m in linked.mei.received)
    await linked.wa.drop(linked.device, abort=True)
    await reconnected(linked, start)
    assert (await sending)["ID"] == call.id
    await linked.mei.wait_for_text("into the void")


async def test_logins_can_be_refused_for_a_while(linked: Linked) -> None:
    linked.wa.refuse_logins(503, seconds=0.5)
    start = len(linked.client.events)
    await linked.wa.drop(linked.device)
    await reconnected(linked, start)
    await arrives(linked, "after the refusals")


async def test_another_stream_takes_over(linked: Linked) -> None:
    await linked.wa.kick(linked.device, "replaced")
    await linked.client.wait("StreamReplacedEv")
    await linked.wa.wait_offline(linked.device)


# --- clients of their own ---


async def test_pairing_by_phone_code_then_log_out_by_the_client() -> None:
    async with a_sandbox() as wa, a_client(wa) as client:
        shop = wa.phone("+60123456789", "Shop")
        await client.do("connect", db=f"{wa.folder}/s.db")
        await client.wait("qr")
        code = await client.do("pair_phone", phone="60123456789")
        with pytest.raises(PairingRefused, match="nobody asked"):
            await wa.phone("+60123456780").enter_code(code)
        device = await shop.enter_code(code)
        await client.wait("ConnectedEv")
        await wa.wait_online(device)
        await client.do("logout")
        assert shop.devices == []


async def test_a_pairing_nobody_scans_times_out() -> None:
    async with a_sandbox() as wa, a_client(wa) as client:
        wa.pairing.refs, wa.pairing.lifetime = 1, 0.3
        await client.do("connect", db=f"{wa.folder}/s.db")
        qr = (await client.wait("qr"))["qr"]
        status = await client.wait("login_status")
        assert status["status"] != "success"
        with pytest.raises(PairingRefused, match="expired"):
            await wa.phone("+60123456789").scan(qr)
        with pytest.raises(PairingRefused, match="not the text"):
            await wa.phone("+60123456789").scan("hello")


async def test_two_real_clients_write_to_each_other(linked: Linked) -> None:
    """Customer and shop are both gateways here: nothing but real clients decrypts."""
    async with a_client(linked.wa) as other:
        ali = linked.wa.person("+60111222444", "Ali")
        await other.do("connect", db=f"{linked.wa.folder}/other.db")
        device = await ali.scan((await other.wait("qr"))["qr"])
        await other.wait("ConnectedEv")
        await linked.wa.wait_online(device)
        async with comes_back(linked) as second:  # the shop's client was replaced before
            await other.do("send", to="60123456789", text="from client to client")
            await second.wait("MessageEv", lambda e: e["text"] == "from client to client")
            await second.do("send", to="60111222444", text="and back")
            await other.wait("MessageEv", lambda e: e["text"] == "and back")
            await other.wait("ReceiptEv", timeout=5)


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        ("banned", "TemporaryBanEv"),
        ("old", "ClientOutdatedEv"),
        ("failed", "ConnectFailureEv"),
        ("forgotten", "LoggedOutEv"),
    ],
)
async def test_a_client_learns_why_it_may_not_stay(linked: Linked, fault: str, event: str) -> None:
    async with comes_back(linked) as client:
        if fault == "forgotten":
            linked.wa.forget_device(linked.device)
        elif fault == "banned":
            linked.wa.ban(code=102, expire=600)
        else:
            linked.wa.refuse_logins(405 if fault == "old" else 400)
        await linked.wa.drop(linked.device)
        data = (await client.wait(event))["data"]
        linked.wa.clear_faults()
    if fault == "banned":
        assert int(data["Expire"]) == 600
    assert (linked.device in linked.shop.devices) is (fault != "forgotten")


@asynccontextmanager
async def comes_back(linked: Linked) -> AsyncIterator[RealClient]:
    """The shop's device once more, in a process of its own; whatever ran it before is ended first."""
    await linked.client.kill()
    async with a_client(linked.wa) as client:
        await client.do("connect", db=linked.database)
        await linked.wa.wait_online(linked.device)
        yield client


async def test_state_outlives_the_process_and_a_killed_client() -> None:
    with quick_folder() as folder:
        await _outlive(folder)


async def _outlive(folder: Path) -> None:
    async with WhatsAppSandbox(folder, autosave=True) as wa:
        linked = await link(wa)
        await arrives(linked, "before")
        await linked.client.kill()
        await wa.wait_offline(linked.device)
        waiting = [await linked.mei.send_text(linked.shop, f"waiting {n}") for n in range(3)]
    async with WhatsAppSandbox(folder) as wa, a_client(wa) as client:
        shop, mei = wa.phone("+60123456789"), wa.person("+60111222333")
        (device,) = shop.devices
        assert wa.unacked(device) == waiting
        await client.do("connect", db=f"{folder}/session.db")
        for msg_id in waiting:
            await client.message(msg_id)
        await wa.wait_drained(device)
        await client.do("send", to="60111222333", text="after all that")
        await mei.wait_for_text("after all that")


# --- the launcher ---


async def run_launcher(env: dict[str, str], *argv: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sandbox.whatsapp.launcher",
        *argv,
        env=env,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(b"typed on stdin"), 20)
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_launcher_keeps_pid_streams_and_arguments(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], sys.stdin.read(), os.getpid(), os.getppid(), os.environ['HTTPS_PROXY']]))"
    )
    async with WhatsAppSandbox(tmp_path / "state") as wa:
        argv, env = wa.child_command(str(script))
        code, out, err = await run_launcher(env, *argv[3:], "one", "two")
        assert code == 0, err
        arguments, stdin, _, parent, proxy = json.loads(out)
        assert (arguments, stdin, parent) == (["one", "two"], "typed on stdin", os.getpid())
        assert proxy == json.loads(wa.launch_file.read_text())["proxy"]


async def test_the_launcher_says_what_is_missing(tmp_path: Path) -> None:
    env = dict(os.environ)
    assert (await run_launcher(env, "module"))[2].startswith("usage:")
    code, _, err = await run_launcher(env | {"SANDBOX_WHATSAPP": str(tmp_path / "none.json")}, "module")
    assert code != 0
    assert "start the sandbox first" in err


async def test_the_launcher_refuses_a_library_it_does_not_know(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "from sandbox.whatsapp.launcher import replace_root_key\nreplace_root_key(bytes(32))"  # a second time
    )
    async with WhatsAppSandbox(tmp_path / "state") as wa:
        argv, env = wa.child_command(str(script))
        code, _, err = await run_launcher(env, *argv[3:])
        assert code != 0
        assert "found 0 times" in err
