"""Nothing is acknowledged before it is durable, and nothing is lost when the child dies at the worst moment."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from core.journal import Journal
from gateway.whatsapp.protocol import journal_path
from sandbox.whatsapp.phone import Phone
from tests.integration.whatsapp.conftest import Session
from tests.support.whatsapp_sink import alive, until


def kill(session: Session) -> None:
    os.kill(session.pid, signal.SIGKILL)


async def restart_with(session: Session, monkeypatch: pytest.MonkeyPatch, faults: str) -> None:
    """A new child with these fault points armed; the old one is killed."""
    monkeypatch.setenv("FAULTS", faults)
    logins = len(session.wa.logins)
    pid = session.pid
    kill(session)
    await until(lambda: not alive(pid))
    await until(lambda: len(session.wa.logins) > logins)
    assert session.device is not None
    await session.wa.wait_online(session.device)
    monkeypatch.delenv("FAULTS", raising=False)


@pytest.mark.parametrize("chat", ["direct", "group"])
async def test_with_the_callback_blocked_nothing_is_acknowledged_and_all_of_it_heals(
    session: Session, mei: Phone, monkeypatch: pytest.MonkeyPatch, chat: str
) -> None:
    eve = session.wa.person("+60199888777", "Eve", auto_receipts=None)
    group = session.wa.group([mei, session.shop, eve], "Team")

    async def write(author: Phone, text: str) -> str:
        if chat == "group":
            return await author.send_group(group, text)
        return await author.send_text(session.shop, text)

    for author in (mei, eve):  # sessions and group keys exist
        await session.sink.message(await write(author, "before"))
    await restart_with(session, monkeypatch, "whatsapp.callback=sleep:3600")
    ids = [await write(author, f"{n}") for n in range(10) for author in (mei, eve)]
    await asyncio.sleep(1.5)
    assert [i for i in ids if session.wa.acked(i)] == []
    assert not session.journaled() & set(ids)
    assert not session.wa.retries

    # Decrypted by the first child and stored nowhere: only the senders' phones can still help.
    kill(session)
    await session.sink.all_of(ids)
    contents = {m.channel_message_id: m.content for m in session.sink.messages.values() if not m.placeholder}
    assert [contents[i] for i in ids] == [f"{n}" for n in range(10) for _ in range(2)]
    assert len(session.wa.retries) > 0
    assert session.device is not None
    await session.wa.wait_drained(session.device)
    # The session works both ways afterwards, for everyone.
    for author in (mei, eve):
        await session.sink.message(await write(author, "after"))
    await session.channel.send(session.text("whatsapp:+60111222333", "still here"))
    await mei.wait_for_text("still here")


async def test_a_child_killed_again_and_again_mid_traffic_loses_and_doubles_nothing(
    session: Session, mei: Phone
) -> None:
    authors = [mei, *(session.wa.person(f"+6019988800{n}", f"P{n}") for n in range(3))]
    ids: list[str] = []
    for _round in range(3):
        for n in range(12):
            ids.append(await authors[n % 4].send_text(session.shop, f"text {len(ids)}"))
            await asyncio.sleep(0.01)
            if n == 7:
                kill(session)
        await session.sink.stands("active")
        await until(session.channel._supervisor.link.is_set)
    await session.sink.all_of(ids)
    stored = [m for m in session.sink.messages.values() if not m.placeholder]
    assert sorted(m.channel_message_id for m in stored) == sorted(ids)
    assert session.metrics.child_exits.labels("whatsapp")._value.get() >= 3


@pytest.mark.parametrize(
    "point",
    ["whatsapp.callback", "whatsapp.journal.before", "journal.before_fsync", "whatsapp.journal.after"],
)
async def test_a_kill_at_each_step_of_the_callback_loses_nothing(
    session: Session, mei: Phone, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    await session.sink.message(await mei.send_text(session.shop, "before"))
    await restart_with(session, monkeypatch, f"{point}=kill")
    sent = await mei.send_text(session.shop, f"killed at {point}")
    assert (await session.sink.message(sent)).content == f"killed at {point}"
    ack = await session.wa.wait_acked(sent)
    with Journal(journal_path(session.context.folder)) as journal:
        appended = journal._query("SELECT min(appended_at) FROM entries WHERE key LIKE ?", (f"{sent} %",))
    assert ack.at >= appended[0][0]


async def test_a_message_whose_sender_never_answers_is_reported_as_possible_loss(
    session: Session, mei: Phone
) -> None:
    sent = await mei.send_garbage(session.shop, "never readable", repair="garbage")
    loss = session.metrics.possible_loss.labels("whatsapp")
    await session.sink.wait(lambda: loss._value.get() >= 1 and bool(session.sink.messages))
    [held] = [m for m in session.sink.messages.values() if m.channel_message_id == sent]
    assert held.placeholder
    assert any(m.raw_payload.get("possible_loss") for m in session.sink.calls)


async def test_a_journal_that_cannot_write_acknowledges_nothing_until_it_can(
    session: Session, mei: Phone, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.sink.message(await mei.send_text(session.shop, "before"))
    await restart_with(session, monkeypatch, "whatsapp.journal.before=raise")
    monkeypatch.setenv("FAULTS", "whatsapp.journal.before=raise")
    sent = await mei.send_text(session.shop, "nowhere to put it")
    state = await session.sink.stands("disconnected", "journal_failed")
    assert "Free space" in (state.action or "")
    assert session.wa.acked(sent) is None
    monkeypatch.delenv("FAULTS")
    assert (await session.sink.message(sent)).content == "nowhere to put it"
    await session.sink.stands("active")


async def test_while_the_database_is_away_messages_wait_in_the_journal_in_order(
    session: Session, mei: Phone
) -> None:
    session.sink.away = True
    ids = [await mei.send_text(session.shop, f"{n}") for n in range(20)]
    for sent in ids:
        await session.wa.wait_acked(sent)  # durable, so WhatsApp may forget them
    assert session.sink.calls == []
    session.sink.away = False
    await session.sink.all_of(ids)
    assert [m.channel_message_id for m in session.sink.calls] == ids


async def test_what_a_dead_gateway_left_in_the_journal_is_stored_before_connecting(
    session: Session, mei: Phone
) -> None:
    session.sink.away = True
    ids = [await mei.send_text(session.shop, f"{n}") for n in range(5)]
    for sent in ids:
        await session.wa.wait_acked(sent)
    await session.channel.disconnect()
    session.sink.away = False
    await session.wa.go_down()  # WhatsApp itself cannot help
    await session.channel.connect()
    await session.sink.all_of(ids)
    assert [m.channel_message_id for m in session.sink.calls] == ids


async def test_one_message_that_the_database_refuses_does_not_hold_up_the_others(
    session: Session, mei: Phone
) -> None:
    session.sink.refuse = lambda message: message.content == "poison"
    first = await mei.send_text(session.shop, "poison")
    second = await mei.send_text(session.shop, "fine")
    assert (await session.sink.message(second)).content == "fine"
    stored = await session.sink.message(first)
    assert (stored.message_type, stored.content) == ("unsupported", None)
    assert stored.raw_payload["payload_base64"]
