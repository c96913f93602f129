"""The platform that scripted channels talk to: a process of its own that no fault is aimed at, with its own ledger.

It offers messages until they are acknowledged, and writes down every call before it answers, drops, refuses or ignores it.
`python -m tests.faults.peer LEDGER SEED` prints its port; the harness talks to it through `PeerProcess`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from tests.faults import wire
from tests.faults.ledger import ACKNOWLEDGED, ANSWERED, CALLED, OFFERED, Ledger

ROOT = Path(__file__).resolve().parents[2]
BATCH = 50

OUTCOMES = ("dropped", "not_sent", "refused", "hang", "lost")
"""What can happen to a call instead of `sent`. `dropped`: it goes out and the connection breaks before the answer.
`lost`: the connection breaks and nothing has gone out. `hang`: it goes out, and no answer ever comes."""


@dataclass
class _Session:
    number: str
    waiting: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Offered and not acknowledged, oldest first."""
    connections: set[_Connection] = field(default_factory=set)
    current: _Connection | None = None

    def look(self) -> None:
        """There is something new to offer, to each that is connected."""
        for connection in self.connections:
            connection.fresh.set()


@dataclass(eq=False)
class _Connection:
    number: int
    session: _Session
    owner: str
    kind: str
    writer: asyncio.StreamWriter
    told: set[str] = field(default_factory=set)
    fresh: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def say(self, message: dict[str, Any]) -> None:
        if not self.over and not self.writer.transport.is_closing():
            self.writer.write(wire.pack(message))

    def cut(self) -> None:
        self.over = True
        self.writer.transport.abort()


class Peer:
    def __init__(self, ledger: Ledger, seed: int) -> None:
        self._ledger = ledger
        self._chance = random.Random(f"{seed}/peer")
        self._sessions: dict[str, _Session] = {}
        self._connections = itertools.count(1)
        self._shares: dict[str, float] = {}
        self._delay = (0.0, 0.0)
        self._gone_out: dict[tuple[int, int], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: Counter[str] = Counter()
        self._quiet = asyncio.Event()
        self._talking: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=wire.LIMIT)
        print(server.sockets[0].getsockname()[1], flush=True)
        # Ends with the harness, whose pipe this is.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
        server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await wire.receive(reader)
            while first is not None and "control" in first:
                writer.write(wire.pack(self._control(first)))
                first = await wire.receive(reader)
            if first is not None:
                await self._talk(first, reader, writer)
        finally:
            writer.transport.abort()

    # ---- the harness ----

    def _control(self, order: dict[str, Any]) -> dict[str, Any]:
        match order["control"]:
            case "behave":
                self._shares = {name: float(order["shares"].get(name, 0)) for name in OUTCOMES}
                self._delay = tuple(order["delay"])
            case "offer":
                session = self._session(order["session"])
                for item in order["items"]:
                    session.waiting[item["id"]] = item | {"ms": int(time.time() * 1000)}
                session.look()
            case "traffic":
                self._talking = asyncio.create_task(self._traffic(order))
            case "hush":
                self._quiet.set()
            case "status":
                waiting = sum(len(s.waiting) for s in self._sessions.values())
                talking = self._talking is not None and not self._talking.done()
                return {"waiting": waiting, "talking": talking, "calls": dict(self._calls)}
        return {"done": True}

    async def _traffic(self, order: dict[str, Any]) -> None:
        """Messages of many senders at a rate, whatever the gateway does meanwhile: an open loop."""
        chance = random.Random(f"{order['seed']}/traffic")
        places: Counter[tuple[int, int]] = Counter()
        sessions: list[int] = order["sessions"]
        began = time.monotonic()
        self._quiet.clear()
        for n in itertools.count():
            if self._quiet.is_set():
                return
            due = began + n / order["rate"]
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            session, sender = chance.choice(sessions), chance.randrange(order["senders"])
            places[session, sender] += 1
            place = places[session, sender]
            item = {"id": f"{session}.{sender}.{place}", "sender": sender, "place": place}
            self._control({"control": "offer", "session": session, "items": [item]})

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _session(self, number: object) -> _Session:
        return self._sessions.setdefault(str(number), _Session(str(number)))

    # ---- a channel ----

    async def _talk(
        self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        session = self._session(hello["hello"])
        connection = _Connection(
            next(self._connections), session, hello["owner"], hello["kind"], writer
        )  # fmt: skip
        if session.current is not None and hello["kind"] == "scripted":
            # As WhatsApp does: one device, one connection, the newest. What the older one still had under way is void.
            session.current.say({"op": "replaced"})
            session.current.cut()
        session.current = connection
        session.connections.add(connection)
        self._note("connected", connection)
        connection.say({"op": "welcome", "connection": connection.number})
        offering = asyncio.create_task(self._offer(connection))
        try:
            while (message := await wire.receive(reader)) is not None and not connection.over:
                self._take(connection, message)
        finally:
            connection.over = True
            session.connections.discard(connection)
            offering.cancel()
            if session.current is connection:
                session.current = None
            self._note("disconnected", connection)

    def _note(self, kind: str, connection: _Connection) -> None:
        self._ledger.write(
            kind, connection.session.number, owner=connection.owner, connection=connection.number
        )

    async def _offer(self, connection: _Connection) -> None:
        """Everything that is not acknowledged, in order, to whoever is connected."""
        session = connection.session
        while True:
            connection.fresh.clear()
            items = [i for i in session.waiting.values() if i["id"] not in connection.told]
            for start in range(0, len(items), BATCH):
                batch = items[start : start + BATCH]
                self._ledger.write_many(OFFERED, [(i["id"], {"owner": connection.owner}) for i in batch])
                connection.told.update(i["id"] for i in batch)
                connection.say({"op": "offer", "items": batch})
                await connection.writer.drain()
            await connection.fresh.wait()

    def _take(self, connection: _Connection, message: dict[str, Any]) -> None:
        match message["op"]:
            case "ack":
                self._ledger.write_many(ACKNOWLEDGED, [(i, {}) for i in message["items"]])
                for item in message["items"]:
                    connection.session.waiting.pop(item, None)
            case "send":
                self._spawn(self._called(connection, message))
            case "resolve":
                key = (message["item"], message["epoch"])
                known = self._gone_out.get(key) if connection.kind == "scripted" else None
                found = "cannot_tell" if connection.kind != "scripted" else "sent" if known else "not_sent"
                connection.say({"op": "answer", "id": message["id"], "outcome": found, "message_id": known})

    async def _called(self, connection: _Connection, message: dict[str, Any]) -> None:
        item, epoch = message["item"], message["epoch"]
        outcome = self._outcome()
        self._calls[outcome] += 1
        fields = {
            "epoch": epoch, "session": connection.session.number, "owner": connection.owner,
            "connection": connection.number, "thread": message["recipient"], "place": message["content"],
        }  # fmt: skip
        # Down before anything else can happen to it: what is in the ledger was called, whatever the gateway believes.
        self._ledger.write(CALLED, item, **fields)
        if outcome in ("sent", "dropped", "hang"):
            self._gone_out[item, epoch] = f"P{item}.{epoch}"
        low, high = self._delay
        if high:
            await asyncio.sleep(self._chance.uniform(low, high))
        if outcome == "hang":
            return
        said = "not_sent" if outcome == "lost" else outcome
        self._ledger.write(ANSWERED, item, epoch=epoch, outcome=said)
        if outcome in ("dropped", "lost"):
            connection.cut()
            return
        connection.say(
            {"op": "answer", "id": message["id"], "outcome": outcome, "message_id": self._gone_out.get((item, epoch))}
        )  # fmt: skip

    def _outcome(self) -> str:
        dice = self._chance.random()
        for name, share in self._shares.items():
            if dice < share:
                return name
            dice -= share
        return "sent"


class PeerProcess:
    """`async with PeerProcess(folder, seed) as peer:`; every method is one order and its answer."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.ledger = folder / "peer.ledger"
        self._seed = seed
        self.port = 0
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> PeerProcess:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.peer", str(self.ledger), str(self._seed),
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(await asyncio.wait_for(self._process.stdout.readline(), 30))
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def _order(self, control: str, **fields: Any) -> dict[str, Any]:
        async with self._lock, asyncio.timeout(30):
            self._writer.write(wire.pack({"control": control, **fields}))
            answer: dict[str, Any] = orjson.loads(await self._reader.readline())
        return answer

    async def behave(self, *, delay: tuple[float, float] = (0.0, 0.0), **shares: float) -> None:
        """From now on so large a share of calls ends so (see OUTCOMES); the others are sent after `delay`."""
        assert set(shares) <= set(OUTCOMES), shares
        await self._order("behave", shares=shares, delay=delay)

    async def offer(self, session: int, items: list[dict[str, Any]]) -> None:
        """Messages as `{"id", "sender", "place"}`."""
        await self._order("offer", session=session, items=items)

    async def traffic(self, sessions: list[int], *, rate: float, senders: int, seed: str) -> None:
        """From now on `rate` messages a second in all, of so many senders in each session, until `hush`."""
        await self._order("traffic", sessions=sessions, rate=rate, senders=senders, seed=seed)

    async def hush(self) -> None:
        """No new messages; those not acknowledged are still offered."""
        await self._order("hush")

    async def waiting(self) -> int:
        """Messages not acknowledged, or not offered yet."""
        answer = await self._order("status")
        return int(answer["waiting"]) + int(answer["talking"])

    async def calls(self) -> dict[str, int]:
        """How many calls ended how."""
        answer = await self._order("status")
        return dict(answer["calls"])


if __name__ == "__main__":
    with Ledger(sys.argv[1]) as opened:
        asyncio.run(Peer(opened, int(sys.argv[2])).serve())
