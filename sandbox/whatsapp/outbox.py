"""How a phone's messages get on their way: addressing, encryption for every device, and encrypting anew when one asks.

The half of a phone that talks; `phone.Phone` is the whole and says what people can do with it.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Literal, TypeAlias

from sandbox.whatsapp import bodies, ciphers, media, reading
from sandbox.whatsapp.hub import Hub
from sandbox.whatsapp.inbox import Inbox, Received
from sandbox.whatsapp.nodes import JID, Attribute, Node
from sandbox.whatsapp.protos import e2e
from sandbox.whatsapp.world import Account, Device, Group, Sent, message_id

if TYPE_CHECKING:
    from sandbox.whatsapp.phone import Phone

Mode = Literal["lid", "pn", "lid-only"]
Repair = Literal["yes", "never", "garbage"]
To: TypeAlias = "Phone | Group | str"

_SENT_KEPT = 20_000  # messages a phone can encrypt anew


class Outbox(Inbox):
    def __init__(self, account: Account, hub: Hub) -> None:
        super().__init__(account, hub)
        self.answers_retries = True
        self.retry_delay = 0.0

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def lid(self) -> str:
        """The user part of the LID address."""
        return self.account.lid.user

    @property
    def devices(self) -> list[Device]:
        return list(self.account.devices.values())

    # --- any body ---

    async def send_message(
        self, to: To, message: e2e.Message, *, mode: Mode = "lid", msg_id: str | None = None
    ) -> str:
        """Send any body; its id. The recipient's linked devices, its phone, and this account's own devices get it.

        A repeated `msg_id` is encrypted again under the same id.
        """
        if isinstance(to, Group):
            return await self.send_group(to, message, msg_id=msg_id)
        other, msg_id = self._phone(to), msg_id or message_id()
        attrs, enc_attrs = reading.stanza_attributes(message)
        body = message.SerializeToString()
        self._keep(msg_id, Sent(body, mode, other.account.lid.user, False, attrs, enc_attrs))
        for device in [*other.devices, *self.devices]:
            self._put(device, msg_id)
        self._wrote(msg_id, message, other.number)
        if other is not self:
            other.note(msg_id, message, self.account, self.account.phone, self.number)
        return msg_id

    async def send_group(self, group: Group, message: e2e.Message | str, *, msg_id: str | None = None) -> str:
        """Send to a group this phone is a member of."""
        if self.account.lid.user not in group.members:
            raise ValueError(f"{self.number} is not a member of {group.name}")
        message = bodies.text(message) if isinstance(message, str) else message
        msg_id = msg_id or message_id()
        attrs, enc_attrs = reading.stanza_attributes(message)
        self._keep(msg_id, Sent(message.SerializeToString(), "lid", group.id, True, attrs, enc_attrs))
        self._wrote(msg_id, message, group.id)
        key = ciphers.sender_key(self.account, group.id)
        distribution = key.distribution()
        shared = ciphers.encrypt_group(self.account, group.id, message.SerializeToString())
        holders = self.account.key_holders.setdefault(group.id, set())
        for user in group.members:
            member = self._hub.world.accounts[user]
            for device in member.devices.values():
                parts: list[Node] = []
                if device.lid not in holders:
                    holders.add(device.lid)
                    plain = _distribution(group, distribution).SerializeToString()
                    parts.append(self._enc(device, plain, {}))
                parts.append(Node("enc", {"v": "2", "type": "skmsg", **enc_attrs}, shared))
                self._post(device, Node("message", self._group_attrs(group, msg_id, attrs), parts))
            if member is not self.account:
                phone = self._hub.phone_of(member)
                phone.note(msg_id, message, self.account, self.account.phone, group.id)
        return msg_id

    def send_to_own(self, device: Device, message: e2e.Message) -> str:
        """What a phone says to one of its own linked devices alone (history, answers to its requests)."""
        msg_id, own = message_id(), self.account
        self._keep(
            msg_id, Sent(message.SerializeToString(), "peer", own.lid.user, False, {"type": "text"}, {})
        )
        self._put(device, msg_id)
        return msg_id

    async def send_status(self, to: Phone | str, text: str) -> str:
        """A status update, seen by one contact; it comes from the address all statuses come from."""
        other, msg_id = self._phone(to), message_id()
        attrs: dict[str, Attribute] = {
            "from": JID("status", "broadcast"),
            "participant": self.account.lid,
            "participant_pn": self.account.phone,
            "id": msg_id,
            "t": int(time.time()),
            "type": "text",
            "notify": self.name,
        }
        for device in other.devices:
            enc = self._enc(device, bodies.text(text).SerializeToString(), {})
            self._post(device, Node("message", attrs, [enc]))
        return msg_id

    async def send_garbage(
        self, to: Phone | str, text: str = "repaired", *, repair: Repair = "yes", mode: Mode = "lid"
    ) -> str:
        """A message that no client can decrypt. `repair`: what a retry receipt brings."""
        other, msg_id = self._phone(to), message_id()
        body = bodies.text(text).SerializeToString()
        self._keep(msg_id, Sent(body, mode, other.account.lid.user, False, {"type": "text"}, {}, repair))
        for device in other.devices:
            junk = Node("enc", {"v": "2", "type": "msg"}, os.urandom(96))
            self._post(device, self._stanza(device, msg_id, [junk]))
        return msg_id

    async def send_unavailable(self, to: Phone | str, message: e2e.Message, *, why: str = "view_once") -> str:
        """Tell linked devices that there is a message which only the phone may open, as with "view once"."""
        other, msg_id = self._phone(to), message_id()
        attrs, enc_attrs = reading.stanza_attributes(message)
        self._keep(
            msg_id, Sent(message.SerializeToString(), "lid", other.account.lid.user, False, attrs, enc_attrs)
        )
        for device in other.devices:
            self._post(device, self._stanza(device, msg_id, [Node("unavailable", {"type": why})]))
        self._wrote(msg_id, message, other.number)
        other.note(msg_id, message, self.account, self.account.phone, self.number)
        return msg_id

    # --- repairing ---

    def answer_retry(self, device: Device, msg_id: str, count: int) -> None:
        """Encrypt a message anew, in a fresh session, for the one device that could not read it."""
        sent = self.account.sent.get(msg_id)
        if sent is None or not self.answers_retries or sent.repair == "never":
            return
        if self.retry_delay:
            self._hub.spawn(self._later(device, msg_id, count))
        else:
            self._put(device, msg_id, count)

    async def _later(self, device: Device, msg_id: str, count: int) -> None:
        await asyncio.sleep(self.retry_delay)
        self._put(device, msg_id, count)

    def media_body(self, kind: str, data: bytes, **fields: object) -> e2e.Message:
        """Encrypt and store media; a body that refers to it. `kind`: image, video, audio, document, sticker."""
        stored = media.encrypt(data, kind)
        path = self._hub.media.store(message_id().lower(), stored.blob)
        return bodies.media(kind, stored, path, len(data), **fields)

    # --- stanzas ---

    def _phone(self, to: Phone | str) -> Phone:
        if not isinstance(to, str):
            return to
        account = self._hub.world.account(to.removeprefix("+"))
        if account is None:
            raise ValueError(f"nobody in the sandbox has the number {to}")
        return self._hub.phone_of(account)

    def _wrote(self, msg_id: str, message: e2e.Message, chat: str) -> None:
        own = self.account
        again = any(m.id == msg_id for m in reversed(self.written.items[-200:]))
        self.written.add(
            Received(
                msg_id,
                reading.text_of(message),
                message,
                own.number,
                own.phone,
                chat,
                True,
                again,
                time.time(),
                time.monotonic(),
            )
        )
        self._hub.pulse.touch()

    def _keep(self, msg_id: str, sent: Sent) -> None:
        self.account.sent[msg_id] = sent
        if len(self.account.sent) > _SENT_KEPT:
            del self.account.sent[next(iter(self.account.sent))]

    def _enc(self, device: Device, plain: bytes, attrs: dict[str, str], count: int | None = None) -> Node:
        """`count`: this is the answer to that retry receipt, in a fresh session."""
        kind, data = ciphers.encrypt(self.account, device, plain, fresh=count is not None)
        return Node("enc", {"v": "2", "type": kind, "count": count, **attrs}, data)

    def _put(self, device: Device, msg_id: str, count: int | None = None) -> None:
        """Encrypt a kept message for one device and queue it."""
        sent = self.account.sent[msg_id]
        if sent.group:
            group = self._hub.world.groups[sent.to]
            message = e2e.Message.FromString(sent.body)
            key = ciphers.sender_key(self.account, group.id).distribution()
            message.MergeFrom(_distribution(group, key))
            enc = self._enc(device, message.SerializeToString(), sent.enc_attrs, count)
            self._post(device, Node("message", self._group_attrs(group, msg_id, sent.attrs), [enc]))
            return
        if sent.repair == "garbage":
            junk = Node("enc", {"v": "2", "type": "msg", "count": count}, os.urandom(96))
            self._post(device, self._stanza(device, msg_id, [junk]))
            return
        plain = sent.body
        if device.jid.user == self.account.phone.user and sent.mode != "peer":
            chat = self._hub.world.accounts[sent.to]
            plain = bodies.device_sent(chat.lid, e2e.Message.FromString(sent.body)).SerializeToString()
        self._post(device, self._stanza(device, msg_id, [self._enc(device, plain, sent.enc_attrs, count)]))

    def _stanza(self, device: Device, msg_id: str, parts: list[Node]) -> Node:
        sent, own = self.account.sent[msg_id], self.account
        attrs: dict[str, Attribute]
        if sent.mode == "peer":
            attrs = {"from": own.phone, "category": "peer", "push_priority": "high_force"}
        elif device.jid.user == own.phone.user:
            chat = self._hub.world.accounts[sent.to]
            attrs = {"from": own.lid, "recipient": chat.lid, "peer_recipient_pn": chat.phone}
            attrs["addressing_mode"] = "lid"
        elif sent.mode == "pn":
            attrs = {"from": own.phone, "sender_lid": own.lid, "addressing_mode": "pn"}
        else:
            attrs = {"from": own.lid, "addressing_mode": "lid"}
            if sent.mode == "lid":
                attrs["sender_pn"] = own.phone
        attrs |= {"id": msg_id, "t": int(time.time()), "notify": own.name, **sent.attrs}
        return Node("message", attrs, parts)

    def _group_attrs(self, group: Group, msg_id: str, extra: dict[str, str]) -> dict[str, Attribute]:
        return {
            "from": group.jid,
            "participant": self.account.lid,
            "participant_pn": self.account.phone,
            "addressing_mode": "lid",
            "id": msg_id,
            "t": int(time.time()),
            "notify": self.account.name,
            **extra,
        }

    def _post(self, device: Device, node: Node) -> None:
        self._hub.post.put(device, "message", self.account.lid.user, node)


def _distribution(group: Group, key: bytes) -> e2e.Message:
    message = e2e.Message()
    message.senderKeyDistributionMessage.groupID = str(group.jid)
    message.senderKeyDistributionMessage.axolotlSenderKeyDistributionMessage = key
    return message
