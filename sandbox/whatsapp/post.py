"""The server's post office: every stanza for a device waits in its mailbox until the device acknowledges it.

A stanza is written when its device is online and active, and again after every login until a receipt or an
acknowledgement with its id arrives, as WhatsApp does. Nothing here encrypts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox.whatsapp.ledger import Ledger
from sandbox.whatsapp.nodes import JID, SERVER, Node
from sandbox.whatsapp.world import Device, Queued, World

if TYPE_CHECKING:
    from sandbox.whatsapp.connection import Connection


@dataclass(frozen=True)
class Ack:
    """A message that a client took responsibility for."""

    id: str
    device: JID
    author: str
    how: str  # receipt, ack
    at: float  # wall clock, seconds
    monotonic: float


@dataclass(frozen=True)
class Written:
    """A stanza put on the wire."""

    id: str
    device: JID
    offline: bool
    at: float
    monotonic: float


class PostOffice:
    def __init__(self, world: World, changed: Callable[[], None]) -> None:
        self._world = world
        self._changed = changed
        self.online: dict[JID, Connection] = {}
        self.acks: Ledger[Ack] = Ledger()
        self.retries: Ledger[Ack] = Ledger()
        self.logins: Ledger[JID] = Ledger()
        self.written: dict[str, list[Written]] = {}
        self._acks_of: dict[str, list[Ack]] = {}

    def put(self, device: Device, kind: str, author: str, node: Node) -> None:
        """Queue a stanza, and write it at once when its device listens."""
        item = Queued(self._world.next_stanza(), kind, node.text("id"), author, node)
        device.mailbox.put(item)
        self._changed()
        connection = self.online.get(device.jid)
        if connection is not None and connection.listening:
            self._write(connection, device, item, offline=False)

    def flush(self, connection: Connection, device: Device) -> None:
        """After a login: everything that still waits, between WhatsApp's offline markers."""
        waiting = list(device.mailbox.waiting.values())
        kinds = [item.kind for item in waiting]
        preview = {
            "count": len(waiting),
            "message": kinds.count("message"),
            "receipt": kinds.count("receipt"),
            "notification": kinds.count("notification"),
            "appdata": 0,
        }
        connection.send(Node("ib", {"from": SERVER}, [Node("offline_preview", preview)]))
        for item in waiting:
            self._write(connection, device, item, offline=True)
        connection.active = True
        connection.send(Node("ib", {"from": SERVER}, [Node("offline", {"count": len(waiting)})]))

    def catch_up(self, connection: Connection, device: Device) -> None:
        """After a silence: what was queued meanwhile."""
        for item in list(device.mailbox.waiting.values()):
            if item.number not in connection.seen:
                self._write(connection, device, item, offline=False)

    def _write(self, connection: Connection, device: Device, item: Queued, *, offline: bool) -> None:
        connection.seen.add(item.number)
        node = (
            Node(item.node.tag, item.node.attrs | {"offline": "1"}, item.node.content)
            if offline
            else item.node
        )

        def note() -> None:
            if item.kind == "message":
                self.written.setdefault(item.id, []).append(
                    Written(item.id, device.jid, offline, time.time(), time.monotonic())
                )

        connection.send(node, note)

    def settle(self, device: Device, kind: str, item_id: str, author: str | None, how: str) -> None:
        """The device has answered for a stanza.

        A retry receipt takes the stanza off the queue too: the sender's phone will queue another. The client's
        plain acknowledgement of the stanza it could not read may come after that and must not remove the new one.
        """
        mailbox = device.mailbox
        if how == "ack" and kind == "message" and mailbox.retried.get(item_id):
            mailbox.retried[item_id] -= 1
            return
        item = mailbox.find(kind, item_id, author)
        writer = item.author if item is not None else author or ""
        ack = Ack(item_id, device.jid, writer, how, time.time(), time.monotonic())
        if how == "retry":
            self.retries.add(ack)
            if item is not None:
                mailbox.retried[item_id] += 1
        if item is None:
            return
        mailbox.remove(item)
        self._changed()
        if kind == "message" and how != "retry":
            self.acks.add(ack)
            self._acks_of.setdefault(item_id, []).append(ack)

    def acked(self, item_id: str, device: JID | None = None) -> Ack | None:
        """A receipt if there is one, else a bare acknowledgement, which says no more than "do not send it again"."""
        found = [a for a in self._acks_of.get(item_id, ()) if device in (None, a.device)]
        return next((a for a in found if a.how == "receipt"), found[0] if found else None)
