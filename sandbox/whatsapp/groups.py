"""Changes to a group, and the notices that every member's clients get about them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from sandbox.whatsapp.hub import Hub
from sandbox.whatsapp.nodes import Attribute, Node
from sandbox.whatsapp.world import Account, Group, message_id


def rename(hub: Hub, group: Group, by: Account, name: str) -> None:
    _must_be_member(group, by)
    group.name = name
    now = int(time.time())
    _notice(hub, group, by, group.members, Node("subject", {"subject": name, "s_t": now, "s_o": by.lid}))


def describe(hub: Hub, group: Group, by: Account, description: str) -> None:
    _must_be_member(group, by)
    child = Node("description", {"id": message_id()}, [Node("body", {}, description.encode())])
    _notice(hub, group, by, group.members, child)


def add(hub: Hub, group: Group, by: Account, people: Sequence[Account]) -> None:
    _must_be_member(group, by)
    group.members += [person.lid.user for person in people if person.lid.user not in group.members]
    _notice(hub, group, by, group.members, Node("add", {}, _participants(people)))


def remove(hub: Hub, group: Group, by: Account, people: Sequence[Account]) -> None:
    """Whoever stays gets new sender keys, so that those who left cannot read on. Removing oneself is leaving."""
    _must_be_member(group, by)
    before = list(group.members)
    gone = {person.lid.user for person in people}
    group.members = [user for user in group.members if user not in gone]
    for user in group.members:
        member = hub.world.accounts[user]
        member.own_sender_keys.pop(group.id, None)
        member.key_holders.pop(group.id, None)
    _notice(hub, group, by, before, Node("remove", {}, _participants(people)))


def promote(hub: Hub, group: Group, by: Account, people: Sequence[Account], on: bool) -> None:
    _must_be_member(group, by)
    _notice(hub, group, by, group.members, Node("promote" if on else "demote", {}, _participants(people)))


def _must_be_member(group: Group, by: Account) -> None:
    if by.lid.user not in group.members:
        raise ValueError(f"{by.number} is not a member of {group.name}")


def _participants(people: Iterable[Account]) -> list[Node]:
    return [Node("participant", {"jid": person.lid, "phone_number": person.phone}) for person in people]


def _notice(hub: Hub, group: Group, by: Account, users: Iterable[str], change: Node) -> None:
    for user in users:
        for device in hub.world.accounts[user].devices.values():
            attrs: dict[str, Attribute] = {
                "from": group.jid,
                "type": "w:gp2",
                "id": message_id(),
                "t": int(time.time()),
                "participant": by.lid,
                "participant_pn": by.phone,
                "addressing_mode": "lid",
                "notify": by.name,
            }
            hub.post.put(device, "notification", by.lid.user, Node("notification", attrs, [change]))
    hub.changed()
    hub.pulse.touch()
