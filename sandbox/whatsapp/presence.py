"""What passes at once or not at all: typing, being online, and calls. Calls alone wait for a client that is away."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from sandbox.whatsapp.hub import Event, Hub, Ring
from sandbox.whatsapp.nodes import JID, Attribute, Node
from sandbox.whatsapp.world import Account, Device, message_id


def typing(
    hub: Hub, account: Account, devices: Iterable[Device], on: bool, recording: bool, group: JID | None
) -> None:
    state = Node("composing" if on else "paused", {"media": "audio" if recording else None})
    attrs: dict[str, Attribute] = {"from": account.lid, "sender_pn": account.phone}
    if group is not None:
        attrs = {"from": group, "participant": account.lid, "participant_pn": account.phone}
    _now(hub, devices, Node("chatstate", attrs, [state]))


def here(hub: Hub, account: Account, devices: Iterable[Device]) -> None:
    _now(hub, devices, Node("presence", {"from": account.lid, "sender_pn": account.phone}))


def gone(hub: Hub, account: Account, devices: Iterable[Device], last_seen: int | None) -> None:
    last = "deny" if last_seen == 0 else int(time.time()) if last_seen is None else last_seen
    attrs: dict[str, Attribute] = {"from": account.lid, "type": "unavailable", "last": last}
    _now(hub, devices, Node("presence", attrs))


def _now(hub: Hub, devices: Iterable[Device], node: Node) -> None:
    for device in devices:
        connection = hub.post.online.get(device.jid)
        if connection is not None and connection.listening:
            connection.send(Node(node.tag, dict(node.attrs), node.content))


# --- calls ---


def ring(hub: Hub, caller: Account, to: Account, video: bool) -> str:
    call_id = secrets.token_hex(16).upper()
    parts = [Node("audio", {"enc": "opus", "rate": 16000})]
    if video:
        parts.append(Node("video", {"enc": "vp8", "dec": "vp8"}))
    offer = Node("offer", {**_names(caller, call_id), "device_class": "2016"}, parts)
    hub.rings.add(Ring(call_id, "offer", caller.number, to.number, detail="video" if video else "audio"))
    _to_devices(hub, caller, to, offer)
    return call_id


def hang_up(hub: Hub, caller: Account, to: Account, call_id: str, reason: str) -> None:
    hub.rings.add(Ring(call_id, "terminate", caller.number, to.number, detail=reason))
    _to_devices(hub, caller, to, Node("terminate", {**_names(caller, call_id), "reason": reason}))


def _names(caller: Account, call_id: str) -> dict[str, Attribute]:
    return {"call-id": call_id, "call-creator": caller.lid, "caller_pn": caller.phone}


def _to_devices(hub: Hub, caller: Account, to: Account, child: Node) -> None:
    for device in to.devices.values():
        attrs: dict[str, Attribute] = {
            "from": caller.lid,
            "id": message_id(),
            "t": int(time.time()),
            "notify": caller.name,
            "platform": "android",
            "version": "2.26.1.70",
        }
        hub.post.put(device, "call", caller.lid.user, Node("call", attrs, [child]))


def from_client(hub: Hub, account: Account, device: Device, node: Node) -> None:
    """What a client says about a call: mostly that it declines it."""
    to, child = node.jid("to"), node.children[0] if node.children else Node("")
    creator = hub.world.account_at(child.jid("call-creator") or to)
    number = creator.number if creator else str(to or "")
    hub.rings.add(Ring(child.text("call-id"), child.tag, number, account.number, device.jid))
    hub.events.add(Event("call", f"{child.tag} {child.text('call-id')}", device.jid))
