"""A database that was set back to an older backup gets back what the journal still has, once, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from core.channel import SessionContext
from core.database import Database
from core.errors import DatabaseUnavailable
from core.ingest import Ingest
from core.journal import Journal
from core.metrics import Metrics
from core.store import suppressions
from gateway.session_runner import Sink
from gateway.session_sinks import SessionStore
from gateway.whatsapp.look_back import LookBack
from gateway.whatsapp.pump import Pump
from gateway.whatsapp.timings import Timings
from tests.support.inbound import Place, make_place, running

EVENTS = Path(__file__).parents[1] / "fixtures/whatsapp/event"
TIMINGS = Timings(settled=5, breath=0.0, store_retry=0.02, store_retry_cap=0.05, poll=0.05)
MEI = "whatsapp:+60111222333"


@dataclass(frozen=True)
class PlaceRow:
    tenant_id: int
    session_id: int
    pending: bool = False


@dataclass
class Running:
    """As much of a `gateway.session_runner.Runner` as its sink asks for."""

    row: PlaceRow
    _ingest: Ingest
    _store: SessionStore
    barred: bool = False
    known: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def session_id(self) -> int:
        return self.row.session_id

    def heard(self) -> None:
        pass


@dataclass
class Life:
    """One start of a session, without its child: the journal, the pump that empties it, the look back."""

    place: Place
    folder: Path
    journal: Journal
    pump: Pump
    sink: Sink
    metrics: Metrics
    context: SessionContext

    async def hear(self, *events: dict[str, Any]) -> None:
        """Journal what the child would, and wait until it is stored and let go of."""
        rows = [(e["event"], key(e), orjson.dumps(e)) for e in events]
        await asyncio.to_thread(self.journal.append_many, rows)
        self.pump.hint()
        async with asyncio.timeout(10):
            await self.pump.idle.wait()

    async def look_back(self) -> LookBack:
        connected = asyncio.Event()
        connected.set()
        look = LookBack(self.context, self.sink, self.journal, self.pump.read_again, TIMINGS)
        async with asyncio.timeout(10):
            await look.run(connected)
        return look

    def count(self, metric: Any, *labels: str) -> float:
        return float(metric.labels(*labels)._value.get())


@asynccontextmanager
async def life(place: Place, folder: Path) -> AsyncIterator[Life]:
    metrics = Metrics()
    context = SessionContext(
        place.tenant_id, place.session_id, "whatsapp", "+60123456789", None, {}, {}, folder
    )
    async with running(place.db, metrics) as ingest:
        runner: Any = Running(PlaceRow(place.tenant_id, place.session_id), ingest, SessionStore(place.db))
        runner.known.set()
        sink = Sink(runner)
        with Journal(folder / "journal.db") as journal:
            pump = Pump(
                context, sink, journal, intent_of=lambda _secret: None, metrics=metrics, timings=TIMINGS
            )
            task = asyncio.create_task(pump.run())
            try:
                yield Life(place, folder, journal, pump, sink, metrics, context)
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def event(name: str, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((EVENTS / f"{name}.json").read_bytes())["given"]
    return found | changes


def text(identifier: str, *, ago: float = 60.0) -> dict[str, Any]:
    said = event("text_by_phone", at=time.time() - ago)
    said["data"]["Info"] |= {"ID": identifier, "Timestamp": str(int((time.time() - ago) * 1000))}
    return said


def key(said: dict[str, Any]) -> str:
    return f"{said['data'].get('Info', {}).get('ID', '')} 60111222333@s.whatsapp.net"


@pytest.fixture
async def place(database: Database) -> Place:
    return await make_place(database)


async def forget(place: Place, ids: Iterable[str]) -> None:
    """As restoring an older backup would."""
    await place.fetch("DELETE FROM et_messages WHERE channel_message_id = ANY ($1::text[])", list(ids))


async def ids(place: Place) -> list[str]:
    return [row["channel_message_id"] for row in await place.rows("channel_message_id")]


async def test_what_the_database_lost_comes_back_once(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        await before.hear(*(text(f"M{n}") for n in range(120)))
    await forget(place, ["M3", "M77"])
    async with life(place, tmp_path) as after:
        assert (await after.look_back())._stored == 2
        again = await after.look_back()
        assert (again._stored, again._seen) == (0, 120)
        # What was there was only looked up: no counter of messages knows of it.
        assert after.count(after.metrics.received, str(place.tenant_id)) == 2
        assert after.count(after.metrics.duplicates, "whatsapp") == 0
    stored = await ids(place)
    assert sorted(stored) == sorted(f"M{n}" for n in range(120))
    assert stored[-2:] == ["M3", "M77"]


async def test_only_what_came_just_now_may_still_be_answered(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        await before.hear(text("OLD", ago=3600), text("NEW", ago=60))
    await forget(place, ["OLD", "NEW"])
    async with life(place, tmp_path) as after:
        await after.look_back()
    rows = await place.rows("channel_message_id, delivery_status, is_history")
    assert [tuple(row) for row in rows] == [("OLD", "inbound_ignored", True), ("NEW", "received", False)]


async def test_nothing_of_an_erased_person_comes_back(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        await before.hear(text("M1"), text("M2"))
    async with place.db.worker() as conn, conn.transaction():
        rows = await conn.fetch("SELECT tenant_id, external_id FROM et_lead_identities")
        await suppressions.add(conn, [tuple(row) for row in rows], reason="erased")
        await conn.execute("DELETE FROM et_leads")
    async with life(place, tmp_path) as after:
        assert (await after.look_back())._stored == 0
    assert await ids(place) == []
    assert await place.value("SELECT count(*) FROM et_leads") == 0


async def test_a_placeholder_that_was_filled_since_is_filled_again(place: Place, tmp_path: Path) -> None:
    unreadable = event("unreadable", at=time.time() - 60)
    unreadable["data"]["Info"] = text("M1")["data"]["Info"]
    async with life(place, tmp_path) as before:
        await before.hear(unreadable)
        [row] = await place.rows("id, placeholder")
        assert row["placeholder"]
        await before.hear(text("M1"))
    # The backup is of between the two.
    await place.fetch(
        "UPDATE et_messages SET placeholder = true, content = NULL, message_type = 'unsupported'"
    )
    async with life(place, tmp_path) as after:
        await after.look_back()
        await after.look_back()
    [row] = await place.rows("placeholder, message_type")
    assert tuple(row) == (False, "text")


async def test_receipts_move_what_is_behind_and_nothing_else_is_kept(place: Place, tmp_path: Path) -> None:
    item = await place.enqueue(MEI)
    async with life(place, tmp_path) as before:
        await before.hear(event("receipt_delivered"))  # of A, and of B, which nobody ever knows
    await place.fetch("DELETE FROM et_parked_receipts")
    await place.claim(item["queue_id"])
    await place.mark(item["queue_id"], "sent", "A")
    async with life(place, tmp_path) as after:
        await after.look_back()
        assert (await place.states(item["queue_id"]))[1] == "delivered"
        await place.fetch("DELETE FROM et_parked_receipts")
        await after.look_back()
    assert await place.value("SELECT count(*) FROM et_parked_receipts") == 0


async def test_a_strangers_mail_is_wiped_and_never_looked_at_again(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        before.pump.stranger(True)
        await before.hear(text("THEIRS"))
        before.pump.stranger(False)
        await asyncio.sleep(0.01)
        await before.hear(text("OURS"))
    async with life(place, tmp_path) as after:
        await after.look_back()
        assert {k.split()[0] for k in after.journal.keys("message")} == {"THEIRS", "OURS"}
    assert await ids(place) == ["OURS"]
    with Journal(tmp_path / "journal.db") as journal:
        assert [
            row[0] for row in journal._query("SELECT key FROM entries WHERE length(payload) = 0", ())
        ] == [key(text("THEIRS"))]


async def test_calls_and_losses_are_not_counted_a_second_time(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        await before.hear(event("lost"), event("call_missed"))
        assert before.count(before.metrics.possible_loss, "whatsapp") == 1
    stored = await ids(place)
    async with life(place, tmp_path) as after:
        await after.look_back()
        assert after.count(after.metrics.possible_loss, "whatsapp") == 0
    assert await ids(place) == stored


async def test_while_the_database_is_away_it_waits_and_then_goes_on(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        await before.hear(text("M1"), text("M2"))
    await forget(place, ["M1"])
    async with life(place, tmp_path) as after:
        asked = 0

        class Away:
            async def again(self, messages: Any, updates: Any) -> int:
                nonlocal asked
                asked += 1
                if asked < 3:
                    raise DatabaseUnavailable("away")
                return await after.sink.again(messages, updates)

        connected = asyncio.Event()
        connected.set()
        look = LookBack(after.context, Away(), after.journal, after.pump.read_again, TIMINGS)
        async with asyncio.timeout(10):
            await look.run(connected)
        assert (asked, look._stored) == (3, 1)
    assert sorted(await ids(place)) == ["M1", "M2"]


async def test_sessions_that_start_together_look_back_one_at_a_time(place: Place, tmp_path: Path) -> None:
    async with life(place, tmp_path) as before:
        await before.hear(*(text(f"M{n}") for n in range(120)))
    async with life(place, tmp_path) as after:
        working, most = 0, 0

        class Counting:
            async def again(self, messages: Any, updates: Any) -> int:
                nonlocal working, most
                working += 1
                most = max(most, working)
                await asyncio.sleep(0.005)
                working -= 1
                return 0

        connected = asyncio.Event()
        connected.set()
        looks = [
            LookBack(after.context, Counting(), after.journal, after.pump.read_again, TIMINGS)
            for _ in range(4)
        ]
        async with asyncio.timeout(20):
            await asyncio.gather(*(look.run(connected) for look in looks))
        assert [look._seen for look in looks] == [120] * 4
        assert most == 1
