"""What goes out: every kind as Telegram gets it, every failure as what it means, and nothing ever twice by itself."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable

import pytest

from core.channel import LocalFile, NotSent, Quoted, Unknown
from core.errors import NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from gateway.telegram.pace import Limits
from sandbox.telegram import TelegramSandbox
from sandbox.telegram.people import Person
from tests.integration.telegram.conftest import Session, running

MakeFile = Callable[..., LocalFile]


async def test_a_text_goes_out_as_it_is_and_never_as_markup(session: Session, mei: Person) -> None:
    text = "<b>2*3*4</b> _under_ [x](http://y) & done"
    sent = await session.send(mei, text)
    got = await mei.next_message()
    assert (got.key, got.text) == (sent, text)
    assert "entities" not in got.message
    assert not any("parse_mode" in call.params for call in session.tg.calls)


async def test_marks_become_entities_when_the_sender_asks_for_it(session: Session, mei: Person) -> None:
    await session.send(mei, "🍞 *Rye* costs `RM 12`", payload={"format": "markup"})
    got = await mei.next_message()
    assert got.text == "🍞 Rye costs RM 12"
    assert got.message["entities"] == [
        {"type": "bold", "offset": 3, "length": 3},
        {"type": "code", "offset": 13, "length": 5},
    ]


@pytest.mark.parametrize(
    ("kind", "mime_type", "filename", "arrives_as"),
    [
        ("image", "image/png", "a.png", "photo"),
        ("video", "video/mp4", "a.mp4", "video"),
        ("audio", "audio/ogg", "a.ogg", "voice"),
        ("audio", "audio/mpeg", "a.mp3", "audio"),
        ("document", "application/pdf", "order.pdf", "document"),
        ("sticker", "image/webp", "a.webp", "sticker"),
    ],
)
async def test_a_file_goes_out_with_its_bytes(
    session: Session, mei: Person, file: MakeFile, kind: str, mime_type: str, filename: str, arrives_as: str
) -> None:
    words = None if kind == "sticker" else "look"
    media = file(mime_type, filename, width=320, height=160)
    sent = await session.send(mei, words, kind, media=media)
    got = await mei.next_message()
    assert (got.key, got.kind, got.text) == (sent, arrives_as, words)
    assert got.file is not None
    assert got.file.sha256 == hashlib.sha256(media.path.read_bytes()).hexdigest()
    if arrives_as == "document":
        assert got.message["document"]["file_name"] == filename


async def test_a_silent_film_goes_out_as_an_animation(session: Session, mei: Person, file: MakeFile) -> None:
    await session.send(mei, None, "video", media=file("video/mp4", "a.mp4"), payload={"gif": True})
    assert (await mei.next_message()).kind == "animation"


async def test_places_contacts_and_polls_go_out(session: Session, mei: Person) -> None:
    await session.send(mei, None, "location", payload={"latitude": 3.1, "longitude": 101.6})
    await session.send(
        mei,
        None,
        "location",
        payload={"latitude": 3.1, "longitude": 101.6, "name": "Bakery", "address": "Jalan 1"},
    )
    await session.send(
        mei,
        None,
        "contact",
        payload={"name": "Ann Ng", "phones": ["+60111222333"], "emails": ["a@example.com"]},
    )
    await session.send(
        mei, None, "poll", payload={"question": "Rye?", "options": ["Yes", "No"], "selectable": 0}
    )
    place, venue, card, poll = [await mei.next_message() for _ in range(4)]
    assert place.message["location"] == {"latitude": 3.1, "longitude": 101.6}
    assert (venue.message["venue"]["title"], venue.message["venue"]["address"]) == ("Bakery", "Jalan 1")
    assert (card.message["contact"]["first_name"], card.message["contact"]["last_name"]) == ("Ann", "Ng")
    assert "EMAIL:a@example.com" in card.message["contact"]["vcard"]
    assert poll.message["poll"]["is_anonymous"] is False
    assert poll.message["poll"]["allows_multiple_answers"] is True


async def test_a_vote_in_our_poll_is_told_in_words_also_after_a_restart(
    session: Session, mei: Person
) -> None:
    sent = await session.send(mei, None, "poll", payload={"question": "Rye?", "options": ["Yes", "No"]})
    poll_id = (await mei.next_message()).message["poll"]["id"]
    await session.sink.wait(lambda: "polls" in session.sink.places)
    await session.restart()
    await mei.vote(poll_id, [1])
    await session.sink.wait(lambda: "Voted: No" in session.sink.contents)
    [vote] = [m for m in session.sink.messages.values() if m.content == "Voted: No"]
    assert vote.reply_to_message_id == sent


async def test_reply_reaction_edit_and_deletion_name_their_message(session: Session, mei: Person) -> None:
    said = await mei.say(session.bot, "Is the rye vegan?")
    await session.sink.message(said)
    theirs = Quoted(said, mei.address, "Is the rye vegan?", from_me=False)
    sent = await session.send(mei, "It is", quoted=theirs)
    ours = Quoted(sent, None, "It is", from_me=True)
    ids = [
        sent,
        await session.send(mei, None, "reaction", quoted=theirs, payload={"emoji": "👍"}),
        await session.send(mei, None, "reaction", quoted=theirs, payload={"emoji": ""}),
        await session.send(mei, "It is, entirely", "edited", quoted=ours),
        await session.send(mei, None, "deleted", quoted=ours),
    ]
    assert len(set(ids)) == 5
    reply, thumb, none, edit, gone = [await mei.next_message() for _ in range(5)]
    assert reply.reply_to == said
    assert (thumb.kind, thumb.key, thumb.text, none.text) == ("reaction", said, "👍", None)
    assert (edit.kind, edit.key, edit.text) == ("edited", sent, "It is, entirely")
    assert (gone.kind, gone.key) == ("deleted", sent)


async def test_the_words_under_a_file_can_be_edited_and_an_edit_repeated(
    session: Session, mei: Person, file: MakeFile
) -> None:
    sent = await session.send(mei, "Like this", "image", media=file("image/png", "a.png"))
    ours = Quoted(sent, None, "Like this", from_me=True)
    await session.send(mei, "Like that", "edited", quoted=ours)
    await session.send(mei, "Like that", "edited", quoted=ours)  # "message is not modified": as good as done
    assert [got.text for got in mei.received] == ["Like this", "Like that"]


async def test_what_is_answered_may_be_gone(session: Session, mei: Person) -> None:
    gone = Quoted(f"{mei.id}:9999", mei.address, "?", from_me=False)
    assert await session.send(mei, "Anyway", quoted=gone)
    assert (await mei.next_message()).text == "Anyway"


async def test_other_peoples_messages_cannot_be_changed(session: Session, mei: Person) -> None:
    theirs = Quoted(f"{mei.id}:1", mei.address, "hello", from_me=False)
    for kind in ("edited", "deleted"):
        with pytest.raises(RefusedError, match="the other person's") as refused:
            await session.send(mei, "x", kind, quoted=theirs)
        assert refused.value.code == "invalid_payload"


# --- failures


@pytest.mark.parametrize(
    "when", ["before", "during", "after", "garbage", "fail_after", "hang_before", "hang_after"]
)
async def test_a_call_that_is_cut_off_is_unknown_and_never_made_again(
    session: Session, mei: Person, when: str
) -> None:
    message = session.message(mei, f"cut {when}")
    session.tg.cut(when)
    with pytest.raises(UnknownOutcomeError, match="nothing proves"):
        await session.channel.send(message)
    assert isinstance(await session.channel.resolve(message.attempt), Unknown)
    await session.tg.come_back()
    await session.sink.stands("active")
    await session.send(mei, "the next one")
    await mei.wait_for_text("the next one")
    went_out = when in ("after", "garbage", "fail_after", "hang_after")
    assert len(session.tg.sent(f"cut {when}")) == mei.texts.count(f"cut {when}") == went_out


async def test_an_upload_that_is_cut_off_is_unknown(session: Session, mei: Person, file: MakeFile) -> None:
    session.tg.cut("during")
    with pytest.raises(UnknownOutcomeError):
        await session.send(mei, None, "document", media=file("application/pdf", "a.pdf", b"x" * 3_000_000))
    assert not list(session.tg.accepted)


async def test_what_finds_no_connection_was_not_sent_and_costs_no_attempt(
    session: Session, mei: Person
) -> None:
    await session.tg.drop_connections()
    await session.sink.stands("disconnected", "unreachable")
    message = session.message(mei, "nobody there")
    with pytest.raises(ThrottledError) as error:
        await session.channel.send(message)
    assert (error.value.code, error.value.retry_after) == ("unreachable", 3.0)
    await session.tg.come_back()
    await session.sink.stands("active")
    assert session.tg.sent("nobody there") == []


@pytest.mark.parametrize(
    ("code", "description", "expected", "words"),
    [
        (403, "Forbidden: bot was blocked by the user", "blocked_by_user", "blocked the bot"),
        (403, "Forbidden: user is deactivated", "user_deactivated", "no longer exists"),
        (403, "Forbidden: bot can't initiate conversation with a user", "first_contact_refused", "first"),
        (403, "Forbidden: bot was kicked from the supergroup chat", "not_in_chat", "removed"),
        (400, "Bad Request: chat not found", "chat_not_found", "write to the bot first"),
        (400, "Bad Request: something nobody has seen", "bad_request", "Something nobody has seen"),
        (401, "Unauthorized", "invalid_token", "@BotFather"),
        (413, "Request Entity Too Large", "media_too_large", "50 MB"),
    ],
)
async def test_a_refusal_is_final_and_says_why(
    session: Session, mei: Person, code: int, description: str, expected: str, words: str
) -> None:
    session.tg.fail(code, description)
    with pytest.raises(RefusedError, match=words) as refused:
        await session.send(mei, "no")
    assert refused.value.code == expected
    assert session.bot.token not in str(refused.value)


async def test_a_person_who_blocked_the_bot_is_known_and_refused(session: Session, mei: Person) -> None:
    await mei.block(session.bot)
    await session.sink.wait(lambda: "Blocked the bot" in session.sink.contents)
    with pytest.raises(RefusedError) as refused:
        await session.send(mei, "please")
    assert refused.value.code == "blocked_by_user"


async def test_too_fast_is_told_how_long_and_the_chat_is_left_alone_for_so_long(
    session: Session, mei: Person, tg: TelegramSandbox
) -> None:
    tan = tg.person("Tan")
    await session.sink.message(await tan.say(session.bot, "hi"))
    tg.flood(30)
    with pytest.raises(ThrottledError) as first:
        await session.send(mei, "one")
    assert (first.value.code, round(first.value.retry_after)) == ("flood_limit", 30)
    with pytest.raises(ThrottledError) as second:
        await session.send(mei, "two")
    assert second.value.code == "paced"
    assert 25 < second.value.retry_after <= 31
    await session.send(tan, "another chat goes on")
    assert [call.outcome for call in tg.calls if call.method == "sendMessage"] == ["429", "ok"]


async def test_a_server_that_is_too_busy_to_say_how_long_is_left_alone_too(
    session: Session, mei: Person
) -> None:
    session.tg.fail(429, "Too Many Requests")
    with pytest.raises(ThrottledError) as error:
        await session.send(mei, "one")
    assert error.value.retry_after > 1


async def test_one_message_a_second_goes_to_a_chat(session: Session, mei: Person) -> None:
    session.limits = Limits(chat_seconds=0.3)
    await session.restart()
    await asyncio.gather(*(session.send(mei, f"{n}") for n in range(4)))
    times = [one.at for one in session.tg.accepted]
    assert len(times) == 4
    assert all(later - earlier > 0.25 for earlier, later in itertools.pairwise(times))


# --- groups


async def test_a_group_that_moved_is_followed_and_its_lead_learns_the_new_id(
    session: Session, mei: Person, tg: TelegramSandbox
) -> None:
    group = tg.group("Bakers", [mei], [session.bot], supergroup=False)
    new = tg.migrate(group, tell=False)
    sent = await session.send(group, "still with you?")
    assert sent.startswith(f"{new.id}:")
    [told] = [m for m in session.sink.messages.values() if ":migrated:" in m.channel_message_id]
    assert (told.person.external_id, told.person.aliases) == (f"telegram:{new.id}", (f"telegram:{group.id}",))
    await session.send(group, "and again")
    assert len([call for call in tg.calls if call.outcome == "400"]) == 1, "asked under the old id again"
    assert len(tg.sent("still with you?")) == 1


async def test_a_topic_is_answered_in_itself(session: Session, mei: Person, tg: TelegramSandbox) -> None:
    group = tg.group("Bakers", [mei], [session.bot], forum=True)
    said = await mei.say(group, "in a topic", topic=5)
    stored = await session.sink.message(said)
    await session.send(
        group, "here", quoted=Quoted(said, mei.address, "in a topic", False, stored.raw_payload)
    )
    assert (await mei.next_message()).message["message_thread_id"] == 5


# --- what proves that nothing was sent


async def test_only_what_was_never_begun_is_called_unsent(session: Session, mei: Person) -> None:
    message = session.message(mei, "left by a dead gateway")
    assert isinstance(await session.channel.resolve(message.attempt), NotSent)
    with pytest.raises(NotSentError):  # whoever claimed it and comes back late must not call any more
        await session.channel.send(message)
    assert session.tg.sent("left by a dead gateway") == []


async def test_without_the_database_nothing_is_begun(session: Session, mei: Person) -> None:
    session.sink.away = True
    with pytest.raises(ThrottledError) as error:
        await session.send(mei, "not written down")
    assert error.value.code == "intent_failed"
    session.sink.away = False
    assert not list(session.tg.accepted)


async def test_a_stop_waits_for_the_call_that_is_under_way_and_begins_no_other(
    session: Session, mei: Person
) -> None:
    session.tg.cut("slow")
    under_way = asyncio.create_task(session.send(mei, "under way"))
    await mei.wait_for_text("under way")
    waiting = asyncio.create_task(session.channel.disconnect())
    await asyncio.sleep(0)
    with pytest.raises(ThrottledError) as error:
        await session.send(mei, "too late")
    assert error.value.code == "not_connected"
    assert await under_way
    await waiting
    assert session.tg.sent("too late") == []


async def test_who_never_wrote_to_the_bot_cannot_be_reached(
    session: Session, mei: Person, tg: TelegramSandbox
) -> None:
    stranger = tg.person("Stranger")
    found = await session.channel.check([mei.address, stranger.address, "telegram:5"])
    assert found == {mei.address: True, stranger.address: False, "telegram:5": False}


# --- manners


async def test_typing_is_shown_before_a_text_when_the_session_says_so(tg: TelegramSandbox) -> None:
    async with running(tg, metadata={"settings": {"typing": True}}) as session:
        mei = tg.person("Mei")
        await session.sink.message(await mei.say(session.bot, "hello"))
        await session.send(mei, "hi")
        assert [action for _, action in mei.typing_seen] == ["typing"]
        methods = [call.method for call in tg.calls if call.method.startswith("send")]
        assert methods == ["sendChatAction", "sendMessage"]
