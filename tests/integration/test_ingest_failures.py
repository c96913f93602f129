"""The database goes away under load: nothing that was confirmed is lost, nothing is stored twice, nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from core import faults
from core.database import Database
from core.errors import DatabaseUnavailable
from core.metrics import Metrics
from tests.conftest import migrate_blocking
from tests.support.inbound import Place, make_place, phone, running
from tests.support.postgres import PostgresServer


@pytest.fixture
async def own_database(private_postgres: PostgresServer) -> AsyncIterator[Database]:
    url = private_postgres.create_database()
    migrate_blocking(url)
    database = await Database.open(url)
    yield database
    await database.close()


@pytest.fixture
async def place(own_database: Database) -> Place:
    return await make_place(own_database)


@pytest.fixture(autouse=True)
def no_faults() -> object:
    yield
    faults.disarm()


async def test_kill_9_of_the_server_mid_load_loses_and_doubles_nothing(
    private_postgres: PostgresServer, own_database: Database, place: Place
) -> None:
    confirmed: set[str] = set()
    stop = asyncio.Event()

    async def sender(n: int) -> int:
        i = 0
        while not stop.is_set():
            name = f"{n}-{i}"
            while name not in confirmed:
                try:
                    await ingest.submit([place.message(name, phone(n), str(i))])
                    confirmed.add(name)
                except DatabaseUnavailable:
                    await asyncio.sleep(0.02)  # it is in the journal: bring the same one again
            i += 1
        return i

    async with running(own_database, patience=1.0) as ingest:
        senders = [asyncio.create_task(sender(n)) for n in range(24)]
        chance = random.Random(3)
        for _ in range(3):
            await asyncio.sleep(chance.uniform(0.2, 0.5))
            await asyncio.to_thread(private_postgres.kill)
            await asyncio.sleep(chance.choice([0.05, 1.5]))
            await asyncio.to_thread(private_postgres.restart)
        await asyncio.sleep(0.5)
        stop.set()
        counts = await asyncio.wait_for(asyncio.gather(*senders), 60)
        assert ingest.healthy
    rows = await place.rows("channel_message_id, content, thread_id")
    stored = [r["channel_message_id"] for r in rows]
    assert len(stored) == len(set(stored)), "doubled"
    assert set(stored) == confirmed, "lost, or confirmed too early"
    assert sum(counts) == len(confirmed) > 100
    last: dict[int, int] = {}
    for row in rows:
        assert last.get(row["thread_id"], -1) < int(row["content"]), "out of order"
        last[row["thread_id"]] = int(row["content"])


async def test_without_a_database_submitters_are_told_in_time_and_may_come_again(
    private_postgres: PostgresServer, own_database: Database, place: Place
) -> None:
    metrics = Metrics()
    async with running(own_database, metrics, patience=0.3) as ingest:
        await asyncio.to_thread(private_postgres.kill)
        started = time.monotonic()
        outcomes = await asyncio.gather(
            *(ingest.submit([place.message(f"M{i}")]) for i in range(150)), return_exceptions=True
        )
        assert time.monotonic() - started < 10
        assert all(isinstance(outcome, DatabaseUnavailable) for outcome in outcomes)
        assert ingest.healthy
        assert ingest.depth == 0
        with pytest.raises(DatabaseUnavailable):
            await ingest.apply_status([place.receipt("read", "A1")])
        errors = metrics.registry.get_sample_value(
            "wa_write_errors_total", {"tenant_id": str(place.tenant_id), "error_type": "database_unavailable"}
        )
        assert errors == 150
        await asyncio.to_thread(private_postgres.restart)
        for i in range(150):
            while True:
                try:
                    await ingest.submit([place.message(f"M{i}")])
                    break
                except DatabaseUnavailable:
                    assert time.monotonic() - started < 60
    assert [r["channel_message_id"] for r in await place.rows()] == [f"M{i}" for i in range(150)]


async def test_a_short_outage_is_not_even_noticed_by_submitters(
    private_postgres: PostgresServer, own_database: Database, place: Place
) -> None:
    async with running(own_database, patience=30) as ingest:
        await ingest.submit([place.message("M0")])
        await asyncio.to_thread(private_postgres.kill)
        waiting = [asyncio.create_task(ingest.submit([place.message(f"M{i}")])) for i in range(1, 50)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(private_postgres.restart)
        await asyncio.wait_for(asyncio.gather(*waiting), 30)
    assert len(await place.rows()) == 50


@pytest.mark.parametrize("point", ["ingest.before_insert", "ingest.before_commit", "ingest.after_commit"])
async def test_a_crash_at_every_point_of_a_batch_is_repaired_by_the_repeat(
    database: Database, point: str
) -> None:
    place = await make_place(database)
    hits = 0

    def gone() -> None:
        nonlocal hits
        hits += 1
        if hits == 1:
            raise ConnectionResetError("the connection went away here")

    async with running(database) as ingest:
        faults.arm(point, gone)
        [stored] = await ingest.submit([place.message("M1")])
        assert hits == 2
        # The commit was there already when the answer got lost.
        assert stored.duplicate == (point == "ingest.after_commit")
    [row] = await place.rows()
    assert row["id"] == stored.message_id


async def test_a_stop_without_a_database_ends_in_time(
    private_postgres: PostgresServer, own_database: Database, place: Place
) -> None:
    async with running(own_database, patience=60) as ingest:
        await asyncio.to_thread(private_postgres.kill)
        waiting = asyncio.create_task(ingest.submit([place.message("M1")]))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await ingest.stop(limit=0.5)
        assert time.monotonic() - started < 5
        with pytest.raises(DatabaseUnavailable, match="stopping"):
            await waiting
