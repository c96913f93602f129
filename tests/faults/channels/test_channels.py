"""The short form of P1, P4 and P6 over the channels that fetch."""

from __future__ import annotations

from pathlib import Path

from tests.faults.channels import p146
from tests.faults.run import Plan


async def test_nothing_is_lost_or_sent_twice_over_channels_that_fetch(tmp_path: Path) -> None:
    report = await p146.run(Plan(seed=1, folder=tmp_path, short=True))
    print(report.text())
    assert report.held, report.text()
