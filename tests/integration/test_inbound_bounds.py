"""What bounds automatic replies: opt-outs, caps, two gateways that answer each other, old messages, closed hours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from core.channel import SessionId
from core.database import Database
from tests.support.deciding import Shop, eventually, open_shop, working
from tests.support.fake_channel import FakeDispatcher, FakePlatform
from tests.support.outbound import Place as Sender
from tests.support.outbound import give_lease, running


async def enqueue(
    shop: Shop, text: str, *, who: int = 1, origin: str | None = None, key: str | None = None
) -> int:
    """What somebody else queued for this customer."""
    queue_id: int = await shop.value(
        "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, $4, dedupe_key => $5, raw_payload => $6)",
        shop.tenant_id,
        shop.session_id,
        f"+6011{who:08d}",
        text,
        key,
        {"origin": origin} if origin else {},
    )
    return queue_id


@asynccontextmanager
async def sending(shop: Shop, platform: FakePlatform) -> AsyncIterator[None]:
    """The outbound worker with a fake channel behind the shop's session."""
    await give_lease(shop.db, Sender(shop.tenant_id, shop.session_id, "gw-1"), "gw-1")
    async with running(shop.db, FakeDispatcher(platform, [SessionId(shop.session_id)])):
        yield


async def said(platform: FakePlatform, count: int) -> list[str | None]:
    async def enough() -> bool:
        return len(platform.calls) >= count

    await eventually(enough, what=f"{count} texts on the channel")
    return platform.texts


async def test_stop_ends_automatic_messages_and_start_brings_them_back(database: Database) -> None:
    shop = await open_shop(database)
    await shop.customer(1)
    reminder = await enqueue(shop, "reminder", origin="agent")
    reply = await enqueue(shop, "answer", key="reply:0")
    by_hand = await enqueue(shop, "by hand", origin="operator")
    async with working(database):
        [decision] = await shop.decided(await shop.write("STOP"))
        assert (decision["label"], decision["reason"], decision["action"]) == (
            "opt_out",
            "opt_out",
            "auto_reply",
        )
        opted_out_at = await shop.value("SELECT opted_out_at FROM et_leads")
        assert opted_out_at is not None
        states = {row["id"]: (row["status"], row["error_code"]) for row in await shop.replies()}
        assert states[reminder] == states[reply] == ("cancelled", "opted_out")
        assert states[by_hand] == ("queued", None)
        # Silence, and no second confirmation.
        again = await shop.decided([*await shop.write("hi"), *await shop.write("Stop!")])
        assert [d["reason"] for d in again] == ["opted_out", "opted_out"]
        assert await shop.value("SELECT opted_out_at FROM et_leads") == opted_out_at
        [back] = await shop.decided(await shop.write("START"))
        assert (back["label"], back["action"]) == ("opt_in", "auto_reply")
        assert await shop.value("SELECT opted_out_at FROM et_leads") is None
        [greeted] = await shop.decided(await shop.write("hi"))
        assert greeted["label"] == "greeting"
    texts = [row["content"] for row in await shop.replies()]
    assert len(texts) == 6
    assert "START" in texts[3]


async def test_the_confirmation_of_an_opt_out_reaches_the_customer_and_nothing_after_it(
    database: Database,
) -> None:
    shop = await open_shop(database)
    platform = FakePlatform()
    async with working(database), sending(shop, platform):
        await shop.decided(await shop.write("STOP"))
        [confirmation] = await said(platform, 1)
        assert "START" in (confirmation or "")
        await enqueue(shop, "campaign")
        later = await enqueue(shop, "by hand", origin="operator")

        async def sent() -> bool:
            return bool(
                await shop.value("SELECT status = 'sent' FROM et_outbound_queue WHERE id = $1", later)
            )

        await eventually(sent)
    assert platform.texts == [confirmation, "by hand"]


async def test_who_asks_for_a_person_is_told_that_one_comes(database: Database) -> None:
    shop = await open_shop(database)
    platform = FakePlatform()
    async with working(database), sending(shop, platform):
        [decision] = await shop.decided(await shop.write("can I talk to a human?"))
        assert decision["delivery_status"] == "inbound_human_takeover"
        assert await said(platform, 1) == ["A colleague will answer you here."]


async def test_an_opt_out_counts_without_an_agent_and_in_a_persons_thread(database: Database) -> None:
    quiet = await open_shop(database, agent=False)
    shop = await open_shop(database)
    async with working(database):
        await shop.decided(await shop.write("hi"))
        await shop.value("UPDATE et_threads SET handled_by = 'human' WHERE tenant_id = $1", shop.tenant_id)
        for place in (quiet, shop):
            [decision] = await place.decided(await place.write("unsubscribe"))
            assert (decision["action"], decision["reason"], decision["reply_message_id"]) == (
                "ignore",
                "opt_out",
                None,
            )
    assert await shop.value("SELECT count(*) FROM et_leads WHERE opted_out_at IS NOT NULL") == 2


async def test_two_gateways_that_answer_each_other_stop_at_the_cap(database: Database) -> None:
    """Each is the other's customer, both answer everything with a text that differs every time."""
    settings = {
        "default_reply": "Thank you {name}, we got your message",
        "caps": {"per_10_minutes": 5, "per_day": 30},
    }
    one, two = await open_shop(database, settings=settings), await open_shop(database, settings=settings)
    passed_on = 0
    async with working(database, poll_seconds=0.1):
        await one.write("lorem ipsum 0")

        async def deliver(source: Shop, target: Shop, known: int) -> int:
            nonlocal passed_on
            rows = await source.replies()
            for row in rows[known:]:
                passed_on += 1
                await target.write(f"{row['content']} {passed_on}")
            return len(rows)

        at_one = at_two = 0
        quiet = 0
        while quiet < 10:
            before = passed_on
            at_one = await deliver(one, two, at_one)
            at_two = await deliver(two, one, at_two)
            quiet = quiet + 1 if passed_on == before else 0
            await asyncio.sleep(0.1)
    assert 0 < len(await one.replies()) <= 5
    assert 0 < len(await two.replies()) <= 5
    handled = await one.fetch("SELECT handled_by FROM et_threads")
    assert "human" in {row["handled_by"] for row in handled}


async def test_the_same_text_back_and_forth_is_a_loop(database: Database) -> None:
    shop = await open_shop(database)
    async with working(database):
        reasons = []
        for _ in range(4):
            [decision] = await shop.decided(await shop.write("Hello"))
            reasons.append(decision["reason"])
    assert reasons == ["greeting", "greeting", "loop", "handled_by_human"]


async def test_a_persons_answer_starts_the_count_anew(database: Database) -> None:
    shop = await open_shop(database, settings={"default_reply": "noted", "caps": {"per_day": 2}})
    async with working(database):
        for text in ("lorem", "ipsum"):
            await shop.decided(await shop.write(text))
        await enqueue(shop, "I am here now", origin="operator")
        [decision] = await shop.decided(await shop.write("dolor"))
        assert decision["reason"] == "default_reply"
        await shop.decided(await shop.write("sit"))
        [decision] = await shop.decided(await shop.write("amet"))
    assert decision["reason"] == "reply_cap"


async def test_replies_that_never_went_out_do_not_count(database: Database) -> None:
    shop = await open_shop(database, settings={"default_reply": "noted", "caps": {"per_day": 1}})
    async with working(database):
        await shop.decided(await shop.write("lorem"))
        await shop.value("UPDATE et_outbound_queue SET status = 'cancelled'")
        [decision] = await shop.decided(await shop.write("ipsum"))
    assert decision["reason"] == "default_reply"


async def test_a_vacation_notice_is_not_answered(database: Database) -> None:
    shop = await open_shop(database, settings={"default_reply": "noted"})
    async with working(database):
        ids = await shop.write("I am out of the office until Monday")
        ids += await shop.write("lorem ipsum", who=2, raw_payload={"auto_submitted": True})
        decisions = await shop.decided(ids)
    assert [(d["action"], d["reason"]) for d in decisions] == [("ignore", "automatic_message")] * 2
    assert await shop.replies() == []


@pytest.mark.parametrize(("hours", "reason"), [(13, "stale"), (11, "greeting")])
async def test_an_old_message_is_left_to_a_person(database: Database, hours: int, reason: str) -> None:
    shop = await open_shop(database)
    long_ago = await shop.value("SELECT now()") - timedelta(hours=hours)
    ids = await shop.write("hi", occurred_at=long_ago, created_at=long_ago)
    async with working(database):
        [decision] = await shop.decided(ids)
    assert decision["reason"] == reason


async def test_closed_is_said_once_in_a_thread(database: Database) -> None:
    shop = await open_shop(database, settings={"opening_hours": {}})
    async with working(database):
        [first] = await shop.decided(await shop.write("hi"))
        [second] = await shop.decided(await shop.write("hello"))
        [other] = await shop.decided(await shop.write("hi", who=2))
    assert [d["reason"] for d in (first, second, other)] == ["out_of_hours", "greeting", "out_of_hours"]


async def test_rules_of_one_tenant_say_nothing_to_another(database: Database) -> None:
    one = await open_shop(database, settings={"default_reply": "one"})
    two = await open_shop(database, settings={"default_reply": "two"})
    async with working(database):
        await one.decided(await one.write("lorem"))
        await two.decided(await two.write("lorem"))
    assert [r["content"] for r in await one.replies()] == ["one"]
    assert [r["content"] for r in await two.replies()] == ["two"]
