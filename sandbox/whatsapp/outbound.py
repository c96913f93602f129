"""What a client sends: messages to phones and to other clients, receipts, typing. Each goes where WhatsApp would put it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sandbox.whatsapp.faults import SendAction, SendFault
from sandbox.whatsapp.hub import Call, Event, Hub
from sandbox.whatsapp.nodes import GROUP_SERVER, JID, Attribute, Node
from sandbox.whatsapp.world import Account, Device, Group

if TYPE_CHECKING:
    from sandbox.whatsapp.connection import Connection


def _now() -> int:
    return int(time.time())


# --- messages ---


def message(hub: Hub, connection: Connection, account: Account, device: Device, node: Node) -> None:
    to = node.jid("to")
    if to is None:
        raise ValueError("a message without an address")
    recipient = hub.world.account(to.user)
    fault = hub.faults.for_send(recipient.lid.user if recipient else to.user)
    outcome = "accepted"
    if fault is not None:
        outcome = f"nack:{fault.code}" if fault.action is SendAction.NACK else fault.action.value
    repeat = any(enc.number("count") for enc in _enc_nodes(node))
    hub.calls.add(Call(node.text("id"), to, device.jid, outcome, repeat, time.time(), time.monotonic()))
    if fault is None or fault.action in (SendAction.SWALLOW_ACK, SendAction.DELAY_ACK):
        if to.server == GROUP_SERVER:
            _to_group(hub, account, device, node, to)
        else:
            _to_person(hub, account, device, node, to)
    _acknowledge(hub, connection, node, to, fault)


def _enc_nodes(node: Node) -> list[Node]:
    holders = [node, *(node.find("participants") or Node("")).children]
    return [enc for holder in holders for enc in holder.children if enc.tag == "enc"]


def _acknowledge(hub: Hub, connection: Connection, node: Node, to: JID, fault: SendFault | None) -> None:
    attrs: dict[str, Attribute] = {"class": "message", "id": node.text("id"), "from": to, "t": _now()}
    if fault is None:
        connection.send(Node("ack", attrs))
    elif fault.action is SendAction.NACK:
        connection.send(Node("ack", attrs | {"error": fault.code}))
    elif fault.action is SendAction.DELAY_ACK:

        async def later() -> None:
            await asyncio.sleep(fault.seconds)
            connection.send(Node("ack", attrs))

        hub.spawn(later())


def _copies(node: Node, to: JID) -> list[tuple[JID, Node]]:
    """(device, its ciphertext): the fan-out, or the single one of a repeat."""
    participants = node.find("participants")
    if participants is not None:
        pairs = [(copy.jid("jid"), copy.find("enc")) for copy in participants.children]
    else:
        pairs = [(to, node.find("enc"))]
    return [(jid, enc) for jid, enc in pairs if jid is not None and enc is not None]


def _to_person(hub: Hub, account: Account, device: Device, node: Node, to: JID) -> None:
    chat = hub.world.account(to.user)
    for jid, enc in _copies(node, to):
        owner = hub.world.account(jid.user)
        if owner is None:
            continue
        if jid.device == 0:
            hub.phone_of(owner).take(device, node, enc)
        elif jid.device in owner.devices:
            attrs: dict[str, Attribute] = {"from": device.lid, "addressing_mode": "lid"}
            if owner is account:
                attrs |= {"recipient": to, "peer_recipient_pn": chat.phone if chat else None}
            else:
                attrs |= {"sender_pn": account.phone}
            _relay(hub, account, owner.devices[jid.device], node, attrs, [enc])


def _to_group(hub: Hub, account: Account, device: Device, node: Node, to: JID) -> None:
    group = hub.world.groups.get(to.user)
    if group is None:
        return
    copies = dict(_copies(node, to)) if node.find("participants") else {}
    shared = node.find("enc")
    if shared is not None and shared.text("type") != "skmsg":  # a repeat for one device
        target = node.jid("participant")
        copies, shared = ({target: shared} if target else {}), None
    for member in _members(hub, group):
        if member is not account or member.lid in copies or member.phone in copies:
            own = copies.get(member.lid) or copies.get(member.phone)
            if own is not None or (shared is not None and member is not account):
                hub.phone_of(member).take_group(device, node, own, shared, group)
        for other in member.devices.values():
            if other is device:
                continue
            own = copies.get(other.lid) or copies.get(other.jid)
            parts = [enc for enc in (own, shared) if enc is not None]
            if not parts or (shared is None and own is None):
                continue
            attrs: dict[str, Attribute] = {
                "from": to,
                "participant": device.lid,
                "participant_pn": account.phone,
                "addressing_mode": "lid",
            }
            _relay(hub, account, other, node, attrs, parts)


def _members(hub: Hub, group: Group) -> list[Account]:
    return [hub.world.accounts[user] for user in group.members]


def _relay(
    hub: Hub,
    account: Account,
    target: Device,
    node: Node,
    attrs: dict[str, Attribute],
    parts: list[Node],
) -> None:
    """Pass a ciphertext on to another real client."""
    common: dict[str, Attribute] = {"id": node.text("id"), "t": _now(), "notify": account.name}
    common |= {name: node.attrs[name] for name in ("type", "edit", "category") if name in node.attrs}
    identity = node.find("device-identity")
    content = parts + ([identity] if identity is not None else [])
    hub.post.put(target, "message", account.lid.user, Node("message", attrs | common, content))


# --- receipts and presence ---


def receipt(hub: Hub, connection: Connection, account: Account, device: Device, node: Node) -> None:
    to, kind = node.jid("to"), node.text("type") or "delivery"
    ids = [node.text("id")]
    listed = node.find("list")
    if listed is not None:
        ids += [item.text("id") for item in listed.children]
    if hub.faults.lose_receipts:
        hub.events.add(Event("receipt_lost", node.text("id"), device.jid))
        return
    answer: dict[str, Attribute] = {
        "class": "receipt",
        "id": node.text("id"),
        "from": to,
        "type": node.attrs.get("type"),
        "participant": node.attrs.get("participant"),
    }
    connection.send(Node("ack", answer))
    if kind == "server-error":  # not about the message but about its media, and meant for the own phone
        hub.phone_of(account).media_asked(device, node)
        return
    writer = node.jid("participant") or to
    author = hub.world.account_at(writer)
    if author is None or writer is None:
        return
    if kind == "sender":  # an echo of our own: its author is our own account
        author = account
    if kind not in ("read", "read-self", "played", "played-self"):
        how = "retry" if kind == "retry" else "receipt"
        for item_id in ids:
            hub.post.settle(device, "message", item_id, author.lid.user, how)
    hub.phone_of(author).receipt_from(device, kind, ids, node)
    if kind == "retry":
        if writer.device == 0:
            hub.phone_of(author).answer_retry(device, ids[0], node.get("retry").number("count", 1))
        elif writer.device in author.devices:
            _relay_retry(hub, device, author.devices[writer.device], node)
    elif author is not account:
        for other in author.devices.values():
            attrs: dict[str, Attribute] = {
                "from": to if to is not None and to.server == GROUP_SERVER else device.lid,
                "participant": device.lid if to is not None and to.server == GROUP_SERVER else None,
                "sender_pn": account.phone,
                "id": node.text("id"),
                "t": _now(),
                "type": node.attrs.get("type"),
            }
            hub.post.put(other, "receipt", account.lid.user, Node("receipt", attrs, node.content))


def _relay_retry(hub: Hub, device: Device, target: Device, node: Node) -> None:
    attrs: dict[str, Attribute] = {"from": device.lid, "id": node.text("id"), "type": "retry", "t": _now()}
    to = node.jid("to")
    if to is not None and to.server == GROUP_SERVER:
        attrs |= {"from": to, "participant": device.lid}
    hub.post.put(target, "receipt", device.lid.user, Node("receipt", attrs, node.content))


def presence(hub: Hub, device: Device, node: Node) -> None:
    to = node.jid("to")
    detail = node.children[0].tag if node.children else node.text("type", "available")
    media = node.children[0].text("media") if node.children else ""
    hub.events.add(Event(node.tag, " ".join(filter(None, (detail, str(to or ""), media))), device.jid))
    account = hub.world.account_at(to)
    if node.tag == "chatstate" and account is not None:
        hub.phone_of(account).saw_typing(device.jid, detail)
