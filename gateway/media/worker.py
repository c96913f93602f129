"""The media worker: downloads what stored messages carry, in the background, with retries that survive a restart.

Works from `et_media_jobs`, which a trigger fills; a job is done in the transaction that writes its message. Never touches
a message before it is committed, and never gives one up without saying why on its row.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from asyncpg import Record

from core import faults
from core import log as logs
from core.channel import (
    Json,
    MediaRetry,
    MediaSource,
    MessageId,
    MessageType,
    SessionId,
    StoredMedia,
    TenantId,
)
from core.database import Database, is_transient
from core.errors import ChannelError, MediaExpired, NotSentError, RefusedError, ThrottledError
from core.metrics import Metrics
from core.store import audit
from core.store import media as rows
from gateway.media.outgoing import media_path
from gateway.media.sniff import Kind, identify, inspect, safe_filename
from gateway.media.store import Content, Draft, MediaStore
from gateway.media.sweep import sweep

log = logs.get(part="media")


class MediaSessions(Protocol):
    """What the worker needs of sessions; `gateway.sessions.SessionManager` keeps it."""

    def owned(self) -> frozenset[SessionId]: ...

    def capability(self, session_id: SessionId, kind: type[Any]) -> Any:
        """The live channel, when this process owns it and it has the capability; else None."""
        ...


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, bytes and counts. The last step of `backoff` repeats."""

    poll: float = 15.0
    download: float = 600.0
    ask: float = 75.0
    backoff: tuple[float, ...] = (5, 20, 60, 300, 1800, 3600, 6 * 3600)
    attempts: int = 12
    deadline: float = 14 * 86400.0
    tend: float = 600.0
    parallel: int = 4
    per_session: int = 2
    size: int = 128 << 20

    @property
    def lease(self) -> float:
        """How long a taken job is ours: as long as everything one attempt may take."""
        return self.download + self.ask + 60


class MediaWorker:
    """`await start()`, `await stop()`, `healthy`. One per gateway."""

    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        store: MediaStore,
        sessions: MediaSessions,
        *,
        timings: Timings | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._db = db
        self._metrics = metrics
        self._store = store
        self._sessions = sessions
        self._timings = timings or Timings()
        self._chance = chance
        self._kick = asyncio.Event()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[int, tuple[SessionId, asyncio.Task[None]]] = {}

    # --- life

    async def start(self) -> None:
        self._stopping = False
        self._run("media.claim", self._claim_loop())
        self._run("media.listen", self._listen())
        self._run("media.tend", self._tend_loop())

    async def stop(self) -> None:
        """Downloads are cut off; what they got so far stays on disk, and their jobs are due at once for the next owner."""
        self._stopping = True
        ending = [*self._tasks, *(task for _, task in self._running.values())]
        self._tasks = []
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending, timeout=3)

    @property
    def healthy(self) -> bool:
        """False when one of its tasks has died, or before the start and after the stop."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def kick(self) -> None:
        """Look for work now, for instance because a session has just become active."""
        self._kick.set()

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("worker.died", action=task.get_name(), error=repr(error), exc_info=error)

    # --- finding work

    async def _listen(self) -> None:
        subscription = self._db.hub.subscribe("et_media")
        try:
            while True:
                if await subscription.wait(60):
                    self._kick.set()
        finally:
            subscription.close()

    async def _claim_loop(self) -> None:
        while not self._stopping:
            self._kick.clear()
            wait = self._timings.poll
            try:
                wait = await self._round()
            except Exception as error:
                if not is_transient(error):
                    log.error("media.claim_failed", error=repr(error), exc_info=error)
            try:
                async with asyncio.timeout(max(0.05, min(wait, self._timings.poll))):
                    await self._kick.wait()
            except TimeoutError:
                pass

    async def _round(self) -> float:
        """Take up what is due; returns the seconds until something else may be."""
        busy = Counter(session for session, _ in self._running.values())
        able = [s for s in self._sessions.owned() if self._sessions.capability(s, MediaSource) is not None]
        room = self._timings.parallel - len(self._running)
        if not able:
            self._metrics.media_waiting.set(0)
            return self._timings.poll
        async with self._db.worker() as conn:
            if room > 0:
                free = [s for s in able if busy[s] < self._timings.per_session]
                for row in await rows.claim(conn, free, limit=room, lease=self._timings.lease):
                    self._take_up(row)
            due = await rows.next_due(conn, able)
        self._metrics.media_waiting.set(due["waiting"])
        if len(self._running) >= self._timings.parallel or due["seconds"] is None:
            return self._timings.poll  # whatever ends kicks
        # Due already but its session is busy: not at once again.
        return max(1.0 if due["seconds"] <= 0 else 0.05, float(due["seconds"]))

    def _take_up(self, row: Record) -> None:
        message_id: int = row["message_id"]
        task = asyncio.create_task(self._work(row), name=f"media.download.{message_id}")
        self._running[message_id] = (SessionId(row["session_id"]), task)
        task.add_done_callback(lambda done: self._done(message_id, done))

    def _done(self, message_id: int, task: asyncio.Task[None]) -> None:
        self._running.pop(message_id, None)
        self._ended(task)
        self._kick.set()

    # --- one download

    async def _work(self, row: Record) -> None:
        message = _stored_media(row)
        try:
            outcome = await self._attempt(message)
        except asyncio.CancelledError:
            await self._give_back(message)
            raise
        self._metrics.media.labels(message.channel, outcome).inc()

    async def _attempt(self, message: StoredMedia) -> str:
        source: MediaSource | None = self._sessions.capability(message.session_id, MediaSource)
        if source is None:
            await self._postpone(message, 1.0, "the session is not here any more", counts=False)
            return "no_session"
        try:
            content, kind = await self._download(source, message)
        except MediaExpired as error:
            return await self._ask_again(message, error)
        except RefusedError as error:
            return await self._fail(message, error.code, error.detail)
        except ThrottledError as error:
            await self._postpone(message, error.retry_after, error.detail, counts=False)
            return "throttled"
        except NotSentError as error:
            return await self._again(message, error.code, error.detail)
        except TimeoutError:
            return await self._again(message, "media_timeout", "the download took too long")
        except Exception as error:
            await self._audit(message, error)
            return await self._again(message, "media_error", f"the download failed ({type(error).__name__})")
        patch = _describe(content, kind, message)
        faults.point("media.before_commit")
        await self._settle(message, patch, content)
        log.info(
            "media.stored",
            tenant_id=message.tenant_id,
            session_id=message.session_id,
            message_id=message.message_id,
            result=kind.mime_type,
            bytes=content.size,
        )
        return "stored"

    async def _download(self, source: MediaSource, message: StoredMedia) -> tuple[Content, Kind]:
        said = message.media_metadata
        size = said.get("size")
        expected = size if isinstance(size, int) and size > 0 else 0
        async with self._store.draft(
            f"message-{message.message_id}", limit=self._timings.size, expected=expected
        ) as draft:
            try:
                async with asyncio.timeout(self._timings.download):
                    await source.download(message, draft)
                content = await _kept(draft)
            except Exception as error:
                final = message.attempt >= self._timings.attempts
                if final or isinstance(error, RefusedError | MediaExpired):
                    draft.drop()  # nothing will go on from here
                raise
        declared, name = _text(said.get("mime_type")), _text(said.get("filename"))
        try:
            kind = await asyncio.to_thread(
                inspect, content.path, content.head, content.foot, declared=declared, filename=name
            )
        except RefusedError:  # a picture too large to be looked at is still what the customer sent
            kind = Kind(identify(content.head, content.foot, declared=declared, filename=name))
        return content, kind

    async def _ask_again(self, message: StoredMedia, expired: MediaExpired) -> str:
        retry: MediaRetry | None = self._sessions.capability(message.session_id, MediaRetry)
        if retry is None:
            return await self._fail(message, expired.code, expired.detail)
        hints: Json | None = None
        try:
            async with asyncio.timeout(self._timings.ask):
                hints = await retry.request_media_retry(message)
        except RefusedError as error:
            return await self._fail(message, error.code, error.detail)
        except (ChannelError, TimeoutError) as error:
            log.info("media.asked_again", message_id=message.message_id, result="no answer", error=str(error))
        except Exception as error:
            await self._audit(message, error)
        if hints is None:
            return await self._again(message, expired.code, expired.detail)
        await self._postpone(message, 0.0, expired.detail, hints=hints)
        return "asked_again"

    # --- outcomes

    async def _again(self, message: StoredMedia, code: str, detail: str) -> str:
        if message.attempt >= self._timings.attempts:
            return await self._fail(message, code, f"gave up after {message.attempt} attempts: {detail}")
        steps = self._timings.backoff
        wait = steps[min(message.attempt, len(steps)) - 1] * (0.8 + 0.4 * self._chance())
        await self._postpone(message, wait, detail)
        return "retried"

    async def _fail(self, message: StoredMedia, code: str, detail: str) -> str:
        await self._settle(message, {"state": "failed", "error": code, "reason": detail[:500]})
        log.warning(
            "media.failed",
            tenant_id=message.tenant_id,
            session_id=message.session_id,
            message_id=message.message_id,
            result=code,
            error=detail,
        )
        return "failed"

    async def _settle(self, message: StoredMedia, patch: Json, content: Content | None = None) -> None:
        async def write() -> None:
            async with self._db.worker() as conn, conn.transaction():
                url = media_path(message.message_id) if content is not None else None
                done = await rows.settle(conn, message.tenant_id, message.message_id, url, patch)
                # Erased meanwhile: then nobody has it, and the next sweep takes the file away.
                if done and content is not None:
                    await rows.own(conn, message.tenant_id, content.sha256, content.size)

        await self._until_written(write)

    async def _postpone(
        self,
        message: StoredMedia,
        seconds: float,
        error: str,
        *,
        counts: bool = True,
        hints: Json | None = None,
    ) -> None:
        async def write() -> None:
            async with self._db.worker() as conn:
                await rows.postpone(conn, message.message_id, seconds, error, counts=counts, hints=hints)

        await self._until_written(write)

    async def _until_written(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """While the database is away what was downloaded is kept; after the lease the job is due again anyway."""
        async with asyncio.timeout(self._timings.lease):
            while True:
                try:
                    return await write()
                except Exception as error:
                    if not is_transient(error):
                        raise
                await asyncio.sleep(0.5 + self._chance())

    async def _give_back(self, message: StoredMedia) -> None:
        """We stop: the job is due for the next owner now, and this attempt did not count."""
        try:
            async with asyncio.timeout(1), self._db.worker() as conn:
                await rows.postpone(conn, message.message_id, 0.0, "the gateway stopped", counts=False)
        except Exception as error:
            log.warning("media.not_given_back", message_id=message.message_id, error=repr(error))

    async def _audit(self, message: StoredMedia, error: Exception) -> None:
        log.error("media.error", message_id=message.message_id, error=repr(error), exc_info=error)
        try:
            async with self._db.worker() as conn:
                await audit.write(
                    conn,
                    "worker_error",
                    tenant_id=message.tenant_id,
                    actor="worker:media",
                    subject_type="message",
                    subject_id=message.message_id,
                    detail={"error": type(error).__name__},
                )
        except Exception as failure:
            log.warning("media.not_audited", message_id=message.message_id, error=repr(failure))

    # --- housekeeping

    async def _tend_loop(self) -> None:
        while True:
            try:
                await self.tend()
            except Exception as error:
                if not is_transient(error):
                    log.error("media.tend_failed", error=repr(error), exc_info=error)
            await asyncio.sleep(self._timings.tend * (0.8 + 0.4 * self._chance()))

    async def tend(self) -> None:
        """Give up downloads that nobody could do, and remove files that nobody names."""
        async with self._db.worker() as conn:
            for row in await rows.overdue(conn, seconds=self._timings.deadline):
                why = row["last_error"] or "its session was not connected in all that time"
                patch = {
                    "state": "failed",
                    "error": "media_expired",
                    "reason": f"not downloaded in time: {why}",
                }
                await rows.settle(conn, row["tenant_id"], row["message_id"], None, patch)
        await sweep(self._db, self._store)


async def _kept(draft: Draft) -> Content:
    await draft.flush()
    if not (await asyncio.to_thread(draft.path.stat)).st_size:
        raise NotSentError("the channel gave an empty file", code="media_empty")
    return await draft.keep()


def _stored_media(row: Record) -> StoredMedia:
    return StoredMedia(
        tenant_id=TenantId(row["tenant_id"]),
        session_id=SessionId(row["session_id"]),
        message_id=MessageId(row["message_id"]),
        channel=row["channel"],
        channel_message_id=row["channel_message_id"],
        message_type=MessageType(row["message_type"]),
        direction=row["direction"],
        chat_identifier=row["chat_identifier"],
        sender_identifier=row["sender_identifier"],
        media_metadata=row["media_metadata"] or {},
        raw_payload=row["raw_payload"] or {},
        hints=row["hints"],
        attempt=row["attempts"],
    )


def _describe(content: Content, kind: Kind, message: StoredMedia) -> Json:
    """What is known now; caption, duration and the like stay as the channel said."""
    patch: Json = {
        "state": "stored",
        "filename": safe_filename(
            _text(message.media_metadata.get("filename")),
            kind.mime_type,
            fallback=f"{message.message_type}-{message.message_id}",
        ),
        "mime_type": kind.mime_type,
        "size": content.size,
        "sha256": content.sha256,
    }
    if kind.width is not None:
        patch |= {"width": kind.width, "height": kind.height}
    return patch


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
