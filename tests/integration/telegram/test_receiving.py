"""What comes in: in order, once, kept while the database is away, from where the cursor stands; every way to be cut off."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from core import log
from core.channel import (
    Cursor,
    InboundMessage,
    MessageId,
    MessageType,
    SessionId,
    SessionStatus,
    StoredMedia,
    TenantId,
)
from core.errors import MediaExpired, NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from sandbox.telegram import TelegramSandbox
from sandbox.telegram.people import Person
from sandbox.telegram.world import Webhook
from tests.integration.telegram.conftest import Session, running


async def test_everything_people_do_comes_in_order_and_moves_the_cursor(
    session: Session, mei: Person
) -> None:
    bot = session.bot
    said = await mei.say(bot, "one")
    ids = [
        said,
        await mei.start(bot, "promo7"),
        await mei.send_photo(bot, b"picture", "two"),
        *await mei.send_album(bot, [b"a", b"b"], "three"),
        await mei.send_voice(bot, b"voice"),
        await mei.send_file(bot, "document", b"pdf", filename="order.pdf", mime_type="application/pdf"),
        await mei.send_location(bot, 3.1, 101.6, live=900),
        await mei.send_contact(bot, "+60111222333", "Ann Ng"),
        await mei.send_poll(bot, "Rye?", ["Yes", "No"]),
        await mei.say(bot, "a reply", reply_to=said),
    ]
    await mei.move_live_location(bot, ids[7], 3.2, 101.7)
    await mei.edit(bot, said, "one!")
    await mei.react(bot, said, "👍")
    await mei.press(bot, said, "order:7")
    await mei.block(bot)
    await session.sink.wait(lambda: "Blocked the bot" in session.sink.contents)
    stored = list(session.sink.messages.values())[1:]
    assert [m.channel_message_id for m in stored[:11]] == ids
    assert [m.message_type for m in stored] == [
        "text", "text", "image", "image", "image", "audio", "document", "location", "contact", "poll", "text",
        "edited", "edited", "reaction", "unsupported", "unsupported",
    ]  # fmt: skip
    assert stored[10].reply_to_message_id == stored[12].reply_to_message_id == said
    assert stored[3].media_metadata is not None
    assert stored[4].media_metadata is not None
    assert stored[3].media_metadata["album"] == stored[4].media_metadata["album"]
    await session.sink.wait(lambda: session.sink.places["updates"].value["offset"] == session.bot.next_update)


async def test_a_redelivered_update_is_handed_over_under_the_same_id(session: Session, mei: Person) -> None:
    said = await mei.say(session.bot, "once")
    await session.sink.message(said)
    before = len(session.sink.calls)
    await mei.redeliver(session.bot, said)
    await session.sink.wait(lambda: len(session.sink.calls) > before)
    assert session.sink.contents.count("once") == 1


async def test_while_the_database_is_away_nothing_is_confirmed_and_nothing_lost(
    session: Session, mei: Person
) -> None:
    session.sink.away = True
    ids = [await mei.say(session.bot, f"{n}") for n in range(5)]
    session.sink.away = False
    for said in ids:
        await session.sink.message(said)
    assert session.sink.contents == ["hello", *(f"{n}" for n in range(5))]
    assert session.sink.now.status is SessionStatus.ACTIVE


async def test_what_was_said_while_nobody_asked_comes_after_a_restart(session: Session, mei: Person) -> None:
    await session.channel.disconnect()
    said = [await mei.say(session.bot, f"{n}") for n in range(3)]
    await session.restart()
    for one in said:
        await session.sink.message(one)
    await session.sink.wait(lambda: session.sink.places["updates"].value["offset"] == 5)
    before = len(session.sink.calls)
    await session.restart()
    await session.sink.message(await mei.say(session.bot, "new"))
    assert len(session.sink.calls) == before + 1, "what was confirmed was fetched again"


async def test_updates_that_make_no_message_are_confirmed_too(session: Session, mei: Person) -> None:
    await session.send(mei, None, "poll", payload={"question": "Rye?", "options": ["Yes", "No"]})
    session.bot.tell("poll", {"id": "1"})
    await session.sink.wait(lambda: session.sink.places["updates"].value["offset"] == session.bot.next_update)


async def test_one_that_cannot_be_stored_holds_up_nobody_and_is_kept_bare(
    session: Session, mei: Person
) -> None:
    session.sink.bad.add("poison")
    await session.channel.disconnect()
    for text in ("before", "poison", "after"):
        await mei.say(session.bot, text)
    await session.restart()
    await session.sink.wait(lambda: "after" in session.sink.contents)
    assert session.sink.contents == ["hello", "before", None, "after"]


async def test_an_offset_from_before_an_idle_week_is_not_used(session: Session, mei: Person) -> None:
    """Telegram begins update ids anew, anywhere: the old offset would skip whatever has a smaller id."""
    await session.channel.disconnect()
    old = session.sink.places["updates"].value
    session.sink.places["updates"] = Cursor(
        "updates", {**old, "offset": 900, "at": int(time.time()) - 8 * 86400}
    )
    session.tg.forget_updates(session.bot, next_id=40)
    said = await mei.say(session.bot, "after the holidays")
    await session.restart()
    await session.sink.message(said)
    await session.sink.wait(lambda: session.sink.places["updates"].value["offset"] == 41)


async def test_another_bots_offset_is_not_used(session: Session, mei: Person) -> None:
    await session.channel.disconnect()
    session.sink.places["updates"] = Cursor("updates", {"offset": 900, "bot": 5, "at": int(time.time())})
    said = await mei.say(session.bot, "first of this bot")
    await session.restart()
    await session.sink.message(said)


async def test_groups_come_in_with_their_authors_unless_the_session_says_no(
    session: Session, mei: Person, tg: TelegramSandbox
) -> None:
    tan = tg.person("Tan")
    group = tg.group("Bakers", [mei, tan], [session.bot])
    said = await tan.say(group, "hello all")
    stored = await session.sink.message(said)
    assert (stored.person.external_id, stored.person.kind) == (f"telegram:{group.id}", "group")
    assert (stored.sender_identifier, stored.chat_identifier) == (tan.address, f"telegram:{group.id}")
    tg.remove_bot(group, session.bot)
    await session.sink.wait(lambda: session.sink.contents[-1] == "The bot was removed by Mei Lim")
    async with running(tg, metadata={"settings": {"groups": False}}) as silent:
        quiet = tg.group("Elsewhere", [mei], [silent.bot])
        await mei.say(quiet, "not stored")
        await silent.sink.message(await mei.say(silent.bot, "stored"))
        assert silent.sink.contents == ["stored"]


# --- cut off


@pytest.mark.parametrize("how", ["drop", "hang"])
async def test_a_lost_or_silent_server_is_noticed_and_comes_back(
    session: Session, mei: Person, how: str
) -> None:
    if how == "drop":
        await session.tg.drop_connections()
    else:
        session.tg.hang()
    said = await mei.say(session.bot, "during")
    await session.sink.stands("disconnected", "unreachable")
    await session.tg.come_back()
    await session.sink.stands("active")
    await session.sink.message(said)
    assert session.channel.healthy


async def test_one_broken_connection_alarms_nobody(session: Session, mei: Person) -> None:
    await session.tg.wait_polled(session.bot)
    session.tg.cut_connections()
    await session.sink.message(await mei.say(session.bot, "still here"))
    assert [state.status for state in session.sink.states] == [SessionStatus.CONNECTING, SessionStatus.ACTIVE]


async def test_two_who_ask_for_one_bots_updates_are_told_apart(session: Session, mei: Person) -> None:
    await session.tg.wait_polled(session.bot)
    await session.tg.steal(session.bot)
    state = await session.sink.stands("disconnected", "conflict")
    assert "another program" in (state.action or "")
    await session.sink.stands("active")
    await session.sink.message(await mei.say(session.bot, "ours again"))


async def test_a_revoked_token_says_what_to_do(session: Session) -> None:
    session.tg.new_token(session.bot)
    session.bot.news.set()
    session.tg.cut_connections()
    state = await session.sink.stands("logged_out", "invalid_token")
    assert "@BotFather" in (state.action or "")


async def test_a_page_of_something_else_says_nothing_about_the_token(session: Session) -> None:
    """A proxy that answers 404 in its own words must not log the session out."""
    session.tg.fail(404, "<html>no such page</html>", method="getUpdates", times=None)
    session.tg.cut_connections()
    await session.sink.stands("disconnected", "server_error")
    await session.tg.come_back()
    await session.sink.stands("active")
    assert SessionStatus.LOGGED_OUT not in [state.status for state in session.sink.states]


async def test_the_wrong_bots_token_is_refused_before_anything_is_stored(tg: TelegramSandbox) -> None:
    made = Session(tg, tg.bot("@other_bot"), identifier="@shop_bot")
    await tg.person("Mei").say(made.bot, "for the other bot")
    await made.channel.connect()
    state = await made.sink.stands("logged_out", "wrong_bot")
    await made.channel.disconnect()
    assert "@other_bot" in (state.action or "")
    assert not made.sink.calls


async def test_a_bot_that_was_renamed_goes_on(session: Session, mei: Person) -> None:
    session.bot.username = "bakery_bot"
    await session.restart()
    await session.sink.message(await mei.say(session.bot, "new name"))


@pytest.mark.parametrize("token", [None, "", "not a token", 5])
async def test_without_a_usable_token_nothing_is_started(tg: TelegramSandbox, token: Any) -> None:
    made = Session(tg, tg.bot(), credentials={"token": token})
    await made.channel.connect()
    state = await made.sink.stands("logged_out", "no_token")
    assert "token" in (state.action or "")
    with pytest.raises(ThrottledError):
        await made.send("telegram:5", "x")
    await made.channel.disconnect()


async def test_a_webhook_left_by_another_program_is_taken_away(tg: TelegramSandbox) -> None:
    bot = tg.bot()
    made = Session(tg, bot)
    bot.webhook = Webhook("http://127.0.0.1:9/gone", "")
    said = await tg.person("Mei").say(bot, "kept meanwhile")
    await made.channel.connect()
    await made.sink.message(said)
    await made.channel.disconnect()
    assert bot.webhook is None


async def test_a_webhook_needs_a_secret(tg: TelegramSandbox) -> None:
    made = Session(tg, tg.bot(), metadata={"settings": {"webhook_url": "https://gateway.example.com"}})
    await made.channel.connect()
    state = await made.sink.stands("disconnected", "webhook_secret_missing")
    await made.channel.disconnect()
    assert "webhook_secret" in (state.action or "")
    assert made.bot.webhook is None


# --- media


class Target:
    """A file in memory, as the media store's draft behaves."""

    path = Path("unused")

    def __init__(self) -> None:
        self.data = b""
        self.restarted = 0

    @property
    def offset(self) -> int:
        return len(self.data)

    async def write(self, chunk: bytes) -> None:
        self.data += chunk

    async def restart(self) -> None:
        self.data, self.restarted = b"", self.restarted + 1


def media(message: InboundMessage) -> StoredMedia:
    return StoredMedia(
        TenantId(1), SessionId(2), MessageId(3), "telegram", message.channel_message_id, MessageType.IMAGE, "inbound",
        None, None, message.media_metadata or {}, message.raw_payload,
    )  # fmt: skip


async def test_media_is_downloaded_whole_and_goes_on_where_it_broke_off(
    session: Session, mei: Person
) -> None:
    data = bytes(range(256)) * 4000
    stored = await session.sink.message(await mei.send_photo(session.bot, data))
    target = Target()
    session.tg.cut("after", method="download")
    with pytest.raises(NotSentError):
        await session.channel.download(media(stored), target)
    assert 0 < target.offset < len(data)
    await session.channel.download(media(stored), target)
    assert (target.data == data, target.restarted) == (True, 0)


async def test_a_file_too_large_for_bots_is_refused_in_words(session: Session, mei: Person) -> None:
    sent = await mei.send_file(session.bot, "document", bytes(21 << 20), filename="film.mkv")
    stored = await session.sink.message(sent)
    with pytest.raises(RefusedError, match="20 MB") as refused:
        await session.channel.download(media(stored), Target())
    assert refused.value.code == "media_too_large"


@pytest.mark.parametrize(
    ("code", "description", "expected"),
    [
        (400, "Bad Request: wrong file_id or the file is temporarily unavailable", NotSentError),
        (400, "Bad Request: invalid file_id", RefusedError),
        (429, "Too Many Requests", ThrottledError),
        (500, "Internal Server Error", NotSentError),
    ],
)
async def test_what_telegram_says_of_a_file_means_later_or_never(
    session: Session, mei: Person, code: int, description: str, expected: type[Exception]
) -> None:
    stored = await session.sink.message(await mei.send_photo(session.bot, b"x"))
    session.tg.fail(code, description, method="getFile")
    with pytest.raises(expected) as error:
        await session.channel.download(media(stored), Target())
    assert not isinstance(error.value, MediaExpired)


async def test_a_message_without_a_file_is_refused(session: Session, mei: Person) -> None:
    stored = await session.sink.message(await mei.say(session.bot, "no file"))
    with pytest.raises(RefusedError):
        await session.channel.download(media(stored), Target())


# --- secrets


@contextlib.contextmanager
def everything_logged() -> Iterator[io.StringIO]:
    """As the gateway logs at its most talkative; httpx and the library print addresses, and so tokens, at their own."""
    lines, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log.configure("debug", lines)
    try:
        yield lines
    finally:
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()


async def test_the_token_is_in_no_log_line_and_no_state(session: Session, mei: Person) -> None:
    with everything_logged() as lines:
        stored = await session.sink.message(await mei.send_photo(session.bot, b"x"))
        for when in ("before", "after"):
            session.tg.cut(when)
            with pytest.raises(UnknownOutcomeError) as error:
                await session.send(mei, when)
            assert session.bot.token not in repr(error.value.__cause__) + repr(error.value.__context__)
        await session.channel.download(media(stored), Target())
        await session.tg.drop_connections()
        await session.sink.stands("disconnected", "unreachable")
        with pytest.raises(NotSentError):
            await session.channel.download(media(stored), Target())
        await session.tg.come_back()
        session.tg.new_token(session.bot)
        await session.sink.stands("logged_out", "invalid_token")
    seen = lines.getvalue() + repr(session.sink.states)
    assert session.context.credentials["token"].partition(":")[2] not in seen
    assert "link.failed" in seen


# --- by hand


async def test_a_customer_can_be_played_over_http(session: Session, mei: Person) -> None:
    """What `python -m sandbox` offers: write, block, read what the bot answered, as it comes."""
    async with aiohttp.ClientSession(f"{session.tg.url}/people/{mei.id}/") as http:

        async def say(**body: str) -> tuple[int, dict[str, Any]]:
            async with http.post("say", json=body) as response:
                return response.status, await response.json()

        status, said = await say(text="by hand", to=session.bot.address)
        assert (await session.sink.message(said["id"])).content == "by hand"
        assert status == 200
        await session.send(mei, "an answer")
        async with http.get("messages", params={"after": 0, "wait": 5}) as response:
            shown = await response.json()
        assert ([seen["text"] for seen in shown["messages"]], shown["next"]) == (["an answer"], 1)
        assert (await say(react="👍", about=said["id"]))[0] == (await say(do="block"))[0] == 200
        await session.sink.wait(lambda: "Blocked the bot" in session.sink.contents)
        assert [(await say(**body))[0] for body in ({"text": " "}, {"text": "x", "to": "@nobody"})] == [
            400,
            404,
        ]
