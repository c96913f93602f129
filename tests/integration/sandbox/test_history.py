"""History sync: what the phone hands over after a pairing and when it is asked, as the unmodified client tells it."""

from __future__ import annotations

import time

import pytest

from sandbox.whatsapp import bodies
from sandbox.whatsapp.protos import history
from tests.integration.sandbox.conftest import Linked, a_sandbox, link

pytestmark = pytest.mark.asyncio(loop_scope="package")

SYNC = history.HistorySync
NOW = 1_790_000_000
DAY = 86_400


def names_of(kinds: list[int]) -> set[str]:
    return {SYNC.HistorySyncType.Name(kind) for kind in kinds}


async def test_after_a_pairing_the_phone_hands_over_what_it_remembers() -> None:
    async with a_sandbox() as wa:
        shop, mei = wa.phone("+60123456789", "Shop"), wa.person("+60111222333", "Mei", auto_receipts=None)
        ali = wa.person("+60111222444", "Ali")
        group = wa.group([mei, shop], "Family")
        old = shop.archive.remember(mei, "long ago", NOW - 400 * DAY)
        photo = shop.archive.remember(mei, mei.media_body("image", b"x" * 99, caption="old"), NOW - 9 * DAY)
        shop.archive.fill([mei, ali], 12, until=NOW, apart=DAY)
        shop.archive.remember(group, "in the group", NOW - DAY, author=mei)
        shop.archive.terms.per_chunk = 10
        linked = await link(wa)
        try:
            expected = {m.id for chat in shop.archive.chats for m in chat.messages}
            got: list[str] = []
            kinds: list[int] = []
            index = 0
            while set(got) != expected:
                event = await linked.client.wait("HistorySyncEv", start=index)
                index = linked.client.events.items.index(event, index) + 1
                kinds.append(event["kind"])
                got += event["ids"]
                if event["kind"] == SYNC.PUSH_NAME:
                    assert {"Mei", "Ali"} <= set(event["names"])
                assert len(event["ids"]) <= 10
            assert sorted(got) == sorted(expected)  # each of them once
            assert names_of(kinds) == {"INITIAL_BOOTSTRAP", "PUSH_NAME", "RECENT", "FULL"}
            assert {old, photo} <= expected
            await wa.wait_drained(linked.device)
            await shop.receipts.wait_for(lambda r: r.kind == "hist_sync")
        finally:
            await linked.client.kill()


async def test_more_can_be_asked_for(linked: Linked) -> None:
    ids = [linked.shop.archive.remember(linked.mei, f"then {n}", NOW - 100 + n) for n in range(9)]
    start = len(linked.client.events)
    request = {
        "chatJID": f"{linked.mei.lid}@lid",
        "oldestMsgID": ids[6],
        "oldestMsgFromMe": False,
        "onDemandMsgCount": 4,
        "oldestMsgTimestampMS": str((NOW - 100 + 6) * 1000),
    }
    await linked.client.do("ask_history", request=request)
    event = await linked.client.wait("HistorySyncEv", start=start)
    assert (event["kind"], sorted(event["ids"])) == (SYNC.ON_DEMAND, sorted(ids[2:6]))
    asked = linked.shop.asked.items[-1]
    assert (asked.what, asked.device) == ("history", linked.device.jid)
    assert not any(m.kind == "other" for m in linked.shop.received)


async def test_a_hundred_thousand_messages_are_made_and_handed_over_quickly(linked: Linked) -> None:
    people = [linked.wa.person(f"+6018000{n:04}") for n in range(100)]
    archive = linked.shop.archive
    archive.chats.clear()
    began = time.monotonic()
    assert archive.fill(people, 1_000, until=NOW) == 100_000
    start = len(linked.client.events)
    ids = await archive.send(linked.device, per_chunk=5_000)
    made = time.monotonic() - began
    assert len(ids) >= 21
    last = await linked.client.wait(
        "HistorySyncEv",
        lambda e: e["kind"] == SYNC.RECENT and e["progress"] == 100,
        start=start,
        timeout=60,
    )
    assert last["chats"]
    events = [e for e in linked.client.events.items[start:] if e["ev"] == "HistorySyncEv"]
    assert len({msg_id for e in events for msg_id in e["ids"]}) == 100_000
    assert made < 30  # a few seconds on an idle machine
    archive.chats.clear()
    msg_id = await linked.mei.send_message(linked.shop, bodies.text("still here"))
    await linked.client.message(msg_id)
