"""Outbound, threads, leads, timeline, messages: what a CRM reads and does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core.errors import RefusedError
from tests.support.api import Api, Tenant
from tests.support.outbound import all_reached, enqueue, fetch, reached, value

OUT = "/api/v1/messaging/outbound"


def _later(shop: Tenant, text: str = "later", **more: Any) -> dict[str, Any]:
    return {
        "channel_session_id": shop.session_id,
        "recipient": "+60111222333",
        "content": text,
        "send_at": "2099-01-01T00:00:00Z",
    } | more


async def test_an_outbound_message_is_queued_read_and_sent(api: Api, shop: Tenant) -> None:
    made = await api.post(OUT, _later(shop) | {"send_at": None}, shop.key)
    assert made.status == 201, made.body
    assert set(made.json) == {"message_id", "queue_id", "thread_id", "status"}
    await reached(api.db, made.json["queue_id"], "sent")
    item = (await api.get(f"{OUT}/{made.json['queue_id']}", shop.key)).json
    assert (item["status"], item["recipient"]) == ("sent", "+60111222333")
    assert item["channel_message_id"].startswith("FAKE")
    message = (await api.get(f"/api/v1/messaging/messages/{made.json['message_id']}", shop.key)).json
    assert (message["content"], message["delivery_status"], message["origin"]) == ("later", "sent", "api")
    assert "raw_payload" not in message


async def test_a_repeated_dedupe_key_answers_the_first_item(api: Api, shop: Tenant) -> None:
    first = await api.post(OUT, _later(shop, dedupe_key="d1"), shop.key)
    again = await api.post(OUT, _later(shop, dedupe_key="d1"), shop.key)
    other = await api.post(OUT, _later(shop, "other", dedupe_key="d1"), shop.key)
    assert (first.status, again.status, other.status) == (201, 200, 422)
    assert first.json == again.json


async def test_the_same_key_from_many_at_once_makes_one_message(api: Api, shop: Tenant) -> None:
    answers = await asyncio.gather(
        *(api.post(OUT, _later(shop, dedupe_key="d2"), shop.key) for _ in range(8))
    )
    assert {answer.status for answer in answers} <= {200, 201}
    assert len({answer.json["queue_id"] for answer in answers}) == 1
    assert await value(api.db, "SELECT count(*) FROM et_messages") == 1


WRONG: list[tuple[dict[str, Any], str]] = [
        ({"recipient": None}, "recipient"),
        ({"lead_id": 1}, "recipient"),
        ({"channel": "email"}, "channel"),
        ({"send_at": "tomorrow"}, "send_at"),
        ({"send_at": "2099-01-01T00:00:00"}, "send_at"),
        ({"send_at": "0001-01-01T00:00:00+14:00"}, "send_at"),
        ({"send_at": 1760000000}, "send_at"),
        ({"recipient": "not a number"}, "recipient"),
    ]  # fmt: skip


async def test_what_is_wrong_with_an_outbound_message_is_named(api: Api, shop: Tenant) -> None:
    for change, field in WRONG:
        answer = await api.post(OUT, _later(shop) | change, shop.key)
        assert (answer.status, answer.json["errors"][0]["field"]) == (422, field), answer.body


async def test_cancel_withdraws_what_waits_and_nothing_else(api: Api, shop: Tenant) -> None:
    waiting = (await api.post(OUT, _later(shop), shop.key)).json["queue_id"]
    for _ in range(2):
        answer = await api.post(f"{OUT}/{waiting}/cancel", None, shop.key)
        assert (answer.status, answer.json["status"], answer.json["delivery_status"]) == (
            200,
            "cancelled",
            "cancelled",
        )
    sent = (await api.post("/send", shop.send_body(), shop.key)).json["queue_id"]
    answer = await api.post(f"{OUT}/{sent}/cancel", None, shop.key)
    assert (answer.status, answer.code) == (409, "not_queued")


async def test_failed_items_are_found_by_status_and_sent_again(api: Api, shop: Tenant) -> None:
    api.platform.script(RefusedError("no such number", code="not_on_whatsapp"))
    failed = (await api.post("/send", shop.send_body("again"), shop.key)).json["queue_id"]
    found = (await api.get(f"{OUT}?status=failed", shop.key)).json["items"]
    assert [(item["queue_id"], item["last_error"]) for item in found] == [(failed, "no such number")]
    assert (await api.post(f"{OUT}/{failed}/retry", None, shop.key)).status == 200
    await reached(api.db, failed, "sent")
    again = await api.post(f"{OUT}/{failed}/retry", None, shop.key)
    assert again.status == 409
    assert await value(api.db, "SELECT count(*) FROM et_audit_log WHERE event = 'outbound_retried'") == 1
    assert (await api.get(f"{OUT}?status=strange", shop.key)).status == 422


async def test_an_operator_settles_what_is_unknown_once(api: Api, shop: Tenant) -> None:
    api.platform.script("sent_then_lost", "sent_then_lost")
    ids = [await enqueue(api.db, shop.place, text, to="+60111222333") for text in ("one", "two")]
    await all_reached(api.db, ids, "unknown")
    settled = await api.post(f"{OUT}/{ids[0]}/settle", {"outcome": "arrived"}, shop.key)
    assert (settled.status, settled.json["status"], settled.json["delivery_status"]) == (
        200,
        "sent",
        "delivered",
    )
    given_up = await api.post(f"{OUT}/{ids[1]}/settle", {"outcome": "given_up"}, shop.key)
    assert (given_up.json["status"], given_up.json["error_code"]) == ("failed", "given_up")
    assert "a person gave it up" in given_up.json["last_error"]
    late = await api.post(f"{OUT}/{ids[0]}/settle", {"outcome": "given_up"}, shop.key)
    assert (late.status, late.code) == (409, "not_unknown")
    assert (await api.post(f"{OUT}/{ids[0]}/settle", {"outcome": "lost"}, shop.key)).status == 422
    assert len(api.platform.calls) == 2  # nothing was sent again
    told = await fetch(api.db, "SELECT detail FROM et_audit_log WHERE event = 'outbound_settled' ORDER BY id")
    assert [row["detail"]["outcome"] for row in told] == ["arrived", "given_up"]


async def test_dispatch_next_sends_the_next_due_item(api: Api, shop: Tenant) -> None:
    assert (await api.post(f"{OUT}/dispatch-next", None, shop.key)).status == 204
    api.dispatcher.remove(shop.session_id)  # so that the worker does not do it first
    queued = (await api.post(OUT, _later(shop) | {"send_at": None}, shop.key)).json["queue_id"]
    await asyncio.sleep(0.3)
    outbound = api.services.outbound
    assert outbound is not None
    answers = []
    api.dispatcher._sessions[shop.session_id] = None  # type: ignore[index]
    answers.append(await api.post(f"{OUT}/dispatch-next", None, shop.key))
    done = await reached(api.db, queued, "sent")
    assert done["status"] == "sent"
    if answers[0].status == 200:
        assert set(answers[0].json) == {
            "queue_id",
            "message_id",
            "channel",
            "status",
            "retry_count",
            "detail",
        }
        assert (answers[0].json["queue_id"], answers[0].json["status"]) == (queued, "sent")


async def test_lists_are_paged_without_gap_or_repeat(api: Api, shop: Tenant) -> None:
    for number in range(7):
        await shop.receive(f"m{number}", sender=f"6011122233{number}", message_id=f"P{number}")
        await api.post(OUT, _later(shop, f"o{number}", recipient=f"+6011122233{number}"), shop.key)
    for path in (OUT, "/api/v1/messaging/threads", "/api/v1/messaging/leads"):
        seen: list[int] = []
        cursor = ""
        for _ in range(10):
            page = (await api.get(f"{path}?limit=3{cursor}", shop.key)).json
            seen += [item.get("queue_id") or item["id"] for item in page["items"]]
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert len(seen) == 7, path
        assert len(set(seen)) == 7, path
        assert (await api.get(f"{path}?limit=7", shop.key)).json["next_cursor"] is None


async def test_a_thread_is_read_with_lead_insight_and_the_latest_messages(api: Api, shop: Tenant) -> None:
    for number in range(5):
        await shop.receive(f"m{number}", message_id=f"T{number}")
    thread = (await api.get("/api/v1/messaging/threads", shop.key)).json["items"][0]
    assert thread["lead"]["name"] == "Ann"
    assert thread["last_message"]["content"] == "m4"
    assert thread["insight"] is None
    path = f"/api/v1/messaging/threads/{thread['id']}"
    latest = (await api.get(f"{path}?limit=2", shop.key)).json["messages"]
    assert [one["content"] for one in latest["items"]] == ["m3", "m4"]
    before = (await api.get(f"{path}?limit=3&cursor={latest['next_cursor']}", shop.key)).json["messages"]
    assert [one["content"] for one in before["items"]] == ["m0", "m1", "m2"]
    assert before["next_cursor"] is None


async def test_threads_are_found_by_what_they_are(api: Api, shop: Tenant) -> None:
    await shop.receive("about invoices", sender="60111222331", message_id="F1")
    await shop.receive("about shoes", sender="60111222332", message_id="F2")
    threads = (await api.get("/api/v1/messaging/threads", shop.key)).json["items"]
    invoices = next(one for one in threads if one["last_message"]["content"] == "about invoices")
    async with api.db.worker() as conn:
        await conn.execute(
            "INSERT INTO et_thread_insights (tenant_id, thread_id, lead_id, label, next_followup_at) "
            "VALUES ($1, $2, $3, 'billing', '2025-01-01T00:00:00Z')",
            shop.id,
            invoices["id"],
            invoices["lead"]["id"],
        )
    await api.post(f"/api/v1/messaging/threads/{invoices['id']}/takeover", None, shop.key)
    for query, count in (
        ("q=INVOICE", 1), ("q=60111222332", 1), ("q=ann", 2), ("q=nothing", 0), ("label=billing", 1), ("label=x", 0),
        ("handled_by=human", 1), ("handled_by=agent", 1), ("status=active", 2), ("status=archived", 0),
        ("due_before=2025-06-01T00:00:00Z", 1), ("due_before=2024-06-01T00:00:00%2B08:00", 0),
        (f"channel_session_id={shop.session_id}", 2), (f"lead_id={invoices['lead']['id']}", 1),
    ):  # fmt: skip
        answer = await api.get(f"/api/v1/messaging/threads?{query}", shop.key)
        assert (answer.status, len(answer.json["items"])) == (200, count), query


async def test_a_takeover_withdraws_automatic_replies_and_leaves_what_people_wrote(
    api: Api, shop: Tenant
) -> None:
    await shop.receive("hello")
    thread_id = await value(api.db, "SELECT id FROM et_threads")
    typed = (await api.post(OUT, _later(shop, "typed"), shop.key)).json["queue_id"]
    reply = await value(
        api.db,
        "SELECT queue_id FROM et_enqueue_outbound($1, $2, '+60111222333', 'auto', dedupe_key => 'reply:1', "
        "send_at => now() + INTERVAL '1 h', raw_payload => '{\"origin\": \"agent\"}')",
        shop.id,
        shop.session_id,
    )
    path = f"/api/v1/messaging/threads/{thread_id}"
    taken = await api.post(f"{path}/takeover", None, shop.key)
    assert (taken.status, taken.json["handled_by"], taken.json["cancelled"]) == (200, "human", [reply])
    rows = await fetch(api.db, "SELECT id, status FROM et_outbound_queue ORDER BY id")
    assert {row["id"]: row["status"] for row in rows} == {typed: "queued", reply: "cancelled"}
    assert (await api.post(f"{path}/takeover", None, shop.key)).json["cancelled"] == []
    assert (await api.post(f"{path}/release", None, shop.key)).json["handled_by"] == "agent"
    events = [row["event"] for row in await fetch(api.db, "SELECT event FROM et_audit_log ORDER BY id")]
    assert events == ["thread_taken_over", "thread_released"]


async def test_after_archiving_the_next_message_opens_a_new_thread(api: Api, shop: Tenant) -> None:
    await shop.receive("one", message_id="A1")
    thread_id = await value(api.db, "SELECT id FROM et_threads")
    assert (await api.post(f"/api/v1/messaging/threads/{thread_id}/archive", None, shop.key)).json[
        "status"
    ] == "archived"
    await shop.receive("two", message_id="A2")
    assert await value(api.db, "SELECT count(*) FROM et_threads") == 2
    lead = await value(api.db, "SELECT id FROM et_leads")
    line = (await api.get(f"/api/v1/messaging/leads/{lead}/timeline", shop.key)).json
    assert [one["content"] for one in line["items"]] == ["one", "two"]
    newest = (await api.get(f"/api/v1/messaging/leads/{lead}/timeline?order=desc&limit=1", shop.key)).json
    assert [one["content"] for one in newest["items"]] == ["two"]
    rest = f"/api/v1/messaging/leads/{lead}/timeline?order=desc&cursor={newest['next_cursor']}"
    assert [one["content"] for one in (await api.get(rest, shop.key)).json["items"]] == ["one"]


async def test_a_lead_is_searched_changed_and_opted_out(api: Api, shop: Tenant) -> None:
    await shop.receive("hello")
    found = (await api.get("/api/v1/messaging/leads?q=%2B60111222333", shop.key)).json["items"]
    assert len(found) == 1
    path = f"/api/v1/messaging/leads/{found[0]['id']}"
    changed = await api.patch(
        path,
        {"name": "Ann Lee", "tags": ["vip", "vip", "a"], "timezone": "Asia/Singapore", "opted_out": True},
        shop.key,
    )
    assert (changed.json["name"], changed.json["tags"]) == ("Ann Lee", ["a", "vip"])
    since = changed.json["opted_out_at"]
    assert since
    assert (await api.patch(path, {"opted_out": True}, shop.key)).json["opted_out_at"] == since
    for query, count in (
        ("tag=vip", 1),
        ("tag=x", 0),
        ("opted_out=true", 1),
        ("opted_out=false", 0),
        ("kind=group", 0),
    ):
        assert len((await api.get(f"/api/v1/messaging/leads?{query}", shop.key)).json["items"]) == count, (
            query
        )
    assert (await api.patch(path, {"opted_out": False}, shop.key)).json["opted_out_at"] is None
    assert (await api.patch(path, {}, shop.key)).json["name"] == "Ann Lee"
    assert (await api.patch(path, {"timezone": "Mars/Base"}, shop.key)).json["errors"][0][
        "field"
    ] == "timezone"
    assert (await api.patch(path, {"workspace_id": 999999}, shop.key)).status == 404


async def test_two_leads_become_one_and_the_old_id_answers_with_the_survivor(api: Api, shop: Tenant) -> None:
    await shop.receive("one", sender="60111222331", message_id="G1")
    await shop.receive("two", sender="60111222332", message_id="G2")
    low, high = [row["id"] for row in await fetch(api.db, "SELECT id FROM et_leads ORDER BY id")]
    merged = await api.post(f"/api/v1/messaging/leads/{low}/merge", {"into": high}, shop.key)
    assert (merged.status, merged.json["id"], len(merged.json["identities"])) == (200, low, 2)
    assert (await api.get(f"/api/v1/messaging/leads/{high}", shop.key)).json["id"] == low
    line = (await api.get(f"/api/v1/messaging/leads/{high}/timeline", shop.key)).json
    assert [one["content"] for one in line["items"]] == ["one", "two"]
    audit = (await api.get("/api/v1/audit?event=lead_merged", shop.key)).json["items"]
    assert audit[0]["actor"].startswith("key:")
    again = await api.post(f"/api/v1/messaging/leads/{low}/merge", {"into": 999999}, shop.key)
    assert again.status == 404


async def test_a_cut_search_says_so(api: Api, shop: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncpg

    async def slow(*_: object, **__: object) -> None:
        raise asyncpg.QueryCanceledError("canceling statement due to statement timeout")

    monkeypatch.setattr("core.store.crm.list_threads", slow)
    answer = await api.get("/api/v1/messaging/threads?q=a", shop.key)
    assert (answer.status, answer.json["errors"][0]["field"]) == (422, "q")
