"""WhatsApp's sandbox, a gateway with several paired sessions, a database to kill, and people who write in every way.

The sandbox runs here; gateways, their children and PostgreSQL are processes of their own, and only they are broken.
"""

from __future__ import annotations

import asyncio
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gateway.whatsapp.protocol import LOCK_FILE
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.world import Device, Group
from tests.faults.ledger import Ledger
from tests.faults.whatsapp import child
from tests.faults.whatsapp.witness import Witness
from tests.support.gateway import GatewayProcess
from tests.support.stack import SHOP, Stack

SHORT_WAITS: dict[str, dict[str, float]] = {
    "whatsapp": {"backoff_first": 0.05, "backoff_cap": 0.5, "send": 15.0, "gate_orphan": 20.0},
    "outbound": {"recover": 1.0},
}
"""What is shortened so that hundreds of kills fit into an hour; a child that keeps dying waits up to 60 s otherwise."""
SETTLE = 300.0
START = 120.0
"""Seconds, also on a machine that does much else."""


class Gateway(GatewayProcess):
    module = "tests.faults.whatsapp.gateway"

    async def start(self, within: float = START) -> None:
        await super().start(within)


@dataclass(slots=True)
class Line:
    """A session: its shop's phone, the people who write to it, its group."""

    session: int
    shop: Phone
    device: Device
    folder: Path
    people: list[Phone]
    group: Group

    @property
    def pid(self) -> int | None:
        """The child that holds the session's folder now, as it wrote itself down."""
        try:
            pid = int((self.folder / LOCK_FILE).read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self.folder).encode() in command.split(b"\0") else None


class Rig(Stack):
    """`async with Rig(folder, url, lines=3, ledger=…) as rig:`"""

    process = Gateway

    def __init__(
        self, folder: Path, database_url: str | None, *, lines: int, rng: random.Random, **environ: str
    ) -> None:
        waits = orjson.dumps(SHORT_WAITS).decode()
        super().__init__(folder, database_url, **{"FAULTS_TIMINGS": waits, **environ})
        self.count, self.rng = lines, rng
        self.lines: list[Line] = []

    def client_command(self) -> str:
        return shlex.join([sys.executable, "-m", "tests.faults.whatsapp.child", "gateway.whatsapp.client"])

    async def __aenter__(self) -> Rig:
        await super().__aenter__()
        try:
            self.ledger = Ledger(self.folder / "ledger.jsonl")
            self._stack.callback(self.ledger.close)
            self.witness = Witness(self.sandbox, self.ledger)
            self.witness.watch()
            self._line(self.session, self.shop, self.device)
            for n in range(1, self.count):
                shop = self.sandbox.phone(f"+6012345{6700 + n}", f"Shop {n}")
                session = await self.new_session()
                self._line(session, shop, await self.pair(session, shop))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _line(self, session: int, shop: Phone, device: Device) -> None:
        first = 10 * len(self.lines)
        people = [self.sandbox.person(f"+6018{first + n:07}", f"P{first + n}") for n in range(8)]
        group = self.sandbox.group([people[0], people[1], people[2], shop], f"Team {len(self.lines)}")
        folder = self.folder / "data/whatsapp" / str(session)
        self.witness.folder(session, folder)
        self.lines.append(Line(session, shop, device, folder, people, group))

    # ---- writing ----

    async def write(self, line: Line, text: str | None = None, how: str | None = None) -> str:
        """One message to this session, in one of the ways people write: its id."""
        how = how or self.rng.choices(("lid", "pn", "lid-only", "group", "echo"), (8, 4, 2, 5, 1))[0]
        author = self.rng.choice(line.people)
        text = text or f"{len(self.witness.said)}"
        if how == "group":
            author = self.rng.choice(line.people[:3])
            msg_id = await author.send_group(line.group, text)
        elif how == "echo":
            msg_id = await line.shop.type_text(author, text)
        else:
            # A person's address has one form, as on a real phone: who writes under the phone number goes on so.
            place = {"lid": slice(0, 5), "pn": slice(5, 7), "lid-only": slice(7, 8)}[how]
            author = self.rng.choice(line.people[place])
            msg_id = await author.send_text(line.shop, text, mode=how)  # type: ignore[arg-type]
        self.witness.wrote(msg_id, line.session, text, how)
        return msg_id

    async def burst(self, line: Line, count: int, gap: float = 0.0) -> list[str]:
        ids = []
        for _ in range(count):
            ids.append(await self.write(line))
            if gap:
                await asyncio.sleep(gap)
        return ids

    async def greet(self) -> None:
        """Everybody writes once in every way, so that sessions and group keys exist."""
        ids = []
        for line in self.lines:
            for how in ("lid", "pn", "lid-only", "group", "echo"):
                ids += [await self.write(line, how=how) for _ in range(4)]
        await self.stored(ids, within=60)

    # ---- breaking ----

    def arm_next(self, line: Line, faults: str) -> None:
        """The child that starts next in this session has these armed."""
        child.lay_out(line.folder, faults)

    async def written(self, msg_id: str, within: float = 5.0) -> bool:
        """The moment a message goes on the wire; False when it did not."""
        deadline = time.monotonic() + within
        while not self.sandbox.written(msg_id):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0)
        return True

    async def new_child(self, line: Line, old: int, within: float = 30.0) -> int | None:
        """The next child's process id."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            pid = line.pid
            if pid not in (None, old):
                return pid
            await asyncio.sleep(0.01)
        return None

    async def child_gone(self, pid: int, within: float = 20.0) -> bool:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if not _alive(pid):
                return True
            await asyncio.sleep(0.005)
        return False

    async def drained(self, line: Line, within: float = SETTLE) -> None:
        """Until the session has acknowledged everything that waits for it. Raises AssertionError."""

        async def done() -> bool:
            return not self.sandbox.unacked(line.device)

        await self.until(done, f"session {line.session} has acknowledged everything", within)

    async def online(self, line: Line, logins: int, within: float = SETTLE) -> None:
        """Until the session has logged in more often than that, and listens."""

        async def up() -> bool:
            return self.logins(line) > logins and self.sandbox.is_online(line.device)

        await self.until(up, f"session {line.session} is online again", within)

    def logins(self, line: Line) -> int:
        return sum(jid == line.device.jid for jid in self.sandbox.logins)

    async def restart_gateway(self, faults: str = "") -> None:
        """A new gateway process with these armed in it (its children are well)."""
        self.gateway.environ["FAULTS"] = faults
        await self.gateway.start()

    # ---- looking ----

    async def rows(self) -> list[Any]:
        """Every message of ours that is stored, in the order of storing."""
        return list(
            await self.db.fetch(
                """
                SELECT id, thread_id, channel_session_id AS session, channel_message_id AS item, content, placeholder,
                       raw_payload -> 'possible_loss' IS NOT NULL AS possible_loss
                FROM et_messages
                WHERE NOT is_history AND channel_message_id NOT LIKE 'out\\_%'
                ORDER BY id
                """
            )
        )

    async def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        _, text = await self.gateway.api("GET", "/metrics")
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith((f"{name}{{", f"{name} "))
        )


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


__all__ = ["SHOP", "Line", "Rig"]
