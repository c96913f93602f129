"""The WhatsApp channel as the gateway sees it: one session, made of a supervisor, a journal pump and a reporter.

It keeps `core.channel`'s contract and imports no neonize: everything WhatsApp happens in the child (`client.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from core import faults, log
from core.channel import (
    Attempt,
    Channel,
    History,
    MediaSource,
    MediaTarget,
    MessageType,
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
    ChannelError,
    Conflict,
    DatabaseUnavailable,
    JournalError,
    NotSentError,
    ThrottledError,
    UnknownOutcomeError,
)
from core.identity import external_id, phone_e164
from core.journal import Journal
from core.metrics import Metrics
from core.sinks import HistorySink, ReplaySink, ReplySink
from gateway.whatsapp import calls, mediafiles, outgoing, phone_sign, sending, settings, states, store
from gateway.whatsapp.checks import Checks
from gateway.whatsapp.folder import FolderLock, FolderTaken, forget_device, message_secret
from gateway.whatsapp.history import HistorySync
from gateway.whatsapp.intents import Intent, Intents
from gateway.whatsapp.listening import Listening
from gateway.whatsapp.look_back import LookBack
from gateway.whatsapp.manners import Manners
from gateway.whatsapp.pairing import Pairing
from gateway.whatsapp.polls import Polls
from gateway.whatsapp.process import ChildGone, ChildProcess, ChildRefused, ChildTimeout
from gateway.whatsapp.protocol import INTENTS_FILE, journal_path, store_path
from gateway.whatsapp.pump import Pump
from gateway.whatsapp.reporter import Reporter
from gateway.whatsapp.supervisor import Supervisor
from gateway.whatsapp.timings import Timings
from gateway.whatsapp.uploader import Uploader
from gateway.whatsapp.values import Json

REPLAY_SECONDS = 5.0
"""How long a start waits for an earlier life's entries to be stored before it connects."""
DRAIN_SECONDS = 2.0
CUT_OFF_FREE = 10
"""So often a send that never began costs its item no attempt."""
LOCK_LOOK = 0.1
"""Between two looks at a folder that somebody else holds."""

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
        self._uploads = Uploader(self._timings.upload)
        self._checks = Checks(self._ask_numbers)
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
        self._journal: Journal | None = None
        self._intents: Intents | None = None
        self._pump: Pump | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._looking_back: asyncio.Task[None] | None = None
        self._run: asyncio.Task[None] | None = None
        self._calls: set[tuple[int, int]] = set()
        """Sends that somebody waits for: they may still be at their file."""
        self._inflight: dict[tuple[int, int], ChildProcess] = {}
        self._known_device: tuple[ChildProcess, store.Device] | None = None
        self._sends: set[asyncio.Task[Sent]] = set()
        self._gestures: set[asyncio.Task[Any]] = set()
        self._cut_off: Counter[int] = Counter()
        """How often a child died under an item that it had not begun to send."""
        self._opening = threading.Lock()
        self._changing = asyncio.Lock()
        self._resolving = asyncio.Lock()

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

    # ---- sending ----

    async def send(self, message: OutboundMessage) -> Sent:
        key = (int(message.attempt.queue_id), message.attempt.claim_epoch)
        self._calls.add(key)
        try:
            return await self._send(message)
        finally:
            self._calls.discard(key)

    async def _send(self, message: OutboundMessage) -> Sent:
        attempt = message.attempt
        to = sending.jid_of(attempt.recipient)
        device = await self._own_device()
        draft = outgoing.draft(message, to, device)
        child = await self._connected_child()
        uploaded = await self._uploads.place(child, draft.upload) if draft.upload else None
        secret = await asyncio.to_thread(self._secret, attempt)
        body = outgoing.finish(draft, secret, uploaded)
        text = (message.content or "") if message.message_type is MessageType.TEXT else None
        # Up to here, and while "typing…" is shown, whoever cancels this call has stopped the send.
        async with self._manners.typing(child, to, text):
            await asyncio.to_thread(self._intend, attempt, secret, device)
            # A caller that gives up does not take the send back: it goes on, watched, so that `resolve` knows its end.
            task = asyncio.create_task(self._hand_over(child, attempt, to, body))
            self._sends.add(task)
            task.add_done_callback(self._send_ended)
            sent = await asyncio.shield(task)
        self._manners.answered(child, attempt.recipient)
        return sent

    async def _hand_over(self, child: ChildProcess, attempt: Attempt, to: str, body: Json) -> Sent:
        key = (int(attempt.queue_id), attempt.claim_epoch)
        self._inflight[key] = child
        faults.point("whatsapp.send.command")
        try:
            reply = await child.ask("send", seconds=self._timings.send, to=to, message=body)
        except ChildRefused as refused:
            error = sending.refusal(str(refused))
            raise error or await self._settle(attempt, f"whatsmeow: {refused}") from refused
        except (ChildGone, ChildTimeout) as gone:
            # It may hang in Go without an end: only a dead child is certain to do no more.
            await child.kill()
            raise await self._settle(attempt, str(gone)) from gone
        finally:
            self._inflight.pop(key, None)
        self._cut_off.pop(attempt.queue_id, None)
        faults.point("whatsapp.send.replied")
        with contextlib.suppress(sqlite3.Error):  # votes would name no options, that is all
            await asyncio.to_thread(self._polls.remember, str(reply["message_id"]), body)
        return Sent(str(reply["message_id"]), datetime.fromtimestamp(int(reply["timestamp"]), UTC))

    def _send_ended(self, task: asyncio.Task[Sent]) -> None:
        self._sends.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, also when nobody waits for it any more

    async def _settle(self, attempt: Attempt, cause: str) -> ChannelError:
        """What a send that was cut off became. Nobody works on it any more when this is called."""
        found = await asyncio.to_thread(self._look, attempt)
        if isinstance(found, NotSent):
            return self._never_began(attempt, f"The send was cut off before it began ({cause}).")
        return UnknownOutcomeError(
            f"The send was cut off and nothing proves whether it went out ({cause}).",
            channel_message_id=found.channel_message_id,
        )

    def _never_began(self, attempt: Attempt, detail: str) -> ChannelError:
        """A child that died is not the message's fault, unless the message is what kills it."""
        self._cut_off[attempt.queue_id] += 1
        if self._cut_off[attempt.queue_id] > CUT_OFF_FREE:
            return NotSentError(detail, code="cut_off")
        return ThrottledError(detail, retry_after=sending.LINK_WAIT, code="cut_off")

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        key = (int(attempt.queue_id), attempt.claim_epoch)
        working = self._inflight.get(key)
        if key in self._calls or (working is not None and working.alive):
            return Unknown("still_sending", attempt.channel_message_id)
        deadline = time.monotonic() + self._timings.resolve
        # One at a time: the lock that proves that nobody else sends would shut out the next question too.
        async with self._resolving:
            while True:
                found = await asyncio.to_thread(self._look_alone, attempt)
                if not isinstance(found, Unknown) or found.reason != "folder_taken":
                    return found
                # Mostly our own child, which has the lock and has not said so yet; or a dead gateway's that is ending.
                if time.monotonic() >= deadline:
                    return found
                await asyncio.sleep(LOCK_LOOK)

    def _look_alone(self, attempt: Attempt) -> NotSent | Unknown:
        """Like `_look`, with the proof that no other process sends for this session. Blocking."""
        child = self._supervisor.child
        if child is not None and child.alive and self._supervisor.ready:
            return self._look(attempt)
        try:
            with FolderLock(self._context.folder):
                return self._look(attempt)
        except (FolderTaken, OSError):
            found = self._look(attempt)
            return (
                found if isinstance(found, Unknown) else Unknown("folder_taken", attempt.channel_message_id)
            )

    def _look(self, attempt: Attempt) -> NotSent | Unknown:
        """Whether whatsmeow wrote down this attempt's secret, which it does before anything is sent. Blocking."""
        try:
            secret = self._secret(attempt)
            row = store.find_secret(self._store, secret)
            if row is not None:
                return Unknown("cut_off", row.message_id)
            intent = self._opened_intents().find(secret)
            device = store.device(self._store)
        except (sqlite3.Error, OSError) as error:
            return Unknown(f"store_unreadable: {error}", attempt.channel_message_id)
        if intent is not None and (device is None or device.jid != intent.device):
            # The device that sent it was logged out, and its secrets went along: their absence proves nothing.
            return Unknown("keys_gone", attempt.channel_message_id)
        return NotSent()

    def _intend(self, attempt: Attempt, secret: bytes, device: store.Device | None) -> None:
        """Raises NotSentError: what cannot be written down is not sent."""
        intent = Intent(int(attempt.queue_id), attempt.claim_epoch, device.jid if device else "")
        try:
            self._opened_intents().write(secret, intent)
        except (sqlite3.Error, OSError) as error:
            raise NotSentError(
                f"The send cannot be written down ({error}); free space or mend DATA_DIR.",
                code="intent_failed",
            ) from error

    def _opened_intents(self) -> Intents:
        with self._opening:
            if self._intents is None:
                self._intents = Intents(self._context.folder / INTENTS_FILE)
            return self._intents

    def _intent_of(self, secret: bytes) -> Intent | None:
        return self._opened_intents().find(secret)

    async def _connected_child(self) -> ChildProcess:
        """The child with a live link, waiting briefly for one. Raises ThrottledError: not sent, no attempt lost."""
        supervisor = self._supervisor
        if not supervisor.link.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timings.link if self._running else 0):
                    await supervisor.link.wait()
        child = supervisor.child
        if child is None or not child.alive or not supervisor.link.is_set():
            raise sending.not_connected()
        return child

    # ---- the smaller capabilities ----

    async def check(self, recipients: Sequence[str]) -> dict[str, bool]:
        """By recipient as given. Raises NotSentError when there is no link, ThrottledError when asked too often, Invalid
        for what is no address."""
        phones = {r: external_id("whatsapp", r).partition(":+")[2] for r in recipients}
        found = await self._checks({phone for phone in phones.values() if phone})
        return {r: found.get(phone, False) if phone else True for r, phone in phones.items()}

    async def _ask_numbers(self, phones: list[str]) -> dict[str, bool]:
        found: dict[str, bool] = await self._ask("check", phones=phones)
        return found

    async def typing(self, recipient: str, on: bool) -> None:
        await self._ask("typing", to=sending.jid_of(recipient), on=on, leave=not on)

    async def mark_read(self, recipient: str, message_ids: Sequence[str], sender: str | None = None) -> None:
        chat = sending.jid_of(recipient)
        author = sending.jid_of(external_id("whatsapp", sender)) if sender else chat
        await self._ask("read", chat=chat, sender=author, ids=list(message_ids))

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        """The child writes the file itself, from where an earlier try left off."""
        wanted = mediafiles.request(message)
        child = await self._connected_child()
        to = str(target.path)
        try:
            reply = await child.ask("download", seconds=self._timings.download, to=to, **wanted)
        except (ChildGone, ChildTimeout, ChildRefused) as error:
            self._gesture(child, "download_stop", to=to)
            raise NotSentError(
                f"The WhatsApp client did not download it ({error}).", code="media_later"
            ) from error
        except asyncio.CancelledError:
            self._gesture(child, "download_stop", to=to)
            raise
        problem = mediafiles.outcome(reply)
        if problem is not None:
            raise problem

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

    async def _ask(self, op: str, **fields: Any) -> Any:
        child = await self._connected_child()
        try:
            return await child.ask(op, seconds=self._timings.command, **fields)
        except ChildRefused as refused:
            raise sending.refusal(str(refused)) or ChannelError(f"WhatsApp: {refused}") from refused
        except (ChildGone, ChildTimeout) as gone:
            raise NotSentError(f"The WhatsApp client did not answer ({gone}); try again.") from gone

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
                intent_of=self._intent_of,
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
        if self._sends:  # their child is gone: each knows its outcome in a moment
            await asyncio.wait(self._sends, timeout=DRAIN_SECONDS)

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
        if self._intents is not None:
            await asyncio.to_thread(self._intents.close)
            self._intents = None

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
                self._gesture(child, "reject_call", **{"id": line["call"], "from": line["creator"]})

    def _gesture(self, child: ChildProcess, op: str, **fields: Any) -> None:
        """Asked without waiting; what becomes of it changes nothing."""

        async def ask() -> None:
            with contextlib.suppress(ChildGone, ChildTimeout, ChildRefused):
                await child.ask(op, seconds=self._timings.command, **fields)

        task = asyncio.create_task(ask())
        self._gestures.add(task)
        task.add_done_callback(self._gestures.discard)

    @property
    def _store(self) -> Path:
        return store_path(self._context.folder)

    def _secret(self, attempt: Attempt) -> bytes:
        return message_secret(self._context.folder, int(attempt.queue_id), attempt.claim_epoch)

    async def _own_device(self) -> store.Device | None:
        """Read once for a child: whatsmeow writes that file with every message, and a reader and it wait for each other."""
        child, known = self._supervisor.child, self._known_device
        if known is not None and child is not None and known[0] is child:
            return known[1]
        device = await asyncio.to_thread(self._device)
        self._known_device = (child, device) if child is not None and device is not None else None
        return device

    def _device(self) -> store.Device | None:
        try:
            return store.device(self._store)
        except sqlite3.Error:
            return None


def _contract(
    channel: WhatsAppChannel,
) -> tuple[Channel, Pairable, NumberCheck, Typing, ReadReceipts, MediaSource, History]:
    """Keeps the adapter honest under mypy."""
    return channel, channel, channel, channel, channel, channel, channel


__all__ = ["Timings", "WhatsAppChannel"]
