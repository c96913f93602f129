"""The promises in the short form: the same programs as `python -m tests.faults`, few faults of each kind.

The seed is printed when one breaks; `python -m tests.faults p4 --short --seed N` repeats it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.run import Plan, load
from tests.support.postgres import PostgresServer

SEED = 7


async def held(name: str, folder: Path, **server: object) -> None:
    plan = Plan(SEED, folder, short=True)
    async with asyncio.timeout(110):
        report = plan.done(await load(name)(plan, **server))
    print(report.text())
    assert report.held, report.text()


@pytest.mark.parametrize("name", ["p2", "p3", "p4", "p5", "p8"])
async def test_a_promise_holds_while_gateways_are_broken(
    name: str, tmp_path: Path, postgres_server: PostgresServer, migrated_url: str
) -> None:
    await held(name, tmp_path, server=postgres_server, url=migrated_url)


@pytest.mark.parametrize("name", ["p6", "p7"])
async def test_a_promise_holds_while_the_database_is_broken(name: str, tmp_path: Path) -> None:
    """On servers of their own, which they kill."""
    await held(name, tmp_path)
