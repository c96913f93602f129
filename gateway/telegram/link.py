"""Keeps one bot's updates coming, by long polling or by webhook, and heals: every failure ends in a state and a next try.

An offset is passed to Telegram only after everything before it is committed; what is delivered again is a duplicate.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from telegram.error import BadRequest, Conflict, InvalidToken, NetworkError, TelegramError

from core import faults, log
from core.channel import Cursor, InboundMessage, SessionContext, SessionState, Sink
from core.errors import DatabaseUnavailable, GatewayError, Invalid
from core.sinks import PullSink
from gateway.telegram import states
from gateway.telegram.api import BotApi, Flood, Timings
from gateway.telegram.content import person_name
from gateway.telegram.convert import KINDS, convert_update
from gateway.telegram.failures import why
from gateway.telegram.polls import NAME as POLLS
from gateway.telegram.polls import Polls
from gateway.telegram.settings import SessionSettings
from gateway.telegram.values import Json, number_of, obj, text_of

CURSOR = "updates"
KEPT_SECONDS = 24 * 3600.0
"""Telegram keeps updates so long. An offset that is older names nothing, and ids begin anew after an idle week."""
RETRY_STORE = 1.0

logger = log.get(part="telegram")

Publish = Callable[[SessionState], Awaitable[None]]


class Stopped(Exception):
    """The log-in found something that only a person can mend: the state to show."""

    def __init__(self, state: SessionState) -> None:
        super().__init__(state.reason)
        self.state = state


class Link:
    """`run` until it is cancelled."""

    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        api: BotApi,
        settings: SessionSettings,
        polls: Polls,
        publish: Publish,
        timings: Timings,
    ) -> None:
        self._context, self._sink, self._api = context, sink, api
        self._settings, self._polls, self._timings = settings, polls, timings
        self._publish = publish
        self._pull = sink if isinstance(sink, PullSink) else None
        self._me = states.active(context.identifier, None)
        self.topics = False
        """Whether private chats with this bot have topics."""
        self._offset: int | None = None
        self._moved_at = 0.0
        self._failures = 0

    async def run(self) -> None:
        await self._publish(states.connecting())
        while True:
            try:
                await self._log_in()
                await (self._watch_webhook() if self._settings.webhook_url else self._poll())
            except Exception as error:
                state, wait = self._failed(error)
            if state is not None:
                await self._publish(state)
            await asyncio.sleep(wait)

    # ---- log in ----

    async def _log_in(self) -> None:
        me = obj(await self._api.call("getMe"))
        username, name = text_of(me.get("username")), person_name(me)
        self.topics = me.get("has_topics_enabled") is True
        identifier = f"@{username}" if username else f"telegram:{self._api.bot_id}"
        cursors = await self._cursors()
        stored = obj(cursors[CURSOR].value) if CURSOR in cursors else {}
        same_bot = stored.get("bot") == self._api.bot_id
        wanted = self._context.identifier
        # A bot that has run here before may have been given another name; any other bot is a mistake.
        if wanted.startswith("@") and wanted.lower() != identifier.lower() and not same_bot:
            raise Stopped(states.other_bot(identifier, wanted))
        age = time.time() - (number_of(stored.get("at")) or 0)
        self._offset = number_of(stored.get("offset")) if same_bot and 0 <= age < KEPT_SECONDS else None
        self._moved_at = time.monotonic() - max(0.0, age)
        self._polls.load(cursors.get(POLLS))
        self._me = states.active(identifier if not wanted.startswith("@") else wanted, name)

    async def _cursors(self) -> dict[str, Cursor]:
        if self._pull is None:
            return {}
        while True:
            try:
                return dict(await self._pull.cursors())
            except DatabaseUnavailable:
                await asyncio.sleep(RETRY_STORE)

    # ---- long polling ----

    async def _poll(self) -> None:
        info = obj(await self._api.call("getWebhookInfo"))
        if text_of(info.get("url")):
            # Telegram answers no questions while it delivers. What waits is kept.
            await self._api.call("deleteWebhook", {"drop_pending_updates": False})
            logger.info("webhook.removed", session_id=self._context.session_id)
        wait: int | None = 0  # the first answer comes at once and says that we are the only one who asks
        while True:
            if time.monotonic() - self._moved_at > KEPT_SECONDS:
                self._offset = None
            updates = await self._api.updates(self._offset, KINDS, wait=wait)
            wait = None
            self._failures = 0
            await self._publish(self._me)
            if updates:
                await self._store(updates)

    async def _store(self, updates: list[Any]) -> None:
        """All of them committed, then the offset moves: in the transaction of the last message, or behind it."""
        messages: list[InboundMessage] = []
        offset = self._offset
        last_is_message = False
        for update in updates:
            converted = convert_update(update, self._context, self._polls.known)
            number = number_of(obj(update).get("update_id"))
            offset = number + 1 if number is not None else offset
            last_is_message = bool(converted.messages)
            messages += converted.messages
            if not converted.messages:
                kind = next((name for name in obj(update) if name != "update_id"), None)
                logger.debug("update.ignored", session_id=self._context.session_id, action=kind)
        cursor = Cursor(CURSOR, {"offset": offset, "bot": self._api.bot_id, "at": int(time.time())})
        if last_is_message:
            messages[-1] = replace(messages[-1], cursor=cursor)
        faults.point("telegram.update.before_commit")
        # The one that carries the cursor only after the others: batches of the database may end apart.
        await self._received(messages[:-1])
        await self._received(messages[-1:])
        if not last_is_message and self._pull is not None:
            await self._until_done(lambda: self._advance(cursor))
        faults.point("telegram.update.after_commit")
        self._offset, self._moved_at = offset, time.monotonic()

    async def _advance(self, cursor: Cursor) -> None:
        assert self._pull is not None
        await self._pull.advance(cursor)

    async def _received(self, messages: list[InboundMessage]) -> None:
        if not messages:
            return
        try:
            await self._until_done(lambda: self._sink.received(messages))
        except Invalid:
            for message in messages:
                await self._received_alone(message)

    async def _received_alone(self, message: InboundMessage) -> None:
        """One that cannot be stored as it is must neither be lost nor hold up the others."""
        try:
            await self._until_done(lambda: self._sink.received([message]))
        except Invalid as error:
            logger.error("update.unstorable", session_id=self._context.session_id, error=error.detail)
            bare = replace(message, content=None, media_metadata=None, raw_payload={"problem": error.detail})
            await self._until_done(lambda: self._sink.received([bare]))

    @staticmethod
    async def _until_done(work: Callable[[], Awaitable[Any]]) -> None:
        """While the database is away Telegram keeps what is not confirmed, and so do we."""
        while True:
            try:
                await work()
                return
            except DatabaseUnavailable:
                await asyncio.sleep(RETRY_STORE)

    # ---- webhook ----

    async def _watch_webhook(self) -> None:
        """Have Telegram deliver to the gateway's own route, and see to it that it stays so."""
        secret = self._context.credentials.get("webhook_secret")
        if not isinstance(secret, str) or not secret:
            raise Stopped(states.webhook_secret_missing())
        url = f"{self._settings.webhook_url}/webhook/{self._context.tenant_id}/{self._context.session_id}"
        params: Json = {"url": url, "secret_token": secret, "allowed_updates": list(KINDS)}
        try:
            await self._api.call("setWebhook", {**params, "drop_pending_updates": False})
        except BadRequest as error:
            raise Stopped(states.webhook_refused(why(error))) from None
        while True:
            info = obj(await self._api.call("getWebhookInfo"))
            if text_of(info.get("url")) != url:
                raise Stopped(states.webhook_taken())
            self._failures = 0
            await self._publish(replace(self._me, action=self._undelivered(info)))
            await asyncio.sleep(self._timings.look)

    def _undelivered(self, info: Json) -> str | None:
        """What keeps Telegram from delivering, when it just tried."""
        at, words = number_of(info.get("last_error_date")), text_of(info.get("last_error_message"))
        waiting = number_of(info.get("pending_update_count")) or 0
        if not at or not words or not waiting or time.time() - at > 3 * self._timings.look:
            return None
        return f"Telegram cannot deliver {waiting} updates to settings.webhook_url: {words[:200]}"

    # ---- what went wrong ----

    def _failed(self, error: Exception) -> tuple[SessionState | None, float]:
        """The state to show (None: not worth showing yet) and how long to wait."""
        self._failures += 1
        wait = min(self._timings.most_wait, self._timings.first_wait * 2 ** min(self._failures - 1, 10))
        wait *= 0.8 + 0.4 * random.random()  # noqa: S311
        state: SessionState | None
        match error:
            case Stopped():
                again = error.state.reason == "webhook_changed"
                state, wait = error.state, wait if again else self._timings.look
            case InvalidToken():
                state, wait = states.invalid_token(), self._timings.look
            case Conflict():
                state = states.webhook_taken() if "webhook" in error.message.lower() else states.conflict()
            case Flood():
                state, wait = states.throttled(), error.seconds
            case BadRequest():
                state = states.server_error()
            case NetworkError() if self._failures == 1:
                # One lost connection is no outage: asked again at once before anybody is alarmed.
                state, wait = None, 0.1
            case NetworkError() if error.__cause__ is not None:
                state = states.unreachable()
            case TelegramError():
                state = states.server_error()
            case _:
                state = states.disconnected(error.code if isinstance(error, GatewayError) else "failed")
        known = isinstance(error, (TelegramError, Stopped, GatewayError))
        (logger.warning if known else logger.error)(
            "link.failed",
            session_id=self._context.session_id,
            tenant_id=self._context.tenant_id,
            error=why(error) if known else type(error).__name__,
            result=f"trying again in {wait:.1f} s",
            **({} if known else {"exc_info": error}),
        )
        return state, wait
