"""The checker finds each thing it is there to find: a harness that cannot fail proves nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import checker
from tests.faults.checker import Class, QueueRow, Report, Stint
from tests.faults.ledger import ACKNOWLEDGED, ANSWERED, CALLED, OFFERED, Entry, Ledger, read

_clock = itertools.count()


def entry(kind: str, item: str = "a", **fields: object) -> Entry:
    return Entry(kind, item, float(next(_clock)), 0.0, fields)


OFFER, ACK = entry(OFFERED), entry(ACKNOWLEDGED)


@pytest.mark.parametrize(
    ("ledger", "stored", "expected"),
    [
        ([OFFER, ACK], ["a"], Class.OK),
        ([OFFER, OFFER, ACK], ["a"], Class.RECOVERED),
        ([OFFER], ["a"], Class.RECOVERED),
        ([OFFER], [], Class.UNKNOWN),
        ([OFFER, ACK], [], Class.LOST),
        ([OFFER, ACK], ["a", "a"], Class.DUPLICATED),
        ([OFFER], ["a", "a"], Class.DUPLICATED),
        ([], ["a"], Class.UNEXPECTED),
    ],
)
def test_every_fate_of_a_message_has_its_class(
    ledger: list[Entry], stored: list[str], expected: Class
) -> None:
    assert checker.inbound(ledger, stored).by_item == {"a": expected}


def call(epoch: int, item: str = "a", **fields: object) -> Entry:
    return entry(CALLED, item, epoch=epoch, **fields)


def answer(epoch: int, outcome: str, item: str = "a") -> Entry:
    return entry(ANSWERED, item, epoch=epoch, outcome=outcome)


@pytest.mark.parametrize(
    ("ledger", "row", "expected"),
    [
        ([call(1), answer(1, "sent")], QueueRow("a", "sent"), Class.OK),
        ([call(1)], QueueRow("a", "sent"), Class.RECOVERED),
        ([call(1), answer(1, "dropped")], QueueRow("a", "sent"), Class.RECOVERED),
        ([call(2), answer(2, "sent")], QueueRow("a", "sent", 2), Class.RECOVERED),
        (
            [call(1), answer(1, "not_sent"), call(2), answer(2, "sent")],
            QueueRow("a", "sent", 2),
            Class.RECOVERED,
        ),
        ([call(1)], QueueRow("a", "unknown"), Class.UNKNOWN),
        ([], QueueRow("a", "unknown"), Class.UNKNOWN),
        ([], QueueRow("a", "sent"), Class.LOST),
        ([call(1), answer(1, "not_sent")], QueueRow("a", "sent"), Class.LOST),
        ([], QueueRow("a", "queued"), Class.LOST),
        ([call(1)], QueueRow("a", "dispatching"), Class.LOST),
        ([], QueueRow("a", "failed"), Class.LOST),
        ([call(1), answer(1, "sent"), call(2)], QueueRow("a", "sent", 2), Class.DUPLICATED),
        ([call(1), call(1)], QueueRow("a", "sent"), Class.DUPLICATED),
        ([call(1), call(2)], QueueRow("a", "unknown", 2), Class.DUPLICATED),
        ([call(1), answer(1, "sent")], QueueRow("a", "failed"), Class.UNEXPECTED),
        ([call(1)], QueueRow("a", "cancelled"), Class.UNEXPECTED),
        ([call(1)], None, Class.UNEXPECTED),
        ([], QueueRow("a", "cancelled"), Class.OK),
    ],
)
def test_every_fate_of_a_send_has_its_class(
    ledger: list[Entry], row: QueueRow | None, expected: Class
) -> None:
    assert checker.outbound(ledger, [row] if row else []).by_item == {"a": expected}


def test_a_refusal_that_was_scripted_is_right() -> None:
    ledger = [call(1), answer(1, "refused")]
    assert checker.outbound(ledger, [QueueRow("a", "failed")], refused=["a"]).counts == {Class.OK: 1}


def test_second_sends_are_counted_and_definite_failures_are_not() -> None:
    assert checker.second_sends([call(1), answer(1, "not_sent"), call(2), answer(2, "sent")]) == 0
    assert checker.second_sends([call(1), call(2), call(3)]) == 2
    assert checker.second_sends([call(1), call(1)]) == 1
    assert checker.second_sends([call(1, "a"), call(1, "b")]) == 0


def test_inversions_count_pairs_within_a_thread_only() -> None:
    assert checker.inversions([("a", 1), ("b", 9), ("a", 2), ("b", 10)]) == 0
    assert checker.inversions([("a", 2), ("a", 1)]) == 1
    assert checker.inversions([("a", 3), ("b", 1), ("a", 1), ("a", 2)]) == 2


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20)), max_size=30))
def test_inversions_are_what_the_slow_way_counts(rows: list[tuple[str, int]]) -> None:
    slow = sum(
        a[0] == b[0] and a[1] > b[1] for n, a in enumerate(rows) for b in rows[n + 1 :]
    )  # fmt: skip
    assert checker.inversions(rows) == slow


def test_two_owners_sending_at_once_overlap() -> None:
    ledger = [
        Entry(CALLED, "q", at, 0.0, {"session": 1, "owner": owner, "connection": connection})
        for at, owner, connection in [(0, "A", 1), (4, "A", 1), (3, "B", 2), (9, "B", 2), (10, "A", 3)]
    ]
    found = checker.stints(ledger)
    assert Stint("1", "A", 0, 4) in found
    assert checker.overlap(found) == 1
    assert checker.overlap([Stint("1", "A", 0, 4), Stint("2", "B", 1, 3)]) == 0
    assert checker.overlap([Stint("1", "A", 0, 4), Stint("1", "B", 4, 6)]) == 0


def test_a_report_names_what_broke_and_says_that_it_did() -> None:
    report = Report("p0", 7)
    report.add("inbound", checker.inbound([OFFER, ACK], ["a"]))
    report.zero("inversions", 0)
    assert report.held
    assert "held" in report.text()
    report.add("inbound", checker.inbound([OFFER, ACK], []))
    report.zero("inversions", 2)
    report.at_most("takeover_s", 46, 45)
    report.check("health said so", False)
    assert len(report.problems) == 4
    assert "BROKEN  seed=7" in report.text()
    assert "lost=1" in report.text()


def test_a_ledger_survives_its_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with Ledger(path) as ledger:
        ledger.write(OFFERED, "m1", thread="t")
        ledger.write_many(ACKNOWLEDGED, [("m1", {}), ("m2", {})])
    with path.open("ab") as torn:
        torn.write(b'{"kind":"offered","item":"m3"')
    with Ledger(tmp_path / "other") as other:
        other.write(CALLED, 5, epoch=1)
    found = read(path, tmp_path / "other", tmp_path / "missing")
    assert [(e.kind, e.item) for e in found] == [
        (OFFERED, "m1"),
        (ACKNOWLEDGED, "m1"),
        (ACKNOWLEDGED, "m2"),
        (CALLED, "5"),
    ]
    assert found[0].fields == {"thread": "t"}


def test_percentiles_are_of_the_values_there_are() -> None:
    assert checker.percentiles([]) == {}
    assert checker.percentiles([2, 1]) == {"p50": 1, "p95": 2, "p99": 2, "max": 2}
    assert checker.percentiles(range(1, 101)) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
