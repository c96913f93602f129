"""History in bulk, on a real PostgreSQL: threads and timelines are filled, nothing is answered, every count is exact."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from core import faults, history
from core.channel import InboundMessage, MessageType, Person, SessionId
from core.database import Database
from core.errors import Conflict, DatabaseUnavailable, NotFound
from core.history import Counts, Entry, HistoryImport, Interrupted, Item, Wrong
from core.store import history as store
from core.store import inbound
from tests.conftest import migrate_blocking
from tests.support.inbound import Place, lid, make_place, phone, running
from tests.support.postgres import PostgresServer

START = 1_600_000_000_000


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


@pytest.fixture(autouse=True)
def no_faults() -> object:
    yield
    faults.disarm()


def old(place: Place, n: int, sender: str | Person | None = None, **changes: Any) -> InboundMessage:
    fields = {"content": f"text {n}", "channel_timestamp": START + n * 1000, "is_history": True}
    return place.message(f"H{n}", sender or phone(n % 20), **(fields | changes))


def answer(place: Place, n: int, sender: str | None = None, **changes: Any) -> InboundMessage:
    return old(place, n, sender, direction="outbound", role="assistant", **changes)


async def each(items: Iterable[Item]) -> AsyncIterator[Item]:
    for item in items:
        yield item


def importing(place: Place, **options: Any) -> HistoryImport:
    return HistoryImport(place.db, tenant_id=place.tenant_id, session_id=place.session_id, **options)


async def bring(place: Place, items: Iterable[Item], **options: Any) -> Counts:
    return await importing(place, **options).run(each(items))


async def row_of(place: Place, work: HistoryImport) -> Any:
    async with place.db.worker() as conn:
        row = await store.read(conn, work.import_id)
    assert row is not None
    return row


# --- what is stored


async def test_both_directions_become_one_thread_with_its_times(place: Place) -> None:
    counts = await bring(
        place,
        [
            old(place, 2, phone(1), sender_identifier="+601100000001"),
            answer(place, 3, phone(1)),
            old(place, 1, Person(phone(1), name="Aisyah"), message_type=MessageType.IMAGE),
        ],
    )
    assert counts == Counts(3, 3)
    rows = await place.fetch("SELECT * FROM et_messages ORDER BY occurred_at, id")
    assert [r["channel_message_id"] for r in rows] == ["H1", "H2", "H3"]
    assert [(r["direction"], r["role"], r["delivery_status"]) for r in rows] == [
        ("inbound", "user", "inbound_ignored"),
        ("inbound", "user", "inbound_ignored"),
        ("outbound", "assistant", "sent"),
    ]
    assert all(r["is_history"] for r in rows)
    assert [r["occurred_at"].timestamp() for r in rows] == [START / 1000 + n for n in (1, 2, 3)]
    assert rows[0]["message_type"] == "image"
    [lead] = await place.fetch("SELECT * FROM et_leads")
    assert (lead["external_id"], lead["name"]) == (phone(1), "Aisyah")
    [thread] = await place.fetch("SELECT * FROM et_threads")
    assert {r["thread_id"] for r in rows} == {thread["id"]}
    assert thread["status"] == "active"
    assert thread["last_message_at"].timestamp() == START / 1000 + 3


async def test_a_repeat_stores_nothing(place: Place) -> None:
    items = [old(place, n) if n % 3 else answer(place, n) for n in range(1500)]
    assert await bring(place, items) == Counts(1500, 1500)
    assert await bring(place, items) == Counts(1500, 0, 1500)
    assert await bring(place, items + items[:10]) == Counts(1510, 0, 1510)
    assert await place.value("SELECT count(*) FROM et_messages") == 1500
    assert await place.value("SELECT count(*) FROM et_leads") == 20
    assert await place.value("SELECT count(*) FROM et_threads") == 20


async def test_the_same_message_twice_in_a_chunk_is_stored_once(place: Place) -> None:
    assert await bring(place, [old(place, 1), old(place, 1), old(place, 1)]) == Counts(3, 1, 2)


async def test_messages_that_are_not_called_history_become_it(place: Place) -> None:
    await bring(place, [old(place, 1, is_history=False)])
    assert [r["is_history"] for r in await place.rows()] == [True]


async def test_history_joins_what_is_there_and_opens_nothing_again(place: Place) -> None:
    async with running(place.db) as ingest:
        [archived] = await ingest.submit([place.message("A1", phone(1))])
        [live] = await ingest.submit([place.message("L1", phone(2))])
    await place.value("UPDATE et_threads SET status = 'archived' WHERE id = $1", archived.thread_id)
    before = await place.fetch("SELECT id, status, last_message_at, history_only FROM et_threads ORDER BY id")

    assert (await bring(place, [old(place, 1, phone(1)), old(place, 2, phone(2))])).stored == 2

    rows = await place.rows("thread_id", "is_history")
    assert [r["thread_id"] for r in rows] == [archived.thread_id, live.thread_id]
    after = await place.fetch("SELECT id, status, last_message_at, history_only FROM et_threads ORDER BY id")
    assert after == before


async def test_a_live_message_is_a_duplicate_and_stays_what_it_is(place: Place) -> None:
    async with running(place.db) as ingest:
        await ingest.submit([place.message("H1", phone(1), "live")])
    assert await bring(place, [old(place, 1, phone(1))]) == Counts(1, 0, 1)
    [row] = await place.rows()
    assert (row["content"], row["delivery_status"], row["is_history"]) == ("live", "received", False)


async def test_nothing_wakes_a_worker_and_the_past_is_there_when_it_decides(place: Place) -> None:
    heard: list[str] = []
    conn = await asyncpg.connect(place.db.url)
    await conn.add_listener("et_inbound", lambda *_: heard.append("inbound"))
    await conn.add_listener("et_outbound", lambda *_: heard.append("outbound"))
    await bring(place, [old(place, 1, phone(1)), answer(place, 2, phone(1))])
    await conn.execute("SELECT 1")  # whatever was notified before has come with it
    await conn.close()
    assert heard == []
    assert await place.value("SELECT count(*) FROM et_claim_inbound('w')") == 0
    assert await place.value("SELECT count(*) FROM et_events WHERE kind = 'message'") == 0
    assert await place.value("SELECT count(*) FROM et_outbound_queue") == 0

    async with running(place.db) as ingest:
        [live] = await ingest.submit([place.message("L1", phone(1))])
    async with place.db.worker() as conn:
        claimed = await inbound.claim(conn, "w", threads=10, lease=timedelta(minutes=1))
        assert [row["id"] for row in claimed] == [live.message_id]
        past = await inbound.read_history(conn, [live.thread_id], [live.message_id], limit=10)
    assert [row["channel_message_id"] for row in past] == ["H1", "H2"]


async def test_new_leads_get_the_sessions_workspace_and_forms_of_one_person_are_joined(
    database: Database,
) -> None:
    first = await make_place(database)
    workspace = await first.value(
        "INSERT INTO et_workspaces (tenant_id, name) VALUES ($1, 'sales') RETURNING id", first.tenant_id
    )
    place = await make_place(
        database, tenant_id=first.tenant_id, metadata={"default_workspace_id": workspace}
    )
    both = Person(phone(1), aliases=(lid(1),))
    assert (
        await bring(place, [old(place, 1, lid(1)), old(place, 2, both), old(place, 3, lid(1))])
    ).stored == 3
    [lead] = await place.fetch("SELECT * FROM et_leads")
    assert (lead["external_id"], lead["workspace_id"]) == (phone(1), workspace)


# --- wrong lines


async def test_wrong_lines_are_named_and_the_others_stored(place: Place) -> None:
    other = await make_place(place.db)
    work = importing(place)
    counts = await work.run(
        each(
            [
                Entry(1, old(place, 1)),
                Wrong(2, "not valid JSON"),
                Entry(4, old(other, 2)),
                Entry(5, old(place, 3, channel_message_id="")),
                Entry(6, old(place, 4, role="robot")),  # only the database finds out
                Entry(7, old(place, 5)),
            ]
        )
    )
    assert counts == Counts(6, 2, 0, 4)
    named = {one.line: one.detail for one in work.wrong}
    assert sorted(named) == [2, 4, 5, 6]
    assert named[2] == "not valid JSON"
    assert "another session" in named[4]
    assert "channel_message_id" in named[5]
    assert "the database refuses it" in named[6]
    row = await row_of(place, work)
    assert {one["line"]: one["detail"] for one in row["wrong_lines"]} == named
    assert (row["status"], row["lines"], row["stored"], row["wrong"]) == ("finished", 6, 2, 4)


async def test_of_very_many_wrong_lines_the_first_are_named_and_all_are_counted(place: Place) -> None:
    work = importing(place)
    counts = await work.run(each(Wrong(n, "no") for n in range(1, 3001)))
    assert counts == Counts(3000, 0, 0, 3000)
    assert [one.line for one in work.wrong] == list(range(1, history.WRONG_NAMED + 1))
    assert len((await row_of(place, work))["wrong_lines"]) == history.WRONG_NAMED


# --- beside others


async def test_an_import_beside_live_messages_of_the_same_people(place: Place) -> None:
    """Same ids, both ways at once, two imports: every message is there once, and live ones are answered or history."""
    items = [old(place, n) for n in range(1200)]

    async def live() -> None:
        for n in range(0, 1200, 40):
            batch = [
                place.message(f"H{n + k}", phone((n + k) % 20), channel_timestamp=START)
                for k in range(0, 40, 4)
            ]
            await ingest.submit(batch)

    async with running(place.db) as ingest:
        one, other, _ = await asyncio.gather(
            bring(place, items, live_depth=lambda: ingest.depth), bring(place, items[::-1]), live()
        )
    assert one.lines == other.lines == 1200
    assert await place.value("SELECT count(*) FROM et_messages") == 1200
    written = await place.value("SELECT count(*) FROM et_messages WHERE is_history")
    assert one.stored + other.stored == written
    assert await place.value("SELECT count(*) FROM et_threads") == 20


async def test_it_gives_way_while_live_messages_wait(place: Place) -> None:
    looks = iter([50, 50, 50, 0])
    asked = []

    def depth() -> int:
        asked.append(next(looks, 0))
        return asked[-1]

    assert (await bring(place, [old(place, 1)], live_depth=depth)).stored == 1
    assert asked == [50, 50, 50, 0]


async def test_a_source_is_read_no_further_than_a_chunk_ahead(place: Place) -> None:
    work = importing(place)
    ahead = 0

    async def source() -> AsyncIterator[Item]:
        nonlocal ahead
        for n in range(5000):
            ahead = max(ahead, n - work.counts.lines)
            yield old(place, n)

    assert (await work.run(source())).stored == 5000
    assert ahead <= history.LARGEST_CHUNK
    assert (
        await place.value("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '% import'") == 0
    )


async def test_large_messages_make_small_chunks(place: Place) -> None:
    told: list[Counts] = []
    items = [old(place, n, content="x" * 200_000) for n in range(60)]
    assert (await bring(place, items, progress=told.append)).stored == 60
    assert [counts.lines for counts in told] == [21, 42, 60]


async def test_leads_that_are_merged_in_the_middle(place: Place) -> None:
    """The import remembers leads; one that vanishes is looked up again."""

    async def source() -> AsyncIterator[Item]:
        for n in range(300):
            yield old(place, n, phone(1 + n % 2))
        await place.value(
            "SELECT et_merge_leads($1, min(id), max(id)) FROM et_leads WHERE tenant_id = $1", place.tenant_id
        )
        for n in range(300, 900):
            yield old(place, n, phone(1 + n % 2))

    assert await importing(place).run(source()) == Counts(900, 900)
    assert await place.value("SELECT count(DISTINCT lead_id) FROM et_messages") == 1
    assert await place.value("SELECT count(*) FROM et_messages") == 900


# --- what goes wrong around it


@pytest.mark.parametrize("where", ["history.before_insert", "history.before_commit", "history.after_commit"])
async def test_a_chunk_whose_outcome_is_unknown_is_counted_once(place: Place, where: str) -> None:
    """The connection breaks around the commit: whether it happened is found out, not guessed."""
    broken = 0

    def break_off() -> None:
        nonlocal broken
        broken += 1
        if broken in (1, 2):
            raise ConnectionResetError("cut")

    faults.arm(where, break_off)
    work = importing(place)
    items: list[Item] = [Wrong(9999, "no"), *(old(place, n) for n in range(1200)), old(place, 7)]
    assert await work.run(each(items)) == Counts(1202, 1200, 1, 1)
    assert broken >= 3
    assert work.wrong == [Wrong(9999, "no")]
    row = await row_of(place, work)
    assert (row["status"], row["lines"], row["stored"], row["duplicates"]) == ("finished", 1202, 1200, 1)
    assert await place.value("SELECT count(*) FROM et_messages") == 1200


async def test_kill_9_of_the_server_in_the_middle(private_postgres: PostgresServer) -> None:
    url = private_postgres.create_database()
    migrate_blocking(url)
    database = await Database.open(url)
    try:
        place = await make_place(database)

        async def source() -> AsyncIterator[Item]:
            for n in range(4000):
                if n in (900, 2500):
                    await asyncio.to_thread(private_postgres.kill)
                    await asyncio.to_thread(private_postgres.restart)
                yield old(place, n)

        work = importing(place)
        assert await work.run(source()) == Counts(4000, 4000)
        row = await row_of(place, work)
        assert (row["status"], row["stored"]) == ("finished", 4000)
        assert await place.value("SELECT count(*) FROM et_messages") == 4000
    finally:
        await database.close()


async def test_a_database_that_stays_away_ends_it_with_what_to_do(private_postgres: PostgresServer) -> None:
    url = private_postgres.create_database()
    migrate_blocking(url)
    database = await Database.open(url)
    try:
        place = await make_place(database)
        work = importing(place, patience=0.2)

        async def source() -> AsyncIterator[Item]:
            for n in range(2000):
                if n == 1500:
                    await asyncio.to_thread(private_postgres.kill)
                yield old(place, n)

        with pytest.raises(DatabaseUnavailable, match="what is stored stays"):
            await work.run(source())
        await asyncio.to_thread(private_postgres.restart)
        row = await row_of(place, work)
        assert (row["status"], row["stored"]) == ("running", work.counts.stored)
        assert 0 < work.counts.stored == await place.value("SELECT count(*) FROM et_messages")
        # Nobody could say so; after ten minutes of silence the row says it by itself.
        await place.value("UPDATE et_imports SET updated_at = now() - INTERVAL '11 minutes'")
        assert (await row_of(place, work))["status"] == "interrupted"
    finally:
        await database.close()


async def test_a_source_that_breaks_off_leaves_what_was_committed(place: Place) -> None:
    work = importing(place)

    async def source() -> AsyncIterator[Item]:
        for n in range(600):
            yield old(place, n)
        raise Interrupted("the client went away")

    with pytest.raises(Interrupted):
        await work.run(source())
    row = await row_of(place, work)
    assert (row["status"], row["error"]) == ("interrupted", "the client went away")
    assert row["finished_at"] is not None
    assert 0 < row["stored"] == await place.value("SELECT count(*) FROM et_messages")
    again = await bring(place, [old(place, n) for n in range(600)])
    assert again == Counts(600, 600 - row["stored"], row["stored"])


async def test_a_cancelled_import_says_so(place: Place) -> None:
    work = importing(place)
    never = asyncio.Event()

    async def source() -> AsyncIterator[Item]:
        for n in range(600):
            yield old(place, n)
        never.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work.run(source()))
    await asyncio.wait_for(never.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    row = await row_of(place, work)
    assert (row["status"], row["error"]) == ("interrupted", "it was stopped; begin again to go on")
    assert row["stored"] == work.counts.stored > 0


async def test_a_fault_of_the_source_is_told_without_what_it_says(place: Place) -> None:
    async def source() -> AsyncIterator[Item]:
        yield old(place, 1)
        raise RuntimeError("somebody's words")

    work = importing(place)
    with pytest.raises(RuntimeError):
        await work.run(source())
    row = await row_of(place, work)
    assert row["status"] == "failed"
    assert "RuntimeError" in row["error"]
    assert "words" not in row["error"]


async def test_an_import_that_was_removed_ends(place: Place) -> None:
    async def source() -> AsyncIterator[Item]:
        for n in range(2000):
            if n == 600:
                await place.value("DELETE FROM et_imports")
            yield old(place, n)

    with pytest.raises(Conflict, match="removed"):
        await importing(place).run(source())


async def test_no_such_session(place: Place) -> None:
    other = await make_place(place.db)
    for session_id in (SessionId(999_999), other.session_id):
        work = HistoryImport(place.db, tenant_id=place.tenant_id, session_id=session_id)
        with pytest.raises(NotFound):
            await work.run(each([]))


# --- telling how far it is


async def test_progress_is_told_in_the_row_by_call_and_as_events(place: Place) -> None:
    told: list[Counts] = []
    work = importing(place, kind="sync", total=2500, progress=told.append)

    async def source() -> AsyncIterator[Item]:
        for n in range(2500):
            if n == 2000:
                row = await row_of(place, work)
                assert (row["status"], row["kind"], row["total"]) == ("running", "sync", 2500)
                assert row["lines"] == work.counts.lines >= 1000
            yield old(place, n)

    began = time.time()
    await work.run(source())
    assert told[-1] == Counts(2500, 2500)
    assert [counts.lines for counts in told] == sorted({counts.lines for counts in told})
    row = await row_of(place, work)
    assert row["status"] == "finished"
    assert began - 1 < row["started_at"].timestamp() <= row["finished_at"].timestamp() < time.time() + 1
    events = await place.fetch("SELECT ref_id FROM et_events WHERE kind = 'import'")
    assert [event["ref_id"] for event in events] == [work.import_id, work.import_id]


async def test_imports_are_listed_newest_first_by_session(place: Place) -> None:
    other = await make_place(place.db, tenant_id=place.tenant_id)
    works = [importing(place), importing(other), importing(place)]
    for work in works:
        await work.run(each([]))
    ids = [work.import_id for work in works]
    async with place.db.tenant(place.tenant_id) as conn:
        everything = await store.imports(conn, place.tenant_id, session_id=None, before=None, limit=10)
        own = await store.imports(conn, place.tenant_id, session_id=place.session_id, before=ids[2], limit=10)
    assert [row["id"] for row in everything] == ids[::-1]
    assert [row["id"] for row in own] == [ids[0]]
