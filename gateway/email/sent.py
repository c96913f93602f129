"""The folder of sent mail: keeps copies of what we sent, and is looked into for the fate of a send that was cut off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from core import log
from gateway.email.imap import Imap, ImapLost, ImapRefused
from gateway.email.problems import Problem
from gateway.email.timings import Timings

logger = log.get(part="email")

MOST_WAITING = 200
"""Copies that wait while the IMAP server is away; more are not kept."""
USUAL_NAME = "Sent"


class Sent:
    """`keep` in the background, `find` now. One connection, closed when it was not used for a while."""

    def __init__(
        self,
        open_: Callable[[], Awaitable[Imap]],
        timings: Timings,
        *,
        folder: str | None,
        folders: list[str],
        session_id: int,
    ) -> None:
        self._open = open_
        self._timings = timings
        self._name = folder
        self._folders = folders
        self._session_id = session_id
        self._turn = asyncio.Lock()
        self._connection: Imap | None = None
        self._retire: asyncio.TimerHandle | None = None
        self._copies: set[asyncio.Task[None]] = set()

    def keep(self, raw: bytes) -> None:
        """Put a copy there soon. Its failure costs nothing but the copy."""
        if len(self._copies) >= MOST_WAITING:
            logger.warning("mail.copy_dropped", session_id=self._session_id, error="too many are waiting")
            return
        task = asyncio.create_task(self._keep(raw), name=f"email.{self._session_id}.copy")
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _keep(self, raw: bytes) -> None:
        try:
            async with asyncio.timeout(self._timings.sent_copy), self._turn:
                connection = await self._connected()
                name = await self.name(connection)
                if name is None:
                    with contextlib.suppress(ImapRefused):
                        await connection.create(USUAL_NAME)
                    name = self._name = USUAL_NAME
                await connection.append(name, raw)
                self._later()
        except (Problem, ImapLost, ImapRefused, TimeoutError) as error:
            await self._drop()
            logger.warning("mail.copy_not_kept", session_id=self._session_id, error=str(error) or "timeout")

    async def find(self, message_id: str) -> datetime | None:
        """When this mail was sent, if a copy lies among the sent mail or came back to a folder that is read.

        Raises Problem, ImapLost, ImapRefused: then nothing is known."""
        async with self._turn:
            try:
                connection = await self._connected()
                sent = await self.name(connection)
                for folder in dict.fromkeys([*([sent] if sent else []), *self._folders]):
                    with contextlib.suppress(ImapRefused):
                        await connection.select(folder)
                        if uids := await connection.find(message_id):
                            self._later()
                            items = await connection.items(uids[:1])
                            came = items[0].received_at if items else None
                            return came or datetime.now(UTC)
                self._later()
                return None
            except BaseException:
                await self._drop()
                raise

    async def name(self, connection: Imap) -> str | None:
        if self._name is None:
            self._name = await connection.sent_folder()
        return self._name

    async def close(self) -> None:
        """Copies under way get a moment."""
        if self._copies:
            _, late = await asyncio.wait(set(self._copies), timeout=self._timings.stop)
            for task in late:
                task.cancel()
        await self._drop()

    async def _connected(self) -> Imap:
        if self._connection is None or not self._connection.alive:
            await self._drop()
            self._connection = await self._open()
        return self._connection

    def _later(self) -> None:
        if self._retire is not None:
            self._retire.cancel()
        loop = asyncio.get_running_loop()
        self._retire = loop.call_later(self._timings.keep, self._expire)

    def _expire(self) -> None:
        if not self._turn.locked() and self._connection is not None:
            task = asyncio.create_task(self._drop())
            self._copies.add(task)
            task.add_done_callback(self._copies.discard)

    async def _drop(self) -> None:
        if self._retire is not None:
            self._retire.cancel()
            self._retire = None
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
