"""A world to break: a database server, the scripted platform, gateways, tenants with sessions, and how to look at it all.

Every process of it is its own. The gateways are real; what they talk to writes ledgers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import asyncpg
import orjson

from tests.conftest import migrate_blocking
from tests.faults import checker
from tests.faults.checker import QueueRow
from tests.faults.ledger import Entry, read
from tests.faults.peer import PeerProcess
from tests.faults.proxy import Proxy
from tests.faults.run import Plan
from tests.support.gateway import GatewayProcess
from tests.support.postgres import PostgresServer

LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
"""What a look at a database that is being broken may raise."""

QUICK_TTL = "3,0.5,0.5"
QUICK_TIMINGS = {"poll": 0.2, "tend": 0.1, "recover": 0.2, "backoff": [0.1, 0.2], "owner_alive": 3, "stop": 4}


class Node(GatewayProcess):
    """One gateway that can be killed, stopped, woken and started again at the same address."""

    module = "tests.faults.node"

    def __init__(self, name: str, data_dir: Path, **environ: str) -> None:
        super().__init__(data_dir, **environ)
        self.name = name
        self.proxy: Proxy | None = None
        self.lives = 0

    async def start(self, within: float = 120) -> None:
        await super().start(within)
        self.lives += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def died(self, within: float = 60) -> int:
        """Wait for the end that a fault point brings; the exit code."""
        assert self.process is not None
        async with asyncio.timeout(within):
            code = await self.process.wait()
        await self._ended()
        return code

    def arm(self, faults: str) -> None:
        """For its next life."""
        self.environ["FAULTS"] = faults


@dataclass(frozen=True, slots=True)
class Shop:
    """A tenant's session."""

    tenant: int
    session: int
    channel: str


class World:
    """`async with World(plan) as world:`. With `server` that one is used and left running; else one of its own is made."""

    def __init__(
        self,
        plan: Plan,
        *,
        server: PostgresServer | None = None,
        url: str = "",
        quick: bool | None = None,
        **environ: str,
    ) -> None:
        """`quick`: leases and sweeps as short as tests want them; else as they are in production."""
        self.plan = plan
        self.nodes: list[Node] = []
        self._own = server is None
        self.server = server or PostgresServer()
        self.url = url
        self._quick = plan.short if quick is None else quick
        self._environ = environ
        self._stack = AsyncExitStack()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def __aenter__(self) -> World:
        try:
            if self._own:
                # From the main thread: the server asks to die with the thread that made it.
                self.server.start()
                self._stack.callback(self.server.close)
            if not self.url:
                self.url = self.server.create_database()
                migrate_blocking(self.url)
            self.peer = await self._stack.enter_async_context(PeerProcess(self.plan.folder, self.plan.seed))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            if node.alive:
                with contextlib.suppress(ProcessLookupError):
                    node.wake()
            await node.kill()
            (self.plan.folder / f"{node.name}.log").write_text(node.tail(20_000))
        if self._pool is not None:
            self._pool.terminate()
        await self._stack.aclose()

    # ---- gateways ----

    async def node(
        self,
        name: str = "a",
        *,
        proxied: bool = False,
        data: str = "data",
        start: bool = True,
        **environ: str,
    ) -> Node:
        """Another gateway. `proxied`: it reaches the database through a proxy of its own. `data`: which DATA_DIR."""
        url = self.url
        proxy: Proxy | None = None
        if proxied:
            proxy = await self._stack.enter_async_context(Proxy.to_database(self.url))
            url = proxy.url
        quick = {"FAULTS_TTL": QUICK_TTL, "FAULTS_TIMINGS": orjson.dumps(QUICK_TIMINGS).decode()}
        made = Node(
            name,
            self.plan.folder / data,
            DATABASE_URL=url,
            PORT=str(free_port()),
            FAULTS_PEER=str(self.peer.port),
            **(quick if self._quick else {}) | self._environ | environ,
        )
        made.proxy = proxy
        self.nodes.append(made)
        if start:
            await made.start()
        return made

    async def shops(self, *channels: str) -> list[Shop]:
        """One session for each of these channels, in two tenants by turns, wanted by nobody yet."""
        async with self.looking() as db:
            tenants = [
                await db.fetchval("INSERT INTO et_tenants (name) VALUES ($1) RETURNING id", name)
                for name in ("One", "Two")
            ]
            made = []
            for n, channel in enumerate(channels):
                tenant = tenants[n % 2]
                session = await db.fetchval(
                    """
                    INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status)
                    VALUES ($1, $2, gen_random_uuid()::TEXT, 'disconnected')
                    RETURNING id
                    """,
                    tenant,
                    channel,
                )
                made.append(Shop(tenant, session, channel))
        return made

    async def want(self, shops: Iterable[Shop], wanted: str = "connected") -> None:
        """As the API's `connect` does."""
        async with self.looking() as db:
            for shop in shops:
                await db.execute(
                    """
                    INSERT INTO et_session_runtime AS r (session_id, tenant_id, wanted, wanted_at)
                    VALUES ($1, $2, $3, now())
                    ON CONFLICT (session_id) DO UPDATE SET wanted = excluded.wanted, wanted_at = now()
                    """,
                    shop.session,
                    shop.tenant,
                    wanted,
                )
            await db.execute("SELECT pg_notify('et_sessions', '')")

    async def open_for_business(self, shops: Sequence[Shop], within: float = 60) -> None:
        """Want them, and wait until every one of them is active."""
        await self.want(shops)
        await self.until(
            lambda: self.value(
                "SELECT count(*) = $2 FROM et_channel_sessions WHERE id = ANY ($1::BIGINT[]) AND status = 'active'",
                [shop.session for shop in shops],
                len(shops),
            ),
            within,
            "every session active",
        )

    # ---- looking ----

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[Any]:
        """A superuser's connection, past every proxy. Raises one of LOST when the server is away."""
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                self.server.superuser_url(self.url), min_size=0, max_size=6, timeout=20, command_timeout=60
            )
        async with asyncio.timeout(90), self._pool.acquire() as conn:
            yield conn

    @contextlib.asynccontextmanager
    async def meanwhile(self, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Something that goes on beside the block until its end. It must not have ended by itself."""
        task = asyncio.create_task(work)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task], timeout=30)
        if not task.cancelled():
            task.result()

    async def value(self, sql: str, *args: Any) -> Any:
        async with self.looking() as db:
            return await db.fetchval(sql, *args)

    async def rows(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        async with self.looking() as db:
            found: list[asyncpg.Record] = await db.fetch(sql, *args)
            return found

    async def until(
        self, check: Callable[[], Awaitable[Any]], within: float, what: str, every: float = 0.05
    ) -> float:
        """Seconds until `check` was true. A database that is away counts as not yet."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(*LOST):
                if await check():
                    return time.monotonic() - began
            if time.monotonic() - began > within:
                stories = "\n".join(f"== {node.name}\n{node.story()[-4000:]}" for node in self.nodes)
                raise AssertionError(f"not within {within:g} s: {what}\n{stories}")
            await asyncio.sleep(every)

    # ---- items ----

    async def enqueue(self, shop: Shop, recipient: str, text: str) -> int:
        """One message to send, as a tenant's backend would."""
        found: int = await self.value(
            "SELECT queue_id FROM et_enqueue_outbound(tenant_id => $1, channel_session_id => $2, recipient => $3, "
            "content => $4)",
            shop.tenant,
            shop.session,
            recipient,
            text,
        )
        return found

    async def enqueue_many(self, shop: Shop, messages: Sequence[tuple[str, str]]) -> list[int]:
        """(recipient, text) in order, in one transaction."""
        async with self.looking() as db, db.transaction():
            return [
                await db.fetchval(
                    "SELECT queue_id FROM et_enqueue_outbound(tenant_id => $1, channel_session_id => $2, "
                    "recipient => $3, content => $4)",
                    shop.tenant,
                    shop.session,
                    recipient,
                    text,
                )
                for recipient, text in messages
            ]

    async def settled(self, within: float) -> float:
        """Seconds until nothing waits in the queue any more."""
        return await self.until(
            lambda: self.value(
                "SELECT NOT EXISTS (SELECT FROM et_outbound_queue WHERE status IN ('queued', 'dispatching'))"
            ),
            within,
            "an empty queue",
        )

    async def taken_in(self, within: float) -> float:
        """Seconds until the platform has everything acknowledged."""

        async def check() -> bool:
            return not await self.peer.waiting()

        return await self.until(check, within, "everything acknowledged")

    def ledger(self, *others: Path) -> list[Entry]:
        return read(self.peer.ledger, *others)

    async def queue_rows(self) -> list[QueueRow]:
        rows = await self.rows(
            "SELECT id, status, claim_epoch, retry_count FROM et_outbound_queue ORDER BY id"
        )
        return [QueueRow(str(r["id"]), r["status"], r["claim_epoch"], r["retry_count"]) for r in rows]

    async def stored(self) -> list[str]:
        """The ids of all inbound messages, one for each row."""
        rows = await self.rows("SELECT channel_message_id AS id FROM et_messages WHERE direction = 'inbound'")
        return [row["id"] for row in rows]

    async def inversions_in(self) -> int:
        """Pairs of a thread that were stored, or would be read, the wrong way round."""
        worst = 0
        for order in ("id", "occurred_at, id"):
            rows = await self.rows(
                "SELECT thread_id, raw_payload ->> 'place' AS place, content FROM et_messages "
                f"WHERE direction = 'inbound' ORDER BY {order}"
            )
            found = checker.inversions([(r["thread_id"], int(r["place"] or r["content"])) for r in rows])
            worst = max(worst, found)
        return worst

    def inversions_out(self) -> int:
        """Pairs of a thread that the platform was called with the wrong way round. The text is the place."""
        calls = [e for e in self.ledger() if e.kind == "called"]
        seen: set[str] = set()
        first = [c for c in calls if not (c.item in seen or seen.add(c.item))]  # type: ignore[func-returns-value]
        return checker.inversions(
            [((c.fields["session"], c.fields["thread"]), int(c.fields["place"])) for c in first]
        )


def free_port() -> int:
    """A port that was free a moment ago: the address stays the same through a gateway's lives."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])
