"""`POST /send`: each outcome has its answer, and a repeated key sends nothing."""

from __future__ import annotations

import pytest

from core.errors import RefusedError
from tests.support.api import Api, Tenant
from tests.support.outbound import value


async def test_a_send_answers_with_the_channels_id(api: Api, shop: Tenant) -> None:
    answer = await api.post("/send", shop.send_body("hello"), shop.key)
    assert answer.status == 200, answer.body
    assert answer.json["success"] is True
    assert answer.json["channel_message_id"].startswith("FAKE")
    assert answer.json["sent_at"]
    assert set(answer.json) == {"success", "channel_message_id", "sent_at", "message_id", "queue_id"}
    assert api.platform.texts == ["hello"]


async def test_a_refusal_is_502_with_its_reason(api: Api, shop: Tenant) -> None:
    api.platform.script(RefusedError("this number is not on WhatsApp", code="not_on_whatsapp"))
    answer = await api.post("/send", shop.send_body(), shop.key)
    assert (answer.status, answer.code) == (502, "not_on_whatsapp")
    assert answer.json["queue_id"] > 0


async def test_a_cut_off_send_is_504_with_the_ids(api: Api, shop: Tenant) -> None:
    api.platform.resolvable = False
    api.platform.script("sent_then_lost")
    answer = await api.post("/send", shop.send_body(), shop.key)
    assert (answer.status, answer.code) == (504, "outcome_unknown")
    assert answer.json["message_id"] > 0


async def test_a_send_that_takes_longer_than_asked_is_202(api: Api, shop: Tenant) -> None:
    api.platform.hold()
    answer = await api.post("/send", shop.send_body(timeout_s=0.2), shop.key)
    assert answer.status == 202
    assert answer.json["status"] == "queued"
    api.platform.release()


@pytest.mark.parametrize("status", ["connecting", "disconnected"])
async def test_a_session_that_will_be_back_queues(api: Api, shop: Tenant, status: str) -> None:
    session_id = await api.another_session(shop, status)
    answer = await api.post("/send", shop.send_body(channel_session_id=session_id), shop.key)
    assert answer.status == 202


@pytest.mark.parametrize("status", ["pairing", "logged_out", "suspended"])
async def test_a_session_that_needs_a_person_is_409_and_stores_nothing(
    api: Api, shop: Tenant, status: str
) -> None:
    session_id = await api.another_session(shop, status)
    answer = await api.post("/send", shop.send_body(channel_session_id=session_id), shop.key)
    assert answer.status == 409
    assert answer.json["action"]
    assert await value(api.db, "SELECT count(*) FROM et_messages") == 0


async def test_a_repeated_key_sends_once_and_answers_the_present_state(api: Api, shop: Tenant) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = await api.post("/send", shop.send_body("one"), shop.key, headers=headers)
    second = await api.post("/send", shop.send_body("one"), shop.key, headers=headers)
    assert (first.status, second.status) == (200, 200)
    assert first.json["queue_id"] == second.json["queue_id"]
    assert second.json["channel_message_id"] == first.json["channel_message_id"]
    assert api.platform.texts == ["one"]


async def test_a_key_used_for_another_body_is_422(api: Api, shop: Tenant) -> None:
    headers = {"Idempotency-Key": "order-2"}
    await api.post("/send", shop.send_body("one"), shop.key, headers=headers)
    answer = await api.post("/send", shop.send_body("two"), shop.key, headers=headers)
    assert (answer.status, answer.code) == (422, "idempotency_key_reused")
    assert api.platform.texts == ["one"]


async def test_a_repeat_of_a_refused_send_is_refused_again_without_a_call(api: Api, shop: Tenant) -> None:
    headers = {"Idempotency-Key": "order-3"}
    api.platform.script(RefusedError("no", code="refused"))
    assert (await api.post("/send", shop.send_body(), shop.key, headers=headers)).status == 502
    assert (await api.post("/send", shop.send_body(), shop.key, headers=headers)).status == 502
    assert len(api.platform.calls) == 1


WRONG: list[tuple[dict[str, object], str]] = [
        ({"content": ""}, "content"),
        ({"content": "x" * 65_537}, "content"),
        ({"content": "a\x00b"}, "content"),
        ({"content": 5}, "content"),
        ({"recipient": "hello"}, "recipient"),
        ({"recipient": ""}, "recipient"),
        ({"message_type": "image", "content": None}, "media_url"),
        ({"message_type": "image", "media_url": "http://host/x.png"}, "media_url"),
        ({"message_type": "poll"}, "payload"),
        ({"message_type": "location", "payload": {"latitude": 91, "longitude": 0}}, "payload.latitude"),
        ({"message_type": "contact", "payload": {"name": "Tan"}}, "payload.phones"),
        ({"message_type": "poll", "payload": {"question": "?", "options": ["a", ""]}}, "payload.options.1"),
        (
            {"message_type": "reaction", "reply_to_message_id": "X", "payload": {"emoji": "fine"}},
            "payload.emoji",
        ),
        ({"payload": {"link_preview": {"url": "https://a.example"}}}, "payload.link_preview.title"),
        ({"message_type": "reaction"}, "reply_to_message_id"),
        ({"message_type": "fax"}, "message_type"),
        ({"timeout_s": 61}, "timeout_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"channel_session_id": 2**63}, "channel_session_id"),
        ({"channel_session_id": "1"}, "channel_session_id"),
        ({"colour": "red"}, "colour"),
    ]  # fmt: skip


async def test_what_is_wrong_with_a_body_is_named(api: Api, shop: Tenant) -> None:
    for change, field in WRONG:
        answer = await api.post("/send", shop.send_body() | change, shop.key)
        assert answer.status == 422, answer.body
        assert answer.json["errors"][0]["field"] == field
        assert await value(api.db, "SELECT count(*) FROM et_messages") == 0


async def test_an_unknown_session_is_404(api: Api, shop: Tenant) -> None:
    answer = await api.post("/send", shop.send_body(channel_session_id=999_999), shop.key)
    assert answer.status == 404
