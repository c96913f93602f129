"""The inbound worker on a real database: from a stored message to a stored decision and a queued reply."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
import structlog

from core.database import Database
from core.decide.port import Context, Decision, Usage
from core.metrics import Metrics
from core.rush import Rush
from tests.support.deciding import Scripted, Thinking, eventually, open_shop, says, working


async def test_a_greeting_is_decided_and_answered_through_the_queue(database: Database) -> None:
    shop = await open_shop(database)
    metrics = Metrics()
    async with working(database, metrics=metrics) as worker:
        [message] = await shop.write("Hi!")
        [decision] = await shop.decided([message])
        assert worker.healthy
    assert (decision["action"], decision["label"], decision["reason"]) == (
        "auto_reply",
        "greeting",
        "greeting",
    )
    assert (decision["decider"], decision["delivery_status"]) == ("rules", "inbound_ai_replied")
    [reply] = await shop.replies()
    assert decision["reply_message_id"] == reply["message_id"]
    assert reply["content"] == "Hello Aisha, how can we help you?"
    assert reply["dedupe_key"] == f"reply:{message}"
    assert reply["status"] == "queued"
    assert reply["expires_at"] - reply["created_at"] == timedelta(minutes=15)
    assert reply["priority"] > 0
    assert reply["thread_id"] == decision["thread_id"]
    assert reply["raw_payload"]["origin"] == "agent"
    assert reply["raw_payload"]["inbound_message_id"] == message
    assert reply["raw_payload"]["ai_trace"]["decider"] == "rules"
    assert reply["reply_to_message_id"] is None
    assert await shop.value("SELECT count(*) FROM et_inbound_claims") == 0
    assert metrics.decisions.labels("rules", "auto_reply")._value.get() == 1
    samples = {s.name: s.value for m in metrics.decision_latency.collect() for s in m.samples}
    assert samples["gateway_decision_latency_seconds_count"] == 1


async def test_a_burst_is_answered_once_and_every_message_has_its_decision(database: Database) -> None:
    shop = await open_shop(database)
    decider = says("one answer")
    ids = await shop.write("hello", "are you there?", "what does it cost?")
    async with working(database, decider):
        decisions = await shop.decided(ids)
    [reply] = await shop.replies()
    assert [d["message_id"] for d in decisions] == ids
    assert {d["reply_message_id"] for d in decisions} == {reply["message_id"]}
    assert reply["dedupe_key"] == f"reply:{ids[-1]}"
    [context] = decider.seen
    assert [m.content for m in context.messages] == ["hello", "are you there?", "what does it cost?"]


async def test_what_one_person_writes_in_a_rush_of_messages_is_decided_once(database: Database) -> None:
    shop = await open_shop(database)
    decider, rush = says("one answer"), Rush()
    rush.note(1000)
    async with working(database, decider, rush=rush):
        first = await shop.write("hello")
        second = await shop.write("are you there?")
        await shop.decided([*first, *second])
    [context] = decider.seen
    assert [m.content for m in context.messages] == ["hello", "are you there?"]


async def test_what_comes_while_a_thread_is_decided_waits_for_it(database: Database) -> None:
    shop = await open_shop(database)
    thinking = Thinking()
    async with working(database, thinking), working(database, thinking, owner="gw-2"):
        first = await shop.write("one")
        await asyncio.wait_for(thinking.asked.wait(), 10)
        later = await shop.write("two", "three")
        other = await shop.write("elsewhere", who=2)
        await eventually(lambda: _seen(thinking, 2), what="the other thread")
        assert {len(context.messages) for context in thinking.seen} == {1}
        thinking.released.set()
        await shop.decided([*first, *later, *other])
    mine = [[m.content for m in c.messages] for c in thinking.seen if c.lead.external_id.endswith("1")]
    assert mine == [["one"], ["two", "three"]]
    assert max(thinking.most_at_once.values()) == 1
    # What was said before stands in the history, the reply too.
    last = thinking.seen[-1]
    assert [(t.author, t.content) for t in last.history] == [("customer", "one"), ("agent", "at last")]


async def _seen(decider: Scripted, count: int) -> bool:
    return len(decider.seen) >= count


async def test_two_workers_decide_a_thousand_messages_once_each_and_in_order(database: Database) -> None:
    shop = await open_shop(database)

    async def ignore(_context: Context) -> Decision:
        return Decision("ignore", "scripted")

    one, two = Scripted(ignore), Scripted(ignore)
    for who in range(50):
        await shop.customer(who)
    async with working(database, one), working(database, two, owner="gw-2"):
        written = [
            message
            for number in range(10)
            for batch in await asyncio.gather(
                *(shop.write(str(2 * number), str(2 * number + 1), who=who) for who in range(50))
            )
            for message in batch
        ]
        decisions = await shop.decided(written, seconds=60)
    assert len(written) == 1000
    assert len(decisions) == 1000
    seen = [(c.lead.id, m) for decider in (one, two) for c in decider.seen for m in c.messages]
    assert len(seen) == len({m.id for _, m in seen}) == 1000
    assert one.seen
    assert two.seen
    assert max([*one.most_at_once.values(), *two.most_at_once.values()]) == 1
    in_order = await shop.value(
        """
        SELECT bool_and(d.id > d.before)
        FROM (
            SELECT d.id, lag(d.id, 1, 0::BIGINT) OVER (PARTITION BY d.thread_id ORDER BY d.message_id) AS before
            FROM et_decisions d
        ) d
        """
    )
    assert in_order


async def test_a_missed_notification_is_found_by_the_poll(database: Database, migrated_url: str) -> None:
    import asyncpg

    shop = await open_shop(database)
    async with working(database, poll_seconds=0.3):
        owner = await asyncpg.connect(migrated_url)
        try:
            await owner.execute("ALTER TABLE et_messages DISABLE TRIGGER et_messages_inserted")
        finally:
            await owner.close()
        ids = await shop.write("hi")
        [decision] = await shop.decided(ids)
    assert decision["action"] == "auto_reply"


async def test_a_notification_wakes_the_worker_long_before_the_poll(database: Database) -> None:
    shop = await open_shop(database)
    async with working(database, poll_seconds=3600, lease_seconds=600):
        await shop.decided(await shop.write("hi"), seconds=5)
        await shop.decided(await shop.write("hello"), seconds=5)


async def test_a_follow_up_is_planned_in_the_insight(database: Database) -> None:
    shop = await open_shop(database, timezone="Asia/Kuala_Lumpur")
    async with working(database):
        [decision] = await shop.decided(await shop.write("call me tomorrow"))
    assert (decision["action"], decision["delivery_status"]) == ("follow_up", "inbound_follow_up")
    [insight] = await shop.fetch("SELECT * FROM et_thread_insights")
    assert (insight["label"], insight["next_step"]) == ("follow_up", "contact_again")
    local = insight["next_followup_at"] + timedelta(hours=8)
    assert (local.hour, local.minute) == (10, 0)
    [reply] = await shop.replies()
    assert decision["reply_message_id"] == reply["message_id"]


async def test_a_takeover_hands_the_thread_to_a_person_and_withdraws_older_replies(
    database: Database,
) -> None:
    shop = await open_shop(database)
    async with working(database):
        await shop.decided(await shop.write("hi"))
        [decision] = await shop.decided(await shop.write("this is a scam, I want my money back"))
        assert decision["delivery_status"] == "inbound_human_takeover"
        assert (await shop.thread_of(decision["message_id"]))["handled_by"] == "human"
        greeting, closing = await shop.replies()
        assert (greeting["status"], greeting["error_code"]) == ("cancelled", "human_takeover")
        assert closing["status"] == "queued"
        assert decision["reply_message_id"] == closing["message_id"]
        # From now on nobody answers by themselves.
        [silent] = await shop.decided(await shop.write("hello?"))
    assert (silent["action"], silent["reason"]) == ("human_takeover", "handled_by_human")
    assert len(await shop.replies()) == 2


async def test_without_an_agent_nothing_is_ever_sent(database: Database) -> None:
    shop = await open_shop(database, agent=False)
    async with working(database):
        ids = await shop.write("hi")
        [decision] = await shop.decided(ids)
        assert (decision["action"], decision["reason"]) == ("human_takeover", "no_agent")
        assert await shop.replies() == []
        # An agent that is given to the workspace later may answer: nobody had taken the thread over.
        assert (await shop.thread_of(ids[0]))["handled_by"] == "agent"
        await shop.value(
            """
            WITH a AS (INSERT INTO et_agents (tenant_id, name) VALUES ($1, 'Sam') RETURNING id)
            UPDATE et_workspaces SET agent_id = (SELECT id FROM a) WHERE id = $2
            """,
            shop.tenant_id,
            shop.workspace_id,
        )
        [decision] = await shop.decided(await shop.write("hello"))
    assert decision["action"] == "auto_reply"


async def test_the_threads_own_agent_comes_before_the_workspaces(database: Database) -> None:
    shop = await open_shop(database, settings={"texts": {"greeting": "workspace: {agent}"}})
    async with working(database):
        [first] = await shop.decided(await shop.write("hi"))
        await shop.value(
            """
            WITH a AS (
                INSERT INTO et_agents (tenant_id, name, settings)
                VALUES ($1, 'Zoe', '{"texts": {"greeting": "own: {agent}"}}') RETURNING id
            )
            UPDATE et_threads SET agent_id = (SELECT id FROM a) WHERE id = $2
            """,
            shop.tenant_id,
            first["thread_id"],
        )
        await shop.decided(await shop.write("hi"))
    assert [r["content"] for r in await shop.replies()] == ["workspace: Sam", "own: Zoe"]


async def test_a_sessions_default_workspace_serves_leads_without_one(database: Database) -> None:
    shop = await open_shop(database)
    await shop.value(
        "UPDATE et_channel_sessions SET metadata = $2 WHERE id = $1",
        shop.session_id,
        {"default_workspace_id": shop.workspace_id},
    )
    await shop.customer()
    await shop.value("UPDATE et_leads SET workspace_id = NULL")
    async with working(database):
        [decision] = await shop.decided(await shop.write("hi"))
        assert decision["action"] == "auto_reply"
        await shop.value(
            "UPDATE et_channel_sessions SET metadata = $2 WHERE id = $1",
            shop.session_id,
            {"default_workspace_id": "all of them"},
        )
        [decision] = await shop.decided(await shop.write("hi"))
    assert decision["reason"] == "no_agent"


async def test_groups_reactions_and_history_are_never_answered(database: Database) -> None:
    shop = await open_shop(database)
    history = await shop.write("hi", is_history=True)
    async with working(database):
        group = await shop.write("hi", who=9, kind="group")
        [decision] = await shop.decided(group)
        assert (decision["action"], decision["reason"]) == ("ignore", "group")
        mixed = await shop.write("👍", message_type="reaction", reply_to_message_id="IN0")
        mixed += await shop.write("hi")
        decisions = await shop.decided(mixed)
    assert [d["reason"] for d in decisions] == ["reaction", "greeting"]
    assert [d["decider"] for d in decisions] == ["gates", "rules"]
    assert len(await shop.replies()) == 1
    assert await shop.value("SELECT delivery_status FROM et_messages WHERE id = $1", history[0]) == "received"


async def test_an_unreadable_message_waits_to_be_filled_and_is_then_answered(database: Database) -> None:
    shop = await open_shop(database)
    async with working(database, poll_seconds=0.1):
        [message] = await shop.write(None, message_type="unsupported", placeholder=True)
        await asyncio.sleep(0.4)
        assert await shop.value("SELECT delivery_status FROM et_messages") == "received"
        await shop.value(
            "UPDATE et_messages SET placeholder = false, message_type = 'text', content = 'hi' WHERE id = $1",
            message,
        )
        [decision] = await shop.decided([message])
    assert decision["action"] == "auto_reply"


async def test_an_unreadable_message_is_given_up_to_a_person_and_counted(database: Database) -> None:
    shop = await open_shop(database)
    metrics = Metrics()
    async with working(database, metrics=metrics, poll_seconds=0.1, placeholder_seconds=0.2):
        [decision] = await shop.decided(await shop.write(None, message_type="unsupported", placeholder=True))
    assert (decision["action"], decision["reason"]) == ("human_takeover", "undecryptable")
    assert metrics.possible_loss.labels("whatsapp")._value.get() == 1
    assert await shop.replies() == []


async def test_what_could_never_be_read_counts_as_possible_loss_whoever_handles_its_thread(
    database: Database,
) -> None:
    shop = await open_shop(database)
    metrics = Metrics()
    [known] = await shop.write("hello")
    await shop.value(
        "UPDATE et_threads SET handled_by = 'human' WHERE id = (SELECT thread_id FROM et_messages WHERE id = $1)",
        known,
    )
    async with working(database, metrics=metrics, poll_seconds=0.1, placeholder_seconds=0.2):
        lost = await shop.write(None, message_type="unsupported", placeholder=True)
        lost += await shop.write(None, who=9, kind="group", message_type="unsupported", placeholder=True)
        decisions = await shop.decided(lost)
    assert {d["reason"] for d in decisions} == {"handled_by_human", "group"}
    assert metrics.possible_loss.labels("whatsapp")._value.get() == 2


async def test_a_suspended_tenants_messages_wait(database: Database) -> None:
    shop = await open_shop(database)
    await shop.value("UPDATE et_tenants SET status = 'suspended'")
    async with working(database, poll_seconds=0.1):
        ids = await shop.write("hi")
        await asyncio.sleep(0.4)
        assert await shop.value("SELECT delivery_status FROM et_messages") == "received"
        await shop.value("UPDATE et_tenants SET status = 'active'")
        [decision] = await shop.decided(ids)
    assert decision["action"] == "auto_reply"


async def test_a_tenant_suspended_while_the_decider_thinks_sends_nothing(database: Database) -> None:
    shop = await open_shop(database)
    thinking = Thinking()
    async with working(database, thinking):
        ids = await shop.write("hi")
        await asyncio.wait_for(thinking.asked.wait(), 10)
        await shop.value("UPDATE et_tenants SET status = 'suspended'")
        thinking.released.set()
        [decision] = await shop.decided(ids)
    assert (decision["action"], decision["reason"]) == ("ignore", "tenant_suspended")
    assert await shop.replies() == []


async def test_a_person_who_takes_over_while_the_decider_thinks_is_not_talked_over(
    database: Database,
) -> None:
    shop = await open_shop(database)
    thinking = Thinking()
    async with working(database, thinking):
        ids = await shop.write("hi")
        await asyncio.wait_for(thinking.asked.wait(), 10)
        await shop.value("UPDATE et_threads SET handled_by = 'human'")
        thinking.released.set()
        [decision] = await shop.decided(ids)
    assert (decision["action"], decision["reason"]) == ("human_takeover", "handled_by_human")
    assert await shop.replies() == []


async def test_who_opts_out_while_the_decider_thinks_gets_no_reply(database: Database) -> None:
    shop = await open_shop(database)
    thinking = Thinking()
    async with working(database, thinking):
        ids = await shop.write("hi")
        await asyncio.wait_for(thinking.asked.wait(), 10)
        await shop.value("UPDATE et_leads SET opted_out_at = now()")
        thinking.released.set()
        [decision] = await shop.decided(ids)
    assert (decision["action"], decision["reason"]) == ("ignore", "opted_out")
    assert await shop.replies() == []


async def test_a_model_that_is_not_configured_leaves_it_to_the_rules(database: Database) -> None:
    shop = await open_shop(database, decider="llm", settings={"temperature": 0.3})
    async with working(database):
        [decision] = await shop.decided(await shop.write("hi"))
    assert (decision["action"], decision["decider"]) == ("auto_reply", "rules")


async def test_what_a_model_cost_stands_on_its_message(database: Database) -> None:
    shop = await open_shop(database, settings={"quote": True})

    async def answer(_context: Context) -> Decision:
        usage = Usage("test", "small", 100, 20, 0.0012)
        return Decision("auto_reply", "answered", reply="42", model="small", usage=usage, consent="opt_out")

    async with working(database, Scripted(answer, name="llm")):
        ids = await shop.write("what is six times seven?")
        [decision] = await shop.decided(ids)
    [reply] = await shop.replies()
    assert (decision["decider"], decision["model"]) == ("llm", "small")
    assert (reply["llm_provider"], reply["llm_total_tokens"]) == ("test", 120)
    # Quoting is the tenant's choice, consent is not the model's.
    assert reply["reply_to_message_id"] == await shop.value(
        "SELECT channel_message_id FROM et_messages WHERE id = $1", ids[0]
    )
    assert await shop.value("SELECT opted_out_at FROM et_leads") is None


async def test_no_log_line_carries_what_people_say(database: Database) -> None:
    shop = await open_shop(database)
    with structlog.testing.capture_logs() as lines:
        async with working(database):
            await shop.decided(await shop.write("hi"))
            await shop.decided(await shop.write("my secret complaint about a refund"))
    stored = [line for line in lines if line["event"] == "decision.stored"]
    assert [line["action"] for line in stored] == ["auto_reply", "human_takeover"]
    assert all(
        line["tenant_id"] == shop.tenant_id and line["session_id"] == shop.session_id for line in stored
    )
    for word in ("secret", "refund", "help you", "colleague", "+6011"):
        assert word not in repr(lines)


async def test_start_and_stop_can_be_repeated(database: Database) -> None:
    shop = await open_shop(database)
    async with working(database) as worker:
        await worker.start()
        await worker.stop()
        assert not worker.healthy
        ids = await shop.write("hi")
        await worker.start()
        await shop.decided(ids)
        assert worker.healthy
    await worker.stop()


@pytest.mark.parametrize("archived", [False, True])
async def test_a_reply_is_in_the_thread_it_answers(database: Database, archived: bool) -> None:
    shop = await open_shop(database)
    ids = await shop.write("hi")
    if archived:
        await shop.value("UPDATE et_threads SET status = 'archived'")
        ids = await shop.write("hello")
    async with working(database):
        [decision] = await shop.decided(ids)
    assert decision["thread_id"] in {reply["thread_id"] for reply in await shop.replies()}
