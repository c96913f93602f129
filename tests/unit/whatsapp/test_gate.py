"""The send gate on whatsmeow's own log lines, without whatsmeow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from gateway.whatsapp.gate import Gate, GateTimings, bare, key_of

MEI, GROUP = "100000000020000@lid", "120363000000000001@g.us"
RECV = (
    f'<message addressing_mode="lid" from="{MEI}" id="A1" notify="S" t="1" type="text">'
    '<enc type="msg" v="2">33</enc></message>'
)
RECV_GROUP = (
    f'<message addressing_mode="lid" from="{GROUP}" id="G1" notify="S" participant="{MEI}" t="1" type="text">'
    '<enc type="msg" v="2"><!-- 162 bytes --></enc><enc type="skmsg" v="2">33</enc></message>'
)
RECEIPT = f'<receipt id="A1" to="{MEI}" type="inactive"/>'
RECEIPT_GROUP = f'<receipt id="G1" participant="{MEI}" to="{GROUP}" type="inactive"/>'
OLD_COUNTER = (
    f"Ignoring message A1 from {MEI}: failed to decrypt normal message: old counter (index: 4, count: 3)"
)
UNREADABLE = f"Error decrypting message A1 from {MEI}: failed to parse normal message: proto"
RETRY = f'<receipt id="A1" to="{MEI}" type="retry"><retry count="1" id="A1" t="1" v="1"/></receipt>'
ACK = f'<ack class="message" id="A1" to="{MEI}"/>'


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Goroutine:
    """One of whatsmeow's goroutines about to send a frame."""

    def __init__(self, gate: Gate, text: str) -> None:
        self.passed = threading.Event()

        def send() -> None:
            gate.on_log("Client/Send", text)
            self.passed.set()

        threading.Thread(target=send, daemon=True).start()

    @property
    def held(self) -> bool:
        """Still there after a moment."""
        return not self.passed.wait(0.05)

    @property
    def left(self) -> bool:
        return self.passed.wait(3)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(clock=clock, sleep=lambda _s: None)


@pytest.mark.parametrize("kind", ["", ' type="inactive"', ' type="sender"', ' type="peer_msg"'])
def test_a_receipt_waits_until_its_message_is_stored(gate: Gate, kind: str) -> None:
    receipt = Goroutine(gate, f'<receipt id="A1" to="{MEI}"{kind}/>')
    assert receipt.held
    gate.stored("A2", [MEI])
    gate.stored("A1", ["100000000030000@lid"])  # somebody else's message with the same id
    assert receipt.held
    gate.stored("A1", [MEI])
    assert receipt.left


@pytest.mark.parametrize(
    "text",
    [
        f'<receipt id="A1" to="{MEI}" type="read"/>',
        f'<receipt id="A1" to="{MEI}" type="played"/>',
        f'<ack class="receipt" id="A1" to="{MEI}"/>',
        f'<ack class="message" id="A1" to="{MEI}"/>',  # of a message without trouble
        f'<message id="A1" to="{MEI}"/>',
        '<iq id="1" type="get"/>',
    ],
)
def test_what_takes_nothing_off_the_queue_passes(gate: Gate, text: str) -> None:
    assert Goroutine(gate, text).left


@pytest.mark.parametrize(
    "text",
    [
        f'<receipt id="A1" participant="{MEI}" to="{GROUP}"/>',
        f'<receipt id="A1" recipient="100000000030000@lid" to="{MEI}" type="sender"/>',
        f'<receipt id="A1" recipient="{MEI}" to="100000000030000@lid" type="sender"/>',
        '<receipt id="A1" to="100000000020000:7@lid"/>',  # from one of several devices
        '<receipt id="A1" to="15550002000@s.whatsapp.net"/>',  # the other form of the same person
    ],
)
def test_the_sender_is_found_wherever_the_receipt_names_it(gate: Gate, text: str) -> None:
    receipt = Goroutine(gate, text)
    assert receipt.held
    gate.stored("A1", [MEI, "15550002000@s.whatsapp.net"])
    assert receipt.left


def test_a_message_that_is_stored_wakes_no_other_receipt(gate: Gate) -> None:
    waiting = [Goroutine(gate, RECEIPT.replace("A1", f"A{n}")) for n in range(100)]
    assert waiting[-1].held
    spent = time.process_time()
    for n in range(200):
        gate.stored(f"B{n}", [MEI])
        time.sleep(0.001)
    assert time.process_time() - spent < 0.1  # ten times as much when each of the hundred looks each time
    for n in range(100):
        gate.stored(f"A{n}", [MEI])
    assert all(receipt.left for receipt in waiting)


def test_messages_of_an_earlier_life_are_known() -> None:
    assert Goroutine(Gate([key_of("A1", MEI)]), RECEIPT).left


def test_time_alone_releases_nothing_while_a_callback_runs(gate: Gate, clock: Clock) -> None:
    receipt = Goroutine(gate, RECEIPT)
    with gate.callback():
        clock.now += 10_000
        assert not gate.look()
        assert receipt.held


def test_a_receipt_for_which_no_event_came_is_reported_and_still_held(gate: Gate, clock: Clock) -> None:
    receipt = Goroutine(gate, RECEIPT)
    assert receipt.held
    clock.now += GateTimings().orphan + 1
    [lost] = gate.look().lost
    assert (lost.message_id, lost.sender, lost.reason) == ("A1", MEI, "no_event")
    assert receipt.held  # until its placeholder is durable
    gate.stored("A1", [MEI], confirmed_later=False)
    assert receipt.left


def test_nothing_leaves_once_the_journal_failed(gate: Gate) -> None:
    gate.stored("A1", [MEI])
    gate.fail()
    assert Goroutine(gate, RECEIPT).held
    assert Goroutine(gate, RETRY).held
    assert Goroutine(gate, ACK).held


# ---- groups


def test_the_group_key_alone_lets_no_receipt_of_its_message_go(gate: Gate) -> None:
    gate.on_log("Client/Recv", RECV_GROUP)
    receipt = Goroutine(gate, RECEIPT_GROUP)
    gate.key_distribution("G1", [MEI])
    assert receipt.held
    gate.stored("G1", [MEI])
    assert receipt.left


def test_a_stanza_with_nothing_but_the_group_key_is_acknowledged(gate: Gate) -> None:
    gate.on_log("Client/Recv", RECV_GROUP.replace('<enc type="skmsg" v="2">33</enc>', ""))
    receipt = Goroutine(gate, RECEIPT_GROUP)
    assert receipt.held
    gate.key_distribution("G1", [MEI])
    assert receipt.left


# ---- healing


def test_a_message_that_was_decrypted_but_never_stored_asks_for_healing_and_is_not_acknowledged(
    gate: Gate, clock: Clock
) -> None:
    gate.on_log("Client/Recv", RECV)
    gate.on_log("Client", OLD_COUNTER)
    receipt = Goroutine(gate, RECEIPT)
    assert not gate.look()  # it may still come
    clock.now += 1
    [suspect] = gate.look().heal
    assert (suspect.message_id, suspect.sender, suspect.chat) == ("A1", MEI, MEI)
    assert suspect.reason.startswith("failed to decrypt normal message")
    assert receipt.held
    assert not gate.look().heal


def test_the_chat_of_an_ignored_group_message_is_known(gate: Gate, clock: Clock) -> None:
    gate.on_log("Client/Recv", RECV_GROUP)
    gate.on_log("Client", f"Ignoring message G1 from {MEI} in {GROUP}: failed to decrypt group message: old")
    clock.now += 1
    [suspect] = gate.look().heal
    assert (suspect.sender, suspect.chat) == (MEI, GROUP)


def test_a_repeat_of_a_stored_message_needs_no_healing(gate: Gate, clock: Clock) -> None:
    gate.on_log("Client/Recv", RECV)
    gate.stored("A1", [MEI])
    gate.on_log("Client", OLD_COUNTER)
    clock.now += 1
    assert not gate.look().heal
    assert Goroutine(gate, RECEIPT).left


def test_a_message_stored_a_moment_later_needs_no_healing(gate: Gate, clock: Clock) -> None:
    gate.on_log("Client/Recv", RECV)
    gate.on_log("Client", OLD_COUNTER)
    gate.stored("A1", [MEI])
    clock.now += 1
    assert not gate.look().heal


def test_an_id_that_imitates_a_log_line_heals_nobody_else(gate: Gate, clock: Clock) -> None:
    gate.on_log("Client/Recv", RECV)
    gate.on_log("Client", f"Ignoring message X from 100000000030000@lid: y from {MEI}: old counter")
    clock.now += 1
    assert not gate.look().heal


def test_a_message_healed_often_enough_is_called_lost(clock: Clock) -> None:
    gate = Gate(give_up=[key_of("A1", MEI)], clock=clock)
    gate.on_log("Client/Recv", RECV)
    gate.on_log("Client", OLD_COUNTER)
    clock.now += 11
    found = gate.look()
    assert not found.heal
    assert [s.message_id for s in found.lost] == ["A1"]


# ---- unreadable messages


def test_an_unreadable_message_asks_again_only_after_its_placeholder_is_stored(gate: Gate) -> None:
    gate.on_log("Client/Recv", RECV)
    gate.on_log("Client", UNREADABLE)
    retry, ack = Goroutine(gate, RETRY), Goroutine(gate, ACK)
    assert retry.held
    assert ack.held
    gate.noted("A1", [MEI])
    assert retry.left
    assert ack.left


def test_the_acknowledgement_waits_for_the_retry_receipt(gate: Gate) -> None:
    gate.on_log("Client", UNREADABLE)
    gate.noted("A1", [MEI])
    ack = Goroutine(gate, ACK)
    assert ack.held
    assert Goroutine(gate, RETRY).left
    assert ack.left


def test_an_acknowledgement_with_an_error_waits_for_no_retry_receipt(gate: Gate) -> None:
    gate.on_log("Client", UNREADABLE)
    ack = Goroutine(gate, f'<ack class="message" error="491" id="A1" to="{MEI}"/>')
    assert ack.held
    gate.noted("A1", [MEI])
    assert ack.left


def test_when_whatsmeow_gives_up_the_message_is_reported_as_lost(gate: Gate) -> None:
    gate.on_log("Client", UNREADABLE)
    gate.noted("A1", [MEI])
    ack = Goroutine(gate, ACK)
    gate.on_log("Client", "Not sending any more retry receipts for A1")
    assert ack.left
    assert [s.message_id for s in gate.look().lost] == ["A1"]


def test_an_unavailable_message_is_acknowledged_after_its_placeholder(gate: Gate) -> None:
    gate.on_log("Client", f'Unavailable message A1 from {MEI} (type: "view_once")')
    ack = Goroutine(gate, ACK)
    assert ack.held
    gate.noted("A1", [MEI])
    assert ack.left


# ---- the alarm


def test_a_stored_message_whose_receipt_never_passes_raises_the_alarm_once(gate: Gate, clock: Clock) -> None:
    gate.stored("A1", [MEI])
    clock.now += GateTimings().alarm - 1
    assert not gate.look()
    clock.now += 2
    assert gate.look().unconfirmed == 1
    assert not gate.look()


def _receipt_before(gate: Gate) -> None:
    receipt = Goroutine(gate, RECEIPT)
    assert receipt.held
    gate.stored("A1", [MEI])
    assert receipt.left


def _receipt_after(gate: Gate) -> None:
    gate.stored("A1", [MEI])
    assert Goroutine(gate, RECEIPT).left


def _link_lost(gate: Gate) -> None:
    gate.stored("A1", [MEI])
    gate.disconnected()


def _receipt_of_a_repeat_first(gate: Gate) -> None:
    _receipt_before(gate)
    assert Goroutine(gate, RECEIPT).left
    gate.stored("A1", [MEI])


def _no_receipt_expected(gate: Gate) -> None:
    gate.stored("A1", [MEI], confirmed_later=False)


@pytest.mark.parametrize(
    "story",
    [_receipt_before, _receipt_after, _receipt_of_a_repeat_first, _link_lost, _no_receipt_expected],
)
def test_no_alarm_without_reason(gate: Gate, clock: Clock, story: Callable[[Gate], None]) -> None:
    story(gate)
    clock.now += 100
    assert gate.look().unconfirmed == 0


def test_keepalive_answers_are_no_sign_of_hearing(gate: Gate, clock: Clock) -> None:
    clock.now += 60
    gate.on_log("Client/Recv", '<iq from="s.whatsapp.net" id="1" type="result"/>')
    assert gate.silent_for == 60
    gate.on_log("Client/Recv", RECV)
    assert gate.silent_for == 0


def test_many_receipts_wait_at_once_and_leave_in_any_order(gate: Gate) -> None:
    waiting = [Goroutine(gate, f'<receipt id="M{n}" to="{MEI}"/>') for n in range(101)]
    time.sleep(0.1)
    assert gate.statistics.held_peak == 101
    for n in reversed(range(101)):
        gate.stored(f"M{n}", [MEI])
    assert all(receipt.left for receipt in waiting)
    assert gate.statistics.gated == 101


@pytest.mark.parametrize(
    ("jid", "plain"),
    [
        ("100000000020000:7@lid", "100000000020000@lid"),
        ("60123456789.0:3@s.whatsapp.net", "60123456789@s.whatsapp.net"),
        ("100_1:3@lid", "100@lid"),
        ("120363000000000001@g.us", "120363000000000001@g.us"),
        ("", ""),
        ("nonsense", "nonsense"),
    ],
)
def test_devices_and_agents_do_not_tell_senders_apart(jid: str, plain: str) -> None:
    assert bare(jid) == plain
