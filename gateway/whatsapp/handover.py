"""A message on its way to the child, the gateway's side: written down, handed over once, its end found out after a cut-off.

At most one call for an attempt, and nothing is called unsent without proof. It never tries again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from core import faults
from core.channel import (
    Attempt,
    MessageType,
    NotSent,
    OutboundMessage,
    Sent,
    SessionContext,
    Unknown,
)
from core.errors import ChannelError, NotSentError, ThrottledError, UnknownOutcomeError
from gateway.whatsapp import outgoing, polls, sending, store
from gateway.whatsapp.folder import FolderLock, FolderTaken, message_secret
from gateway.whatsapp.gathered import Gathered
from gateway.whatsapp.intents import Intent, Intents
from gateway.whatsapp.manners import Manners
from gateway.whatsapp.process import ChildGone, ChildProcess, ChildRefused, ChildTimeout
from gateway.whatsapp.protocol import INTENTS_FILE, store_path
from gateway.whatsapp.supervisor import Supervisor
from gateway.whatsapp.timings import Timings
from gateway.whatsapp.uploader import Uploader
from gateway.whatsapp.values import Json

CUT_OFF_FREE = 10
"""So often a send that never began costs its item no attempt."""
LOCK_LOOK = 0.1
"""Between two looks at a folder that somebody else holds."""

_Key = tuple[int, int]


class Handover:
    """The sends of one session. Its files are opened when they are needed; `close` may be followed by more."""

    def __init__(
        self,
        context: SessionContext,
        supervisor: Supervisor,
        *,
        timings: Timings,
        manners: Manners,
        asked: polls.Polls,
        connected: Callable[[], Awaitable[ChildProcess]],
    ) -> None:
        """`connected`: the child with a live link; raises ThrottledError."""
        self._folder, self._store = context.folder, store_path(context.folder)
        self._supervisor, self._timings = supervisor, timings
        self._manners, self._polls, self._connected = manners, asked, connected
        self._intents: Intents | None = None
        self._opening = threading.Lock()
        self._writing: Gathered[tuple[Attempt, str], bytes] = Gathered(self._write_down)
        self.uploads = Uploader(timings.upload)
        self._calls: set[_Key] = set()
        """Sends that somebody waits for: they may still be at their file."""
        self._inflight: dict[_Key, ChildProcess] = {}
        self._sends: set[asyncio.Task[Sent]] = set()
        self._known_device: tuple[ChildProcess, store.Device] | None = None
        self._cut_off: Counter[int] = Counter()
        """How often a child died under an item that it had not begun to send."""
        self._resolving = asyncio.Lock()

    # ---- sending ----

    @property
    def in_flight(self) -> int:
        """Sends that are with a child."""
        return len(self._inflight)

    async def send(self, message: OutboundMessage) -> Sent:
        key = _key(message.attempt)
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
        child = await self._connected()
        uploaded = await self.uploads.place(child, draft.upload) if draft.upload else None
        text = (message.content or "") if message.message_type is MessageType.TEXT else None
        # Up to here, and while "typing…" is shown, whoever cancels this call has stopped the send.
        async with self._manners.typing(child, to, text):
            secret = await self._intend(attempt, device)
            body = outgoing.finish(draft, secret, uploaded)
            # A caller that gives up does not take the send back: it goes on, watched, so that `resolve` knows its end.
            task = asyncio.create_task(self._hand_over(child, attempt, to, body))
            self._sends.add(task)
            task.add_done_callback(self._send_ended)
            sent = await asyncio.shield(task)
        self._manners.answered(child, attempt.recipient)
        return sent

    async def _hand_over(self, child: ChildProcess, attempt: Attempt, to: str, body: Json) -> Sent:
        key = _key(attempt)
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
        if polls.form_of(body) is not None:
            with contextlib.suppress(sqlite3.Error):  # votes would name no options, that is all
                await asyncio.to_thread(self._polls.remember, str(reply["message_id"]), body)
        return Sent(str(reply["message_id"]), datetime.fromtimestamp(int(reply["timestamp"]), UTC))

    def _send_ended(self, task: asyncio.Task[Sent]) -> None:
        self._sends.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, also when nobody waits for it any more

    async def drain(self, seconds: float) -> None:
        """Wait for sends whose child is gone: each knows its outcome in a moment."""
        if self._sends:
            await asyncio.wait(self._sends, timeout=seconds)

    # ---- what was cut off ----

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
        key = _key(attempt)
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
            with FolderLock(self._folder):
                return self._look(attempt)
        except (FolderTaken, OSError):
            found = self._look(attempt)
            return (
                found if isinstance(found, Unknown) else Unknown("folder_taken", attempt.channel_message_id)
            )

    def _look(self, attempt: Attempt) -> NotSent | Unknown:
        """Whether whatsmeow wrote down this attempt's secret, which it does before anything is sent. Blocking."""
        try:
            secret = self.secret(attempt)
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

    # ---- what is written down ----

    def secret(self, attempt: Attempt) -> bytes:
        """What marks the send of this attempt. Blocking."""
        return message_secret(self._folder, int(attempt.queue_id), attempt.claim_epoch)

    async def _intend(self, attempt: Attempt, device: store.Device | None) -> bytes:
        """The attempt's secret, written down. Raises NotSentError: what cannot be written down is not sent."""
        try:
            return await self._writing.do((attempt, device.jid if device else ""))
        except (sqlite3.Error, OSError) as error:
            raise NotSentError(
                f"The send cannot be written down ({error}); free space or mend DATA_DIR.",
                code="intent_failed",
            ) from error

    def _write_down(self, wanted: list[tuple[Attempt, str]]) -> list[bytes]:
        """Blocking."""
        rows = [
            (self.secret(attempt), Intent(int(attempt.queue_id), attempt.claim_epoch, device))
            for attempt, device in wanted
        ]
        self._opened_intents().write(rows)
        return [secret for secret, _ in rows]

    def intent_of(self, secret: bytes) -> Intent | None:
        """Which queue item a secret marks. Blocking; raises sqlite3.Error."""
        return self._opened_intents().find(secret)

    def _opened_intents(self) -> Intents:
        with self._opening:
            if self._intents is None:
                self._intents = Intents(self._folder / INTENTS_FILE)
            return self._intents

    async def close(self) -> None:
        intents, self._intents = self._intents, None
        if intents is not None:
            await asyncio.to_thread(intents.close)

    async def _own_device(self) -> store.Device | None:
        """Read once for a child, not for every message."""
        child, known = self._supervisor.child, self._known_device
        if known is not None and child is not None and known[0] is child:
            return known[1]
        device = await asyncio.to_thread(_device, self._store)
        self._known_device = (child, device) if child is not None and device is not None else None
        return device


def _device(path: Path) -> store.Device | None:
    try:
        return store.device(path)
    except sqlite3.Error:
        return None


def _key(attempt: Attempt) -> _Key:
    return int(attempt.queue_id), attempt.claim_epoch
