"""Bulk import of history: JSON lines streamed straight into chunks, whatever their number; and how far imports are.

Never holds a body: what has arrived is stored while the rest is on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Literal

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from asyncpg import Record
from pydantic import Field

from core.errors import DatabaseUnavailable
from core.history import HistoryImport, Interrupted
from core.history_lines import LINE_LIMIT, LineReader
from core.store import history as store
from core.store import sessions
from gateway.api.models import Id, NoBody, NoQuery, Page, PageQuery, TenantQuery, View
from gateway.api.paging import decode_id, page
from gateway.api.problems import Problem, not_found
from gateway.api.routing import Call, Routes, Subject

routes = Routes("imports")
SUBJECT = Subject("import", "import_id", "et_imports")

TYPES = ("application/x-ndjson", "application/jsonl", "text/plain")
_ACCEPTED = frozenset({*TYPES, "application/ndjson", "application/jsonlines", "application/x-jsonlines"})
STALL_SECONDS = 60.0
TOTAL_SECONDS = 6 * 3600.0
AT_ONCE = 3
"""Imports this gateway runs at a time, one of a tenant: more would not be faster, and live traffic would feel it."""


class ImportQuery(TenantQuery):
    channel_session_id: Id = Field(description="Whose history it is.")


class ImportsQuery(PageQuery):
    channel_session_id: Id | None = Field(None, description="Only of this session.")


class WrongLine(View):
    line: int
    detail: str


class Imported(View):
    import_id: int
    lines: int = Field(
        description="All of them: stored, duplicates and wrong ones. Blank lines do not count."
    )
    stored: int
    duplicates: int = Field(description="They were there already.")
    wrong: list[WrongLine] = Field(description="The first hundred.")
    wrong_total: int


class Import(View):
    id: int
    channel_session_id: int
    kind: str = Field(description="Where it comes from: `file`, `sync`, `span`.")
    status: Literal["running", "finished", "interrupted", "failed"]
    total: int | None = Field(description="How many there will be, where the source says so.")
    lines: int
    stored: int
    duplicates: int
    wrong: list[WrongLine] = Field(description="The first hundred.")
    wrong_total: int
    error: str | None
    started_at: datetime
    updated_at: datetime
    finished_at: datetime | None


class Slots:
    """Who imports just now."""

    def __init__(self) -> None:
        self._tenants: set[int] = set()

    @contextmanager
    def taken(self, tenant_id: int) -> Iterator[None]:
        if tenant_id in self._tenants or len(self._tenants) >= AT_ONCE:
            raise Problem(
                429,
                "too_many_imports",
                "an import of this tenant is running, or too many others are: wait for its end, then send the file again",
                headers={"Retry-After": "30", "Connection": "close"},
            )
        self._tenants.add(tenant_id)
        try:
            yield
        finally:
            self._tenants.discard(tenant_id)


SLOTS: web.AppKey[Slots] = web.AppKey("imports", Slots)


@routes.add(
    "POST",
    "/api/v1/messaging/import",
    access="query",
    scope="admin",
    returns={200: Imported},
    raw_body=f"JSON lines, one message each, of at most {LINE_LIMIT >> 10} KiB; see docs/import.md.",
    raw_types=TYPES,
)
async def create(call: Call[ImportQuery, NoBody]) -> Imported:
    """Import history, one message a line.

    Threads and timelines are filled; nothing is answered, no thread is opened again. Lines are stored while the rest is on
    its way: what came before an interruption stays, and sending the file again stores only what is missing.
    """
    request, limit = call.request, call.services.settings.import_max_bytes
    _require_lines(request)
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    await call.own("channel session", "et_channel_sessions", call.query.channel_session_id)
    async with call.db.worker() as conn:
        session = await sessions.get(conn, call.tenant_id, call.query.channel_session_id)
    reader = LineReader(
        tenant_id=call.tenant_id,
        session_id=session.id,
        channel=session.channel_type,
        own_address=None if session.pending else session.identifier,
    )
    ingest = call.services.ingest
    with request.app[SLOTS].taken(call.tenant_id):
        work = HistoryImport(
            call.db,
            tenant_id=call.tenant_id,
            session_id=session.id,
            actor=call.caller.actor,
            live_depth=lambda: ingest.depth,
        )
        try:
            await work.run(reader.items(_arriving(request, limit)))
        except (Interrupted, DatabaseUnavailable) as error:
            raise _interrupted(error, work) from error
    return _imported(work)


def _require_lines(request: web.Request) -> None:
    kind = request.content_type
    stated = hdrs.CONTENT_TYPE in request.headers
    if not stated or kind not in _ACCEPTED or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        shown = f"{request.headers[hdrs.CONTENT_TYPE][:80]!r}" if stated else "no content type"
        raise Problem(
            415,
            "wrong_content_type",
            f"{shown}: send one JSON object a line, as UTF-8, with Content-Type: {TYPES[0]}",
            headers={"Connection": "close"},
        )


async def _arriving(request: web.Request, limit: int) -> AsyncIterator[bytes]:
    """The body, piece by piece. Raises Interrupted when there is no more to come although it has not ended."""
    size, until = 0, time.monotonic() + TOTAL_SECONDS
    while True:
        if time.monotonic() > until:
            raise Interrupted(f"it took longer than {TOTAL_SECONDS / 3600:.0f} hours", code="stalled")
        try:
            async with asyncio.timeout(STALL_SECONDS):
                piece = await request.content.readany()
        except TimeoutError:
            raise Interrupted(f"nothing came for {STALL_SECONDS:.0f} s", code="stalled") from None
        except (ConnectionError, web.RequestPayloadError, HttpProcessingError, web.PayloadAccessError):
            gone = request.transport is None or request.transport.is_closing()
            text = "the client went away" if gone else "the body could not be read to its end"
            raise Interrupted(text, code="client_gone" if gone else "unreadable") from None
        if not piece:
            return
        size += len(piece)
        if size > limit:
            raise Interrupted(f"the body is over the limit of {limit} bytes", code="too_large")
        yield piece


def _interrupted(error: Interrupted | DatabaseUnavailable, work: HistoryImport) -> Exception:
    if error.code == "client_gone":
        return ConnectionResetError(error.detail)  # nobody is left to answer
    status = {"too_large": 413, DatabaseUnavailable.code: 503}.get(error.code, 422)
    headers = {"Connection": "close"} | ({"Retry-After": "30"} if status == 503 else {})
    detail = (
        f"{error.detail}; {work.counts.lines} lines are settled and stay: "
        "send the rest, or all of it again (nothing is stored twice)"
    )
    return Problem(status, error.code, detail, headers=headers, **_imported(work).model_dump())


def _too_large(limit: int) -> Problem:
    # The rest of the body is not read: the connection cannot be used again.
    detail = f"the body is over the limit of {limit} bytes (IMPORT_MAX_BYTES); send it in parts"
    return Problem(413, "too_large", detail, headers={"Connection": "close"})


def _imported(work: HistoryImport) -> Imported:
    counts = work.counts
    return Imported(
        import_id=work.import_id,
        lines=counts.lines,
        stored=counts.stored,
        duplicates=counts.duplicates,
        wrong=[WrongLine(line=one.line, detail=one.detail) for one in work.wrong],
        wrong_total=counts.wrong,
    )


def _view(row: Record) -> Import:
    values = dict(row)
    return Import(
        **{name: values[name] for name in Import.model_fields.keys() & values.keys() - {"wrong"}},
        channel_session_id=values["session_id"],
        wrong=[WrongLine(**one) for one in values["wrong_lines"]],
        wrong_total=values["wrong"],
    )


@routes.add(
    "GET",
    "/api/v1/messaging/imports",
    access="query",
    scope=("admin", "read"),
    returns={200: Page[Import]},
)
async def listed(call: Call[ImportsQuery, NoBody]) -> Page[Import]:
    """Imports of history with their progress, newest first."""
    query = call.query
    async with call.db.tenant(call.tenant_id) as conn:
        rows = await store.imports(
            conn,
            call.tenant_id,
            session_id=query.channel_session_id,
            before=decode_id(query.cursor),
            limit=query.limit + 1,
        )
    return page(rows, query.limit, _view, lambda row: (row["id"],))


@routes.add(
    "GET",
    "/api/v1/messaging/imports/{import_id}",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "read"),
    returns={200: Import},
)
async def read(call: Call[NoQuery, NoBody]) -> Import:
    """How far an import is.

    Counters are exact: they move with the rows they count.
    """
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.read(conn, call.id("import_id"))
    if row is None:
        raise not_found("import")
    return _view(row)
