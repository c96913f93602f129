"""From a session's journal to the sink: read in order, convert, hand over, release after the commit. Loses nothing.

It never waits for WhatsApp and never skips: an entry that cannot be read is stored as `unsupported` with all of it, and
while the database is away everything stays where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
import time
from base64 import b64encode
from collections.abc import Callable, Sequence

import orjson

from core import faults, log
from core.channel import InboundMessage, MessageType, Person, SessionContext, Sink, StatusUpdate
from core.errors import DatabaseUnavailable, JournalError
from core.journal import Entry, Journal
from core.metrics import Metrics
from core.sinks import ReplySink
from gateway.whatsapp import calls, polls, protocol, settings, store
from gateway.whatsapp.convert import convert_event, unreadable
from gateway.whatsapp.intents import Intent
from gateway.whatsapp.timings import Timings
from gateway.whatsapp.values import Json, items, obj

BATCH = 100
MEASURE_SECONDS = 1.0
"""Between two looks at how much waits."""
GATHER_SECONDS = 0.2
_LIDS_KEPT = 10_000

logger = log.get(part="whatsapp")


class Pump:
    """One task per session. It runs whether or not a child does, so that a crash's rest is stored at once."""

    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        journal: Journal,
        *,
        intent_of: Callable[[bytes], Intent | None],
        on_event: Callable[[Json], None] = lambda _event: None,
        asked: polls.Polls | None = None,
        replies: ReplySink | None = None,
        metrics: Metrics,
        timings: Timings,
    ) -> None:
        """`intent_of`: which queue item a secret marks; blocking. `on_event` sees every entry before it is converted."""
        self._context, self._sink, self._journal, self._intent_of = context, sink, journal, intent_of
        self._metrics, self._timings = metrics, timings
        self._on_event = on_event
        self._asked = asked or polls.Polls(context.folder, protocol.store_path(context.folder))
        self._replies = replies
        self._hint = asyncio.Event()
        self._lids: dict[str, str] = {}
        self._after = 0
        self._look_back_at = 0.0
        self._kept = False
        self._done: list[int] = []
        self._only_receipts = False
        self._strange: list[int] = []
        self._measured_at = 0.0
        self._stranger_since: float | None = None
        self._strangers: list[tuple[float, float]] = []
        self._pruned_at = time.monotonic()
        self.idle = asyncio.Event()
        """Set while the journal holds nothing that is not stored."""

    def stranger(self, present: bool) -> None:
        """A number that was never meant to be here is linked (until it is logged out): what comes meanwhile is
        somebody's private mail, which their phone has anyway. It is not stored."""
        if present and self._stranger_since is None:
            self._stranger_since = time.time()
        elif not present and self._stranger_since is not None:
            self._strangers.append((self._stranger_since, time.time()))
            self._stranger_since = None

    def _is_strangers(self, entry: Entry) -> bool:
        since = self._stranger_since
        if since is not None and entry.appended_at >= since:
            return True
        return any(first <= entry.appended_at <= last for first, last in self._strangers)

    def hint(self) -> None:
        """Something was journaled."""
        self.idle.clear()
        self._hint.set()

    async def run(self) -> None:
        wait = self._timings.store_retry
        while True:
            try:
                self._hint.clear()
                if await self._step():
                    wait = self._timings.store_retry
                    if self._only_receipts:
                        await self._gather()
                    continue
                self.idle.set()
                await self._prune()
                await self._rest()
            except DatabaseUnavailable:
                logger.warning(
                    "journal.waiting", session_id=self._context.session_id, result="database_unavailable"
                )
                await asyncio.sleep(wait)
                wait = min(wait * 2, self._timings.store_retry_cap)
            except JournalError as error:
                logger.error("journal.unreadable", session_id=self._context.session_id, error=error.detail)
                await asyncio.sleep(self._timings.store_retry_cap)

    async def _gather(self) -> None:
        """Nobody waits for a receipt: those of a moment are stored together, unless a message comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                await self._hint.wait()

    async def _rest(self) -> None:
        try:
            async with asyncio.timeout(self._timings.poll):
                await self._hint.wait()
        except TimeoutError:
            # Look at the whole journal again now and then: an operator may have asked for a replay, and what the
            # database refused gets another try.
            if not self._kept or time.monotonic() >= self._look_back_at:
                self._kept, self._after = False, 0

    async def _step(self) -> bool:
        """One batch; False when there is none."""
        entries = await asyncio.to_thread(self._release_and_read)
        if not entries:
            return False
        messages: list[tuple[Entry, InboundMessage]] = []
        updates: list[tuple[Entry, StatusUpdate]] = []
        for entry in entries:
            if self._is_strangers(entry):
                self._strange.append(entry.number)
                continue
            found, receipts = await self._convert(entry)
            messages += [(entry, message) for message in found]
            updates += [(entry, update) for update in receipts]
        kept = await self._store(messages) | await self._apply(updates)
        for entry, message in messages:
            if entry.kind == protocol.CALL and entry.number not in kept:
                await self._after_call(entry, message)
        self._done = [entry.number for entry in entries if entry.number not in kept]
        self._only_receipts = not messages
        self._after = max(self._after, entries[-1].number)
        if kept:
            self._look_back_at = time.monotonic() + self._timings.look_back
            self._kept = True
        return True

    def _release_and_read(self) -> list[Entry]:
        """Let go of the batch that was committed, and read the next one: one trip to the disk for both. Blocking."""
        if self._done:
            faults.point("whatsapp.release.before")
            self._journal.release(self._done)
            self._done = []
        if self._strange:
            self._journal.discard(self._strange)
            self._strange = []
        now = time.monotonic()
        if now >= self._measured_at + MEASURE_SECONDS:
            self._measured_at = now
            depth = self._journal.depth()
            self._metrics.journal_depth.labels(f"session-{self._context.session_id}").set(depth)
        return self._journal.pending(self._after, BATCH)

    async def read_again(self, entries: Sequence[Entry]) -> tuple[list[InboundMessage], list[StatusUpdate]]:
        """What entries say that were stored before. Nobody is told of them and nothing is counted a second time."""
        converted = [await self._convert(entry, again=True) for entry in entries]
        return [m for messages, _ in converted for m in messages], [
            u for _, updates in converted for u in updates
        ]

    async def _convert(
        self, entry: Entry, *, again: bool = False
    ) -> tuple[Sequence[InboundMessage], Sequence[StatusUpdate]]:
        try:
            body = orjson.loads(entry.payload)
            if not again:
                self._on_event(body)
            await self._learn_lids(body)
            await self._learn_own_number()
            if entry.kind == protocol.MESSAGE:
                await self._open_vote(body)
            converted = convert_event(body, self._context, phone_of=self._lids.get)
            if not again:
                self._count(entry.kind)
            return [await self._recognised(m) for m in converted.messages], converted.updates
        except Exception as error:
            # A bug of ours or a form nobody has seen: the message is stored all the same.
            if not again:
                logger.error(
                    "message.unreadable",
                    session_id=self._context.session_id,
                    action=f"journal entry {entry.number} is stored as unsupported",
                    error=f"{type(error).__name__}: {error}",
                )
            if entry.kind == protocol.RECEIPT:
                return (), ()
            return (unreadable(entry.payload, entry.key, entry.appended_at, self._context),), ()

    async def _open_vote(self, body: Json) -> None:
        """Put what a vote chose beside it, and keep what a poll asks for the votes that follow."""
        data = obj(body.get("data"))
        try:
            if polls.is_vote(data):
                opened = await asyncio.to_thread(self._asked.read, data)
                if opened is not None:
                    body["vote"] = opened
            elif polls.form_of(data.get("Message")) is not None:
                identifier = str(obj(data.get("Info")).get("ID"))
                await asyncio.to_thread(self._asked.remember, identifier, data.get("Message"))
        except sqlite3.Error as error:
            logger.warning("poll.not_kept", session_id=self._context.session_id, error=str(error))

    async def _after_call(self, entry: Entry, message: InboundMessage) -> None:
        """The text that follows a declined call. Raises DatabaseUnavailable: then the entry comes once more."""
        if self._replies is None:
            return
        body = orjson.loads(entry.payload)
        wanted = settings.read(self._context.metadata)
        text = calls.text_after(body, obj(body.get("data")), wanted, time.time())
        if text is not None:
            await self._replies.automatic_reply(
                message.person.external_id, text, purpose=calls.PURPOSE, at_most_every=calls.AT_MOST_EVERY
            )

    async def _recognised(self, message: InboundMessage) -> InboundMessage:
        """An own echo that carries a secret of ours names the queue item it comes from."""
        if message.message_secret is None:
            return message
        intent = await asyncio.to_thread(self._intent_of, bytes.fromhex(message.message_secret))
        if intent is None:
            return message
        reference = {"queue_id": intent.queue_id, "claim_epoch": intent.claim_epoch}
        return dataclasses.replace(message, raw_payload={**message.raw_payload, "queue_ref": reference})

    def _count(self, kind: str) -> None:
        if kind == protocol.UNDECRYPTABLE:
            self._metrics.undecryptable.labels(self._context.channel).inc()
        elif kind == protocol.LOST:
            self._metrics.possible_loss.labels(self._context.channel).inc()

    async def _learn_own_number(self) -> None:
        """A session that was made before its number was known learns it from the keys."""
        if self._context.identifier.startswith("+"):
            return
        with contextlib.suppress(sqlite3.Error):
            device = await asyncio.to_thread(store.device, protocol.store_path(self._context.folder))
            if device is not None:
                self._context = dataclasses.replace(self._context, identifier=device.identifier)

    async def _learn_lids(self, body: object) -> None:
        """Look up phones of LIDs that came without one, so that the same person is the same lead."""
        for lid in lids_without_phone(body):
            if lid in self._lids:
                continue
            path = protocol.store_path(self._context.folder)
            try:
                phone = await asyncio.to_thread(store.phone_of_lid, path, lid)
            except sqlite3.Error:
                continue
            if phone:
                if len(self._lids) >= _LIDS_KEPT:
                    self._lids.clear()
                self._lids[lid] = phone

    async def _store(self, messages: list[tuple[Entry, InboundMessage]]) -> set[int]:
        """Numbers of entries that could not be stored."""
        if not messages:
            return set()
        try:
            await self._sink.received([message for _, message in messages])
            return set()
        except DatabaseUnavailable:
            raise
        except Exception as error:
            if len(messages) > 1:
                # One of them is poison: find it, in order, without holding up the others.
                kept: set[int] = set()
                for pair in messages:
                    kept |= await self._store([pair])
                return kept
            return await self._store_stripped(messages[0], error)

    async def _store_stripped(self, pair: tuple[Entry, InboundMessage], error: Exception) -> set[int]:
        entry, message = pair
        logger.error(
            "message.refused",
            session_id=self._context.session_id,
            message_id=message.channel_message_id,
            error=f"{type(error).__name__}: {error}",
            action="storing it as unsupported",
        )
        plain = dataclasses.replace(
            message,
            message_type=MessageType.UNSUPPORTED,
            content=None,
            media_metadata=None,
            reply_to_message_id=None,
            person=Person(message.person.external_id, message.person.kind),
            raw_payload={"payload_base64": b64encode(entry.payload).decode()},
        )
        try:
            await self._sink.received([plain])
            return set()
        except DatabaseUnavailable:
            raise
        except Exception as second:
            logger.error(
                "message.not_stored",
                session_id=self._context.session_id,
                message_id=message.channel_message_id,
                error=f"{type(second).__name__}: {second}",
                action=f"journal entry {entry.number} stays in the journal; mend the database, it is tried again",
            )
            self._metrics.write_errors.labels(str(self._context.tenant_id), "refused").inc()
            return {entry.number}

    async def _apply(self, updates: list[tuple[Entry, StatusUpdate]]) -> set[int]:
        if not updates:
            return set()
        try:
            await self._sink.status([update for _, update in updates])
            return set()
        except DatabaseUnavailable:
            raise
        except Exception as error:
            if len(updates) > 1:
                kept: set[int] = set()
                for pair in updates:
                    kept |= await self._apply([pair])
                return kept
            logger.error(
                "receipt.refused",
                session_id=self._context.session_id,
                error=f"{type(error).__name__}: {error}",
                action="dropped: a receipt says nothing that is not asked for again",
            )
            return set()

    async def _prune(self) -> None:
        if time.monotonic() - self._pruned_at >= self._timings.prune:
            self._pruned_at = time.monotonic()
            await asyncio.to_thread(self._journal.prune)


def lids_without_phone(body: object) -> list[str]:
    """LIDs of the people in an event whose phone it does not name."""
    if not isinstance(body, dict):
        return []
    data = body.get("data")
    if not isinstance(data, dict):
        return []
    info = data.get("Info")
    source = data.get("MessageSource") or (info.get("MessageSource") if isinstance(info, dict) else None)
    if not isinstance(source, dict):
        people = [obj(data.get("basicCallMeta")).get("callCreator"), data.get("Sender")]
        people += [jid for name in ("Join", "Leave", "Promote", "Demote") for jid in items(data.get(name))]
        found = [
            str(jid["User"]) for jid in map(obj, people) if jid.get("Server") == "lid" and jid.get("User")
        ]
        if found:
            return found
        jids = [data.get("sender"), data.get("chat")]
        return [j.partition("@")[0] for j in jids if isinstance(j, str) and j.endswith("@lid")]
    pairs = (("Sender", "SenderAlt"), ("Chat", "RecipientAlt" if source.get("IsFromMe") else "SenderAlt"))
    found = []
    for name, alternative in pairs:
        jid, other = source.get(name), source.get(alternative)
        named = isinstance(other, dict) and other.get("User")
        if isinstance(jid, dict) and jid.get("Server") == "lid" and jid.get("User") and not named:
            found.append(str(jid["User"]))
    return found
