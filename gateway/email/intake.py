"""From fetched mails to stored rows: read each in the worker process, look up what it is about, store with the cursor.

Comes back only when everything is committed, however long the database is away; a mail that cannot be read or stored as
it is becomes a row that says so. Knows no IMAP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from core import faults, log
from core.channel import Converted, Cursor, InboundMessage, SessionContext, Sink, Stored
from core.errors import DatabaseUnavailable, Invalid
from core.sinks import ConversationSink, PullSink, Written
from gateway.email import parse
from gateway.email.convert import Known, Origin, convert, references, unreadable
from gateway.email.ids import MessageIds
from gateway.email.parser import MailParser, Unreadable
from gateway.email.raws import Raws
from gateway.email.timings import Timings

logger = log.get(part="email")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    raw: bytes
    origin: Origin
    cursor: Cursor | None = None
    """Where the folder goes on once this mail is stored."""


@dataclass(frozen=True, slots=True)
class _Read:
    fetched: Fetched
    digest: str
    parsed: dict[str, object] | None
    problem: str = ""


class Intake:
    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        parser: MailParser,
        raws: Raws,
        timings: Timings,
        *,
        own: str,
        ids: MessageIds,
    ) -> None:
        self._context = context
        self._sink = sink
        self._parser = parser
        self._raws = raws
        self._timings = timings
        self._own = own
        self._ids = ids

    async def store(self, mails: Sequence[Fetched]) -> int:
        """Store these, in order; returns how many rows were new."""
        read = [await self._read(one) for one in mails]
        known = await self._known(read)
        new = 0
        batch: list[InboundMessage] = []
        for one in read:
            converted = await asyncio.to_thread(self._converted, one, known)
            await self._keep_original(one, converted)
            if converted.updates:
                # Before the cursor: said twice after a crash, never not at all.
                await self._insist(partial(self._sink.status, converted.updates))
            batch += _with_cursor(converted.messages, one.fetched.cursor)
        faults.point("email.store.before")
        new += await self._commit(batch)
        faults.point("email.store.after")
        return new

    async def messages(self, mail: Fetched) -> tuple[InboundMessage, ...]:
        """What a mail of the past becomes."""
        read = await self._read(mail)
        known = await self._known([read])
        return self._converted(read, known).messages

    async def advance(self, cursor: Cursor) -> None:
        sink = self._sink
        if isinstance(sink, PullSink):
            await self._insist(lambda: sink.advance(cursor))

    async def cursors(self) -> Mapping[str, Cursor]:
        sink = self._sink
        return await self._insist(sink.cursors) if isinstance(sink, PullSink) else {}

    # ---- reading

    async def _read(self, mail: Fetched) -> _Read:
        digest = parse.digest(mail.raw)
        try:
            return _Read(mail, digest, await self._parser.parse(mail.raw))
        except Unreadable as error:
            logger.warning(
                "mail.quarantined",
                session_id=self._context.session_id,
                tenant_id=self._context.tenant_id,
                bytes=len(mail.raw),
                error=str(error).partition(":")[0],  # what follows may hold words of the mail
                action="stored as unsupported, with its original",
            )
            return _Read(mail, digest, None, str(error))

    async def _known(self, read: Sequence[_Read]) -> Known:
        wanted = list(dict.fromkeys(one for r in read if r.parsed for one in references(r.parsed)))
        sink = self._sink
        written: Mapping[str, Written] = {}
        if wanted and isinstance(sink, ConversationSink):
            written = await self._insist(lambda: sink.written(wanted))
        return Known(self._own, self._ids.queue_id, written)

    def _converted(self, one: _Read, known: Known) -> Converted:
        raw, origin = one.fetched.raw, one.fetched.origin
        reason = one.problem
        if one.parsed is not None:
            try:
                return convert(
                    one.parsed, digest=one.digest, context=self._context, known=known, origin=origin
                )
            except Exception as error:
                reason = f"it could not be understood ({type(error).__name__})"
                logger.error("mail.not_converted", session_id=self._context.session_id, exc_info=error)
        surface = parse.surface(raw)
        return unreadable(raw, surface, reason, digest=one.digest, context=self._context, origin=origin)

    async def _keep_original(self, one: _Read, converted: Converted) -> None:
        for message in converted.messages:
            quarantined = "quarantined" in message.raw_payload
            waiting = (message.media_metadata or {}).get("state") == "pending"
            if not waiting and not quarantined:
                continue
            mail = str(message.raw_payload.get("part_of") or message.channel_message_id)
            number = int(message.raw_payload.get("attachment") or 0)
            await asyncio.to_thread(self._raws.keep, mail, [number], one.fetched.raw)

    # ---- storing

    async def _commit(self, batch: Sequence[InboundMessage]) -> int:
        if not batch:
            return 0
        try:
            stored = await self._insist(lambda: self._sink.received(batch))
            return sum(not one.duplicate for one in stored)
        except Invalid:
            pass
        new = 0
        for (
            message
        ) in batch:  # one of them can never be stored as it is: the others are, and it is made plain
            try:
                stored = await self._insist(partial(self._sink.received, [message]))
            except Invalid as error:
                logger.error("mail.refused", session_id=self._context.session_id, error=error.detail)
                stored = await self._plain(message, error)
            new += sum(not one.duplicate for one in stored)
        return new

    async def _plain(self, message: InboundMessage, error: Invalid) -> list[Stored]:
        payload = {"quarantined": error.detail[:300], "auto_submitted": True} | {
            name: message.raw_payload[name]
            for name in ("imap", "subject", "message_id")
            if name in message.raw_payload
        }
        bare = replace(message, media_metadata=None, raw_payload=payload, placeholder=False)
        try:
            return await self._insist(lambda: self._sink.received([bare]))
        except Invalid as again:
            logger.error("mail.lost", session_id=self._context.session_id, error=again.detail)
            if message.cursor is not None:
                await self.advance(message.cursor)
            return []

    async def _insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeat it until the database can be had: the mail waits here, and the cursor does not move."""
        while True:
            try:
                return await work()
            except DatabaseUnavailable as error:
                logger.warning(
                    "mail.waits_for_database", session_id=self._context.session_id, error=error.detail
                )
                await asyncio.sleep(self._timings.store)


def _with_cursor(messages: Sequence[InboundMessage], cursor: Cursor | None) -> list[InboundMessage]:
    """The cursor moves with the last row of a mail."""
    if not messages or cursor is None:
        return list(messages)
    return [*messages[:-1], replace(messages[-1], cursor=cursor)]
