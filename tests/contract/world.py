"""The gateway's own parts around one channel, wired as `gateway.app` wires them, on a database of their own.

Real PostgreSQL, ingest, session manager, outbound worker and media; only the waits are shorter. Keeps every log line.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from asyncpg import Record

from core import log
from core.channel import Attempt, MessageId, NotSent, QueueId, Sent, SessionStatus, TenantId, Unknown
from core.database import Database, connect
from core.ingest import Ingest
from core.metrics import Metrics
from core.outbound import OutboundWorker
from core.settings import load
from core.store import credentials
from core.store import sessions as store
from core.store.sessions import SessionRow
from gateway.media import MediaStore, MediaWorker, OutgoingMedia
from gateway.media.worker import Timings as MediaTimings
from gateway.session_runner import RunnerTimings
from gateway.sessions import ManagerTimings, SessionManager
from tests.contract.peer import Customer, Peer
from tests.support.outbound import QUICK as OUTBOUND
from tests.support.outbound import Place, enqueue, eventually, fetch, value
from tests.support.sessions import KEYS, new_session, new_tenant, read, want

PATIENCE = 30.0
"""Seconds for anything to happen on a busy machine; the suite waits for events, never for this long."""
MANAGER = ManagerTimings(
    poll=0.2,
    bury=0.5,
    ttl=20.0,
    renew=2.0,
    margin=1.0,
    stop=8,
    runner=RunnerTimings(start=20, backoff_first=0.05, backoff_most=0.5, watch=0.1),
)
MEDIA = MediaTimings(poll=0.5, backoff=(0.1, 0.2), tend=60)


class World:
    """`async with World(peer_class(), url, folder) as world:` — a tenant with one active session of the peer's channel."""

    tenant_id: int
    session: SessionRow

    def __init__(self, peer: Peer, database_url: str, folder: Path) -> None:
        self.peer = peer
        self._url = database_url
        self._folder = folder
        self._lines = io.StringIO()
        self._people = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> World:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        self._stack.enter_context(_logging_to(self._lines))
        (self._folder / "peer").mkdir()
        await self.peer.open(self._folder / "peer")
        self._stack.push_async_callback(self.peer.close)
        environ = dict(self.peer.settings())
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, setting in environ.items():
            patch.setenv(name, setting)

        settings = load({"DATA_DIR": str(self._folder / "data"), **environ})
        settings.data_dir.mkdir()
        self.metrics = Metrics()
        self.db = await Database.open(self._url)
        self._stack.push_async_callback(self.db.close)
        self.ingest = Ingest(self.db, self.metrics)
        await self._run(self.ingest)
        settings.media_dir.mkdir()
        self.files = MediaStore(settings.media_dir)
        self.uploads = OutgoingMedia(self.db, self.files, metrics=self.metrics)
        self.kind = self.peer.kind(settings, self.metrics)
        self.sessions = SessionManager(
            self.db,
            self.ingest,
            self.metrics,
            {self.kind.name: self.kind},
            settings,
            owner="gw-contract",
            keys=KEYS,
            prepare=self.uploads.prepare,
            timings=MANAGER,
        )
        await self._run(self.sessions)
        await self._run(MediaWorker(self.db, self.metrics, self.files, self.sessions, timings=MEDIA))
        self.outbound = OutboundWorker(
            self.db, self.metrics, self.sessions, owner="gw-contract", timings=OUTBOUND
        )
        await self._run(self.outbound)
        await self._log_in()

    async def _run(self, part: Any) -> None:
        await part.start()
        self._stack.push_async_callback(part.stop)

    async def _log_in(self) -> None:
        login = self.peer.log_in()
        self.tenant_id = await new_tenant(self.db)
        self.session = await new_session(
            self.db,
            self.tenant_id,
            channel=self.peer.channel,
            identifier=login.identifier,
            metadata=login.metadata,
        )
        async with self.db.worker() as conn:
            await credentials.put(
                conn,
                KEYS,
                tenant_id=self.tenant_id,
                session_id=self.session.id,
                credentials=login.credentials,
            )
        await want(self.db, self.session, "connected", login_method=login.method)
        if login.method == "qr":
            await self.peer.scan(await self.until(self._qr, "a QR code"))
        await self.active()

    async def _qr(self) -> str | None:
        return (await read(self.db, self.session)).qr

    # --- the session

    async def row(self) -> SessionRow:
        return await read(self.db, self.session)

    async def stands(self, match: Callable[[SessionRow], bool], what: str) -> SessionRow:
        """The session's row, once it says so."""
        try:

            async def look() -> SessionRow | None:
                row = await self.row()
                return row if match(row) else None

            found: SessionRow = await self.until(look, what)
        except AssertionError:
            row = await self.row()
            raise AssertionError(f"not {what}: {row.status} {row.status_reason}\n{self.story()}") from None
        return found

    async def active(self) -> SessionRow:
        return await self.stands(lambda row: row.status is SessionStatus.ACTIVE, "the session active")

    async def want(self, wanted: store.Wanted) -> None:
        await want(self.db, self.session, wanted)

    # --- people and what they wrote

    def customer(self, name: str = "mei") -> Customer:
        self._people += 1
        return self.peer.customer(f"{name}-{self._people}")

    async def stored(self, message_id: str) -> Record:
        """The row of an inbound message, once it is there; fails when there are two."""

        async def look() -> Record | None:
            rows = await self.inbound(message_id)
            return rows[0] if rows else None

        found: Record = await self.until(look, f"message {message_id} stored")
        return found

    async def inbound(self, message_id: str) -> list[Record]:
        return await fetch(
            self.db,
            """
            SELECT m.*, l.external_id, l.kind AS lead_kind, t.status AS thread_status, t.last_message_at
            FROM et_messages m
            JOIN et_leads l ON l.id = m.lead_id
            JOIN et_threads t ON t.id = m.thread_id
            WHERE m.channel_session_id = $1 AND m.channel_message_id = $2 AND m.direction = 'inbound'
            """,
            self.session.id,
            message_id,
        )

    # --- what goes out

    @property
    def place(self) -> Place:
        """What `tests.support.outbound` calls a place."""
        return Place(self.tenant_id, int(self.session.id), "gw-contract")

    async def send(self, customer: Customer, text: str, **more: Any) -> int:
        """Enqueue as a backend would; the queue id."""
        return await enqueue(self.db, self.place, text, to=customer.address, **more)

    async def item(self, queue_id: int) -> Record:
        [row] = await fetch(
            self.db,
            """
            SELECT q.*, m.delivery_status, m.channel_message_id, m.content, m.lead_id, m.thread_id
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            WHERE q.id = $1
            """,
            queue_id,
        )
        return row

    async def reached(self, queue_id: int, *statuses: str) -> Record:
        """The item, once it has one of these statuses."""

        async def look() -> Record | None:
            row = await self.item(queue_id)
            return row if row["status"] in statuses else None

        try:
            found: Record = await self.until(look, "")
        except AssertionError:
            row = await self.item(queue_id)
            raise AssertionError(
                f"item {queue_id} is {row['status']} ({row['error_code']}: {row['last_error']}), not {statuses}"
                f"\n{self.story()}"
            ) from None
        return found

    async def hurry(self, queue_id: int, *statuses: str) -> Record:
        """Like `reached`, for an item that waits: whatever holds it back is over now."""

        async def look() -> Record | None:
            row = await self.item(queue_id)
            if row["status"] in statuses:
                return row
            if row["status"] == "queued" and row["claim_epoch"]:
                await value(
                    self.db,
                    "UPDATE et_outbound_queue SET next_attempt_at = now() WHERE id = $1 AND status = 'queued'",
                    queue_id,
                )
            return None

        found: Record = await self.until(look, f"item {queue_id} {statuses}")
        return found

    async def upload(self, data: bytes, *, mime_type: str, filename: str) -> str:
        """A file to send, as the API takes it; its `media_url`."""
        async with self.files.draft(limit=1 << 24) as draft:
            await draft.write(data)
            content = await draft.keep()
        upload_id, _ = await self.uploads.add_upload(
            self.tenant_id, content, declared=mime_type, filename=filename
        )
        return f"upload:{upload_id}"

    async def resolve(self, row: Record, *, queue_id: int | None = None) -> Sent | NotSent | Unknown:
        """Ask the live channel what became of an attempt: this item's, or one (`queue_id`) that never was."""
        recipient = await value(self.db, "SELECT external_id FROM et_leads WHERE id = $1", row["lead_id"])
        attempt = Attempt(
            TenantId(self.tenant_id),
            self.session.id,
            QueueId(queue_id or row["id"]),
            MessageId(row["message_id"]),
            row["claim_epoch"],
            recipient,
        )
        return await self.sessions.resolve(attempt)

    # --- waiting and looking

    async def until(self, look: Callable[[], Awaitable[Any]], what: str) -> Any:
        try:
            return await eventually(look, seconds=PATIENCE, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    async def arrived(self, customer: Customer, count: int) -> None:
        async def look() -> bool:
            return len(customer.arrivals) >= count

        await self.until(look, f"{count} messages at the customer's")

    @property
    def log(self) -> str:
        return self._lines.getvalue()

    def story(self) -> str:
        """The last log lines."""
        return "\n".join(self.log.splitlines()[-25:])

    async def rows_with(self, needle: str) -> list[str]:
        """Tables in which any row holds this string, as text, anywhere."""
        conn = await connect(self._url)  # as the owner, who sees every table
        try:
            tables = await conn.fetch(
                """
                SELECT relname
                FROM pg_class
                WHERE relnamespace = 'public'::REGNAMESPACE AND relkind = 'r'
                ORDER BY relname
                """
            )
            return [
                table["relname"]
                for table in tables
                if await conn.fetchval(
                    f'SELECT EXISTS (SELECT 1 FROM "{table["relname"]}" t WHERE position($1 IN t::TEXT) > 0)',
                    needle,
                )
            ]
        finally:
            await conn.close()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _logging_to(stream: io.StringIO) -> Iterator[None]:
    """Every line of the process as the gateway writes them at its most talkative."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log.configure("debug", stream)
    try:
        yield
    finally:
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()
