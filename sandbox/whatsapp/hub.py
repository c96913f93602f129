"""What the parts of the sandbox share: the world, the post office, the phones, the faults and the records."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.whatsapp.faults import Faults
from sandbox.whatsapp.ledger import Ledger, Pulse
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.post import PostOffice
from sandbox.whatsapp.store import MediaStore
from sandbox.whatsapp.world import Account, World

if TYPE_CHECKING:
    from sandbox.whatsapp.pairing import PairingDesk
    from sandbox.whatsapp.phone import Phone


@dataclass(frozen=True)
class Call:
    """One message stanza that a client put on the wire, repeats and refused ones included."""

    id: str
    to: JID
    device: JID
    outcome: str  # accepted, nack:<code>, swallow, swallow_ack, delay_ack
    repeat: bool  # encrypted anew after a retry receipt
    at: float
    monotonic: float


@dataclass(frozen=True)
class Event:
    """Anything else worth looking at: presence, typing, decryption failures, refused hosts."""

    kind: str
    detail: str
    device: JID | None = None
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Ring:
    """One thing that happened to a call. `device`: the client that did it, None for the caller's phone."""

    call: str
    what: str  # offer, terminate, reject, …
    caller: str  # number
    to: str  # number
    device: JID | None = None
    detail: str = ""
    at: float = field(default_factory=time.time)
    monotonic: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Transfer:
    """One upload to or download from the media server, and how it was answered."""

    what: str  # upload, download
    token: str
    status: int
    size: int
    at: float = field(default_factory=time.time)


@dataclass
class PairingTerms:
    """How a pairing is offered; short lifetimes make time-out tests quick."""

    refs: int = 6
    lifetime: float = 180.0  # seconds until the server closes an unused pairing connection


class Hub:
    def __init__(self, world: World, folder: Path, changed: Callable[[], None]) -> None:
        self.world = world
        self.folder = folder
        self.changed = changed
        self.pulse = Pulse()
        self.post = PostOffice(world, changed)
        self.media = MediaStore(folder)
        self.faults = Faults()
        self.terms = PairingTerms()
        self.phones: dict[str, Phone] = {}  # by lid user
        self.calls: Ledger[Call] = Ledger()
        self.events: Ledger[Event] = Ledger()
        self.rings: Ledger[Ring] = Ledger()
        self.transfers: Ledger[Transfer] = Ledger()
        self.desk: PairingDesk
        self._tasks: set[asyncio.Task[None]] = set()

    def phone_of(self, account: Account) -> Phone:
        return self.phones[account.lid.user]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background; its failure becomes an event that tests can see."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.events.add(Event("task_failed", repr(error)))

    async def stop_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
