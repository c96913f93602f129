"""The benchmarks' arithmetic and their page: a wrong percentile or a lost paragraph would be believed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from bench import common, page
from bench.common import Figure
from bench.whatsapp import arrivals, inversions


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [common.percentile(values, p) for p in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert common.percentile([7.0], 50) == common.percentile([7.0], 99) == 7.0
    assert common.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert common.percentile([], 50) == 0.0


def test_percentiles_are_told_in_milliseconds() -> None:
    assert common.percentiles([0.001, 0.002, 0.003]) == "p50 2.0 ms, p95 3.0 ms, p99 3.0 ms"


def test_a_ratio_is_taken_round_by_round() -> None:
    # A neighbour halved both sides of the second round.
    assert common.ratio([10.0, 5.0, 12.0], [20.0, 10.0, 20.0]) == "0.50 (0.50 to 0.60)"
    assert common.ratio([1.0], [0.0]) == "–"
    assert common.rate([1000.0, 3000.0, 2000.0]) == "2,000/s (1,000 to 3,000)"


def test_the_machine_says_what_it_is() -> None:
    found = common.machine("18.4")
    assert found.cores >= 1
    assert found.memory_mb > 0
    assert "PostgreSQL 18.4" in str(found)
    assert "load average" in str(found)


def test_processor_time_of_a_process_that_is_gone_is_nothing() -> None:
    assert common.cpu_seconds([2**22 + 1]) == 0.0
    assert common.cpu_seconds([os.getpid()]) > 0.0
    assert common.memory_mb(os.getpid())[0] > 1


def test_arrivals_are_in_order_within_the_span_and_repeatable() -> None:
    first = arrivals(1000, 60.0, random.Random(1))
    assert first == sorted(first)
    assert len(first) == 1000
    assert 0.0 <= first[0] < 1.0
    assert 59.0 < first[-1] <= 60.0
    assert first == arrivals(1000, 60.0, random.Random(1))


def test_an_inversion_counts_within_a_thread_only() -> None:
    written = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert inversions([(1, "a"), (1, "b"), (1, "c")], written) == 0
    assert inversions([(1, "b"), (1, "a"), (1, "c")], written) == 1
    assert inversions([(1, "c"), (1, "a"), (1, "b")], written) == 2
    assert inversions([(1, "c"), (2, "a"), (3, "b")], written) == 0


def test_figures_go_between_the_markers_and_nowhere_else() -> None:
    text = page.render(
        [("Ingest", [Figure("rows a | second", "12\n3", "0.45")])],
        date="2026-01-02",
        machine="2 cores",
        command="python -m bench",
    )
    before = f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n"
    after = page.replace(before, text)
    assert after.startswith(
        f"# Title\n\n{page.BEGIN}\n\nMeasured 2026-01-02 on 2 cores, with `python -m bench`.\n"
    )
    assert after.endswith(f"{page.END}\n\nafter\n")
    assert "| rows a \\| second | 12 3 | 0.45 |" in after
    assert "old" not in after
    assert page.replace(after, text) == after


@pytest.mark.parametrize(
    "broken", ["", page.BEGIN, f"{page.END}{page.BEGIN}", f"{page.BEGIN}{page.BEGIN}{page.END}"]
)
def test_a_page_without_its_markers_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match="once, in this order"):
        page.replace(broken, "x")


def test_the_page_of_the_project_has_its_markers() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text()
    assert page.replace(text, "x").count(page.BEGIN) == 1
