"""A tenant whose customers write, and scripted deciders, for the tests of the inbound worker. Real database, no channel."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from asyncpg import Record

from core.database import Database
from core.decide.port import Context, Decider, Decision
from core.decide.rules import RulesDecider
from core.inbound import InboundWorker
from core.metrics import Metrics

_numbers = itertools.count(1)
WAITING = ("received", "inbound_processing")


@dataclass
class Shop:
    """A tenant with a workspace, usually an agent, and one session."""

    db: Database
    tenant_id: int
    session_id: int
    workspace_id: int
    agent_id: int | None
    channel: str

    async def fetch(self, sql: str, *values: Any) -> list[Record]:
        async with self.db.worker() as conn:
            return await conn.fetch(sql, *values)

    async def value(self, sql: str, *values: Any) -> Any:
        async with self.db.worker() as conn:
            return await conn.fetchval(sql, *values)

    async def customer(self, who: int = 1, *, kind: str = "person", name: str | None = "Aisha") -> int:
        """The lead's id; found or made."""
        external_id = f"whatsapp:+6011{who:08d}" if kind == "person" else f"whatsapp-group:{who}@g.us"
        await self.value(
            """
            INSERT INTO et_leads (tenant_id, workspace_id, external_id, kind, name)
            VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT DO NOTHING
            """,
            self.tenant_id,
            self.workspace_id,
            external_id,
            kind,
            name,
        )
        lead_id: int = await self.value(
            "SELECT id FROM et_leads WHERE tenant_id = $1 AND external_id = $2", self.tenant_id, external_id
        )
        return lead_id

    async def write(
        self, *texts: str | None, who: int = 1, kind: str = "person", **columns: Any
    ) -> list[int]:
        """The customer writes these, in one transaction; returns the messages' ids."""
        lead_id = await self.customer(who, kind=kind)
        ids = []
        async with self.db.worker() as conn, conn.transaction():
            for text in texts:
                row = {
                    "tenant_id": self.tenant_id,
                    "lead_id": lead_id,
                    "channel_session_id": self.session_id,
                    "channel": self.channel,
                    "channel_message_id": f"IN{next(_numbers)}",
                    "direction": "inbound",
                    "role": "user",
                    "sender_identifier": f"+6011{who:08d}",
                    "message_type": "text",
                    "content": text,
                    "delivery_status": "received",
                } | columns
                names = ", ".join(row)
                marks = ", ".join(f"${n}" for n in range(1, len(row) + 1))
                sql = f"INSERT INTO et_messages ({names}) VALUES ({marks}) RETURNING id"
                ids.append(await conn.fetchval(sql, *row.values()))
        return ids

    async def thread_of(self, message_id: int) -> Record:
        rows = await self.fetch(
            "SELECT h.* FROM et_threads h JOIN et_messages m ON m.thread_id = h.id WHERE m.id = $1",
            message_id,
        )
        return rows[0]

    async def decided(self, ids: Sequence[int], *, seconds: float = 15.0) -> list[Record]:
        """The decisions about these messages, once all are decided; in order of message."""

        async def done() -> bool:
            waiting = await self.value(
                "SELECT count(*) FROM et_messages WHERE id = ANY ($1::BIGINT[]) AND delivery_status = ANY ($2::TEXT[])",
                list(ids),
                list(WAITING),
            )
            return bool(waiting == 0)

        await eventually(done, seconds=seconds, what=f"deciding {len(ids)} messages")
        return await self.fetch(
            """
            SELECT d.*, m.delivery_status
            FROM et_decisions d
            JOIN et_messages m ON m.id = d.message_id
            WHERE d.message_id = ANY ($1::BIGINT[])
            ORDER BY d.message_id
            """,
            list(ids),
        )

    async def replies(self) -> list[Record]:
        """Everything enqueued in this tenant, in order."""
        return await self.fetch(
            """
            SELECT q.*, m.content, m.raw_payload, m.reply_to_message_id, m.llm_provider, m.llm_total_tokens
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            WHERE q.tenant_id = $1
            ORDER BY q.id
            """,
            self.tenant_id,
        )


async def open_shop(
    db: Database,
    *,
    agent: bool = True,
    settings: dict[str, Any] | None = None,
    decider: str = "rules",
    channel: str = "whatsapp",
    timezone: str = "UTC",
) -> Shop:
    async with db.worker() as conn:
        tenant_id = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('Kedai') RETURNING id")
        agent_id = None
        if agent:
            agent_id = await conn.fetchval(
                "INSERT INTO et_agents (tenant_id, name, decider, settings) VALUES ($1, 'Sam', $2, $3) RETURNING id",
                tenant_id,
                decider,
                settings or {},
            )
        workspace_id = await conn.fetchval(
            "INSERT INTO et_workspaces (tenant_id, name, timezone, agent_id) VALUES ($1, 'Sales', $2, $3) RETURNING id",
            tenant_id,
            timezone,
            agent_id,
        )
        session_id = await conn.fetchval(
            "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status)"
            " VALUES ($1, $2, $3, 'active') RETURNING id",
            tenant_id,
            channel,
            f"+6019{next(_numbers):08d}",
        )
    return Shop(db, tenant_id, session_id, workspace_id, agent_id, channel)


@asynccontextmanager
async def working(
    db: Database,
    decider: Decider | None = None,
    *,
    owner: str = "gw-1",
    metrics: Metrics | None = None,
    **more: Any,
) -> AsyncIterator[InboundWorker]:
    """A running worker with short times; `decider` stands in for the rules."""
    quick: dict[str, Any] = {"poll_seconds": 0.5, "lease_seconds": 2.0, "backoff_seconds": 0.02}
    worker = InboundWorker(
        db, metrics or Metrics(), {"rules": decider or RulesDecider()}, owner=owner, **(quick | more)
    )
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


@dataclass
class Scripted:
    """A decider that does what the test says and remembers what it was shown."""

    answer: Callable[[Context], Awaitable[Decision]]
    name: str = "scripted"
    seen: list[Context] = field(default_factory=list)
    at_once: Counter[int] = field(default_factory=Counter)
    most_at_once: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    async def decide(self, context: Context) -> Decision:
        thread = context.thread.id
        self.seen.append(context)
        self.at_once[thread] += 1
        self.most_at_once[thread] = max(self.most_at_once[thread], self.at_once[thread])
        try:
            return await self.answer(context)
        finally:
            self.at_once[thread] -= 1


def says(text: str, *, after: float = 0.0) -> Scripted:
    """Always the same reply."""

    async def answer(_context: Context) -> Decision:
        if after:
            await asyncio.sleep(after)
        return Decision("auto_reply", "scripted", reply=text)

    return Scripted(answer)


@dataclass
class Thinking(Scripted):
    """Waits inside `decide` until it is released."""

    answer: Callable[[Context], Awaitable[Decision]] = field(init=False)
    reply: str = "at last"
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answer = self._wait

    async def _wait(self, _context: Context) -> Decision:
        self.asked.set()
        await self.released.wait()
        return Decision("auto_reply", "scripted", reply=self.reply)


async def eventually(check: Callable[[], Awaitable[Any]], *, seconds: float = 10.0, what: str = "it") -> Any:
    """Poll until `check` gives something true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = await check()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        await asyncio.sleep(0.02)
