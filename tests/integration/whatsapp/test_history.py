"""The phone's history through the real client into a real database: all of it, once, behind live traffic, over crashes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from core.channel import SessionId, TenantId
from core.database import Database
from core.history import Counts, Item
from core.metrics import Metrics
from gateway.session_sinks import SessionStore
from gateway.whatsapp import history
from gateway.whatsapp.channel import WhatsAppChannel
from gateway.whatsapp.history_files import HistoryFolder
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.integration.whatsapp.conftest import QUICK, Session, Template, make_session, sandbox_at
from tests.support.whatsapp_sink import MemorySink, until

NOW = 1_790_000_000
DAY = 86_400


class HistorySink(MemorySink):
    """Live messages in memory, history in the database."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.store = SessionStore(database)
        self.runs: list[Counts] = []
        self.named = False

    async def history(
        self, source: AsyncIterable[Item], committed: Callable[[int], None], *, kind: str = "sync"
    ) -> Counts:
        counts = await self.store.history(TenantId(1), SessionId(7), source, committed, kind)
        self.runs.append(counts)
        return counts

    async def names(self, names: Mapping[str, str]) -> None:
        await self.store.names(TenantId(1), names)
        self.named = True

    @property
    def stored(self) -> int:
        return sum(counts.stored for counts in self.runs)


class Past:
    """A session whose history goes into a database."""

    def __init__(self, wa: WhatsAppSandbox, folder: Path, database: Database) -> None:
        self.wa, self.folder, self.database = wa, folder, database
        self.session: Session
        self.sink: HistorySink

    async def open(self, **metadata: Any) -> Session:
        session = make_session(self.wa, self.folder, metadata={"settings": metadata})
        [session.device] = session.shop.devices
        self.sink = HistorySink(self.database)
        command = tuple(self.wa.child_command()[0])
        session.sink = self.sink
        session.channel = WhatsAppChannel(
            session.context, self.sink, command=command, metrics=Metrics(), timings=QUICK
        )
        self.session = session
        await session.channel.connect()
        await self.sink.stands("active", timeout=40)
        await self.wa.wait_online(session.device)
        return session

    @property
    def files(self) -> HistoryFolder:
        return HistoryFolder(self.folder)

    async def idle(self) -> None:
        """Everything that was announced is stored or given up."""

        def settled() -> bool:
            notices = len(list(self.files.path.glob("*.notice")))
            over = len(list(self.files.path.glob("*.done"))) + self.files.failures()
            return notices > 0 and notices == over

        await until(settled, timeout=80)

    async def rows(self) -> list[Any]:
        async with self.database.worker() as conn:
            return await conn.fetch(
                "SELECT m.*, l.name, l.external_id, l.kind AS lead_kind FROM et_messages m"
                " JOIN et_leads l ON l.id = m.lead_id ORDER BY m.occurred_at, m.id"
            )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LINGER_SECONDS", 0.5)
    monkeypatch.setattr(history, "LOOK_SECONDS", 0.5)


@pytest.fixture
async def past(template: Template, tmp_path: Path, database: Database) -> AsyncIterator[Past]:
    async with database.worker() as conn:
        await conn.execute("INSERT INTO et_tenants (id, name) OVERRIDING SYSTEM VALUE VALUES (1, 'shop')")
        await conn.execute(
            "INSERT INTO et_channel_sessions (id, tenant_id, channel_type, session_identifier, status)"
            " OVERRIDING SYSTEM VALUE VALUES (7, 1, 'whatsapp', '+60123456789', 'active')"
        )
    shutil.copytree(template.sandbox, tmp_path / "sandbox")
    shutil.copytree(template.session, tmp_path / "session")
    async with sandbox_at(tmp_path / "sandbox") as wa:
        found = Past(wa, tmp_path / "session", database)
        await found.open()
        try:
            yield found
        finally:
            await found.session.channel.disconnect()


@pytest.fixture
def mei(past: Past) -> Phone:
    return past.wa.person("+60111222333", "Mei", auto_receipts=None)


async def test_the_past_fills_threads_and_answers_nothing(past: Past, mei: Phone) -> None:
    shop, session = past.session.shop, past.session
    shop.archive.remember(mei, "How much?", NOW - 400 * DAY)
    shop.archive.remember(mei, "RM 5", NOW - 400 * DAY + 60, from_me=True)
    photo = mei.media_body("image", b"x" * 99, caption="this one")
    shop.archive.remember(mei, photo, NOW - DAY)
    ali = past.wa.person("+60111222444", "Ali")
    shop.archive.remember(ali, "only we wrote", NOW - DAY, from_me=True)
    group = past.wa.group([mei, shop], "Family")
    shop.archive.remember(group, "in the group", NOW, author=mei)
    assert session.device is not None
    await shop.archive.send(session.device)
    await past.idle()
    await until(lambda: past.sink.named)
    rows = await past.rows()
    assert [(r["content"], r["direction"], r["message_type"]) for r in rows] == [
        ("How much?", "inbound", "text"),
        ("RM 5", "outbound", "text"),
        ("this one", "inbound", "image"),
        ("only we wrote", "outbound", "text"),
        ("in the group", "inbound", "text"),
    ]
    assert all(r["is_history"] for r in rows)
    assert {r["delivery_status"] for r in rows} == {"inbound_ignored", "sent"}
    assert [r["external_id"] for r in rows] == [
        *["whatsapp:+60111222333"] * 3,
        "whatsapp:+60111222444",
        f"whatsapp-group:{group.jid}",
    ]
    assert [r["name"] for r in rows] == ["Mei"] * 3 + ["Ali", "Family"]
    assert rows[0]["thread_id"] == rows[2]["thread_id"]
    assert rows[0]["channel_timestamp"] == (NOW - 400 * DAY) * 1000
    assert rows[4]["sender_identifier"] == mei.number
    assert rows[0]["raw_payload"]["message"] == {"conversation": "How much?"}
    async with past.database.worker() as conn:
        [run] = await conn.fetch("SELECT status, kind, stored, wrong FROM et_imports")
    assert tuple(run) == ("finished", "sync", 5, 0)
    await shop.receipts.wait_for(lambda r: r.kind == "hist_sync")


async def test_the_same_history_again_stores_nothing(past: Past, mei: Phone) -> None:
    shop, device = past.session.shop, past.session.device
    assert device is not None
    shop.archive.fill([mei], 30, until=NOW)
    for _ in range(2):
        await shop.archive.send(device)
        await past.idle()
        await until(lambda: not past.files.blobs())
    await until(lambda: sum(c.lines for c in past.sink.runs) == 60)
    assert past.sink.stored == 30
    assert len(await past.rows()) == 30


async def test_thousands_come_behind_what_people_write_now(past: Past, mei: Phone) -> None:
    shop, device = past.session.shop, past.session.device
    assert device is not None
    people = [past.wa.person(f"+6011300{n:04d}", f"P{n}") for n in range(20)]
    shop.archive.fill(people, 100, until=NOW)
    shop.archive.terms.per_chunk = 500
    sending = asyncio.create_task(shop.archive.send(device))
    stored: list[int] = []
    """How much of the past was there each time somebody's words of now were."""
    while past.sink.stored < 2000 and len(stored) < 100:
        await past.sink.message(await mei.send_text(shop, f"now {len(stored)}"))
        stored.append(past.sink.stored)
        await asyncio.sleep(0.05)
    await sending
    await past.idle()
    assert past.sink.stored == 2000
    # Not how fast, which the machine decides: nobody waited for the rest of the past.
    assert len([count for count in stored if count < 2000]) >= 3


async def test_a_crash_in_the_middle_costs_nothing(past: Past, mei: Phone) -> None:
    """The child dies as soon as the first file was announced, twice; what it had not fetched is fetched later."""
    shop, device = past.session.shop, past.session.device
    assert device is not None
    shop.archive.fill([mei], 300, until=NOW)
    shop.archive.terms.per_chunk = 60
    past.wa.fail_media("slow", seconds=0.3)
    sending = asyncio.create_task(shop.archive.send(device))
    for count in (1, 3):
        await until(lambda count=count: len(list(past.files.path.glob("*.notice"))) >= count)
        os.kill(past.session.pid, signal.SIGKILL)
        await past.wa.wait_offline(device)
        await past.wa.wait_online(device)
    await sending
    past.wa.clear_faults()
    await past.wa.wait_drained(device)
    await past.idle()
    await until(lambda: past.sink.stored == 300)
    assert past.files.failures() == 0
    assert len(await past.rows()) == 300


async def test_a_restart_of_the_gateway_goes_on(past: Past, mei: Phone) -> None:
    shop, device = past.session.shop, past.session.device
    assert device is not None
    shop.archive.fill([mei], 200, until=NOW)
    past.wa.fail_media("status", status=503)  # nothing can be fetched before the restart
    await shop.archive.send(device)
    await until(lambda: len(past.files.waiting()) >= 3)
    await past.session.channel.disconnect()
    assert past.sink.stored == 0
    past.wa.clear_faults()
    await past.open()
    await past.idle()
    await until(lambda: past.sink.stored == 200)


async def test_a_file_that_is_gone_is_said_to_be_and_does_not_hold_up_the_others(
    past: Past, mei: Phone
) -> None:
    shop, device = past.session.shop, past.session.device
    assert device is not None
    shop.archive.fill([mei], 20, until=NOW)
    past.wa.fail_media("status", status=410)
    lost = await shop.archive.send(device)
    # The first may be given up before the next is announced: that is no rest yet.
    await until(lambda: past.files.failures() == len(lost), timeout=60)
    await past.idle()
    past.wa.clear_faults()
    await shop.archive.send(device)
    await until(lambda: past.sink.stored == 20, timeout=60)


async def test_groups_stay_out_where_the_settings_say_so(past: Past, mei: Phone) -> None:
    await past.session.channel.disconnect()
    session = await past.open(groups=False)
    group = past.wa.group([mei, session.shop], "Family")
    session.shop.archive.remember(group, "in the group", NOW, author=mei)
    session.shop.archive.remember(mei, "in private", NOW)
    assert session.device is not None
    await session.shop.archive.send(session.device)
    await past.idle()
    assert [r["content"] for r in await past.rows()] == ["in private"]
