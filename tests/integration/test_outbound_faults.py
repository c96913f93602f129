"""P4 in small: whatever is killed, cut or frozen, an item is called at most once a try, and never again on a guess."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from asyncpg.transaction import Transaction

from core import faults, ownership
from core.database import Database
from core.dispatch import Timings
from tests.conftest import migrate_blocking
from tests.support.fake_channel import FakeDispatcher, FakePlatform
from tests.support.outbound import (
    QUICK,
    Place,
    all_reached,
    enqueue,
    eventually,
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
def platform() -> FakePlatform:
    return FakePlatform()


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.disarm()


async def left_by_a_dead_owner(db: Database, place: Place, *, called: FakePlatform | None = None) -> int:
    """A row as a killed gateway leaves it: claimed, committed, and perhaps called."""
    queue_id = await enqueue(db, place, "in flight")
    await fetch(
        db,
        "UPDATE et_outbound_queue SET status = 'dispatching', claimed_by = 'dead', claim_epoch = 1, claimed_at = now()",
    )
    if called is not None:
        called.delivered[queue_id, 1] = "FAKE-DONE"
    return queue_id


# --- after a crash


async def test_what_went_out_before_the_crash_is_found_and_not_sent_again(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    queue_id = await left_by_a_dead_owner(database, place, called=platform)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        row = await reached(database, queue_id, "sent")
    assert row["channel_message_id"] == "FAKE-DONE"
    assert not platform.calls


async def test_what_provably_never_left_goes_out_again(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    queue_id = await left_by_a_dead_owner(database, place)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        row = await reached(database, queue_id, "sent")
    assert (row["claim_epoch"], row["retry_count"]) == (2, 0)
    assert len(platform.calls) == 1


async def test_what_nobody_can_tell_stays_unknown(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.resolvable = False
    queue_id = await left_by_a_dead_owner(database, place)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        row = await reached(database, queue_id, "unknown")
        await asyncio.sleep(0.3)
    assert row["error_code"] == "no_way_to_tell"
    assert not platform.calls
    assert await value(database, "SELECT count(*) FROM et_audit_log WHERE event = 'send_failure'") == 1


async def test_a_living_owner_is_given_its_time(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    queue_id = await left_by_a_dead_owner(database, place)
    await fetch(database, "INSERT INTO et_gateways (owner, host, data_dir_id) VALUES ('dead', 'h', 'd')")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await asyncio.sleep(0.4)
        assert (await item(database, queue_id))["status"] == "dispatching"
        await fetch(database, "UPDATE et_gateways SET heartbeat_at = now() - INTERVAL '1 minute'")
        await reached(database, queue_id, "sent")


async def test_a_row_nobody_will_ever_look_at_becomes_unknown(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    queue_id = await left_by_a_dead_owner(database, place)
    await fetch(database, "UPDATE et_outbound_queue SET claimed_at = now() - INTERVAL '1 hour'")
    await fetch(database, "UPDATE et_session_leases SET expires_at = now() - INTERVAL '1 hour'")
    async with running(database, FakeDispatcher(platform, [])):
        row = await reached(database, queue_id, "unknown")
    assert row["error_code"] == "owner_gone"


# --- calls that do not end


async def test_a_call_that_never_returns_is_given_up_and_its_thread_goes_on(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    platform.script("hang", "sent")
    first, second = [await enqueue(database, place, text) for text in ("a", "b")]
    async with running(
        database, FakeDispatcher(platform, [place.session_id]), timings=replace(QUICK, watchdog=0.3)
    ):
        row = await reached(database, first, "unknown")
        assert row["error_code"] == "no_answer"
        await reached(database, second, "sent")
    assert platform.texts == ["a", "b"]


async def test_a_file_is_given_the_time_to_go_up(database: Database, platform: FakePlatform) -> None:
    assert Timings().watchdog_text + Timings().tend < 2 * ownership.TTL, "nothing hangs for two leases' time"
    place = await make_place(database)
    platform.script("hang", "hang")
    picture = await enqueue(database, place, "a", message_type="image", media_url="https://example.com/a.jpg")
    text = await enqueue(database, place, "b", to="bob")
    timings = replace(QUICK, watchdog=60, watchdog_text=0.2)
    async with running(database, FakeDispatcher(platform, [place.session_id]), timings=timings) as worker:
        row = await reached(database, text, "unknown")
        assert row["error_code"] == "no_answer"
        assert worker.in_flight == 1
        assert (await item(database, picture))["status"] == "dispatching"


async def test_an_answer_after_the_watchdog_still_counts(database: Database, platform: FakePlatform) -> None:
    place = await make_place(database)
    platform.script("deaf")
    queue_id = await enqueue(database, place, "a")
    async with running(
        database, FakeDispatcher(platform, [place.session_id]), timings=replace(QUICK, watchdog=0.2)
    ):
        await reached(database, queue_id, "unknown")
        platform.release()
        row = await reached(database, queue_id, "sent")
    assert row["channel_message_id"] == platform.delivered[queue_id, 1]
    assert len(platform.calls) == 1


async def test_a_stop_waits_for_calls_and_claims_nothing_more(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    platform.hold()
    queue_id = await enqueue(database, place, "a")
    async with running(database, FakeDispatcher(platform, [place.session_id])) as worker:
        await eventually(_true(lambda: platform.calls))
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        late = await enqueue(database, place, "late", to="bob")
        platform.release()
        await stopping
    assert (await item(database, queue_id))["status"] == "sent"
    assert (await item(database, late))["status"] == "queued"


# --- receipts and echoes


async def test_a_receipt_that_came_before_the_send_was_marked_counts(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    platform.hold()
    queue_id = await enqueue(database, place, "a")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await eventually(_true(lambda: platform.calls))
        said = await value(
            database,
            "SELECT et_apply_receipt($1, $2, $3, 'read')",
            place.tenant_id,
            place.session_id,
            f"FAKE{queue_id:012d}{1:04d}",
        )
        assert said == "parked"
        platform.release()
        await eventually(lambda: _delivery(database, queue_id, "read"))


async def test_an_echo_that_was_stored_first_becomes_the_same_message(
    database: Database, platform: FakePlatform
) -> None:
    place = await make_place(database)
    platform.hold()
    queue_id = await enqueue(database, place, "a")
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await eventually(_true(lambda: platform.calls))
        await fetch(
            database,
            "INSERT INTO et_messages (tenant_id, lead_id, channel_session_id, channel, direction, role, content, "
            "channel_message_id, occurred_at, delivery_status) SELECT tenant_id, lead_id, channel_session_id, channel, "
            "'outbound', 'assistant', content, $2, now(), 'delivered' FROM et_messages m JOIN "
            "(SELECT message_id FROM et_outbound_queue WHERE id = $1) q ON q.message_id = m.id",
            queue_id,
            f"FAKE{queue_id:012d}{1:04d}",
        )
        platform.release()
        row = await reached(database, queue_id, "sent")
    assert await value(database, "SELECT count(*) FROM et_messages") == 1
    assert (row["delivery_status"], row["channel_message_id"]) == ("delivered", f"FAKE{queue_id:012d}{1:04d}")
    assert len(platform.calls) == 1


# --- the database goes away


async def test_a_mark_is_repeated_until_the_database_is_back(
    platform: FakePlatform, private_postgres: PostgresServer
) -> None:
    url = private_postgres.create_database()
    migrate_blocking(url)
    db = await Database.open(url)
    try:
        place = await make_place(db)
        platform.hold()
        ids = [await enqueue(db, place, f"{n}", to=f"p{n}") for n in range(20)]
        async with running(
            db, FakeDispatcher(platform, [place.session_id]), timings=replace(QUICK, stop=8)
        ) as worker:
            await eventually(_true(lambda: len(platform.calls) == 20))
            private_postgres.kill()
            platform.release()
            await asyncio.sleep(0.5)
            private_postgres.restart()
            await eventually(_true(lambda: db.connected), seconds=20)
            await all_reached(db, ids, "sent", seconds=30)
            assert worker.healthy
        assert set(platform.calls_per_item().values()) == {1}
    finally:
        await db.close()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_claim_whose_commit_was_not_answered_is_never_half_done(
    database: Database, platform: FakePlatform, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is cut around the commit: what is in force was never called, and is put back without an attempt."""
    from asyncpg.transaction import Transaction

    place = await make_place(database)
    queue_id = await enqueue(database, place, "a")
    commit, cut = Transaction.commit, []

    async def cutting(self: Transaction) -> None:
        name = asyncio.current_task()
        if name is not None and name.get_name() == "outbound.claim" and not cut:
            cut.append(moment)
            if moment == "after":
                await commit(self)
            raise ConnectionResetError("cut off at the commit")
        await commit(self)

    monkeypatch.setattr(Transaction, "commit", cutting)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        row = await reached(database, queue_id, "sent")
    assert cut == [moment]
    assert row["retry_count"] == 0
    assert row["claim_epoch"] == (2 if moment == "after" else 1)
    assert len(platform.calls) == 1


# --- kill -9 at every point

PROGRAM = """
import asyncio, os, sys
from datetime import UTC, datetime
sys.path.insert(0, {root!r})
from core import faults, ownership
from core.channel import NotSent, Sent, SessionId
from core.database import Database
from core.dispatch import Timings
from core.metrics import Metrics
from core.outbound import OutboundWorker

LEDGER = os.open({ledger!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class World:
    changed = asyncio.Event()
    def sendable(self): return {{SessionId({session}): float("inf")}}
    def owned(self): return frozenset([SessionId({session})])
    def line(self, a): return f"{{a.queue_id}} {{a.claim_epoch}}"
    async def send(self, message):
        os.write(LEDGER, (self.line(message.attempt) + "\\n").encode())
        os.fsync(LEDGER)
        return Sent(f"W{{message.attempt.queue_id}}x{{message.attempt.claim_epoch}}", datetime.now(UTC))
    async def resolve(self, attempt):
        seen = open({ledger!r}).read().splitlines()
        if self.line(attempt) in seen:
            return Sent(f"W{{attempt.queue_id}}x{{attempt.claim_epoch}}", datetime.now(UTC))
        return NotSent()

async def main():
    db = await Database.open({url!r})
    timings = Timings(poll=0.1, tend=0.05, recover=0.05, backoff=(0.05,))
    worker = OutboundWorker(db, Metrics(), World(), owner=sys.argv[1], timings=timings)
    faults.arm_from_environment()
    await worker.start()
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""

POINTS = [
    "outbound.claim.before_commit",
    "outbound.claim.after_commit",
    "outbound.resolve.before",
    "outbound.call.before",
    "outbound.call.after",
    "outbound.mark.before_commit",
    "outbound.mark.after_commit",
]


def write_gateway(folder: Path, session_id: int, url: str) -> tuple[Path, Path]:
    """The ledger of what was called, and the program that calls."""
    ledger, script = folder / "ledger", folder / "gateway.py"
    ledger.touch()
    root = str(Path(__file__).resolve().parents[2])
    script.write_text(PROGRAM.format(root=root, ledger=str(ledger), session=session_id, url=url))
    return ledger, script


def spawn(script: Path, owner: str, point: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "FAULTS": f"{point}=kill" if point else ""}
    return subprocess.Popen([sys.executable, str(script), owner], env=environment, stdout=subprocess.DEVNULL)


async def test_kill_9_at_every_point_calls_each_item_once(
    database: Database, migrated_url: str, tmp_path: Path
) -> None:
    place = await make_place(database)
    ledger, script = write_gateway(tmp_path, place.session_id, migrated_url)
    chance = random.Random(7)
    ids: list[int] = []
    for number, point in enumerate([*POINTS, ""]):
        ids += [
            await enqueue(database, place, f"{number}.{n}", to=f"p{chance.randrange(6)}") for n in range(8)
        ]
        await give_lease(database, place, f"gw-{number}")
        process = spawn(script, f"gw-{number}", point)
        try:
            if point:
                assert await asyncio.to_thread(process.wait, 20) == -signal.SIGKILL, point
            else:
                await all_reached(database, ids, "sent", seconds=30)
        finally:
            process.kill()
            process.wait(10)
    calls = Counter(line.split()[0] for line in ledger.read_text().splitlines())
    assert set(calls) == {str(queue_id) for queue_id in ids}
    assert set(calls.values()) == {1}, "an item was called twice"


async def _delivery(db: Database, queue_id: int, status: str) -> bool:
    return bool((await item(db, queue_id))["delivery_status"] == status)


def _true(check: object) -> object:
    async def ask() -> bool:
        return bool(check())  # type: ignore[operator]

    return ask


async def test_a_claim_that_is_committed_before_we_hear_of_it_is_called_once(
    database: Database, platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery looks again and again while the answer to the commit is under way: the row is nobody's but ours."""
    place = await make_place(database)
    queue_id = await enqueue(database, place, "once")
    commit = Transaction.commit

    async def heard_late(self: Transaction) -> None:
        await commit(self)
        await asyncio.sleep(0.5)

    monkeypatch.setattr(Transaction, "commit", heard_late)
    async with running(database, FakeDispatcher(platform, [place.session_id])):
        await reached(database, queue_id, "sent")
    assert platform.texts == ["once"]
