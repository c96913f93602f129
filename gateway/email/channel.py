"""One email session: folders read over IMAP, mail sent over SMTP, and what a contract of channels asks for around that.

Heals by itself. Everything that must survive is in the database or the mailbox: any gateway may take the session over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Any

from core import log
from core.channel import (
    Attempt,
    Channel,
    History,
    MediaSource,
    MediaTarget,
    NotSent,
    OutboundMessage,
    Quoted,
    SessionContext,
    SessionState,
    SessionStatus,
    Sink,
    StoredMedia,
    Unknown,
)
from core.channel import (
    Sent as SentAs,
)
from core.errors import (
    Conflict,
    DatabaseUnavailable,
    GatewayError,
    NotSentError,
    RefusedError,
    ThrottledError,
)
from core.metrics import Metrics
from core.sinks import ConversationSink, CredentialSink, HistorySink
from gateway.email import settings as reading
from gateway.email.compose import Mail, compose
from gateway.email.imap import ImapLost, ImapRefused
from gateway.email.live import Live, tls_context
from gateway.email.oauth import Tokens
from gateway.email.parser import MailParser, Unreadable
from gateway.email.problems import Problem
from gateway.email.raws import Raws
from gateway.email.reader import pause
from gateway.email.standing import SMTP, Standing
from gateway.email.timings import Timings
from gateway.media.guard import Guard

logger = log.get(part="email")

DEFAULT_HISTORY_DAYS = 30
SWEEP_SECONDS = 3600.0
CHUNK = 1 << 18


class EmailChannel:
    """Create it anywhere; connect it on the main thread's loop (the worker process is spawned there)."""

    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        *,
        parser: MailParser,
        metrics: Metrics,
        guard: Guard | None = None,
        timings: Timings | None = None,
    ) -> None:
        self._context, self._sink, self._metrics = context, sink, metrics
        self._guard = guard or Guard()
        self._parser = parser
        self._timings = timings or Timings()
        self._settings = reading.read(context.metadata)
        self._raws = Raws(context.folder)
        needed = (*self._settings.folders[:1], SMTP)
        self._standing = Standing(needed, context.identifier, self._publish)
        self._states: asyncio.Queue[SessionState] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()
        self._smtp_failed = asyncio.Event()
        self._sending: dict[tuple[int, int], asyncio.Task[SentAs]] = {}
        self._history: asyncio.Task[bool] | None = None
        self._live: Live | None = None
        self._tokens: Tokens | None = None

    # ---- life

    @property
    def state(self) -> SessionState:
        return self._standing.state

    @property
    def healthy(self) -> bool:
        """False when a background part has died, which would be a bug: the session is then made anew."""
        return not any(task.done() for task in self._tasks)

    async def connect(self) -> None:
        async with self._changing:
            if self._tasks:
                return
            self._parser.hold()
            try:
                credentials = reading.read_credentials(self._context.credentials)
                self._live = Live(
                    self._context,
                    self._sink,
                    credentials,
                    self._settings,
                    parser=self._parser,
                    raws=self._raws,
                    timings=self._timings,
                    guard=self._guard,
                    tokens=self._made_tokens(credentials),
                    tell=self.tell,
                )
            except GatewayError as error:
                self._parser.let_go()
                self._standing.tell(SMTP, _bad_credentials(error))
                await self._sink.state(self._standing.state)
                return
            self._standing.starting()
            self._start("states", self._tell_states())
            self._start("life", self._live.run())
            self._start("smtp", self._watch_smtp(self._live))
            self._start("sweep", self._sweep())

    async def disconnect(self) -> None:
        async with self._changing:
            tasks: list[asyncio.Task[Any]] = [*self._tasks]
            self._tasks = []
            live, self._live = self._live, None
            if self._history is not None:
                tasks.append(self._history)
                self._history = None
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=self._timings.stop)
            if live is not None:
                await self._let_sends_end()
                await live.close()
                if self._tokens is not None:
                    await self._tokens.close()
                self._parser.let_go()
            self._standing.stopped()

    def _made_tokens(self, credentials: reading.Credentials) -> Tokens | None:
        """Those of the first start: they know of a newer refresh token than the credentials this channel was made with."""
        if self._tokens is None and credentials.oauth is not None:
            sink = self._sink
            keep = (
                partial(sink.credential_renewed, ("oauth", "refresh_token"))
                if isinstance(sink, CredentialSink)
                else None
            )
            self._tokens = Tokens(credentials.oauth, tls_context(credentials.ca), self._guard, keep=keep)
        return self._tokens

    async def logout(self) -> None:
        """Mail servers know no linked devices: stop. The credentials are forgotten by whoever called."""
        await self.disconnect()
        self._standing.state = SessionState(
            SessionStatus.LOGGED_OUT, "logged_out", identifier=self._context.identifier
        )

    async def _let_sends_end(self) -> None:
        """A mail in the middle of its transfer gets a moment: cut off, nobody would know what became of it."""
        if self._sending:
            await asyncio.wait(set(self._sending.values()), timeout=self._timings.stop)
        for task in self._sending.values():
            task.cancel()

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"email.{self._context.session_id}.{name}")
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("email.task_died", action=task.get_name(), error=repr(error), exc_info=error)

    # ---- states

    def _publish(self, state: SessionState) -> None:
        self._states.put_nowait(state)

    async def _tell_states(self) -> None:
        while True:
            state = await self._states.get()
            if state == self._standing.state:  # of several only the newest counts
                await self._sink.state(state)

    def tell(self, part: str, problem: Problem | None) -> None:
        if problem is not None:
            self._metrics.reconnects.labels("email").inc()
        self._standing.tell(part, problem)

    async def _watch_smtp(self, live: Live) -> None:
        """Finds out whether mail can go out: at the start, and after each failure until it can."""
        delay = self._timings.backoff_first
        while True:
            self._smtp_failed.clear()
            try:
                await live.smtp.probe()
            except Problem as problem:
                self.tell(SMTP, problem)
                await asyncio.sleep(pause(problem, delay, self._timings))
                delay = min(delay * 2, self._timings.backoff_most)
                continue
            delay = self._timings.backoff_first
            self._standing.tell(SMTP, None)
            await self._smtp_failed.wait()

    async def _sweep(self) -> None:
        while True:
            await asyncio.to_thread(self._raws.sweep)
            await asyncio.sleep(SWEEP_SECONDS)

    # ---- sending

    async def send(self, message: OutboundMessage) -> SentAs:
        """As `core.channel.Channel.send`. What was begun goes on when the caller gives up: `resolve` then knows its end."""
        live = self._live
        if live is None:
            raise ThrottledError("the session is not connected", retry_after=1.0, code="session_not_ready")
        mail = await self._compose(live, message)
        attempt = message.attempt
        key = (int(attempt.queue_id), attempt.claim_epoch)
        task = asyncio.create_task(self._hand_over(live, mail), name=f"email.send.{attempt.queue_id}")
        self._sending[key] = task
        task.add_done_callback(lambda done: self._send_ended(key, done))
        return await asyncio.shield(task)

    async def _compose(self, live: Live, message: OutboundMessage) -> Mail:
        """Nothing has been sent while this fails."""
        ids = await live.message_ids()
        file = None
        if message.media is not None:
            try:
                file = await asyncio.to_thread(message.media.path.read_bytes)
            except OSError as error:
                raise NotSentError(
                    f"the file to send cannot be read ({error.strerror})", code="media_not_ready"
                ) from error
        answered = message.quoted or await self._last_said(message)
        return await asyncio.to_thread(
            compose,
            message,
            own=live.own,
            name=self._context.name,
            message_id=ids.of(message.attempt.queue_id),
            now=datetime.now(UTC),
            settings=self._settings,
            answered=answered,
            file=file,
        )

    async def _last_said(self, message: OutboundMessage) -> Quoted | None:
        if not isinstance(self._sink, ConversationSink):
            return None
        try:
            return await self._sink.last_said(message.attempt.message_id)
        except DatabaseUnavailable as error:
            raise NotSentError(
                "the database is away: what this mail answers is not known", code="database_unavailable"
            ) from error

    async def _hand_over(self, live: Live, mail: Mail) -> SentAs:
        try:
            await live.smtp.send(live.own, mail.recipients, mail.raw, mail.message_id)
        except Problem as problem:
            # No connection or no log-in: the session waits, not the message's attempts.
            self.tell(SMTP, problem)
            self._smtp_failed.set()
            raise ThrottledError(problem.detail, retry_after=1.0, code=problem.code) from None
        if live.saves_copies:
            live.sent.keep(mail.raw)
        return SentAs(mail.message_id, datetime.now(UTC))

    def _send_ended(self, key: tuple[int, int], task: asyncio.Task[SentAs]) -> None:
        self._sending.pop(key, None)
        if not task.cancelled():
            task.exception()  # looked at, also when nobody waits for it any more

    async def resolve(self, attempt: Attempt) -> SentAs | NotSent | Unknown:
        """Found among the sent mail: sent. Not found proves nothing."""
        live = self._live
        if (int(attempt.queue_id), attempt.claim_epoch) in self._sending:
            return Unknown("still_sending", attempt.channel_message_id)
        if live is None:
            raise NotSentError("the session is not connected", code="session_not_ready")
        ids = await live.message_ids()
        for message_id in dict.fromkeys(filter(None, (attempt.channel_message_id, ids.of(attempt.queue_id)))):
            try:
                found = await live.sent.find(message_id)
            except (ImapLost, ImapRefused, Problem) as error:
                raise NotSentError(
                    f"the mailbox cannot be asked now ({error})", code="mailbox_away"
                ) from None
            if found is not None:
                return SentAs(message_id, found)
        return Unknown("not_in_sent", ids.of(attempt.queue_id))

    # ---- files

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        """From the original on our disk, else from the mailbox."""
        number = message.raw_payload.get("attachment")
        live = self._live
        if not isinstance(number, int):
            raise RefusedError("this message has no file", code="media_gone")
        if live is None:
            raise NotSentError("the session is not connected", code="session_not_ready")
        mail = str(message.raw_payload.get("part_of") or message.channel_message_id)
        raw = await asyncio.to_thread(self._raws.find, mail, number)
        if raw is None:
            raw = await live.original(message)
        try:
            data = await self._parser.attachment(raw, number)
        except Unreadable as error:
            raise RefusedError(
                f"the file cannot be taken out of its mail ({error})", code="media_gone"
            ) from None
        if target.offset:
            await target.restart()
        for start in range(0, len(data), CHUNK):
            await target.write(data[start : start + CHUNK])
        await asyncio.to_thread(self._raws.used, mail, number)

    # ---- history

    async def sync_history(self) -> int:
        """Bring in the mail of the last days (`settings.history_days`, else thirty) as history."""
        live = self._live
        if live is None or not isinstance(self._sink, HistorySink):
            raise Conflict("the session is not connected", action="Connect it first.")
        if self._history is None or self._history.done():
            days = self._settings.history_days or DEFAULT_HISTORY_DAYS
            self._history = asyncio.create_task(
                live.bring_history(self._sink, days), name=f"email.{self._context.session_id}.history"
            )
            self._history.add_done_callback(self._ended)
        return len(live.readers)


def _bad_credentials(error: GatewayError) -> Problem:
    return Problem(
        "credentials_invalid",
        error.detail,
        f"Enter the log-in of this mailbox again: {error.detail}.",
        lasting=True,
    )


def _check_types(context: SessionContext, sink: Sink, parser: MailParser, metrics: Metrics) -> None:
    """Keeps the contract honest under mypy; never called."""
    channel = EmailChannel(context, sink, parser=parser, metrics=metrics)
    _: Channel = channel
    _source: MediaSource = channel
    _history: History = channel
