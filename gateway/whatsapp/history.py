"""The phone's history sync, from fetched files to stored messages: in the background, behind live traffic, exactly once.

A file is forgotten only after its last message is committed; whatever ends this in the middle, the next start goes on and
what is stored already is not stored again. Never answers anything and never talks to WhatsApp.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from pathlib import Path

from core import log
from core.channel import InboundMessage, MessageType, Person, SessionContext
from core.errors import DatabaseUnavailable
from core.history import Entry, Item, Wrong
from core.sinks import HistorySink
from gateway.whatsapp import store
from gateway.whatsapp.history_files import HistoryFolder
from gateway.whatsapp.history_process import HistoryProcess
from gateway.whatsapp.people import own_address, party
from gateway.whatsapp.protocol import store_path
from gateway.whatsapp.values import Json

LOOK_SECONDS = 5.0
"""Between two looks at the folder without a hint."""
LINGER_SECONDS = 10.0
"""An import goes on when the next file comes within this time: one import for one pairing, not fifty."""
RETRY_SECONDS, RETRY_CAP = 2.0, 60.0
STRIKES = 3
"""So often a file is tried that the reader cannot read."""

logger = log.get(part="whatsapp")


class HistorySync:
    """One task per session, `await run()`. `hint()` when the child has fetched a file."""

    def __init__(self, context: SessionContext, sink: object) -> None:
        self._context = context
        self._sink = sink if isinstance(sink, HistorySink) else None
        self._folder = HistoryFolder(context.folder)
        self._hint = asyncio.Event()
        self._stranger = False
        self._names: dict[str, str] = {}
        self._unsaved = False
        self._strikes: Counter[str] = Counter()
        self._own = ""
        self.stored = 0
        """Messages that were read from files and committed since the start; duplicates count too."""

    def hint(self) -> None:
        self._hint.set()

    def stranger(self, present: bool) -> None:
        """A number that was never meant to be here: its past is nobody's business."""
        self._stranger = present
        self._hint.set()

    async def run(self) -> None:
        if self._sink is None:
            return
        wait = RETRY_SECONDS
        while True:
            self._hint.clear()
            try:
                if self._stranger:
                    await asyncio.to_thread(self._folder.clear)
                elif await asyncio.to_thread(self._folder.blobs):
                    await self._import(self._sink)
                else:
                    await asyncio.to_thread(self._folder.prune)
                wait = RETRY_SECONDS
            except DatabaseUnavailable as error:
                logger.warning("history.waiting", session_id=self._context.session_id, error=error.detail)
                await asyncio.sleep(wait)
                wait = min(wait * 2, RETRY_CAP)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._hint.wait()

    async def _import(self, sink: HistorySink) -> None:
        """Everything that is there, and what follows shortly, as one import."""
        began = time.monotonic()
        with contextlib.suppress(sqlite3.Error):
            device = await asyncio.to_thread(store.device, store_path(self._context.folder))
            self._own = device.identifier if device else ""
        own = own_address(self._context) or self._own
        source = _Source(self, self._folder)
        try:
            async with HistoryProcess(self._context, own) as reader:
                counts = await sink.history(source.items(reader), source.committed)
        except (OSError, TimeoutError, ValueError) as error:
            await self._strike(source.reading, error)
            return
        await source.settle()
        self.stored += counts.lines
        await self._fill_names(sink)
        logger.info(
            "history.stored_all",
            session_id=self._context.session_id,
            count=counts.stored,
            duplicates=counts.duplicates,
            wrong=counts.wrong,
            duration_ms=round((time.monotonic() - began) * 1000),
        )

    async def _strike(self, blob: Path | None, error: Exception) -> None:
        """The reader failed. A file that it cannot read again and again is put aside, and the others go on."""
        reason = f"{type(error).__name__}: {error}"
        logger.error("history.unreadable", session_id=self._context.session_id, error=reason)
        if blob is not None:
            self._strikes[blob.stem] += 1
            if self._strikes[blob.stem] >= STRIKES:
                await asyncio.to_thread(self._folder.put_aside, blob, reason)
        await asyncio.sleep(RETRY_SECONDS)

    async def _fill_names(self, sink: HistorySink) -> None:
        names = await asyncio.to_thread(self._folder.names)
        people = {
            found.external_id: name for jid, name in names.items() if (found := party(jid, "", _unknown))
        }
        if people:
            await sink.names(people)

    async def under_way(self) -> int:
        """Files that are announced or fetched and not stored yet."""
        folder = self._folder
        waiting, blobs = await asyncio.to_thread(folder.waiting), await asyncio.to_thread(folder.blobs)
        return len(waiting) + len(blobs)

    # ---- reading one file ----

    async def items(self, reader: HistoryProcess, blob: Path) -> AsyncIterator[Item]:
        """The messages of one file. Raises OSError and ValueError when it cannot be read."""
        number = 0
        async for line in reader.lines(blob):
            if "m" in line:
                number += 1
                yield Entry(number, self._message(line["m"]))
            elif "w" in line:
                number += 1
                yield Wrong(number, f"{blob.stem}: {line['w']}")
            elif "n" in line:
                await self._learn(line["n"])

    def _message(self, fields: Json) -> InboundMessage:
        outbound = fields["out"] is True
        context = self._context
        return InboundMessage(
            tenant_id=context.tenant_id,
            session_id=context.session_id,
            channel=context.channel,
            channel_message_id=fields["id"],
            person=Person(fields["who"], fields["kind"], fields["name"], tuple(fields["aliases"])),
            message_type=MessageType(fields["type"]),
            content=fields["content"],
            channel_timestamp=fields["at"],
            direction="outbound" if outbound else "inbound",
            role="assistant" if outbound else "user",
            sender_identifier=fields["sender"],
            chat_identifier=fields["chat"],
            reply_to_message_id=fields["reply_to"],
            media_metadata=fields["media"],
            raw_payload=fields["raw"],
            is_history=True,
            placeholder=fields["placeholder"] is True,
        )

    async def _learn(self, names: dict[str, str]) -> None:
        """Names for leads that only their address is known of; kept, because the people may come in a later file."""
        if not self._names:
            self._names = await asyncio.to_thread(self._folder.names)
        if any(self._names.get(jid) != name for jid, name in names.items()):
            self._names |= names
            self._unsaved = True

    async def save_names(self) -> None:
        if self._unsaved:
            self._unsaved = False
            await asyncio.to_thread(self._folder.keep_names, dict(self._names))

    async def linger(self) -> bool:
        """Wait for another file; whether one may have come."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self._hint.wait()
        except TimeoutError:
            return False
        self._hint.clear()
        return True


class _Source:
    """The files of one import, and which of them are committed so far."""

    def __init__(self, sync: HistorySync, folder: HistoryFolder) -> None:
        self._sync, self._folder = sync, folder
        self._read = 0
        self._settled = 0
        self._ends: deque[tuple[int, Path]] = deque()
        self._seen: set[Path] = set()
        self.reading: Path | None = None

    async def items(self, reader: HistoryProcess) -> AsyncIterator[Item]:
        while True:
            fresh = [b for b in await asyncio.to_thread(self._folder.blobs) if b not in self._seen]
            if not fresh:
                if not await self._sync.linger():
                    return  # everything is handed over; the last chunk is committed when this ends
                continue
            self.reading = fresh[0]
            self._seen.add(fresh[0])
            async for item in self._sync.items(reader, fresh[0]):
                self._read += 1
                yield item
            await self._sync.save_names()
            self._ends.append((self._read, fresh[0]))
            await self.settle()

    def committed(self, lines: int) -> None:
        self._settled = lines

    async def settle(self) -> None:
        """Forget the files whose messages are all committed."""
        while self._ends and self._ends[0][0] <= self._settled:
            _, blob = self._ends.popleft()
            await asyncio.to_thread(self._folder.stored, blob)


def _unknown(_lid: str) -> None:
    return None
