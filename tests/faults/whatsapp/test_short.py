"""The promises through the real WhatsApp client, in the short form: a few faults of each kind.

The seed is printed when one breaks; `python -m tests.faults p1 --short --seed N` repeats it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.run import Plan, load

SEED = 11

pytestmark = pytest.mark.timeout(420)


async def held(name: str, folder: Path, **server: object) -> None:
    plan = Plan(SEED, folder, short=True)
    async with asyncio.timeout(400):
        report = plan.done(await load(name)(plan, **server))
    print(report.text())
    assert report.held, report.text()


@pytest.mark.parametrize("name", ["p1", "p4-whatsapp", "p8-whatsapp"])
async def test_a_promise_holds_through_the_real_client(name: str, tmp_path: Path, migrated_url: str) -> None:
    await held(name, tmp_path, url=migrated_url)


async def test_a_soak_with_every_kind_of_fault_loses_and_doubles_nothing(tmp_path: Path) -> None:
    await held("soak", tmp_path)
