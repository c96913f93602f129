"""One gateway with a session on every channel that fetches, customers on each, and ledgers of what they said and got.

The servers and customers live here, in the process that no fault is aimed at; only the gateway and its database are broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Any

import asyncpg
import orjson

from core.secrets import KeyRing, generate
from core.store import credentials
from tests.conftest import migrate_blocking
from tests.contract.peer import Can, Customer, Peer
from tests.faults import checker
from tests.faults.checker import QueueRow, Report
from tests.faults.ledger import ACKNOWLEDGED, ANSWERED, CALLED, OFFERED, Entry, Ledger, read
from tests.faults.run import Plan
from tests.faults.world import LOST, QUICK_TIMINGS, QUICK_TTL, Node, free_port
from tests.support.outbound import eventually
from tests.support.postgres import PostgresServer

NAMES = ("mei", "tan", "ali", "siti", "arun", "wei")


class ChannelNode(Node):
    module = "tests.faults.channels.node"


@dataclass
class Line:
    """One channel: its session, its customers, and what was said and queued."""

    peer: Peer
    ledger: Ledger
    tenant: int = 0
    session: int = 0
    customers: list[Customer] = field(default_factory=list)
    said: list[tuple[Customer, str]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    queued: dict[str, str] = field(default_factory=dict)
    """Queue id by text."""

    async def say(self, chance: random.Random, count: int) -> None:
        """Messages whose text is their place in the conversation, one of them handed over twice."""
        # Everybody writes once to begin with: a bot may not write first.
        quiet = [customer for customer in self.customers if customer.address not in self.places]
        for customer in quiet + chance.choices(self.customers, k=count):
            place = self.places[customer.address] = self.places.get(customer.address, 0) + 1
            message_id = await customer.say(str(place))
            self.ledger.write(OFFERED, message_id)
            self.said.append((customer, message_id))
        if Can.REDELIVER not in self.peer.cannot and self.said:
            customer, message_id = chance.choice(self.said)
            await customer.redeliver(message_id)
            self.ledger.write(OFFERED, message_id)

    def offered(self) -> list[Entry]:
        """These channels keep a message until it is stored, so in the end each of them must be."""
        entries = read(self.ledger.path)
        return entries + [Entry(ACKNOWLEDGED, e.item, e.at, e.wall) for e in entries]

    def calls(self) -> list[Entry]:
        """What reached the customers, as calls that were answered: one an arrival."""
        found: list[Entry] = []
        for customer in self.customers:
            for arrival in customer.arrivals:
                item = self.queued.get((arrival.text or "").strip(), f"never queued: {arrival.text}")
                epoch = sum(e.item == item and e.kind == CALLED for e in found) + 1
                about = {"epoch": epoch, "outcome": "sent"}
                found += [Entry(kind, item, 0.0, 0.0, about) for kind in (CALLED, ANSWERED)]
        return found


class Rig:
    """`async with Rig(plan, [EmailPeer(), TelegramPeer()]) as rig:`. The gateway is not started yet."""

    def __init__(self, plan: Plan, peers: Iterable[Peer]) -> None:
        self.plan = plan
        self.peers = list(peers)
        self.lines: list[Line] = []
        self.server = PostgresServer()
        self._stack = AsyncExitStack()
        self._number = 0
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def __aenter__(self) -> Rig:
        try:
            # From the main thread: the server asks to die with the thread that made it.
            self.server.start()
            self._stack.callback(self.server.close)
            self.url = self.server.create_database()
            migrate_blocking(self.url)
            keys = generate()
            environ = {"SECRET_KEYS": keys, "DESKCHAT_FOLDER": str(self._folder("page"))}
            for peer in self.peers:
                await peer.open(self._folder(peer.channel))
                self._stack.push_async_callback(peer.close)
                environ |= peer.settings()
                self.lines.append(await self._open(peer, KeyRing.parse(keys)))
            self.node = ChannelNode(
                "a",
                self.plan.folder / "data",
                DATABASE_URL=self.url,
                PORT=str(free_port()),
                FAULTS_PEER="0",
                FAULTS_TTL=QUICK_TTL,
                FAULTS_TIMINGS=orjson.dumps(QUICK_TIMINGS).decode(),
                **environ,
            )
            self._stack.push_async_callback(self.node.kill)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.plan.folder / "a.log").write_text(self.node.tail(20_000))
        for line in self.lines:
            line.ledger.close()
        await self._stack.aclose()

    def _folder(self, name: str) -> Path:
        made = self.plan.folder / name
        made.mkdir()
        return made

    async def _open(self, peer: Peer, keys: KeyRing) -> Line:
        """A tenant with a session that is wanted, and customers who have not written yet."""
        login, line = peer.log_in(), Line(peer, Ledger(self.plan.folder / f"{peer.channel}.ledger"))
        async with self._looking() as db, db.transaction():
            line.tenant = await db.fetchval(
                "INSERT INTO et_tenants (name) VALUES ($1) RETURNING id", peer.channel
            )
            line.session = await db.fetchval(
                """
                INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, metadata, status)
                VALUES ($1, $2, $3, $4::TEXT::JSONB, 'disconnected')
                RETURNING id
                """,
                line.tenant,
                peer.channel,
                login.identifier,
                orjson.dumps(login.metadata).decode(),
            )
            await credentials.put(
                db, keys, tenant_id=line.tenant, session_id=line.session, credentials=login.credentials
            )
            await db.execute(
                """
                INSERT INTO et_session_runtime (session_id, tenant_id, wanted, wanted_at)
                VALUES ($1, $2, 'connected', now())
                """,
                line.session,
                line.tenant,
            )
        line.customers = [peer.customer(f"{name}-{peer.channel}") for name in NAMES]
        return line

    @contextlib.asynccontextmanager
    async def _looking(self) -> AsyncIterator[Any]:
        """A superuser's connection. Raises one of LOST when the server is away."""
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                self.server.superuser_url(self.url), min_size=0, max_size=3, timeout=10, command_timeout=30
            )
            self._stack.callback(self._pool.terminate)
        async with self._pool.acquire() as conn:
            yield conn

    # --- going on

    async def enqueue(self, line: Line, chance: random.Random, count: int) -> None:
        """Messages to customers as a backend would queue them, each with a text of its own."""
        async with self._looking() as db:
            for _ in range(count):
                self._number += 1
                text = f"number {self._number}"
                line.queued[text] = str(
                    await db.fetchval(
                        "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, $4, 'text', NULL, NULL)",
                        line.tenant,
                        line.session,
                        chance.choice(line.customers).address,
                        text,
                    )
                )

    async def life(self, point: str, *, patience: float) -> bool:
        """One life of the gateway up to a fault point (`random`: some moment); whether that is what ended it."""
        self.node.arm("" if point == "random" else point)
        try:
            await self.node.start()
        except AssertionError:
            if self.node.alive or self.node.process is None or self.node.process.returncode != -SIGKILL:
                raise
            return True  # killed before it had said that it had started
        try:
            await self.node.died(patience)
        except TimeoutError:
            await self.node.kill()
            return False
        return True

    async def until(self, sql: str, what: str, *args: Any, within: float = 90) -> None:
        """Until this is true. A database that is away counts as not yet."""

        async def look() -> bool:
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(10), self._looking() as db:
                    return bool(await db.fetchval(sql, *args))
            return False

        try:
            await eventually(look, seconds=within, what=what)
        except AssertionError as error:
            async with self._looking() as db:
                rows = await db.fetch(
                    "SELECT channel_type, status, status_reason FROM et_channel_sessions ORDER BY id"
                )
            stand = "\n".join(" ".join(map(str, row)) for row in rows)
            raise AssertionError(f"{error}\n{stand}\n{self.node.story()[-6000:]}") from None

    async def quiet(self) -> None:
        """Everything that was said is stored, everything queued has an end."""
        for line in self.lines:
            ids = sorted({message_id for _, message_id in line.said})
            await self.until(
                """
                SELECT count(DISTINCT channel_message_id) = $2
                FROM et_messages
                WHERE channel_session_id = $1 AND channel_message_id = ANY ($3)
                """,
                f"{len(ids)} messages of {line.peer.channel} stored",
                line.session,
                len(ids),
                ids,
            )
        await self.until(
            "SELECT NOT EXISTS (SELECT FROM et_outbound_queue WHERE status IN ('queued', 'dispatching'))",
            "an empty queue",
        )

    # --- what became of it

    async def tell(self, report: Report) -> None:
        async with self._looking() as db:
            for line in self.lines:
                await self._tell(report, db, line)

    async def _tell(self, report: Report, db: asyncpg.Connection[Any], line: Line) -> None:
        name = line.peer.channel
        inbound = await db.fetch(
            """
            SELECT channel_message_id, thread_id, content
            FROM et_messages
            WHERE channel_session_id = $1 AND direction = 'inbound'
            ORDER BY occurred_at, id
            """,
            line.session,
        )
        report.add(
            f"{name}: messages",
            checker.inbound(line.offered(), [row["channel_message_id"] for row in inbound]),
        )
        report.zero(
            f"{name}: inversions",
            checker.inversions([(row["thread_id"], int(row["content"])) for row in inbound]),
        )
        queue = await db.fetch(
            "SELECT id, status, claim_epoch, retry_count FROM et_outbound_queue WHERE channel_session_id = $1",
            line.session,
        )
        rows = [QueueRow(str(r["id"]), r["status"], r["claim_epoch"], r["retry_count"]) for r in queue]
        calls = line.calls()
        report.add(f"{name}: sends", checker.outbound(calls, rows))
        report.zero(f"{name}: second sends", checker.second_sends(calls))


def points(chance: random.Random, names: Sequence[str]) -> list[str]:
    """Each of these fault points in turn, at a passing that chance gives."""
    return [name if name == "random" else f"{name}=kill:{chance.randint(1, 3)}" for name in names]
