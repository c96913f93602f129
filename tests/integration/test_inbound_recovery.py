"""The inbound worker when things break: killed at every fault point, frozen, without its database, with a bad decider."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from core import faults
from core.database import Database
from core.decide.port import Context, Decision
from core.metrics import Metrics
from tests.conftest import migrate_blocking
from tests.support.deciding import Scripted, Shop, Thinking, eventually, open_shop, says, working
from tests.support.postgres import PostgresServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.disarm()


async def killed_at(url: str, point: str, *, owner: str = "gw-dead") -> None:
    """Run a worker process until it kills itself at this point."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.inbound_process",
        url,
        owner,
        cwd=ROOT,
        env={**os.environ, "FAULTS": f"{point}=kill"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        code = await asyncio.wait_for(process.wait(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert code == -signal.SIGKILL


@pytest.mark.parametrize("point", ["inbound.claimed", "inbound.decided", "inbound.commit", "inbound.stored"])
async def test_killed_anywhere_a_burst_is_decided_once_and_answered_once(
    database: Database, migrated_url: str, point: str
) -> None:
    shop = await open_shop(database)
    ids = await shop.write("hi", "hello")
    await killed_at(migrated_url, point)
    claimed = await shop.value(
        "SELECT count(*) FROM et_messages WHERE delivery_status = 'inbound_processing'"
    )
    assert claimed == (0 if point == "inbound.stored" else 2)
    async with working(database, owner="gw-dead"):  # the same gateway, started again
        decisions = await shop.decided(ids)
    assert [d["delivery_status"] for d in decisions] == ["inbound_ai_replied"] * 2
    [reply] = await shop.replies()
    assert {d["reply_message_id"] for d in decisions} == {reply["message_id"]}


async def test_a_slow_decider_that_is_alive_is_not_robbed(database: Database) -> None:
    shop = await open_shop(database)
    slow, other = says("slow", after=2.0), says("robbed")
    ids = await shop.write("hi")
    async with working(database, slow, lease_seconds=0.6, poll_seconds=0.1):
        await eventually(lambda: _count(slow), what="being asked")
        async with working(database, other, owner="gw-2", lease_seconds=0.6, poll_seconds=0.1):
            await shop.decided(ids)
    assert [reply["content"] for reply in await shop.replies()] == ["slow"]
    assert other.seen == []


async def _count(decider: Scripted) -> int:
    return len(decider.seen)


async def test_a_worker_that_was_frozen_drops_its_answer(database: Database) -> None:
    shop = await open_shop(database)
    frozen, other = Thinking(reply="too late"), Thinking(reply="in time")
    ids = await shop.write("hi")
    async with working(database, frozen, lease_seconds=600, concurrency=1) as thawed:
        await asyncio.wait_for(frozen.asked.wait(), 10)
        # Its claim ran out while it could not renew.
        await shop.value("UPDATE et_inbound_claims SET expires_at = now() - INTERVAL '1 second'")
        async with working(database, other, owner="gw-2", poll_seconds=0.1):
            await asyncio.wait_for(other.asked.wait(), 10)
            frozen.released.set()

            async def gave_up() -> bool:
                return thawed.busy == 0

            await eventually(gave_up)
            assert await shop.value("SELECT count(*) FROM et_decisions") == 0
            other.released.set()
            [decision] = await shop.decided(ids)
    assert [reply["content"] for reply in await shop.replies()] == ["in time"]
    assert decision["action"] == "auto_reply"


async def test_a_claim_whose_answer_got_lost_runs_out_though_its_owner_lives(database: Database) -> None:
    shop = await open_shop(database)
    broken = True

    def lose() -> None:
        if broken:
            raise ConnectionResetError("the answer to the claim got lost")

    faults.arm("inbound.claimed", lose)
    async with working(database, lease_seconds=1.0, poll_seconds=0.1) as worker:
        ids = await shop.write("hi")

        async def claimed() -> bool:
            return bool(await shop.value("SELECT count(*) FROM et_inbound_claims"))

        await eventually(claimed)
        broken = False
        assert worker.busy == 0
        [decision] = await shop.decided(ids)
        assert worker.healthy
    assert decision["action"] == "auto_reply"
    assert len(await shop.replies()) == 1


async def test_a_stopped_worker_gives_back_what_it_holds(database: Database) -> None:
    shop = await open_shop(database)
    ids = await shop.write("hi")
    thinking = Thinking()
    async with working(database, thinking, lease_seconds=600) as worker:
        await asyncio.wait_for(thinking.asked.wait(), 10)
        await asyncio.wait_for(worker.stop(), 10)
        assert await shop.value("SELECT delivery_status FROM et_messages") == "received"
    async with working(database):
        await shop.decided(ids)
    assert len(await shop.replies()) == 1


async def test_a_decider_that_fails_is_asked_again(database: Database) -> None:
    shop = await open_shop(database)

    async def answer(_context: Context) -> Decision:
        if len(flaky.seen) < 3:
            raise RuntimeError("try later")
        return Decision("auto_reply", "scripted", reply="third time lucky")

    flaky = Scripted(answer)
    async with working(database, flaky):
        await shop.decided(await shop.write("hi"))
    assert [reply["content"] for reply in await shop.replies()] == ["third time lucky"]
    assert await shop.value("SELECT count(*) FROM et_audit_log") == 0


async def _raise(_context: Context) -> Decision:
    raise RuntimeError("secret words of the customer")


async def _hang(_context: Context) -> Decision:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _nonsense(_context: Context) -> Decision:
    return "auto_reply"  # type: ignore[return-value]


async def _contradiction(_context: Context) -> Decision:
    return Decision("auto_reply", "no words")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_raise, "decider_error"),
        (_hang, "decider_timeout"),
        (_nonsense, "decider_error"),
        (_contradiction, "decider_error"),
    ],
)
async def test_a_decider_that_keeps_failing_leaves_it_to_a_person_and_the_audit_log(
    database: Database, answer: object, reason: str
) -> None:
    shop = await open_shop(database)
    bad = Scripted(answer)  # type: ignore[arg-type]
    metrics = Metrics()
    async with working(database, bad, metrics=metrics, decide_seconds=0.1) as worker:
        ids = await shop.write("hi", "hello")
        decisions = await shop.decided(ids)
        assert worker.healthy
    assert len(bad.seen) == 3
    assert [(d["action"], d["reason"], d["delivery_status"]) for d in decisions] == [
        ("human_takeover", reason, "inbound_error")
    ] * 2
    assert (await shop.thread_of(ids[0]))["handled_by"] == "human"
    [audited] = await shop.fetch("SELECT * FROM et_audit_log")
    assert (audited["event"], audited["actor"], audited["tenant_id"]) == (
        "worker_error",
        "worker:inbound",
        shop.tenant_id,
    )
    assert (audited["subject_id"], audited["detail"]["error"]) == (str(ids[-1]), reason)
    assert "secret" not in repr(dict(audited))
    assert await shop.replies() == []
    assert metrics.decisions.labels("gates", "human_takeover")._value.get() == 2


async def test_a_slow_thread_does_not_hold_up_the_others(database: Database) -> None:
    shop = await open_shop(database)

    async def answer(context: Context) -> Decision:
        if context.lead.external_id.endswith("1"):
            await asyncio.sleep(1.5)
        return Decision("auto_reply", "scripted", reply="ok")

    async with working(database, Scripted(answer), concurrency=4):
        slow = await shop.write("slow", who=1)
        await asyncio.sleep(0.2)
        for who in (2, 3, 4, 5, 6):
            await shop.decided(await shop.write("quick", who=who), seconds=1.0)
        await shop.decided(slow)


async def test_two_people_merged_while_the_decider_thinks_are_answered_in_the_surviving_thread(
    database: Database,
) -> None:
    shop = await open_shop(database)
    await shop.customer(1)
    thinking = Thinking()
    async with working(database, thinking):
        ids = await shop.write("hi", who=2)
        await asyncio.wait_for(thinking.asked.wait(), 10)
        older, younger = [r["id"] for r in await shop.fetch("SELECT id FROM et_leads ORDER BY id")]
        await shop.value("SELECT et_merge_leads($1, $2, $3)", shop.tenant_id, older, younger)
        thinking.released.set()
        [decision] = await shop.decided(ids)
    [reply] = await shop.replies()
    assert reply["thread_id"] == decision["thread_id"]
    assert await shop.value("SELECT lead_id FROM et_threads WHERE id = $1", decision["thread_id"]) == older


async def test_messages_erased_while_the_decider_thinks_are_let_go(database: Database) -> None:
    shop = await open_shop(database)
    thinking = Thinking()
    async with working(database, thinking) as worker:
        await shop.write("hi")
        await asyncio.wait_for(thinking.asked.wait(), 10)
        await shop.value("DELETE FROM et_messages")
        thinking.released.set()

        async def idle() -> bool:
            return worker.busy == 0

        await eventually(idle)
        assert worker.healthy
    assert await shop.value("SELECT count(*) FROM et_decisions") == 0


# ---- the database away ----


@pytest.fixture
async def own_database(private_postgres: PostgresServer) -> AsyncIterator[Database]:
    url = private_postgres.create_database()
    migrate_blocking(url)
    opened = await Database.open(url)
    yield opened
    await opened.close()


async def test_a_database_killed_while_deciding_changes_nothing_in_the_end(
    private_postgres: PostgresServer, own_database: Database
) -> None:
    shop: Shop = await open_shop(own_database)
    thinking = Thinking()
    async with working(own_database, thinking, poll_seconds=0.2) as worker:
        ids = await shop.write("hi")
        await asyncio.wait_for(thinking.asked.wait(), 10)
        await asyncio.to_thread(private_postgres.kill)
        thinking.released.set()
        await asyncio.sleep(0.5)
        assert worker.healthy
        await asyncio.to_thread(private_postgres.restart)
        ids += await _written_again(shop)
        decisions = await shop.decided(ids, seconds=30)
        assert worker.healthy
    assert len(decisions) == 2
    assert len(await shop.replies()) == 2


async def _written_again(shop: Shop) -> list[int]:
    for _ in range(50):
        try:
            return await shop.write("still there?", who=2)
        except Exception:
            await asyncio.sleep(0.2)
    raise AssertionError("the database did not come back")


async def test_a_worker_started_without_its_database_begins_when_it_is_there(
    private_postgres: PostgresServer, own_database: Database
) -> None:
    shop = await open_shop(own_database)
    ids = await shop.write("hi")
    await asyncio.to_thread(private_postgres.kill)
    async with working(own_database, poll_seconds=0.2) as worker:
        await asyncio.sleep(0.3)
        assert worker.healthy
        await asyncio.to_thread(private_postgres.restart)

        async def back() -> bool:
            try:
                return bool(await shop.value("SELECT count(*) = 1 FROM et_decisions"))
            except Exception:
                return False

        await eventually(back, seconds=30)
        await shop.decided(ids)
