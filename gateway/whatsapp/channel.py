"""The WhatsApp channel as the gateway sees it: one session, made of a supervisor, a journal pump and a reporter.

It keeps `core.channel`'s contract and imports no neonize: everything WhatsApp happens in the child (`client.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from core import log
from core.channel import (
    Attempt,
    Channel,
    History,
    MediaSource,
    MediaTarget,
    NotSent,
    NumberCheck,
    OutboundMessage,
    Pairable,
    ReadReceipts,
    Sent,
    SessionContext,
    SessionState,
    SessionStatus,
    Sink,
    StoredMedia,
    Typing,
    Unknown,
)
from core.errors import (
    Conflict,
    DatabaseUnavailable,
    JournalError,
)
from core.identity import phone_e164
from core.journal import Journal
from core.metrics import Metrics
from core.sinks import HistorySink, ReplaySink, ReplySink
from gateway.whatsapp import calls, phone_sign, settings, states, store
from gateway.whatsapp.asking import Asking
from gateway.whatsapp.folder import forget_device
from gateway.whatsapp.handover import Handover
from gateway.whatsapp.history import HistorySync
from gateway.whatsapp.listening import Listening
from gateway.whatsapp.look_back import LookBack
from gateway.whatsapp.manners import Manners
from gateway.whatsapp.pairing import Pairing
from gateway.whatsapp.polls import Polls
from gateway.whatsapp.process import ChildGone, ChildRefused, ChildTimeout
from gateway.whatsapp.protocol import journal_path, store_path
from gateway.whatsapp.pump import Pump
from gateway.whatsapp.reporter import Reporter
from gateway.whatsapp.supervisor import Supervisor
from gateway.whatsapp.timings import Timings
from gateway.whatsapp.values import Json

REPLAY_SECONDS = 5.0
"""How long a start waits for an earlier life's entries to be stored before it connects."""
DRAIN_SECONDS = 2.0

logger = log.get(part="whatsapp")


class WhatsAppChannel:
    """One WhatsApp session. Create it anywhere; call it from the main thread's loop (children are spawned there)."""

    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        *,
        command: Sequence[str],
        metrics: Metrics,
        timings: Timings | None = None,
    ) -> None:
        self._context, self._metrics = context, metrics
        self._timings = timings or Timings()
        self._settings = settings.read(context.metadata)
        self._manners = Manners(self._settings, self._timings)
        self._phone = phone_sign.PhoneSign(context.folder)
        self._sink = Listening(
            sink,
            on_stored=self._manners.noticed,
            on_paired=lambda: self._phone.seen(time.time()),
            on_active=lambda state: self._manners.introduce(self._supervisor.child, state.name),
            warning=lambda: self._phone.warning,
        )
        self._polls = Polls(context.folder, store_path(context.folder))
        self._history = HistorySync(context, sink) if isinstance(sink, HistorySink) else None
        self._replies = sink if isinstance(sink, ReplySink) else None
        self._replays = sink if isinstance(sink, ReplaySink) else None
        self._reporter = Reporter(self._sink, context.session_id)
        self._supervisor = Supervisor(
            context,
            command,
            metrics=metrics,
            timings=self._timings,
            reporter=self._reporter,
            on_journaled=self._hint,
            on_stranger=self._stranger,
            on_report=self._reported,
        )
        self._asking = Asking(self._supervisor, self._timings, running=lambda: self._running)
        self._handover = Handover(
            context,
            self._supervisor,
            timings=self._timings,
            manners=self._manners,
            asked=self._polls,
            connected=self._asking.connected,
        )
        self._journal: Journal | None = None
        self._pump: Pump | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._looking_back: asyncio.Task[None] | None = None
        self._run: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    # ---- life ----

    @property
    def state(self) -> SessionState:
        return self._supervisor.state

    @property
    def healthy(self) -> bool:
        """False when a background part has died for good; `_guard` starts each again, so that would be a bug."""
        return not any(task.done() for task in self._tasks)

    async def connect(self) -> None:
        async with self._changing:
            if self._running:
                return
            try:
                paired = await asyncio.to_thread(store.device, self._store) is not None
            except (sqlite3.Error, OSError) as error:
                logger.error("store.unreadable", session_id=self._context.session_id, error=str(error))
                self._supervisor.publish(states.disconnected("store_unreadable"))
                await self._report_only()
                return
            await self._start(None if paired else self._new_pairing(None))

    async def disconnect(self) -> None:
        async with self._changing:
            await self._stop_child()
            if self._supervisor.state.status in (SessionStatus.ACTIVE, *states.PASSING):
                self._supervisor.publish(states.disconnected())
            await self._stop_rest()

    async def logout(self) -> None:
        """Tell WhatsApp, stop, forget the keys. The phone may list the device until it notices when WhatsApp is away."""
        async with self._changing:
            if await asyncio.to_thread(store.device, self._store) is not None:
                await self._tell_whatsapp()
            await self._stop_child()
            await asyncio.to_thread(forget_device, self._context.folder)
            self._supervisor.publish(states.logged_out("logged_out"))
            await self._stop_rest()

    async def _tell_whatsapp(self) -> None:
        supervisor = self._supervisor
        if not self._running:
            await self._start(None)
        supervisor.leaving = True
        try:
            async with asyncio.timeout(self._timings.logout):
                await supervisor.link.wait()
                assert supervisor.child is not None
                await supervisor.child.ask("logout", seconds=self._timings.logout)
        except (TimeoutError, ChildGone, ChildTimeout, ChildRefused) as error:
            logger.warning(
                "session.logout_unsaid",
                session_id=self._context.session_id,
                error=str(error) or "WhatsApp could not be reached",
                action="remove the device on the phone: Settings, Linked devices",
            )

    # ---- pairing ----

    async def pair_qr(self) -> None:
        await self._pair(None)

    async def pair_code(self, phone: str) -> None:
        await self._pair(phone_e164(phone))

    async def _pair(self, phone: str | None) -> None:
        async with self._changing:
            if await asyncio.to_thread(store.device, self._store) is not None:
                raise Conflict(
                    "This session is paired already; delete it or log it out before pairing another number.",
                    code="already_paired",
                )
            running = self._supervisor.pairing
            if self._running and running is not None:
                if running.phone == phone:  # let it go on, and show its code again
                    if running.current is not None:
                        self._reporter.pairing(running.current)
                    return
                await self._stop_child()
            await self._start(self._new_pairing(phone))

    def _new_pairing(self, phone: str | None) -> Pairing:
        return Pairing(self._timings, time.monotonic() + self._timings.pairing, phone)

    # ---- sending, and the smaller capabilities ----

    async def send(self, message: OutboundMessage) -> Sent:
        return await self._handover.send(message)

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        return await self._handover.resolve(attempt)

    async def check(self, recipients: Sequence[str]) -> dict[str, bool]:
        return await self._asking.check(recipients)

    async def typing(self, recipient: str, on: bool) -> None:
        await self._asking.typing(recipient, on)

    async def mark_read(self, recipient: str, message_ids: Sequence[str], sender: str | None = None) -> None:
        await self._asking.mark_read(recipient, message_ids, sender)

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        await self._asking.download(message, target)

    async def sync_history(self) -> int:
        """WhatsApp hands history over once, after the pairing, and the client library cannot ask the phone for more."""
        under_way = await self._history.under_way() if self._history is not None else 0
        if self._history is None or not under_way:
            raise Conflict(
                "The phone hands over its history once, when it is linked; all it gave is stored.",
                code="history_only_after_pairing",
                action="to get it again, log the session out and pair the same phone again: nothing is stored twice",
            )
        self._history.hint()
        return under_way

    # ---- parts ----

    @property
    def _running(self) -> bool:
        return self._run is not None and not self._run.done()

    async def _start(self, pairing: Pairing | None) -> None:
        supervisor = self._supervisor
        supervisor.leaving = False
        supervisor.pairing = pairing
        supervisor.publish(states.pairing() if pairing else states.connecting())
        await self._report_only()
        self._run = asyncio.create_task(self._live())

    async def _report_only(self) -> None:
        if not self._tasks:
            await asyncio.to_thread(self._phone.start)
            self._tasks = [
                asyncio.create_task(self._guard("reporter", self._reporter.run)),
                asyncio.create_task(self._guard("phone", self._watch_phone)),
            ]

    async def _watch_phone(self) -> None:
        """Say it in time when the phone gives no sign any more, and stop saying it when it does again."""
        gauge = self._metrics.phone_seen.labels(str(self._context.tenant_id), str(self._context.session_id))
        while True:
            gauge.set(self._phone.last or 0)
            with contextlib.suppress(DatabaseUnavailable):
                await self._sink.look_again()
            await asyncio.sleep(self._timings.phone)

    async def _live(self) -> None:
        """The journal's rest first, then WhatsApp."""
        wait = self._timings.backoff_first
        while self._pump is None:
            try:
                self._journal = await asyncio.to_thread(Journal, journal_path(self._context.folder))
            except JournalError as error:
                logger.error("journal.failed", session_id=self._context.session_id, error=error.detail)
                self._supervisor.publish(states.disconnected("journal_failed"))
                await asyncio.sleep(wait)
                wait = min(wait * 2, self._timings.backoff_cap)
                continue
            self._pump = Pump(
                self._context,
                self._sink,
                self._journal,
                intent_of=self._handover.intent_of,
                on_event=self._noticed,
                asked=self._polls,
                replies=self._replies,
                metrics=self._metrics,
                timings=self._timings,
            )
            self._tasks.append(asyncio.create_task(self._guard("pump", self._pump.run)))
            if self._history is not None:
                self._tasks.append(asyncio.create_task(self._guard("history", self._history.run)))
            if self._replays is not None:
                look = LookBack(
                    self._context, self._replays, self._journal, self._pump.read_again, self._timings
                )
                work = partial(look.run, self._supervisor.link)
                self._looking_back = asyncio.create_task(self._guard("look back", work))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPLAY_SECONDS):
                await self._pump.idle.wait()
        await self._guard("supervisor", self._supervisor.run)

    async def _guard(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """A background part never dies silently: its failure is logged and it starts again."""
        wait = self._timings.backoff_first
        while True:
            try:
                await work()
                return
            except Exception:
                logger.exception("session.part_failed", session_id=self._context.session_id, action=name)
            await asyncio.sleep(wait)
            wait = min(wait * 2, self._timings.backoff_cap)

    async def _stop_child(self) -> None:
        supervisor = self._supervisor
        supervisor.leaving = True
        child = supervisor.child
        if child is not None and child.alive and supervisor.link.is_set():
            await child.stop(self._timings.stop)
        if self._run is not None:
            self._run.cancel()
            await asyncio.gather(self._run, return_exceptions=True)
            self._run = None
        supervisor.pairing = None
        await self._handover.drain(DRAIN_SECONDS)

    async def _stop_rest(self) -> None:
        if self._pump is not None:
            self._pump.hint()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self._pump.idle.wait()
        await self._reporter.flush(DRAIN_SECONDS)
        tasks = [*self._tasks, *([self._looking_back] if self._looking_back else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._looking_back = [], None
        self._pump = None
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)
            self._journal = None
        await self._handover.close()

    def _noticed(self, event: Json) -> None:
        at = phone_sign.sign_of(event)
        if at is not None:
            self._phone.seen(at)

    def _hint(self) -> None:
        if self._pump is not None:
            self._pump.hint()

    def _stranger(self, present: bool) -> None:
        if self._pump is not None:
            self._pump.stranger(present)
        if self._history is not None:
            self._history.stranger(present)

    def _reported(self, line: Json) -> None:
        """What the child says that the supervisor has no use for."""
        event = line.get("ev")
        if event == "history":
            logger.info("history.fetched", session_id=self._context.session_id, action=line.get("sync"),
                        result=f"{line.get('progress')} %")  # fmt: skip
            if self._history is not None:
                self._history.hint()
        elif event == "history_failed":
            logger.error("history.lost", session_id=self._context.session_id, error=line.get("error"),
                         action="this part of the phone's history is missing; pair again to get it again")  # fmt: skip
        elif (
            event == "call"
            and self._settings.call_policy == "decline"
            and calls.rings(line.get("at"), time.time())
        ):
            child = self._supervisor.child
            if child is not None:
                self._asking.gesture(child, "reject_call", **{"id": line["call"], "from": line["creator"]})

    @property
    def _store(self) -> Path:
        return store_path(self._context.folder)


def _contract(
    channel: WhatsAppChannel,
) -> tuple[Channel, Pairable, NumberCheck, Typing, ReadReceipts, MediaSource, History]:
    """Keeps the adapter honest under mypy."""
    return channel, channel, channel, channel, channel, channel, channel


__all__ = ["Timings", "WhatsAppChannel"]
