"""A conversation as people read it: edits, reactions and deletions folded into what they are about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast
from zoneinfo import ZoneInfo

from asyncpg import Record

from gateway.console import timeline, words

ZONE = ZoneInfo("Asia/Kuala_Lumpur")
NOON = datetime(2024, 3, 5, 12, tzinfo=UTC)


def row(n: int, **about: Any) -> Record:
    values: dict[str, Any] = {
        "id": n,
        "channel_message_id": f"m{n}",
        "direction": "inbound",
        "content": f"text {n}",
        "message_type": "text",
        "media_metadata": None,
        "occurred_at": NOON + timedelta(minutes=n),
        "sender_identifier": "+60111222333",
        "reply_to_message_id": None,
        "origin": None,
        "delivery_status": "received",
        "last_error": None,
        "decision_action": None,
        "decision_reason": None,
        "decision_label": None,
    }
    return cast("Record", values | about)


def bubbles(*rows: Record) -> list[timeline.Bubble]:
    return [bubble for day in timeline.fold(rows, ZONE) for bubble in day.bubbles]


def test_an_edit_a_reaction_and_a_deletion_change_the_message_they_are_about() -> None:
    first, second, third = bubbles(
        row(1),
        row(2),
        row(3),
        row(4, message_type="edited", content="better", reply_to_message_id="m1"),
        row(5, message_type="reaction", content="👍", reply_to_message_id="m2"),
        row(6, message_type="deleted", content=None, reply_to_message_id="m3"),
    )
    assert (first.content, first.edited) == ("better", True)
    assert second.reactions == ["👍"]
    assert (third.content, third.deleted) == (None, True)


def test_our_own_edit_counts_only_once_it_is_out() -> None:
    edit = {"direction": "outbound", "message_type": "edited", "content": "new", "reply_to_message_id": "m1"}
    waiting = bubbles(row(1), row(2, delivery_status="queued", **edit))
    assert [bubble.content for bubble in waiting] == ["text 1", "new"]
    out = bubbles(row(1), row(2, delivery_status="sent", **edit))
    assert [bubble.content for bubble in out] == ["new"]


def test_a_quote_shows_what_it_answers_and_a_lost_target_stays_a_line() -> None:
    quoted, lost = bubbles(
        row(1, reply_to_message_id="gone", message_type="reaction", content="❤"),
        row(2, reply_to_message_id="m1"),
    )
    assert quoted.kind == "Reaction"
    assert lost.quote == "Reaction: ❤"


def test_days_are_those_of_the_reader() -> None:
    days = timeline.fold([row(1, occurred_at=NOON), row(2, occurred_at=NOON + timedelta(hours=5))], ZONE)
    assert [day.name for day in days] == ["Tue 5 Mar 2024", "Wed 6 Mar 2024"]


def test_a_time_zone_nobody_knows_is_utc() -> None:
    for name in (None, "", "../../etc/passwd", "/etc/localtime", "Nowhere/Land", "x" * 100, "Europe"):
        assert words.zone(name).key == "UTC"
    assert words.zone("Asia/Kuala_Lumpur").key == "Asia/Kuala_Lumpur"


def test_each_outcome_has_its_tick_and_trouble_its_words() -> None:
    def told(status: str, error: str | None = None) -> tuple[str, str | None]:
        tick = words.tick(row(1, direction="outbound", delivery_status=status, last_error=error))
        assert tick is not None
        return tick.mark, tick.detail

    assert told("queued") == ("clock", None)
    assert [told(s)[0] for s in ("dispatching", "sent", "delivered", "read")] == [
        "clock",
        "one",
        "two",
        "blue",
    ]
    assert told("failed", "this number is not on WhatsApp") == ("failed", "This number is not on WhatsApp.")
    assert told("cancelled", "a person took over")[1] == "A person took over."
    assert told("unknown")[1] is not None
    assert words.tick(row(1)) is None
