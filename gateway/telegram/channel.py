"""The Telegram channel: one bot, made of a link that brings its updates and of calls that send.

It keeps `core.channel`'s contract. Everything durable is in the database, so any gateway may run the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from telegram.error import BadRequest, ChatMigrated, Forbidden, TelegramError

from core import faults, log
from core.channel import (
    Attempt,
    Channel,
    MediaSource,
    MediaTarget,
    MessageId,
    MessageType,
    NotSent,
    NumberCheck,
    OutboundMessage,
    Sent,
    SessionContext,
    SessionState,
    SessionStatus,
    Sink,
    StoredMedia,
    Typing,
    Unknown,
)
from core.errors import DatabaseUnavailable, NotSentError, ThrottledError
from core.sinks import ConversationSink, IntentSink, PullSink
from gateway.telegram import outgoing, settings, states
from gateway.telegram.api import OFFICIAL, BotApi, Flood, Timings, upload
from gateway.telegram.convert import migration
from gateway.telegram.downloads import download
from gateway.telegram.failures import failure, why
from gateway.telegram.link import Link
from gateway.telegram.outgoing import Draft
from gateway.telegram.pace import Limits, Pace
from gateway.telegram.polls import Polls
from gateway.telegram.values import Json, message_key, number_of, obj

SECONDS_PER_CHARACTER = 0.03
SHORTEST, LONGEST = 0.5, 3.0
"""Seconds that "typing…" is shown before a text."""
TOPIC_SECONDS = 2.0

logger = log.get(part="telegram")


class TelegramChannel:
    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        *,
        base_url: str = OFFICIAL,
        timings: Timings | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._context, self._sink, self._base_url = context, sink, base_url
        self._timings = timings or Timings()
        self._settings = settings.read(context.metadata)
        self._pace = Pace(limits)
        self._polls = Polls()
        self._state = states.disconnected()
        self._api: BotApi | None = None
        self._link: Link | None = None
        self._run: asyncio.Task[None] | None = None
        self._keeping: set[asyncio.Task[None]] = set()
        self._calls: set[tuple[int, int]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._moved: dict[int, int] = {}
        """Groups that became supergroups, old id to new."""
        self._changing = asyncio.Lock()

    # ---- life ----

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def healthy(self) -> bool:
        """False when the link has died, which would be a bug: it heals by itself."""
        return self._run is None or not self._run.done()

    async def connect(self) -> None:
        async with self._changing:
            if self._run is not None:
                return
            api = self._api or await self._open()
            if api is None:
                return
            self._api = api
            self._link = Link(
                self._context, self._sink, api, self._settings, self._polls, self._publish, self._timings
            )
            self._run = asyncio.create_task(self._link.run(), name=f"telegram.{self._context.session_id}")

    async def _open(self) -> BotApi | None:
        credentials = self._context.credentials
        token = credentials.get("token")
        try:
            return BotApi(
                token if isinstance(token, str) else "",
                self._base_url,
                proxy=credentials.get("proxy") or self._context.metadata.get("proxy"),
                timings=self._timings,
            )
        except ValueError as error:
            words = str(error)
            await self._publish(states.bad_proxy(words) if "proxy" in words else states.no_token())
            return None

    async def disconnect(self) -> None:
        async with self._changing:
            await self._stop()
            if self._state.status in (SessionStatus.ACTIVE, SessionStatus.CONNECTING):
                await self._publish(states.disconnected())

    async def logout(self) -> None:
        """A token cannot be given back by its bot: the webhook is taken away, the rest does @BotFather."""
        async with self._changing:
            api = self._api or await self._open()
            if api is not None and self._settings.webhook_url:
                try:
                    await api.call("deleteWebhook", {"drop_pending_updates": False})
                except TelegramError as error:
                    logger.warning(
                        "webhook.not_removed", session_id=self._context.session_id, error=why(error)
                    )
            self._api = api
            await self._stop()
            await self._publish(SessionState(SessionStatus.LOGGED_OUT, "logged_out"))

    async def _stop(self) -> None:
        tasks = [task for task in (self._run, *self._keeping) if task is not None]
        self._run = None
        api, self._api = self._api, None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._timings.stop)
        if api is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timings.drain):
                    await self._idle.wait()
            await api.close()

    async def _publish(self, state: SessionState) -> None:
        if state != self._state:
            self._state = state
            await self._sink.state(state)

    # ---- sending ----

    async def send(self, message: OutboundMessage) -> Sent:
        api = self._connected()
        key = (int(message.attempt.queue_id), message.attempt.claim_epoch)
        draft = outgoing.draft(message, self._settings, await self._topic(message))
        draft = self._followed(draft)
        self._calls.add(key)
        self._idle.clear()
        try:
            await self._show_typing(api, message, draft)
            await self._pace.turn(draft.chat_id)
            if self._api is not api:  # stopped meanwhile: nothing is begun on its way out
                raise _not_connected()
            return await self._hand_over(api, draft, message.attempt)
        finally:
            self._calls.discard(key)
            if not self._calls:
                self._idle.set()

    async def _hand_over(self, api: BotApi, draft: Draft, attempt: Attempt) -> Sent:
        await self._intend(attempt)
        faults.point("telegram.send.command")
        try:
            result = await self._call(api, draft)
        except ChatMigrated as moved:
            draft = await self._migrated(draft, moved.new_chat_id)
            await self._pace.turn(draft.chat_id)
            try:
                result = await self._call(api, draft)
            except Exception as error:
                raise self._failure(error, draft) from None
        except Exception as error:
            raise self._failure(error, draft) from None
        faults.point("telegram.send.replied")
        if isinstance(result, dict) and "poll" in result:
            self._keep_poll(result)
        return _sent(result, draft, attempt)

    async def _call(self, api: BotApi, draft: Draft) -> Any:
        if draft.file is not None:
            return await self._call_with_file(api, draft)
        try:
            return await api.call(draft.method, draft.params)
        except BadRequest as error:
            said = error.message.lower()
            if draft.method.startswith("editMessage") and "message is not modified" in said:
                return True  # it says so already: an edit that was cut off and is tried again
            if draft.method == "editMessageText" and "no text in the message" in said:
                return await self._call(api, outgoing.as_caption(draft))
            raise

    async def _call_with_file(self, api: BotApi, draft: Draft) -> Any:
        assert draft.file is not None
        try:
            handle = await asyncio.to_thread(draft.file.path.open, "rb")
        except OSError as error:
            raise NotSentError(
                f"The file to send cannot be read ({error.strerror}).", code="media_not_here"
            ) from None
        try:
            params = {**draft.params, draft.field: upload(handle, draft.file.filename)}
            return await api.call(draft.method, params, upload=True)
        finally:
            handle.close()

    def _failure(self, error: Exception, draft: Draft) -> Exception:
        """What to raise: the error itself may hold the token."""
        if isinstance(error, Flood):
            self._pace.hold(draft.chat_id, error.seconds)
        found = failure(error)
        logger.info(
            "send.refused",
            session_id=self._context.session_id,
            action=draft.method,
            result=found.code,
            error=why(error),
        )
        return found

    def _connected(self) -> BotApi:
        if self._api is None:
            raise _not_connected()
        return self._api

    async def _intend(self, attempt: Attempt) -> None:
        """Telegram cannot be asked what became of a call, so it is written down that one begins: only what was not
        written down is known not to have been sent. Raises ThrottledError."""
        if not isinstance(self._sink, IntentSink):
            return
        try:
            granted = await self._sink.intend(attempt)
        except DatabaseUnavailable as error:
            raise ThrottledError(
                "The send could not be written down, so it was not begun.",
                retry_after=1.0,
                code="intent_failed",
            ) from error
        if not granted:
            raise ThrottledError(
                "Another gateway has settled this attempt, so it was not begun.",
                retry_after=1.0,
                code="settled",
            )

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        key = (int(attempt.queue_id), attempt.claim_epoch)
        if key in self._calls:
            return Unknown("still_sending", attempt.channel_message_id)
        if isinstance(self._sink, IntentSink) and await self._sink.never_called(attempt):
            return NotSent("never_called")
        return Unknown("cut_off", attempt.channel_message_id)

    # ---- where it goes ----

    def _followed(self, draft: Draft) -> Draft:
        moved = self._moved.get(draft.chat_id)
        return draft if moved is None else draft.to(moved)

    async def _migrated(self, draft: Draft, new: int) -> Draft:
        """The group has another id now: its lead learns it, and the message goes there. The first call sent nothing."""
        old = draft.chat_id
        self._moved[old] = new
        logger.info("group.migrated", session_id=self._context.session_id, tenant_id=self._context.tenant_id)
        try:
            await self._sink.received([migration(self._context, old, new)])
        except DatabaseUnavailable as error:
            logger.warning(
                "group.migration_not_kept", session_id=self._context.session_id, error=error.detail
            )
        return draft.to(new)

    async def _topic(self, message: OutboundMessage) -> int | None:
        """Where in a chat with topics: beside what is answered, else where the other side wrote last."""
        if message.quoted is not None:
            return outgoing.topic_of(message.quoted)
        about_another = message.message_type in (
            MessageType.REACTION,
            MessageType.EDITED,
            MessageType.DELETED,
        )
        # Private chats have topics only with bots that have them switched on.
        may_have = outgoing.chat_of(message.attempt.recipient) < 0 or (
            self._link is not None and self._link.topics
        )
        if about_another or not may_have or not isinstance(self._sink, ConversationSink):
            return None
        try:
            async with asyncio.timeout(TOPIC_SECONDS):
                last = await self._sink.last_said(MessageId(message.attempt.message_id))
        except (DatabaseUnavailable, TimeoutError) as error:
            raise NotSentError(
                "The database cannot be asked for the conversation; tried again.", code="no_topic"
            ) from error
        return outgoing.topic_of(last)

    def _keep_poll(self, result: Json) -> None:
        cursor = self._polls.sent(result)
        if cursor is None or not isinstance(self._sink, PullSink):
            return
        pull = self._sink

        async def keep() -> None:
            try:
                await pull.advance(cursor)
            except DatabaseUnavailable:
                logger.warning("poll.not_kept", session_id=self._context.session_id)

        task = asyncio.create_task(keep())
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def check(self, recipients: Sequence[str]) -> dict[str, bool]:
        """Whether the bot knows these chats, as it does once they wrote. A block only shows when something is sent."""
        api, found = self._connected(), {}
        for recipient in recipients:
            try:
                await api.call("getChat", {"chat_id": outgoing.chat_of(recipient)})
            except (BadRequest, Forbidden):
                found[recipient] = False
            except TelegramError as error:
                raise self._failure(error, Draft("getChat", {"chat_id": 0})) from None
            else:
                found[recipient] = True
        return found

    # ---- manners ----

    async def typing(self, recipient: str, on: bool) -> None:
        """Telegram shows it for five seconds, or until a message comes; it cannot be taken back."""
        if on:
            await self._gesture(self._connected(), outgoing.chat_of(recipient))

    async def _show_typing(self, api: BotApi, message: OutboundMessage, draft: Draft) -> None:
        if not self._settings.typing or message.message_type is not MessageType.TEXT:
            return
        began = time.monotonic()
        await self._gesture(api, draft.chat_id, draft.params.get("message_thread_id"))
        shown = min(LONGEST, SHORTEST + SECONDS_PER_CHARACTER * len(message.content or ""))
        await asyncio.sleep(max(0.0, shown - (time.monotonic() - began)))

    async def _gesture(self, api: BotApi, chat_id: int, topic: int | None = None) -> None:
        params: Json = {"chat_id": chat_id, "action": "typing"}
        try:
            async with asyncio.timeout(LONGEST):
                await api.call(
                    "sendChatAction", params if topic is None else {**params, "message_thread_id": topic}
                )
        except (TelegramError, TimeoutError) as error:
            logger.debug("gesture.failed", session_id=self._context.session_id, error=why(error))

    # ---- media ----

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        if self._api is None:
            raise NotSentError(
                "The session is not connected to Telegram at the moment.", code="not_connected"
            )
        await download(self._api, message, target)


def _not_connected() -> ThrottledError:
    return ThrottledError(
        "The session is not connected to Telegram at this moment.", retry_after=2.0, code="not_connected"
    )


def _sent(result: Any, draft: Draft, attempt: Attempt) -> Sent:
    """The message's own id; what changes another message gets one that no other row has."""
    fields = obj(result)
    chat_id, message_id = number_of(obj(fields.get("chat")).get("id")), number_of(fields.get("message_id"))
    if chat_id and message_id and draft.method.startswith("send"):
        at = number_of(fields.get("date"))
        sent_at = datetime.fromtimestamp(at, UTC) if at else datetime.now(UTC)
        return Sent(message_key(chat_id, message_id), sent_at)
    about = (
        message_key(draft.chat_id, int(draft.params["message_id"]))
        if "message_id" in draft.params
        else "sent"
    )
    return Sent(f"{about}:{draft.method}:{attempt.queue_id}", datetime.now(UTC))


def _keeps_the_contract(
    context: SessionContext, sink: Sink
) -> tuple[Channel, MediaSource, NumberCheck, Typing]:
    channel = TelegramChannel(context, sink)
    return channel, channel, channel, channel
