"""What exists while an email session is connected: its readers, its ways out, the session's key, history, originals.

Made from credentials that were read; thrown away as a whole when the session is disconnected.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from core import log
from core.channel import Cursor, InboundMessage, SessionContext, Sink, StoredMedia
from core.errors import DatabaseUnavailable, NotSentError, RefusedError
from core.history import Interrupted
from core.sinks import HistorySink
from gateway.email.ids import MessageIds
from gateway.email.imap import Imap, ImapLost, ImapRefused
from gateway.email.intake import Intake
from gateway.email.oauth import Tokens
from gateway.email.parser import MailParser
from gateway.email.problems import Problem
from gateway.email.raws import Raws
from gateway.email.reader import Reader
from gateway.email.sent import Sent
from gateway.email.settings import Credentials, SessionSettings
from gateway.email.smtp import Smtp
from gateway.email.timings import Timings
from gateway.media.guard import Guard

logger = log.get(part="email")

KEY_CURSOR = "email:ids"
HISTORY_CURSOR = "email:history"
HISTORY_TRIES = 5
_SAVES_ITSELF = ("gmail.com", "googlemail.com", "google.com", "outlook.com", "office365.com", "hotmail.com")


def tls_context(ca: str | None) -> ssl.SSLContext:
    """Verified, always; against `ca` alone when that is given."""
    context = ssl.create_default_context(cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Live:
    """What exists while a session is connected: its parts, made from credentials that were read."""

    def __init__(
        self,
        context: SessionContext,
        sink: Sink,
        credentials: Credentials,
        settings: SessionSettings,
        *,
        parser: MailParser,
        raws: Raws,
        timings: Timings,
        guard: Guard,
        tokens: Tokens | None,
        tell: Callable[[str, Problem | None], None],
    ) -> None:
        """`guard`: where its servers may be. `tell`: how a folder stands, None when it is well. Raises Invalid."""
        self._context, self._sink = context, sink
        self._parser, self._raws = parser, raws
        self._timings, self._settings = timings, settings
        self._tell = tell
        self._credentials = credentials
        self.own = credentials.own
        self._tls = tls_context(credentials.ca)
        self._guard = guard
        self._tokens = tokens
        self.smtp = Smtp(credentials, self._tls, self._timings, tokens, guard=guard)
        self.sent = Sent(
            self.open,
            self._timings,
            folder=settings.sent_folder,
            folders=settings.folders,
            session_id=int(self._context.session_id),
        )
        itself = credentials.smtp.host.endswith(_SAVES_ITSELF)
        self.saves_copies = settings.save_sent if settings.save_sent is not None else not itself
        self.readers: list[Reader] = []
        self._ids: MessageIds | None = None
        self._known = asyncio.Lock()
        self._intake: Intake | None = None

    async def open(self) -> Imap:
        return await Imap.open(self._credentials, self._tls, self._timings, self._tokens, guard=self._guard)

    async def run(self) -> None:
        intake = await self._made_intake()
        self.readers = [self._reader(name, intake, sent=False) for name in self._settings.folders]
        async with asyncio.TaskGroup() as group:
            for reader in self.readers:
                group.create_task(reader.run())
            if self._settings.watch_sent:
                group.create_task(self._watch_sent(intake))
            group.create_task(self._first_history(intake))

    def _reader(self, name: str, intake: Intake, *, sent: bool) -> Reader:
        def tell(problem: Problem | None) -> None:
            self._tell(name, problem)

        return Reader(
            name,
            open_=self.open,
            intake=intake,
            tell=tell if not sent else lambda _: None,
            timings=self._timings,
            most_bytes=self._settings.max_mail_bytes,
            sent=sent,
        )

    async def _watch_sent(self, intake: Intake) -> None:
        """The folder's name is only known once somebody has asked the server."""
        while True:
            name = None
            try:
                connection = await self.open()
                try:
                    name = await self.sent.name(connection)
                finally:
                    await connection.close()
            except (Problem, ImapLost, ImapRefused):
                pass
            if name is not None and name not in self._settings.folders:
                reader = self._reader(name, intake, sent=True)
                self.readers.append(reader)
                await reader.run()
            await asyncio.sleep(self._timings.probe)

    async def _made_intake(self) -> Intake:
        if self._intake is None:
            self._intake = Intake(
                self._context,
                self._sink,
                self._parser,
                self._raws,
                self._timings,
                own=self.own,
                ids=await self.message_ids(),
            )
        return self._intake

    async def message_ids(self) -> MessageIds:
        """Made with the session's key, which is made at its first start and kept beside the cursors."""
        async with self._known:
            if self._ids is None:
                self._ids = MessageIds(await self._key(), self.own)
            return self._ids

    async def _key(self) -> bytes:
        blank = MessageIds(b"", self.own)
        intake = Intake(
            self._context,
            self._sink,
            self._parser,
            self._raws,
            self._timings,
            own=self.own,
            ids=blank,
        )
        cursor = (await intake.cursors()).get(KEY_CURSOR)
        stored = cursor.value.get("key") if cursor is not None else None
        if isinstance(stored, str) and len(stored) == 64:
            return bytes.fromhex(stored)
        key = secrets.token_bytes(32)
        await intake.advance(Cursor(KEY_CURSOR, {"key": key.hex()}))
        return key

    # ---- history

    async def _first_history(self, intake: Intake) -> None:
        """The span that was asked for, once; a start that broke off in the middle begins it again."""
        days, sink = self._settings.history_days, self._sink
        cursor = (await intake.cursors()).get(HISTORY_CURSOR)
        if not days or not isinstance(sink, HistorySink) or (cursor is not None and cursor.value.get("done")):
            return
        if await self.bring_history(sink, days):
            await intake.advance(Cursor(HISTORY_CURSOR, {"done": True, "days": days}))

    async def bring_history(self, sink: HistorySink, days: int) -> bool:
        end = datetime.now(UTC)
        start = end - timedelta(days=days)
        delay = self._timings.backoff_first
        for _ in range(HISTORY_TRIES):
            try:
                counts = await sink.history(self._past(start, end), lambda _: None, kind="span")
            except (Interrupted, DatabaseUnavailable) as error:
                logger.warning(
                    "mail.history_broke_off", session_id=self._context.session_id, error=error.detail
                )
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._timings.backoff_most)
                continue
            logger.info(
                "mail.history", session_id=self._context.session_id, count=counts.stored,
                duplicates=counts.duplicates,
            )  # fmt: skip
            return True
        return False

    async def _past(self, start: datetime, end: datetime) -> AsyncIterator[InboundMessage]:
        readers = self.readers or [
            self._reader(name, await self._made_intake(), sent=False) for name in self._settings.folders
        ]
        for reader in list(readers):
            try:
                async for message in reader.past(start, end):
                    yield message
            except (Problem, ImapLost) as error:
                raise Interrupted(f"the mail server broke off ({error})") from error
            except ImapRefused as error:
                logger.warning("mail.history_refused", folder=reader.folder, error=str(error))

    # ---- files

    async def original(self, message: StoredMedia) -> bytes:
        """The mail a file belongs to, from the mailbox: by its place, else by its Message-ID."""
        place = message.raw_payload.get("imap")
        if not isinstance(place, dict):
            raise RefusedError("nothing says where this mail lies", code="media_gone")
        try:
            connection = await self.open()
            try:
                return await self._fetched(connection, place, message.raw_payload.get("message_id"))
            finally:
                await connection.close()
        except (Problem, ImapLost, ImapRefused) as error:
            raise NotSentError(f"the mailbox cannot be asked now ({error})", code="mailbox_away") from None

    async def _fetched(self, connection: Imap, place: dict[str, Any], message_id: object) -> bytes:
        folder = await connection.select(str(place.get("folder") or "INBOX"))
        uid = place.get("uid")
        uids = [uid] if isinstance(uid, int) and place.get("uidvalidity") == folder.uidvalidity else []
        for wanted in (uids, await connection.find(message_id) if isinstance(message_id, str) else []):
            for item in await connection.items(wanted[:1], bodies=True) if wanted else []:
                if item.body is not None:
                    return item.body
        raise RefusedError(
            "the mail was deleted in the mailbox before its file was fetched", code="media_gone"
        )

    async def close(self) -> None:
        await self.sent.close()
        await self.smtp.close()
