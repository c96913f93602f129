"""Reads one folder for as long as the session lives: catches up from its cursor, waits in IDLE, connects again.

The cursor is `(UIDVALIDITY, UID)`; a new UIDVALIDITY lists everything again and leaves it to the dedupe key. Mail from
before the session's first start is left alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from core import faults, log
from core.channel import Cursor, InboundMessage
from gateway.email.convert import Origin
from gateway.email.imap import Imap, ImapLost, ImapRefused
from gateway.email.imap_words import Folder, Item, since
from gateway.email.intake import Fetched, Intake
from gateway.email.problems import Problem
from gateway.email.timings import Timings

logger = log.get(part="email")

LISTED = 200
AT_ONCE = 50
AT_ONCE_BYTES = 8 << 20
BEGINNING = 1 << 20
"""Of a mail that is too large: its text stands at the beginning."""
SLACK = 600
"""Seconds by which the server's clock may be behind ours."""

Open = Callable[[], Awaitable[Imap]]
Tell = Callable[[Problem | None], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a folder goes on. `since`: Unix seconds; what came before is not ours."""

    uidvalidity: int
    uid: int
    since: float

    def cursor(self, folder: str) -> Cursor:
        value = {"uidvalidity": self.uidvalidity, "uid": self.uid, "since": round(self.since)}
        return Cursor(cursor_name(folder), value)

    @classmethod
    def read(cls, cursor: Cursor | None) -> Place | None:
        value: Any = cursor.value if cursor is not None else None
        try:
            return cls(int(value["uidvalidity"]), int(value["uid"]), float(value["since"]))
        except (KeyError, TypeError, ValueError):
            return None


def cursor_name(folder: str) -> str:
    return f"imap:{folder}"


class Reader:
    """`await run()` never ends by itself. `tell(None)` when all is well, else what is wrong."""

    def __init__(
        self,
        folder: str,
        *,
        open_: Open,
        intake: Intake,
        tell: Tell,
        timings: Timings,
        most_bytes: int,
        sent: bool = False,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._open = open_
        self._intake = intake
        self._tell = tell
        self._timings = timings
        self._most_bytes = most_bytes
        self._sent = sent
        self._on_lost = on_lost

    async def run(self) -> None:
        delay = self._timings.backoff_first
        while True:
            began = time.monotonic()
            problem = await self._life()
            self._tell(problem)
            self._on_lost()
            if time.monotonic() - began > self._timings.backoff_most:
                delay = self._timings.backoff_first
            wait = self.pause(problem, delay)
            logger.info(
                "mail.reconnecting",
                folder=self.folder,
                error=problem.detail,
                action=problem.action,
                duration_s=round(wait, 1),
            )
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311  (spread, no secret)
            delay = min(delay * 2, self._timings.backoff_most)

    def pause(self, problem: Problem, delay: float) -> float:
        return pause(problem, delay, self._timings)

    async def _life(self) -> Problem:
        """One connection, from log-in to its end."""
        try:
            connection = await self._open()
        except Problem as problem:
            return problem
        try:
            folder = await connection.select(self.folder)
            place = await self._begin(connection, folder)
            self._tell(None)
            while True:
                connection.pushed.clear()
                place = await self._catch_up(connection, folder, place)
                await connection.wait()
        except ImapLost as lost:
            return _lost(str(lost))
        except ImapRefused as refused:
            return self._refused(connection, str(refused))
        finally:
            await connection.close()

    def _refused(self, connection: Imap, said: str) -> Problem:
        if connection.folder is None:
            return Problem(
                "folder_missing",
                f"the mailbox has no folder {self.folder!r} ({said[:100]})",
                f"Correct settings.folders: {self.folder!r} does not exist.",
                lasting=True,
            )
        return Problem("imap_refused", f"the mail server refused a command: {said[:200]}")

    async def _begin(self, connection: Imap, folder: Folder) -> Place:
        """The stored place; at the first start everything that is there counts as read."""
        cursors = await self._intake.cursors()
        place = Place.read(cursors.get(cursor_name(self.folder)))
        if place is None:
            last = folder.uidnext - 1 if folder.uidnext else max(await connection.search("ALL"), default=0)
            place = Place(folder.uidvalidity, last, time.time())
            await self._intake.advance(place.cursor(self.folder))
        elif place.uidvalidity != folder.uidvalidity:
            logger.warning(
                "mail.folder_renumbered",
                folder=self.folder,
                action="everything is listed again; what is stored already stays as it is",
            )
            place = replace(place, uidvalidity=folder.uidvalidity, uid=0)
        return place

    # ---- catching up

    async def _catch_up(self, connection: Imap, folder: Folder, place: Place) -> Place:
        if place.uid == 0 and place.since:
            day = datetime.fromtimestamp(place.since - SLACK - 86_400, UTC)
            uids = await connection.search("SINCE", since(day))
        else:
            uids = await connection.after(place.uid)
        for start in range(0, len(uids), LISTED):
            listed = uids[start : start + LISTED]
            for group in _groups(await self._wanted(connection, listed, place), self._most_bytes):
                await self._take(connection, folder, group, place)
            # Also past what was left out, or was gone before it could be fetched.
            if listed[-1] > place.uid:
                place = replace(place, uid=listed[-1])
                await self._intake.advance(place.cursor(self.folder))
        return place

    async def _wanted(self, connection: Imap, uids: Sequence[int], place: Place) -> list[Item]:
        oldest = place.since - SLACK
        return [
            item
            for item in await connection.items(uids)
            if item.received_at is None or item.received_at.timestamp() >= oldest
        ]

    async def _take(self, connection: Imap, folder: Folder, group: Sequence[Item], place: Place) -> None:
        mails = []
        for item in await self._bodies(connection, group):
            cursor = replace(place, uid=item.uid).cursor(self.folder)
            assert item.body is not None
            mails.append(Fetched(item.body, self._origin(folder, item), cursor))
        faults.point("email.fetched")
        new = await self._intake.store(mails)
        logger.info("mails.taken", folder=self.folder, count=len(mails), new=new)

    async def _bodies(self, connection: Imap, group: Sequence[Item]) -> list[Item]:
        if group[0].size > self._most_bytes:
            got = await connection.items([group[0].uid], bodies=True, first=BEGINNING)
        else:
            got = await connection.items([item.uid for item in group], bodies=True)
        return [item for item in got if item.body is not None]

    def _origin(self, folder: Folder, item: Item, *, history: bool = False) -> Origin:
        return Origin(
            folder=self.folder,
            uidvalidity=folder.uidvalidity,
            uid=item.uid,
            size=item.size,
            received_at=item.received_at,
            sent=self._sent,
            whole=item.size <= self._most_bytes,
            history=history,
        )

    # ---- history

    async def past(self, start: datetime, end: datetime) -> AsyncIterator[InboundMessage]:
        """Mail of a span, over a connection of its own. Raises Problem, ImapLost, ImapRefused."""
        connection = await self._open()
        try:
            folder = await connection.select(self.folder)
            uids = await connection.search("SINCE", since(start))
            for first in range(0, len(uids), LISTED):
                items = await connection.items(uids[first : first + LISTED])
                inside = [
                    item for item in items if item.received_at is None or start <= item.received_at < end
                ]
                for group in _groups(inside, self._most_bytes):
                    for item in await self._bodies(connection, group):
                        assert item.body is not None
                        origin = self._origin(folder, item, history=True)
                        for message in await self._intake.messages(Fetched(item.body, origin)):
                            yield message
        finally:
            await connection.close()


def pause(problem: Problem, delay: float, timings: Timings) -> float:
    """How long to leave the server alone."""
    if problem.after is not None:
        return max(delay, problem.after)
    if problem.code == "throttled":
        return max(delay, timings.throttled)
    if problem.code in ("auth_failed", "account_suspended", "folder_missing"):
        return max(delay, timings.refused)
    return delay


def _groups(items: Sequence[Item], most_bytes: int) -> list[list[Item]]:
    """Fetched together: few enough to be held in memory, a large mail alone."""
    groups: list[list[Item]] = []
    room = 0
    for item in items:
        large = item.size > most_bytes
        if not groups or len(groups[-1]) >= AT_ONCE or item.size > room or large:
            groups.append([])
            room = AT_ONCE_BYTES
        groups[-1].append(item)
        room = 0 if large else room - item.size
    return groups


def _lost(said: str) -> Problem:
    return Problem("connection_lost", f"the connection to the mail server broke ({said[:200]})")
