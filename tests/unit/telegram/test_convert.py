"""Every recorded update becomes what its file says; garbage never raises and never loses what names a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.channel import Converted, InboundMessage, SessionContext, SessionId, TenantId
from core.prepare import prepare
from gateway.telegram.convert import SentPoll, convert_update, convert_webhook, migration

FIXTURES = Path(__file__).parents[2] / "fixtures" / "telegram"
CASES = sorted(path.relative_to(FIXTURES).with_suffix("").as_posix() for path in FIXTURES.glob("*/*.json"))
CONTEXT = SessionContext(TenantId(1), SessionId(2), "telegram", "@shop_bot", None, {}, {}, Path("unused"))


def recorded(case: str) -> Any:
    return json.loads((FIXTURES / f"{case}.json").read_text())


def seen(message: InboundMessage) -> dict[str, Any]:
    return {
        "person": message.person.external_id,
        "kind": message.person.kind,
        "name": message.person.name,
        "aliases": list(message.person.aliases),
        "raw": message.raw_payload,
        **{
            name: getattr(message, name)
            for name in InboundMessage.__slots__
            if name not in ("person", "raw_payload")
        },
    }


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_update_becomes_what_its_file_says(case: str) -> None:
    expect = recorded(case)["expect"]
    found = convert_webhook(recorded(case)["given"], CONTEXT)
    assert len(found.messages) == len(expect.get("messages", []))
    for message, wanted in zip(found.messages, expect.get("messages", []), strict=True):
        actual = seen(message)
        for name, value in wanted.items():
            if name == "raw":
                assert {part: actual["raw"][part] for part in value} == value
            else:
                assert actual[name] == value, name
        assert (message.tenant_id, message.session_id, message.channel) == (1, 2, "telegram")
        assert message.raw_payload["update_id"]
        prepare(message)
    assert [index for index, _ in found.errors] == expect.get("errors", [])
    assert found.ignored == expect.get("ignored", 0)


def test_there_are_cases_of_every_kind() -> None:
    assert {case.partition("/")[0] for case in CASES} == {
        "message", "group", "channel", "edited", "reaction", "member", "poll", "other", "invalid",
    }  # fmt: skip
    assert len(CASES) > 70


def test_what_is_said_in_groups_is_left_out_when_the_session_says_so() -> None:
    context = SessionContext(
        TenantId(1), SessionId(2), "telegram", "@b", None, {"settings": {"groups": False}}, {}, Path("unused")
    )
    assert convert_webhook(recorded("group/text")["given"], context) == Converted(ignored=1)
    assert convert_webhook(recorded("message/text")["given"], context).messages


def test_a_vote_is_told_in_words_when_its_poll_was_sent_from_here() -> None:
    polls = {"5123": SentPoll("700000002:39", "Rye?", ("Yes", "No"))}
    [vote] = convert_update(recorded("poll/vote")["given"], CONTEXT, polls).messages
    assert (vote.content, vote.reply_to_message_id) == ("Voted: No", "700000002:39")
    assert vote.media_metadata is not None
    assert vote.media_metadata["question"] == "Rye?"


def test_a_members_vote_in_a_groups_poll_belongs_to_the_group() -> None:
    polls = {"5123": SentPoll("-1005000002:39", "Rye?", ("Yes", "No"))}
    [vote] = convert_update(recorded("poll/vote")["given"], CONTEXT, polls).messages
    assert (vote.person.external_id, vote.person.kind) == ("telegram:-1005000002", "group")
    assert vote.sender_identifier == "telegram:700000002"


def test_a_group_that_moved_is_told_once_by_whoever_learns_it_first() -> None:
    told = [
        convert_update(recorded(f"group/migrated-{end}")["given"], CONTEXT).messages[0]
        for end in ("old", "new")
    ]
    learned = migration(CONTEXT, -5000003, -1005000009)
    assert (
        len({(m.channel_message_id, m.person.external_id, m.person.aliases) for m in (*told, learned)}) == 1
    )


def test_two_edits_within_one_second_are_two_rows() -> None:
    update = recorded("edited/text")["given"]
    later = {**update, "update_id": update["update_id"] + 1}
    assert len({convert_update(one, CONTEXT).messages[0].channel_message_id for one in (update, later)}) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["chat", "from", "id", "message_id", "date", "text", "photo", "poll", "type", "contact", "user",
             "new_chat_members", "reply_to_message", "option_ids", "poll_id", "new_reaction", "venue", "document"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip
KINDS = st.sampled_from(
    ["message", "edited_message", "message_reaction", "poll_answer", "my_chat_member", "callback_query",
     "chat_join_request", "poll", "something_new"]
)  # fmt: skip


@settings(max_examples=120)
@given(KINDS, JSON, st.integers(1, 2**31))
def test_whatever_comes_is_stored_named_or_ignored_and_never_raises(
    kind: str, body: Any, number: int
) -> None:
    found = convert_webhook({"update_id": number, kind: body}, CONTEXT)
    assert len(found.messages) + found.ignored + len(found.errors) == 1
    for message in found.messages:
        prepare(message)
        orjson.dumps(message.raw_payload)
