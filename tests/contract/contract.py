"""What every channel must keep, whatever it is: one set of behaviours, run over each channel by a class of two lines.

Only what `core.channel` promises stands here. What a channel cannot do, its peer says with a reason, and what needs it is
left out for that channel: `needs` names it.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import orjson
import pytest
from PIL import Image

from core import log_in
from core.channel import (
    InboundMessage,
    MessageType,
    NotSent,
    Sent,
    SessionId,
    SessionStatus,
    StatusUpdate,
    TenantId,
    Unknown,
)
from core.errors import InvalidField
from core.identity import channel_of, checked
from tests.contract.peer import Can, Peer
from tests.contract.world import World, digest
from tests.support.outbound import enqueue, fetch, value
from tests.support.sessions import new_session

F = TypeVar("F", bound=Callable[..., Any])
DAY_MS = 86_400_000


def needs(*abilities: Can) -> Callable[[F], F]:
    """This behaviour only concerns channels that can do all of these."""

    def mark(test: F) -> F:
        test.needs = abilities  # type: ignore[attr-defined]
        return test

    return mark


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (320, 160), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.asyncio(loop_scope="class")
class Contract:
    """`class TestEmail(Contract, peer=EmailPeer)` in a module of its own is all a channel adds."""

    peer_class: ClassVar[type[Peer]]
    """One session of it serves all behaviours (fixture `world`); each has customers of its own."""

    def __init_subclass__(cls, *, peer: type[Peer]) -> None:
        cls.peer_class = peer
        for name in dir(cls):
            wanted = getattr(getattr(cls, name), "needs", ())
            if any(ability in peer.cannot for ability in wanted):
                setattr(cls, name, None)  # what does not concern a channel is no test of it

    # --- what the peer says of the channel

    async def test_what_the_channel_cannot_do_is_said_with_a_reason(self) -> None:
        for reasons in (self.peer_class.cannot, self.peer_class.never):
            assert all(len(reason) > 10 for reason in reasons.values()), reasons

    async def test_every_message_type_is_in_the_fixtures_and_is_stored(self, world: World) -> None:
        """Recorded payloads through `convert`, and what comes out through ingest into rows."""
        messages: list[InboundMessage] = []
        for name, converted in world.peer.recorded():
            for message in converted.messages:
                _check_form(name, message, world.peer.channel)
                messages.append(message)
            for update in converted.updates:
                _check_update(name, update, world.peer.channel)
        assert messages
        came = {message.message_type for message in messages}
        assert not came & set(world.peer.never), "a type that never comes in has a fixture"
        assert came | set(world.peer.never) == set(MessageType)

        place = await new_session(world.db, world.tenant_id, channel=world.peer.channel, identifier="archive")
        for message in messages:
            [stored] = await world.ingest.submit(
                [_moved(message, TenantId(world.tenant_id), SessionId(place.id))]
            )
            kind = await value(
                world.db, "SELECT message_type FROM et_messages WHERE id = $1", stored.message_id
            )
            assert stored.duplicate or kind == message.message_type

    @needs(Can.CHECK)
    async def test_credentials_are_tried_on_the_spot_and_a_mistake_is_named(self, world: World) -> None:
        right = world.peer.log_in()
        said = await log_in.check(world.kind, dict(right.credentials), right.metadata)
        assert said.identifier == right.identifier
        assert world.kind.form, "the console cannot ask for them"
        wrong = world.peer.wrong_credentials()
        assert wrong
        for field, credentials in wrong.items():
            with pytest.raises(InvalidField) as refusal:
                await log_in.check(world.kind, dict(credentials), right.metadata)
            assert refusal.value.field == field
            assert len(refusal.value.reason) > 10
            assert not [secret for secret in world.peer.secrets() if secret in str(refusal.value)]

    # --- what comes in

    async def test_the_first_message_makes_a_lead_and_a_thread(self, world: World) -> None:
        mei = world.customer()
        before = int(time.time() * 1000)
        row = await world.stored(await mei.say("Hi, how much is the sourdough?"))
        assert (row["content"], row["message_type"], row["role"]) == (
            "Hi, how much is the sourdough?",
            "text",
            "user",
        )
        assert (row["channel"], row["tenant_id"]) == (world.peer.channel, world.tenant_id)
        assert (row["external_id"], row["lead_kind"], row["thread_status"]) == (
            mei.external_id,
            "person",
            "active",
        )
        assert row["sender_identifier"]
        assert row["raw_payload"], "the original is not kept"
        assert not row["is_history"]
        assert abs(row["channel_timestamp"] - before) < DAY_MS, "not in milliseconds"
        assert row["last_message_at"] is not None
        assert await value(
            world.db,
            "SELECT count(*) = 1 FROM et_threads WHERE lead_id = $1 AND channel_session_id = $2",
            row["lead_id"],
            world.session.id,
        )

    async def test_a_reply_joins_the_thread(self, world: World) -> None:
        mei, tan = world.customer(), world.customer("tan")
        first = await world.stored(await mei.say("Do you deliver?"))
        sent = await world.reached(await world.send(mei, "To Ipoh, yes."), "sent")
        await world.arrived(mei, 1)
        knows = Can.REPLY_IN not in world.peer.cannot
        answer = await world.stored(
            await mei.say("Great, two loaves please", reply_to=mei.arrivals[0].id if knows else None)
        )
        other = await world.stored(await tan.say("And I?"))
        assert first["thread_id"] == sent["thread_id"] == answer["thread_id"] != other["thread_id"]
        if knows:
            assert answer["reply_to_message_id"] == sent["channel_message_id"]

    @needs(Can.REDELIVER)
    async def test_what_is_delivered_again_is_stored_once(self, world: World) -> None:
        mei = world.customer()
        said = await mei.say("One loaf for tomorrow")
        first = await world.stored(said)
        await mei.redeliver(said)
        await mei.redeliver(said)
        last = await world.stored(await mei.say("See you!"))
        [again] = await world.inbound(said)
        assert (again["id"], again["updated_at"]) == (first["id"], first["updated_at"])
        assert again["thread_id"] == last["thread_id"]
        assert await self._texts(world, last["thread_id"]) == ["One loaf for tomorrow", "See you!"]

    async def test_the_order_of_a_conversation_is_kept(self, world: World) -> None:
        mei = world.customer()
        lines = [f"line {number}" for number in range(12)]
        said = [await mei.say(line) for line in lines]
        last = await world.stored(said[-1])
        for message_id in said:
            await world.stored(message_id)
        assert await self._texts(world, last["thread_id"]) == lines

    @needs(Can.MEDIA_IN)
    async def test_a_picture_comes_in_with_its_bytes(self, world: World) -> None:
        mei, data = world.customer(), picture()
        said = await mei.send_media(
            MessageType.IMAGE, data, mime_type="image/png", filename="cake.png", caption="Like this?"
        )
        row = await world.stored(said)
        assert (row["message_type"], row["content"]) == ("image", "Like this?")

        async def fetched() -> Any:
            [now] = await world.inbound(said)
            return now["media_metadata"] if now["media_metadata"].get("state") == "stored" else None

        about = await world.until(fetched, "the picture fetched")
        assert (about["sha256"], about["size"], about["mime_type"]) == (digest(data), len(data), "image/png")
        assert world.files.path(about["sha256"]).read_bytes() == data

    # --- what goes out

    async def test_a_send_is_sent_with_the_channels_own_id(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Hello?"))
        row = await world.reached(await world.send(mei, "We are open until six."), "sent")
        await world.arrived(mei, 1)
        [arrival] = mei.arrivals
        assert (arrival.text, arrival.kind) == ("We are open until six.", "text")
        assert row["channel_message_id"] == arrival.id
        assert row["delivery_status"] in ("sent", "delivered", "read")
        assert (row["retry_count"], row["error_code"]) == (0, None)

    async def test_what_is_sent_in_a_thread_arrives_in_its_order(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Tell me everything"))
        lines = [f"part {number}" for number in range(5)]
        async with world.db.worker() as conn, conn.transaction():
            items = [
                await conn.fetchval(
                    "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, $4, 'text', NULL, NULL)",
                    world.tenant_id,
                    world.session.id,
                    mei.address,
                    line,
                )
                for line in lines
            ]
        for queue_id in items:
            await world.reached(queue_id, "sent")
        await world.arrived(mei, len(lines))
        assert [arrival.text for arrival in mei.arrivals] == lines

    @needs(Can.REPLY_OUT)
    async def test_an_answer_names_the_message_it_answers(self, world: World) -> None:
        mei = world.customer()
        said = await mei.say("Is the rye bread vegan?")
        await world.stored(said)
        message_id = await value(
            world.db,
            """
            INSERT INTO et_messages (tenant_id, channel_session_id, lead_id, channel, direction, role, message_type,
                                     content, reply_to_message_id, delivery_status)
            SELECT tenant_id, channel_session_id, lead_id, channel, 'outbound', 'assistant', 'text', 'It is', $2, 'queued'
            FROM et_messages
            WHERE channel_session_id = $1 AND channel_message_id = $2
            RETURNING id
            """,
            world.session.id,
            said,
        )
        queue_id = await value(
            world.db,
            """
            INSERT INTO et_outbound_queue (tenant_id, message_id, channel, channel_session_id)
            VALUES ($1, $2, $3, $4)
            RETURNING id
            """,
            world.tenant_id,
            message_id,
            world.peer.channel,
            world.session.id,
        )
        await world.reached(queue_id, "sent")
        await world.arrived(mei, 1)
        assert (mei.arrivals[0].text, mei.arrivals[0].reply_to) == ("It is", said)

    @needs(Can.MEDIA_OUT)
    async def test_a_picture_goes_out_with_its_bytes(self, world: World) -> None:
        mei, data = world.customer(), picture()
        await world.stored(await mei.say("What does it look like?"))
        url = await world.upload(data, mime_type="image/png", filename="cake.png")
        await world.reached(await world.send(mei, "Like this", message_type="image", media_url=url), "sent")
        await world.arrived(mei, 1)
        [arrival] = mei.arrivals
        assert (arrival.kind, arrival.text, arrival.media_sha256) == ("image", "Like this", digest(data))

    # --- what becomes of a send that fails

    @needs(Can.REFUSE)
    async def test_a_refused_send_has_failed_once_and_says_why(self, world: World) -> None:
        queue_id = await enqueue(world.db, world.place, "to nobody", to=world.peer.unreachable())
        row = await world.reached(queue_id, "failed", "sent", "unknown")
        assert (row["status"], row["delivery_status"], row["claim_epoch"]) == ("failed", "failed", 1)
        assert row["error_code"]
        assert len(row["last_error"]) > 10, "no words for a person"
        assert await value(
            world.db,
            "SELECT count(*) FROM et_audit_log WHERE event = 'send_failure' AND subject_id = $1",
            str(row["id"]),
        )
        mei = world.customer()
        await world.stored(await mei.say("But I am here"))
        await world.reached(await world.send(mei, "the next one goes"), "sent")
        await self._only_once(world, mei, "to nobody", 0)

    @needs(Can.THROTTLE)
    async def test_a_throttled_send_waits_and_loses_no_attempt(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Are you busy?"))
        await world.peer.throttle_next()
        row = await world.hurry(await world.send(mei, "throttled"), "sent", "failed", "unknown")
        assert (row["status"], row["retry_count"]) == ("sent", 0)
        assert row["claim_epoch"] > 1, "it was not throttled at all"
        await world.arrived(mei, 1)
        assert [arrival.text for arrival in mei.arrivals] == ["throttled"]

    @needs(Can.FAIL)
    async def test_a_send_that_was_not_taken_is_tried_again(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Try twice"))
        await world.peer.fail_next()
        row = await world.hurry(await world.send(mei, "second try"), "sent", "failed", "unknown")
        assert (row["status"], row["retry_count"]) == ("sent", 1)
        await world.arrived(mei, 1)
        assert [arrival.text for arrival in mei.arrivals] == ["second try"]

    @needs(Can.CUT_BEFORE)
    async def test_a_send_cut_off_before_it_was_taken_never_arrives_twice(self, world: World) -> None:
        """Where the channel proves that it was not taken it is sent again, else it is left to a person."""
        mei = world.customer()
        await world.stored(await mei.say("Cut before"))
        await world.peer.cut_before_acceptance()
        row = await world.hurry(await world.send(mei, "cut before"), "sent", "unknown", "failed")
        assert row["status"] in ("sent", "unknown"), row["last_error"]
        await self._only_once(world, mei, "cut before", 1 if row["status"] == "sent" else 0)
        if row["status"] == "unknown":
            assert (row["delivery_status"], row["claim_epoch"]) == ("unknown", 1)
            assert len(row["last_error"]) > 10
        else:
            assert row["claim_epoch"] > 1, "it was not cut off at all"

    @needs(Can.CUT_AFTER)
    async def test_a_send_cut_off_after_it_was_taken_is_never_sent_again(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Cut after"))
        await world.peer.cut_after_acceptance()
        queue_id = await world.send(mei, "cut after")
        row = await world.reached(queue_id, "unknown", "sent", "failed")
        assert row["claim_epoch"] == 1
        assert row["status"] != "failed", row["last_error"]
        if Can.PROVE_SENT in world.peer.cannot:
            assert (row["status"], row["delivery_status"]) == ("unknown", "unknown")
        else:
            row = await world.reached(queue_id, "sent")
            assert row["delivery_status"] in ("sent", "delivered", "read")
        await world.arrived(mei, 1)
        await self._only_once(world, mei, "cut after", 1)
        assert (await world.item(queue_id))["claim_epoch"] == 1
        if row["status"] == "sent":
            assert row["channel_message_id"] == mei.arrivals[0].id

    async def test_resolve_never_claims_what_is_not_so(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Sent or not?"))
        row = await world.reached(await world.send(mei, "this one was sent"), "sent")
        found = await world.resolve(row)
        assert isinstance(found, Sent | Unknown), "what was sent is called unsent"
        if isinstance(found, Sent):
            assert found.channel_message_id == row["channel_message_id"]
        missing = await world.resolve(row, queue_id=row["id"] + 1_000_000)
        assert isinstance(missing, NotSent | Unknown), "what never was is called sent"

    async def test_what_a_dead_gateway_left_is_asked_about_before_anything_else(self, world: World) -> None:
        """Claimed by one that died before its call: sent once when the channel can prove that nothing left, else unknown."""
        mei = world.customer()
        await world.stored(await mei.say("Who left that?"))
        async with world.db.worker() as conn, conn.transaction():
            queue_id = await conn.fetchval(
                "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, 'left behind', 'text', NULL, NULL)",
                world.tenant_id,
                world.session.id,
                mei.address,
            )
            await conn.execute(
                """
                UPDATE et_outbound_queue
                SET status = 'dispatching', claimed_by = 'gw-dead', claim_epoch = claim_epoch + 1, claimed_at = now()
                WHERE id = $1
                """,
                queue_id,
            )
        row = await world.hurry(queue_id, "sent", "unknown", "failed")
        assert row["status"] != "failed", row["last_error"]
        await self._only_once(world, mei, "left behind", 1 if row["status"] == "sent" else 0)

    # --- when the channel goes away

    async def test_the_state_shown_is_where_the_session_stands(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("Hello"))  # a channel may hold back what goes to strangers
        row = await world.row()
        assert (row.status, row.status_reason, row.action) == (SessionStatus.ACTIVE, None, None)
        assert not row.pending
        assert row.last_connected_at is not None
        await world.want("disconnected")
        row = await world.stands(
            lambda row: row.status is SessionStatus.DISCONNECTED, "the session disconnected"
        )
        said = await mei.say("Anybody there?")
        queue_id = await world.send(mei, "Back again")
        assert (await world.item(queue_id))["claim_epoch"] == 0, "claimed without a connection"
        await world.want("connected")
        await world.active()
        await world.stored(said)
        await world.reached(queue_id, "sent")
        await self._only_once(world, mei, "Back again", 1)

    @needs(Can.DROP)
    async def test_a_dropped_connection_loses_nothing(self, world: World) -> None:
        await self._away(world, world.peer.drop_connections)

    @needs(Can.HANG)
    async def test_a_silent_channel_is_noticed_and_loses_nothing(self, world: World) -> None:
        await self._away(world, world.peer.hang)

    @needs(Can.REFUSE_LOGIN)
    async def test_a_refused_log_in_says_what_to_do_and_loses_nothing(self, world: World) -> None:
        mei = world.customer()
        await world.stored(await mei.say("before"))
        await world.peer.refuse_login()
        said = await mei.say("during")
        row = await world.stands(
            lambda row: row.status is not SessionStatus.ACTIVE and row.action is not None,
            "a state that says what to do",
        )
        assert row.status_reason
        assert len(row.action or "") > 10
        queue_id = await world.send(mei, "patience")
        await world.peer.come_back()
        await world.want("connected")
        await world.active()
        after = await world.stored(await mei.say("after"))
        await world.stored(said)
        await world.hurry(queue_id, "sent")
        assert await self._texts(world, after["thread_id"], direction="inbound") == [
            "before",
            "during",
            "after",
        ]
        await self._only_once(world, mei, "patience", 1)
        row = await world.row()
        assert (row.status_reason, row.action) == (None, None)

    # --- at last

    @needs(Can.SECRETS)
    async def test_the_credentials_are_in_no_log_line_and_no_row(self, world: World) -> None:
        secrets = world.peer.secrets()
        assert secrets
        for secret in secrets:
            assert len(secret) >= 6, "too short to look for"
            assert secret not in world.log
            assert await world.rows_with(secret) == []

    # --- helpers

    async def _away(self, world: World, leave: Callable[[], Any]) -> None:
        """The channel goes, a customer and we write meanwhile, it comes back: everything is there, once and in order."""
        mei = world.customer()
        await world.stored(await mei.say("before"))
        await leave()
        said = await mei.say("during")
        queue_id = await world.send(mei, "patience")
        await world.stands(lambda row: row.status is not SessionStatus.ACTIVE, "a session that is not active")
        await world.peer.come_back()
        await world.active()
        after = await world.stored(await mei.say("after"))
        await world.stored(said)
        assert await self._texts(world, after["thread_id"], direction="inbound") == [
            "before",
            "during",
            "after",
        ]
        row = await world.hurry(queue_id, "sent", "unknown", "failed")
        assert row["status"] != "failed", row["last_error"]
        await self._only_once(world, mei, "patience", 1 if row["status"] == "sent" else math.inf)

    async def _only_once(self, world: World, customer: Any, text: str, most: float) -> None:
        """Another message goes out after it, so what would arrive by mistake has had its time."""
        await world.hurry(await world.send(customer, f"after {text}"), "sent")

        async def last() -> bool:
            return any(arrival.text == f"after {text}" for arrival in customer.arrivals)

        await world.until(last, f"what was sent after {text!r}")
        count = [arrival.text for arrival in customer.arrivals].count(text)
        assert count == most if math.isfinite(most) else count <= 1, f"{text!r} arrived {count} times"

    @staticmethod
    async def _texts(world: World, thread_id: int, *, direction: str | None = None) -> list[str]:
        """What a reader sees of a thread, in the order of `occurred_at, id`."""
        rows = await fetch(
            world.db,
            """
            SELECT content
            FROM et_messages
            WHERE thread_id = $1 AND direction = coalesce($2, direction)
            ORDER BY occurred_at, id
            """,
            thread_id,
            direction,
        )
        return [row["content"] for row in rows]


def _check_form(name: str, message: InboundMessage, channel: str) -> None:
    """What the core relies on in every converted message."""
    assert message.channel == channel, name
    assert message.channel_message_id, name
    assert checked(message.person.external_id) == message.person.external_id, name
    assert channel_of(message.person.external_id) == channel, name
    assert message.raw_payload, f"{name}: the original is not kept"
    assert "\x00" not in (message.content or ""), name
    assert b"\\u0000" not in orjson.dumps(message.raw_payload), f"{name}: PostgreSQL takes no NUL"
    if message.direction == "inbound":
        assert message.sender_identifier, name
    if message.channel_timestamp is not None:
        assert message.channel_timestamp == 0 or message.channel_timestamp > 10**11, (
            f"{name}: not in milliseconds"
        )


def _check_update(name: str, update: StatusUpdate, channel: str) -> None:
    assert update.channel == channel, name
    assert update.message_ids, name
    assert all(update.message_ids), name
    assert update.occurred_at is None or update.occurred_at.tzinfo is not None, name


def _moved(message: InboundMessage, tenant_id: TenantId, session_id: SessionId) -> InboundMessage:
    """The message as if this session had received it."""
    return replace(message, tenant_id=tenant_id, session_id=session_id, cursor=None)
