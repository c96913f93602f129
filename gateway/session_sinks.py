"""What a session's sink does with the database beyond storing what arrives: history in bulk, what an earlier life stored,
names, automatic texts, where a pull channel goes on, and what was said before.

Knows no channel. Every call may be repeated: nothing is stored or sent twice.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import asyncpg

from core import log as logs
from core.channel import (
    Attempt,
    Cursor,
    InboundMessage,
    MessageId,
    Person,
    Quoted,
    SessionId,
    StatusUpdate,
    TenantId,
)
from core.database import Database, is_transient
from core.errors import DatabaseUnavailable
from core.history import Counts, HistoryImport, Item
from core.sinks import Written
from core.store import again, conversations, intents, leads, messages, replies
from core.store.audit import Conn
from core.store.decisions import REPLY_EXPIRES

log = logs.get(part="sessions")
T = TypeVar("T")

NAMES_AT_ONCE = 500


class SessionStore:
    """`live_depth`: how many live messages wait for the database now."""

    def __init__(self, db: Database, live_depth: Callable[[], int] = lambda: 0) -> None:
        self._db = db
        self._live_depth = live_depth

    async def history(
        self,
        tenant_id: TenantId,
        session_id: SessionId,
        source: AsyncIterable[Item],
        committed: Callable[[int], None],
        kind: str,
    ) -> Counts:
        work = HistoryImport(
            self._db,
            tenant_id=tenant_id,
            session_id=session_id,
            kind=kind,
            live_depth=self._live_depth,
            progress=lambda counts: committed(counts.lines),
        )
        return await work.run(source)

    async def lost(
        self,
        tenant_id: TenantId,
        session_id: SessionId,
        messages: Sequence[InboundMessage],
        updates: Sequence[StatusUpdate],
    ) -> tuple[list[InboundMessage], list[StatusUpdate]]:
        """What of these the database does not have (any more), as it is to be stored."""

        async def look(conn: Conn) -> tuple[list[InboundMessage], list[StatusUpdate]]:
            return (
                await again.missing(conn, tenant_id, session_id, messages) if messages else [],
                await again.behind(conn, tenant_id, session_id, updates) if updates else [],
            )

        missing, behind = await self._with(look)
        answered = time.time() - REPLY_EXPIRES.total_seconds()
        return [_past(message) if message.arrived_at < answered else message for message in missing], behind

    async def names(self, tenant_id: TenantId, names: Mapping[str, str]) -> None:
        people = sorted(names)
        for start in range(0, len(people), NAMES_AT_ONCE):
            keys = [(int(tenant_id), person) for person in people[start : start + NAMES_AT_ONCE]]

            async def fill(conn: Conn, keys: list[tuple[int, str]] = keys) -> None:
                known = await leads.find(conn, keys)
                wanted = {
                    (int(tenant_id), lead.lead_id): names[key[1]]
                    for key, lead in known.items()
                    if not lead.named and lead.kind == "person"
                }
                if wanted:
                    await leads.fill_names(conn, wanted)

            await self._with(fill)

    async def automatic_reply(
        self,
        tenant_id: TenantId,
        session_id: SessionId,
        recipient: str,
        text: str,
        purpose: str,
        at_most_every: timedelta,
    ) -> bool:
        async def enqueue(conn: Conn) -> bool:
            async with conn.transaction():
                return await replies.enqueue_once(
                    conn, tenant_id, session_id, recipient, text, purpose=purpose, every=at_most_every
                )

        try:
            return await self._with(enqueue)
        except asyncpg.PostgresError as error:
            # A suspended tenant, a recipient nobody can write to: the call itself is stored all the same.
            log.warning("reply.refused", tenant_id=tenant_id, session_id=session_id, error=str(error))
            return False

    async def cursors(self, session_id: SessionId) -> dict[str, Cursor]:
        return await self._with(lambda conn: messages.cursors_of(conn, session_id))

    async def written(
        self, tenant_id: TenantId, session_id: SessionId, channel_message_ids: Sequence[str]
    ) -> dict[str, Written]:
        rows = await self._with(
            lambda conn: conversations.written(conn, tenant_id, session_id, channel_message_ids)
        )
        return {
            row["channel_message_id"]: Written(
                Person(row["external_id"], row["kind"]),
                row["payload"] if isinstance(row["payload"], dict) else {},
            )
            for row in rows
        }

    async def last_said(self, tenant_id: TenantId, message_id: MessageId) -> Quoted | None:
        row = await self._with(lambda conn: conversations.last_said(conn, tenant_id, message_id))
        if row is None:
            return None
        return Quoted(
            row["channel_message_id"],
            row["sender_identifier"],
            row["content"],
            from_me=False,
            raw_payload=row["raw_payload"] or {},
        )

    async def intend(self, attempt: Attempt) -> bool:
        return await self._intent(attempt, "called") == "new called"

    async def never_called(self, attempt: Attempt) -> bool:
        return (await self._intent(attempt, "withdrawn")).endswith("withdrawn")

    async def _intent(self, attempt: Attempt, kind: str) -> str:
        ids = (attempt.tenant_id, attempt.session_id, attempt.queue_id, attempt.claim_epoch)
        return await self._with(lambda conn: intents.write(conn, *ids, kind))

    async def _with(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        try:
            async with self._db.worker() as conn:
                return await work(conn)
        except Exception as error:
            if is_transient(error):
                raise DatabaseUnavailable(f"the database cannot be used now ({error})") from error
            raise


def _past(message: InboundMessage) -> InboundMessage:
    """It was answered before the database was set back, or its automatic answer would have expired: it comes back as
    history, so that nobody gets a second answer. What was typed on the phone still hands its thread to that person."""
    return replace(message, is_history=True) if message.direction == "inbound" else message
