"""`python -m gateway import`: a file of JSON lines into a session's history, with its progress on stderr.

Writes straight into the database, beside a running gateway or without one. Reads the file in pieces, never whole.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import time
from collections.abc import AsyncIterator
from typing import BinaryIO

from core.channel import TenantId
from core.errors import NotFound
from core.history import Counts, HistoryImport
from core.history_lines import LineReader
from core.settings import Settings
from core.store import sessions, tenants
from gateway.commands.admin import ACTOR, database

PIECE = 1 << 18
PROGRESS_SECONDS = 1.0


async def run(settings: Settings, session_id: int, file: BinaryIO) -> int:
    """0 when every line is in the database now, 1 when some were wrong. Raises GatewayError."""
    async with database(settings) as db:
        async with db.worker() as conn:
            owner = await tenants.owner_of(conn, "et_channel_sessions", session_id)
            if owner is None or owner.tenant_id is None:
                raise NotFound(
                    f"there is no session {session_id}: see `python -m gateway session list TENANT_ID`"
                )
            session = await sessions.get(conn, owner.tenant_id, session_id)
        reader = LineReader(
            tenant_id=session.tenant_id,
            session_id=session.id,
            channel=session.channel_type,
            own_address=None if session.pending else session.identifier,
        )
        pieces = _Pieces(file)
        progress = _Progress(pieces)
        work = HistoryImport(
            db,
            tenant_id=TenantId(session.tenant_id),
            session_id=session.id,
            actor=ACTOR,
            progress=progress.tell,
        )
        try:
            counts = await work.run(reader.items(pieces.read()))
        finally:
            for wrong in work.wrong:
                _say(f"line {wrong.line}: {wrong.detail}")
            if work.counts.wrong > len(work.wrong):
                _say(f"… and {work.counts.wrong - len(work.wrong)} more")
            _say(f"import {work.import_id}: {_sentence(work.counts)}")
    return 1 if counts.wrong else 0


class _Pieces:
    """The file, and how much of it was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.done = 0
        found = os.fstat(file.fileno())
        self.size = found.st_size if stat.S_ISREG(found.st_mode) else 0

    async def read(self) -> AsyncIterator[bytes]:
        # A pipe may keep us waiting: in a thread. BufferedReader.read1 gives what there is.
        read1 = getattr(self._file, "read1", self._file.read)
        while piece := await asyncio.to_thread(read1, PIECE):
            self.done += len(piece)
            yield piece


class _Progress:
    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._next = time.monotonic() + PROGRESS_SECONDS

    def tell(self, counts: Counts) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PROGRESS_SECONDS
        size = self._pieces.size
        share = f"{100 * self._pieces.done // size} %, " if size else ""
        _say(f"{share}{_sentence(counts)}")


def _sentence(counts: Counts) -> str:
    return f"{counts.lines:,} lines: {counts.stored:,} stored, {counts.duplicates:,} duplicates, {counts.wrong:,} wrong"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
