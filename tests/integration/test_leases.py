"""Leases on the database's clock: taken, renewed, run out, fenced by epoch, freed when their owner is proven dead."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.channel import SessionId
from core.database import Database
from core.ownership import Ownership
from core.store import leases
from core.store.leases import Bid
from tests.support.fake_channel import FakeDispatcher, FakePlatform
from tests.support.outbound import (
    Place,
    enqueue,
    fetch,
    give_lease,
    item,
    make_place,
    reached,
    running,
    value,
)
from tests.support.postgres import PostgresServer


@pytest.fixture
async def place(database: Database) -> Place:
    made = await make_place(database, owner="nobody")
    await fetch(database, "DELETE FROM et_session_leases")
    await fetch(
        database,
        "INSERT INTO et_session_runtime (session_id, tenant_id, wanted) VALUES ($1, $2, 'connected')",
        made.session_id,
        made.tenant_id,
    )
    return made


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def owner(db: Database, name: str, folder: Path, clock: Clock | None = None) -> Ownership:
    made = Ownership(db, name, folder, renew=3600, clock=clock or Clock())
    await made.start()
    return made


async def test_one_of_two_gets_it_and_the_other_when_it_is_given_up(
    database: Database, place: Place, tmp_path: Path
) -> None:
    one, two = await owner(database, "one", tmp_path), await owner(database, "two", tmp_path)
    session = SessionId(place.session_id)
    assert await one.take([Bid(session)]) == {session}
    assert await two.take([Bid(session)]) == frozenset()
    await one.give_up([session])
    assert one.until(session) == 0
    assert await two.take([Bid(session)]) == {session}
    assert await value(database, "SELECT epoch FROM et_session_leases") == 2
    await one.stop()
    await two.stop()


async def test_the_proof_ends_before_the_lease_does_and_a_renewal_extends_it(
    database: Database, place: Place, tmp_path: Path
) -> None:
    clock = Clock()
    mine = await owner(database, "one", tmp_path, clock)
    session = SessionId(place.session_id)
    await mine.take([Bid(session)])
    assert mine.until(session) == 1000 + 30 - 3
    clock.now = 1010
    await mine.renew()
    assert mine.until(session) == 1010 + 30 - 3
    left = await value(
        database, "SELECT extract(epoch FROM expires_at - clock_timestamp())::FLOAT8 FROM et_session_leases"
    )
    assert 28 < left <= 30
    await mine.stop()


async def test_a_lease_that_ran_out_is_taken_and_the_old_owner_learns_it(
    database: Database, place: Place, tmp_path: Path
) -> None:
    lost: list[SessionId] = []
    session = SessionId(place.session_id)
    slow = Ownership(database, "slow", tmp_path / "a", renew=3600, on_lost=lost.extend)
    await slow.start()
    quick = await owner(database, "quick", tmp_path / "b")
    await slow.take([Bid(session)])
    await fetch(database, "UPDATE et_session_leases SET expires_at = now() - INTERVAL '1 second'")
    await slow.renew()
    assert slow.until(session) > 0, "nobody took it: it is ours again"
    await fetch(database, "UPDATE et_session_leases SET expires_at = now() - INTERVAL '1 second'")
    assert await quick.take([Bid(session)]) == {session}
    await slow.renew()
    assert lost == [session]
    assert slow.until(session) == 0
    assert await value(database, "SELECT owner FROM et_session_leases") == "quick"
    await slow.stop()
    assert await value(database, "SELECT owner FROM et_session_leases WHERE expires_at > now()") == "quick"
    await quick.stop()


async def test_files_bind_a_session_to_its_folder(database: Database, place: Place, tmp_path: Path) -> None:
    here, there = (
        await owner(database, "here", tmp_path / "a"),
        await owner(database, "there", tmp_path / "b"),
    )
    session = SessionId(place.session_id)
    assert here.data_dir_id != there.data_dir_id
    assert await here.take([Bid(session, here.data_dir_id)]) == {session}
    await here.give_up([session])
    assert await there.take([Bid(session, there.data_dir_id)]) == frozenset()
    assert await here.take([Bid(session, here.data_dir_id)]) == {session}
    await here.stop()
    await there.stop()


def spawn(program: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)


async def test_a_killed_owner_on_our_folder_is_proven_dead(
    database: Database, place: Place, tmp_path: Path, migrated_url: str
) -> None:
    """A real process with a real kill -9: the operating system frees its lock, nothing else tells of its end."""
    program = f"""
import asyncio
from pathlib import Path
from core.database import Database
from core.ownership import Ownership
from core.store.leases import Bid

async def main():
    db = await Database.open({migrated_url!r})
    owner = Ownership(db, "victim", Path({str(tmp_path)!r}))
    await owner.start()
    await owner.take([Bid({place.session_id})])
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    process = spawn(program)
    try:
        assert process.stdout is not None
        while b"ready" not in (line := process.stdout.readline()):
            assert line, "the other gateway did not start"
        session = SessionId(place.session_id)
        mine = await owner(database, "mine", tmp_path)
        assert await mine.bury_dead() == []
        assert await mine.take([Bid(session)]) == frozenset()
        process.kill()
        process.wait(10)
        assert await mine.bury_dead() == ["victim"]
        assert await mine.take([Bid(session)]) == {session}
        assert await value(database, "SELECT count(*) FROM et_gateways WHERE owner = 'victim'") == 0
        await mine.stop()
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


async def test_the_same_owner_name_cannot_run_twice(database: Database, place: Place, tmp_path: Path) -> None:
    first = await owner(database, "one", tmp_path)
    with pytest.raises(BlockingIOError):
        await owner(database, "one", tmp_path)
    await first.stop()


async def test_a_stale_owner_cannot_renew_what_another_epoch_holds(database: Database, place: Place) -> None:
    session = SessionId(place.session_id)
    async with database.worker() as conn:
        assert await leases.take(conn, "a", [Bid(session)], ttl=30) == {session: 1}
        assert await leases.seize(conn, "b", session, ttl=30) == 2
        assert await leases.renew(conn, "a", {session: 1}, ttl=30) == frozenset()
        await leases.give_up(conn, "a", [session])
        assert await leases.holder(conn, session) == "b"


async def test_a_stale_owner_claims_nothing_and_the_new_one_sends(database: Database, place: Place) -> None:
    platform = FakePlatform()
    await give_lease(database, place, "new")
    queue_id = await enqueue(database, place, "x")
    everything = FakeDispatcher(platform, [place.session_id])
    async with running(database, everything, owner="stale"):
        with pytest.raises(AssertionError):
            await reached(database, queue_id, "sent", seconds=0.5)
    assert (await item(database, queue_id))["claim_epoch"] == 0
    async with running(database, everything, owner="new"):
        assert (await reached(database, queue_id, "sent"))["claimed_by"] == "new"


async def test_while_the_database_is_away_nothing_is_forgotten_and_the_proof_runs_out(
    private_postgres: PostgresServer, tmp_path: Path
) -> None:
    from tests.conftest import migrate_blocking

    url = private_postgres.create_database()
    migrate_blocking(url)
    db = await Database.open(url)
    clock = Clock()
    try:
        place = await make_place(db, owner="nobody")
        await fetch(db, "DELETE FROM et_session_leases")
        await fetch(
            db,
            "INSERT INTO et_session_runtime (session_id, tenant_id) VALUES ($1, $2)",
            place.session_id,
            place.tenant_id,
        )
        session = SessionId(place.session_id)
        mine = await owner(db, "one", tmp_path, clock)
        await mine.take([Bid(session)])
        private_postgres.kill()
        with pytest.raises(Exception):  # noqa: B017, PT011  (whatever a dead server makes of it)
            await mine.renew()
        assert mine.held == {session}
        clock.now += 28
        assert mine.until(session) < clock.now
        private_postgres.restart()
        for _ in range(50):
            try:
                await mine.renew()
                break
            except Exception:
                await asyncio.sleep(0.1)
        assert mine.until(session) > clock.now
        await mine.stop()
    finally:
        await db.close()
