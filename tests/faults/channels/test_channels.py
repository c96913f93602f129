"""The short form of P1, P4 and P6 over the channels that fetch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.channels import p146
from tests.faults.run import Plan


@pytest.mark.timeout(300)
async def test_nothing_is_lost_or_sent_twice_over_channels_that_fetch(tmp_path: Path) -> None:
    report = await p146.run(Plan(seed=1, folder=tmp_path, short=True))
    print(report.text())  # what CI shows of a run that did not hold, and -s of any
    assert report.held, report.text()
