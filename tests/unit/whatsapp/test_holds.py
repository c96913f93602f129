"""What must not leave before it is durable besides messages: acknowledgements of calls, receipts of history."""

from __future__ import annotations

import threading

import pytest

from gateway.whatsapp.holds import Holds

CALL = '<call from="1@lid" id="S1" t="1"><offer call-creator="1@lid" call-id="C1"><audio/></offer></call>'
ACK = '<ack class="call" id="S1" to="1@lid"/>'
RECEIPT = '<receipt id="H1" to="6@s.whatsapp.net" type="hist_sync"/>'
RECEIVED = "Received history sync (type RECENT, chunk 2, progress 50)"


class Goroutine:
    """One of whatsmeow's goroutines about to go on."""

    def __init__(self, holds: Holds, source: str, text: str) -> None:
        self.passed = threading.Event()

        def go() -> None:
            holds.on_log(source, text)
            self.passed.set()

        threading.Thread(target=go, daemon=True).start()

    @property
    def held(self) -> bool:
        return not self.passed.wait(0.05)

    @property
    def left(self) -> bool:
        return self.passed.wait(3)


@pytest.fixture
def holds() -> Holds:
    return Holds()


def test_a_call_is_acknowledged_only_when_this_part_of_it_is_stored(holds: Holds) -> None:
    holds.on_log("Client/Recv", CALL)
    ack = Goroutine(holds, "Client/Send", ACK)
    assert ack.held
    holds.call_stored("terminate", "C1")
    holds.call_stored("offer", "C2")
    assert ack.held
    holds.call_stored("offer", "C1")
    assert ack.left


def test_parts_of_a_call_that_are_not_kept_are_acknowledged_at_once(holds: Holds) -> None:
    holds.on_log("Client/Recv", CALL.replace("offer", "relaylatency"))
    assert Goroutine(holds, "Client/Send", ACK).left
    assert Goroutine(holds, "Client/Send", '<ack class="call" id="never seen" to="1@lid"/>').left


def test_a_history_receipt_waits_for_its_file(holds: Holds) -> None:
    receipt = Goroutine(holds, "Client/Send", RECEIPT)
    assert receipt.held
    holds.history_here("H2")
    assert receipt.held
    holds.history_here("H1")
    assert receipt.left


def test_the_library_deletes_a_file_only_after_we_have_it(holds: Holds) -> None:
    library = Goroutine(holds, "Client", RECEIVED)  # quicker than the event that tells us of it
    assert library.held
    holds.history_announced("H1")
    holds.history_announced("H2")
    holds.history_here("H2")
    assert library.held
    holds.history_here("H1")
    assert library.left
    assert Goroutine(holds, "Client", RECEIVED).left
    assert Goroutine(holds, "Client", RECEIVED).held


def test_a_file_the_library_could_not_have_does_not_confuse_what_follows(holds: Holds) -> None:
    for number in (1, 2):
        holds.history_announced(f"H{number}")
    holds.history_here("H1")  # given up by us as well
    holds.on_log("Client", "Failed to download history sync: status code 410")
    library = Goroutine(holds, "Client", RECEIVED)
    assert library.held
    holds.history_here("H2")
    assert library.left


def test_the_library_is_not_held_for_ever() -> None:
    holds = Holds(delete_seconds=0.05)
    assert Goroutine(holds, "Client", RECEIVED).left
    assert holds.overdue == 1


def test_other_lines_pass(holds: Holds) -> None:
    for source, text in (
        ("Client/Send", '<ack class="message" id="S1" to="1@lid"/>'),
        ("Client/Send", '<receipt id="H1" to="1@lid" type="inactive"/>'),
        ("Client/Send", '<message id="S1"><body>type="hist_sync"</body></message>'),
        ("Client", "Received something else"),
        ("Client/Recv", "<call>"),
    ):
        assert Goroutine(holds, source, text).left, text
