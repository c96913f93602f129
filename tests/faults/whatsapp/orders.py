"""A backend that puts messages into the queue by SQL, and what became of each: at WhatsApp, on phones, in its row."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import orjson

from core.database import connect
from core.errors import GatewayError
from sandbox.whatsapp.hub import Call
from tests.faults import checker
from tests.faults.checker import Classes, QueueRow
from tests.faults.ledger import ANSWERED, CALLED, Entry
from tests.faults.whatsapp.rig import Line, Rig
from tests.support.stack import LOST

OPEN = ("queued", "dispatching")
GATHER = 3.0
"""Seconds for the last receipts to arrive."""


@dataclass(slots=True)
class Order:
    queue_id: int
    session: int
    to: str


@dataclass(slots=True)
class Orders:
    rig: Rig
    rng: random.Random
    placed: dict[str, Order] = field(default_factory=dict)
    """By text."""
    on_call: Callable[[Call], None] | None = None
    """Called for each message that reaches WhatsApp's server, before the server does anything about it."""
    _backend: asyncpg.Connection[Any] | None = None
    _number: int = 0
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    def watch(self) -> None:
        calls = self.rig.sandbox.calls
        note = calls.add

        def on_call(call: Call) -> None:
            if not call.repeat:
                self.rig.ledger.write(CALLED, call.id, outcome=call.outcome)
            note(call)
            if self.on_call is not None:
                self.on_call(call)

        vars(calls)["add"] = on_call

    # ---- placing ----

    async def place(self, line: Line, to: str | None = None) -> None:
        """One row, to a person or to the group. A database that is being killed is asked again, with the same key."""
        self._number += 1
        text = f"order {self._number}"
        if to is None:
            to = str(line.group.jid) if self.rng.random() < 0.15 else self.rng.choice(line.people).number
        async with self._one:  # a connection that dies under two tasks at once says strange things
            row = await self._put(line.session, to, text)
        assert row is not None
        self.placed[text] = Order(row["queue_id"], line.session, to)

    async def _put(self, session: int, to: str, text: str) -> asyncpg.Record | None:
        while True:
            try:
                backend = await self._connected()
                return await backend.fetchrow(
                    "SELECT * FROM et_enqueue_outbound($1, $2, $3, $4, 'text', NULL, $5)",
                    self.rig.tenant,
                    session,
                    to,
                    text,
                    text,
                )
            except (GatewayError, *LOST):
                await self.close()
                await asyncio.sleep(0.2)

    async def place_some(self, line: Line, count: int, gap: float = 0.02) -> None:
        for _ in range(count):
            await self.place(line)
            await asyncio.sleep(gap)

    async def _connected(self) -> asyncpg.Connection[Any]:
        if self._backend is None or self._backend.is_closed():
            self._backend = await connect(self.rig.database_url)
        return self._backend

    async def close(self) -> None:
        if self._backend is not None:
            self._backend.terminate()
            self._backend = None

    # ---- what became of them ----

    async def finished(self, within: float) -> None:
        """Until no row waits or is under way, and the last receipts have come. Raises AssertionError."""

        async def none_open() -> bool:
            return not await self.rig.db.fetchval(
                "SELECT count(*) FROM et_outbound_queue WHERE id = ANY ($1) AND status = ANY ($2)",
                [order.queue_id for order in self.placed.values()],
                list(OPEN),
            )

        await self.rig.until(none_open, "every row of the queue has ended", within)
        await asyncio.sleep(GATHER)

    async def rows(self) -> dict[str, Any]:
        found = await self.rig.db.fetch(
            """
            SELECT q.id, q.status, q.claim_epoch, q.retry_count, q.error_code, m.content, m.channel_message_id
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            WHERE q.id = ANY ($1)
            """,
            [order.queue_id for order in self.placed.values()],
        )
        return {row["content"]: row for row in found}

    def judge(self, rows: dict[str, Any]) -> tuple[Classes, int]:
        """(class of each item, second sends). A second sending is a second message id for one text."""
        seen: dict[str, set[str]] = {text: set() for text in self.placed}
        for text, row in rows.items():
            if not row["channel_message_id"].startswith("out_"):
                seen[text].add(row["channel_message_id"])
        for phone in self.rig.sandbox.people:
            for message in phone.received:
                if message.text in seen:
                    seen[message.text].add(message.id)
        calls = {call.id: call for call in reversed(self.rig.sandbox.calls.items) if not call.repeat}
        entries: list[Entry] = []
        for text, ids in seen.items():
            reached = sorted((calls[i] for i in ids if i in calls), key=lambda call: call.monotonic)
            for epoch, call in enumerate(reached, 1):
                outcome = "sent" if call.outcome == "accepted" else "dropped"
                entries.append(Entry(CALLED, text, call.monotonic, call.at, {"epoch": epoch}))
                entries.append(
                    Entry(ANSWERED, text, call.monotonic, call.at, {"epoch": epoch, "outcome": outcome})
                )
        queue = [
            QueueRow(text, row["status"], row["claim_epoch"], row["retry_count"])
            for text, row in rows.items()
        ]
        return checker.outbound(entries, queue), checker.second_sends(entries)

    def doubted(self) -> tuple[set[int], set[int]]:
        """Queue ids that were `unknown` at any time, and those that were proven never to have begun; from the log."""
        unknown: set[int] = set()
        not_begun: set[int] = set()
        for text in self.rig.gateway.lines:
            if '"event":"send.' not in text:
                continue
            line = orjson.loads(text)
            if line["event"] == "send.unknown" or (
                line["event"] == "send.resolved" and line["result"] == "unknown"
            ):
                unknown.add(line["queue_id"])
            elif (line["event"] == "send.resolved" and line["result"] == "queued") or line.get(
                "error"
            ) == "cut_off":
                not_begun.add(line["queue_id"])
        return unknown, not_begun
