"""Answers to a client's iq stanzas: keys, devices, numbers, groups, media hosts. Unknown ones get an empty result."""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING

from sandbox.whatsapp.keys import DJB, verify
from sandbox.whatsapp.nodes import JID, LID_SERVER, SERVER, Attribute, Content, Node
from sandbox.whatsapp.signal import Bundle
from sandbox.whatsapp.world import Account, Device, Group, World

if TYPE_CHECKING:
    from sandbox.whatsapp.connection import Connection

_LOW_KEYS = 10  # below this the server asks for more one-time keys


def answer(connection: Connection, node: Node) -> None:
    namespace = node.text("xmlns")
    first = node.children[0] if node.children else Node("")
    device, world = connection.device, connection.hub.world
    content: Content = None
    if namespace == "encrypt" and device is not None:
        if first.tag == "count":
            content = [Node("count", {"value": len(device.one_time)})]
        elif first.tag == "key":
            content = [Node("list", {}, [_bundle_of(connection, user) for user in first.children])]
        elif node.text("type") == "set" and node.find("list"):
            store_keys(device, node)
            connection.hub.changed()
    elif namespace == "usync":
        content = [_usync(world, first)]
    elif namespace == "w:m":
        host = [Node("host", {"hostname": "mmg.whatsapp.net"})]
        content = [
            Node("media_conn", {"auth": "sandbox", "ttl": 300, "auth_ttl": 21600, "max_buckets": 12}, host)
        ]
    elif namespace == "w:g2" and first.tag == "query":
        jid = node.jid("to")
        group = world.groups.get(jid.user) if jid else None
        if group is None:
            connection.send(_error(node, 404, "item-not-found"))
            return
        content = [_group(world, group)]
    elif namespace == "w:g2" and first.tag == "participating":
        mine = [
            g
            for g in world.groups.values()
            if connection.account and connection.account.lid.user in g.members
        ]
        content = [Node("groups", {}, [_group(world, group) for group in mine])]
    elif namespace == "w:profile:picture" and node.text("type") == "get":
        target = world.account_at(node.jid("target"))
        if target is None or not target.picture:
            connection.send(_error(node, 404, "item-not-found"))
            return
        content = [
            Node(
                "picture",
                {
                    "id": _picture_id(target),
                    "type": first.text("type", "image"),
                    "url": f"https://pps.whatsapp.net{target.picture}",
                    "direct_path": target.picture,
                },
            )
        ]
    elif namespace == "privacy" and node.text("type") == "get":
        content = [Node("privacy", {}, [Node("category", {"name": "readreceipts", "value": "all"})])]
    elif namespace == "w:sync:app:state":
        names = [collection.text("name") for collection in first.children]
        content = [Node("sync", {}, [Node("collection", {"name": name, "version": 0}) for name in names])]
    elif namespace == "md" and first.tag == "remove-companion-device":
        connection.send(result(node))
        if connection.account is not None and device is not None:
            connection.hub.desk.forget(connection.account, device)
        return
    elif namespace == "md" and first.tag == "link_code_companion_reg":
        content = connection.hub.desk.link_code(connection, first)
    connection.send(result(node, content))


def result(node: Node, content: Content = None) -> Node:
    sender = node.attrs.get("to") or SERVER
    return Node("iq", {"from": sender, "id": node.text("id"), "type": "result"}, content)


def _error(node: Node, code: int, text: str) -> Node:
    reply = result(node, [Node("error", {"code": code, "text": text})])
    reply.attrs["type"] = "error"
    return reply


# --- Signal keys ---


def store_keys(device: Device, node: Node) -> None:
    """Take what a client uploads. Raises ValueError when its signed key is not signed by its identity."""
    signed = node.get("skey")
    device.registration = int.from_bytes(node.get("registration").data, "big")
    device.identity = node.get("identity").data
    device.signed_id = int.from_bytes(signed.get("id").data, "big")
    device.signed_key, device.signature = signed.get("value").data, signed.get("signature").data
    for key in node.get("list").children:
        device.one_time.append((int.from_bytes(key.get("id").data, "big"), key.get("value").data))
    if not verify(device.identity, DJB + device.signed_key, device.signature):
        raise ValueError(f"{device.jid} uploaded a signed key with a wrong signature")


def key_nodes(bundle: Bundle) -> list[Node]:
    """The parts that a bundle has both in a key fetch and in a retry receipt."""

    def key(tag: str, number: int, value: bytes, signature: bytes | None = None) -> Node:
        parts = [Node("id", {}, number.to_bytes(3, "big")), Node("value", {}, value)]
        if signature is not None:
            parts.append(Node("signature", {}, signature))
        return Node(tag, {}, parts)

    nodes = [
        Node("type", {}, DJB),
        Node("identity", {}, bundle.identity),
        key("skey", bundle.signed_id, bundle.signed_key, bundle.signature),
    ]
    if bundle.one_time_id is not None and bundle.one_time_key is not None:
        nodes.append(key("key", bundle.one_time_id, bundle.one_time_key))
    return nodes


def _bundle_of(connection: Connection, wanted: Node) -> Node:
    jid = wanted.jid("jid")
    account = connection.hub.world.account_at(jid)
    if jid is None or account is None or (jid.device and jid.device not in account.devices):
        return Node("user", {"jid": jid}, [Node("error", {"code": 404, "text": "item-not-found"})])
    if jid.device:
        bundle = account.devices[jid.device].bundle()
        ask_for_keys(connection, account.devices[jid.device])
    else:
        bundle = account.keys.bundle()
    connection.hub.changed()
    registration = Node("registration", {}, bundle.registration.to_bytes(4, "big"))
    return Node("user", {"jid": jid, "t": int(time.time())}, [registration, *key_nodes(bundle)])


def ask_for_keys(connection: Connection, device: Device) -> None:
    """Tell a device whose one-time keys run out to upload new ones."""
    target = connection.hub.post.online.get(device.jid)
    if target is not None and len(device.one_time) == _LOW_KEYS:
        count = Node("count", {"value": len(device.one_time)})
        attrs = {"from": SERVER, "type": "encrypt", "id": f"keys-{time.time_ns()}", "t": int(time.time())}
        target.send(Node("notification", attrs, [count]))


# --- who is who ---


def _usync(world: World, query: Node) -> Node:
    wanted = {node.tag for node in query.get("query").children}
    users = [_user(world, user, wanted) for user in query.get("list").children]
    echoed: dict[str, Attribute] = {
        name: query.attrs[name] for name in ("sid", "mode", "context", "last", "index") if name in query.attrs
    }
    return Node("usync", echoed, [Node("list", {}, users)])


def _user(world: World, user: Node, wanted: set[str]) -> Node:
    jid, contact = user.jid("jid"), user.find("contact")
    typed = contact.data.decode() if contact is not None else ""
    if typed:
        jid = JID(typed.partition("@")[0].removeprefix("+"))
    account = world.account_at(jid)
    parts: list[Node] = []
    if "contact" in wanted:
        parts.append(Node("contact", {"type": "in" if account else "out"}, typed.encode() or None))
    if account is not None and "devices" in wanted:
        parts.append(Node("devices", {}, [Node("device-list", {}, _devices(account))]))
    if account is not None and "lid" in wanted:
        parts.append(Node("lid", {"val": account.lid}))
    if account is not None and "status" in wanted:
        parts.append(Node("status", {}, account.about.encode() or None))
    if account is not None and "picture" in wanted and account.picture:
        parts.append(Node("picture", {"id": _picture_id(account)}))
    phone = account.phone if account is not None and jid is not None and jid.server == LID_SERVER else None
    return Node("user", {"jid": jid, "pn_jid": phone}, parts)


def _picture_id(account: Account) -> int:
    return zlib.crc32(account.picture.encode())


def _devices(account: Account) -> list[Node]:
    linked = [Node("device", {"id": number, "key-index": number}) for number in account.devices]
    return [Node("device", {"id": 0}), *linked]


def _group(world: World, group: Group) -> Node:
    members = [world.accounts[user] for user in group.members]
    now = int(time.time())
    participants = [
        Node(
            "participant",
            {"jid": member.lid, "phone_number": member.phone, "type": None if index else "superadmin"},
        )
        for index, member in enumerate(members)
    ]
    owner = members[0].phone
    attrs = {
        "id": group.id,
        "creator": owner,
        "creation": now,
        "subject": group.name,
        "s_t": now,
        "s_o": owner,
        "addressing_mode": "lid",
    }
    return Node("group", attrs, list(participants))
