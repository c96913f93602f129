"""A tenant with a WhatsApp session and messages to it, for the tests of the inbound path. Real database, no channel."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from core.channel import InboundMessage, MessageType, Person, SessionId, StatusUpdate, TenantId
from core.database import Database
from core.ingest import Ingest
from core.metrics import Metrics

_numbers = itertools.count(1)


def phone(n: int) -> str:
    return f"whatsapp:+6011{n:08d}"


def lid(n: int) -> str:
    return f"whatsapp-lid:{100_000_000_000_000 + n}"


@dataclass(frozen=True)
class Place:
    """Where messages arrive."""

    db: Database
    tenant_id: TenantId
    session_id: SessionId

    def message(
        self,
        message_id: str,
        sender: str | Person = "whatsapp:+601100000001",
        content: str | None = "hello",
        **changes: Any,
    ) -> InboundMessage:
        fields: dict[str, Any] = {
            "tenant_id": self.tenant_id,
            "session_id": self.session_id,
            "channel": "whatsapp",
            "channel_message_id": message_id,
            "person": sender if isinstance(sender, Person) else Person(sender),
            "message_type": MessageType.TEXT,
            "content": content,
            "channel_timestamp": int(time.time() * 1000),
            "raw_payload": {"key": {"id": message_id}},
        }
        return InboundMessage(**(fields | changes))

    def typed(self, message_id: str, content: str = "I take over", **changes: Any) -> InboundMessage:
        """A text typed on the paired phone."""
        fields: dict[str, Any] = {
            "direction": "outbound",
            "role": "assistant",
            "raw_payload": {"origin": "phone"},
        }
        return self.message(message_id, content=content, **(fields | changes))

    def receipt(self, status: str, *message_ids: str, **changes: Any) -> StatusUpdate:
        fields: dict[str, Any] = {
            "tenant_id": self.tenant_id,
            "session_id": self.session_id,
            "channel": "whatsapp",
            "message_ids": message_ids,
            "status": status,
        }
        return StatusUpdate(**(fields | changes))

    async def rows(self, columns: str = "*", where: str = "true") -> list[Any]:
        """Messages of the tenant in order of id."""
        return await self.fetch(
            f"SELECT {columns} FROM et_messages WHERE tenant_id = $1 AND {where} ORDER BY id",
            self.tenant_id,
        )

    async def fetch(self, sql: str, *values: object) -> list[Any]:
        async with self.db.worker() as conn:
            return list(await conn.fetch(sql, *values))

    async def value(self, sql: str, *values: object) -> Any:
        async with self.db.worker() as conn:
            return await conn.fetchval(sql, *values)

    async def enqueue(
        self, recipient: str = "+601100000001", content: str = "our text", **changes: Any
    ) -> Any:
        """One outbound item: message_id, queue_id, thread_id."""
        return await self._row(
            "SELECT * FROM et_enqueue_outbound($1, $2, $3, $4, dedupe_key => $5, raw_payload => $6)",
            self.tenant_id,
            self.session_id,
            recipient,
            content,
            changes.get("dedupe_key"),
            changes.get("raw_payload"),
        )

    async def _row(self, sql: str, *values: object) -> Any:
        async with self.db.worker() as conn:
            return await conn.fetchrow(sql, *values)

    async def claim(self, queue_id: int) -> None:
        """What the outbound worker does before it calls the channel."""
        await self.value(
            "UPDATE et_outbound_queue SET status = 'dispatching', claim_epoch = claim_epoch + 1 WHERE id = $1",
            queue_id,
        )

    async def mark(self, queue_id: int, status: str, channel_message_id: str | None = None) -> None:
        """What the outbound worker does after the call."""
        await self.value("UPDATE et_outbound_queue SET status = $2 WHERE id = $1", queue_id, status)
        if channel_message_id is not None:
            await self.value(
                "UPDATE et_messages m SET channel_message_id = $2 FROM et_outbound_queue q"
                " WHERE q.id = $1 AND m.id = q.message_id",
                queue_id,
                channel_message_id,
            )

    async def states(self, queue_id: int) -> tuple[str, str, str]:
        """Status of the queue row, of its message, and the message's channel id."""
        row = await self._row(
            "SELECT q.status, m.delivery_status, m.channel_message_id FROM et_outbound_queue q"
            " JOIN et_messages m ON m.id = q.message_id WHERE q.id = $1",
            queue_id,
        )
        return tuple(row)


async def make_place(
    db: Database, *, tenant_id: int | None = None, metadata: dict[str, Any] | None = None
) -> Place:
    async with db.worker() as conn:
        if tenant_id is None:
            tenant_id = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('Acme') RETURNING id")
        session_id = await conn.fetchval(
            """
            INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status, metadata)
            VALUES ($1, 'whatsapp', $2, 'active', $3)
            RETURNING id
            """,
            tenant_id,
            f"+6019{next(_numbers):08d}",
            metadata or {},
        )
    return Place(db, TenantId(tenant_id), SessionId(session_id))


@asynccontextmanager
async def running(db: Database, metrics: Metrics | None = None, **options: Any) -> AsyncIterator[Ingest]:
    ingest = Ingest(db, metrics or Metrics(), **options)
    await ingest.start()
    try:
        yield ingest
    finally:
        await ingest.stop()
