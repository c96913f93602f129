"""A phone and the person who holds it: sends, reads, answers retry receipts, links clients.

Every account of the sandbox has one, the customers' as well as the business's own. Its linked devices are real
clients; the phone itself is played here.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, Literal

from sandbox.whatsapp import bodies, ciphers, media
from sandbox.whatsapp.connection import device_removed
from sandbox.whatsapp.hub import Hub
from sandbox.whatsapp.inbox import AutoReceipts, Inbox, ReceiptSeen, Received
from sandbox.whatsapp.nodes import JID, Attribute, Node
from sandbox.whatsapp.protos import e2e
from sandbox.whatsapp.world import Account, Device, Group, Sent, message_id

Mode = Literal["lid", "pn", "lid-only"]
Repair = Literal["yes", "never", "garbage"]

_SENT_KEPT = 20_000  # messages a phone can encrypt anew


__all__ = ["AutoReceipts", "Mode", "Phone", "ReceiptSeen", "Received", "Repair"]


class Phone(Inbox):
    def __init__(self, account: Account, hub: Hub) -> None:
        super().__init__(account, hub)
        self.answers_retries = True
        self.retry_delay = 0.0

    def __repr__(self) -> str:
        return f"Phone({self.number}, {self.name!r})"

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

    # --- linking ---

    async def scan(self, qr: str) -> Device:
        """Scan a QR code by its text. Raises PairingRefused."""
        return await self._hub.desk.scan(qr, self.account)

    async def enter_code(self, code: str) -> Device:
        """Type the eight characters that the client shows. Raises PairingRefused."""
        return await self._hub.desk.enter_code(code, self.account)

    async def unlink(self, device: Device) -> None:
        """ "Log out" in the phone's list of linked devices."""
        self._hub.desk.forget(self.account, device)
        connection = self._hub.post.online.get(device.jid)
        if connection is not None:
            await connection.last_words(device_removed())

    # --- sending ---

    async def send_text(
        self,
        to: Phone | str,
        text: str,
        *,
        mode: Mode = "lid",
        quoted: Received | str | None = None,
        msg_id: str | None = None,
    ) -> str:
        """Write to someone; the message's id. A repeated `msg_id` is encrypted again under the same id."""
        body = bodies.text(text) if quoted is None else self._quote(text, quoted)
        return await self.send_message(to, body, mode=mode, msg_id=msg_id)

    async def type_text(self, to: Phone | str, text: str, **options: Any) -> str:
        """The same, by the name of what it is on a business phone: its linked devices get an own echo."""
        return await self.send_text(to, text, **options)

    async def send_image(
        self,
        to: Phone | str,
        data: bytes,
        caption: str | None = None,
        *,
        mimetype: str = "image/png",
        mode: Mode = "lid",
        msg_id: str | None = None,
        **fields: Any,
    ) -> str:
        body = self.media_body("image", data, caption=caption, mimetype=mimetype, **fields)
        return await self.send_message(to, body, mode=mode, msg_id=msg_id)

    async def send_media(
        self,
        to: Phone | str,
        kind: str,
        data: bytes,
        *,
        mode: Mode = "lid",
        msg_id: str | None = None,
        **fields: Any,
    ) -> str:
        """`kind`: image, video, audio, document, sticker; `fields` as in its protobuf (mimetype, fileName, …)."""
        return await self.send_message(to, self.media_body(kind, data, **fields), mode=mode, msg_id=msg_id)

    async def react(self, to: Phone | str, target_id: str, emoji: str) -> str:
        other = self._phone(to)
        mine = target_id in self.account.sent
        return await self.send_message(to, bodies.reaction(emoji, other.account.lid, target_id, from_me=mine))

    async def edit(self, to: Phone | str, target_id: str, text: str) -> str:
        return await self.send_message(to, bodies.edit(self._phone(to).account.lid, target_id, text))

    async def revoke(self, to: Phone | str, target_id: str) -> str:
        return await self.send_message(to, bodies.revoke(self._phone(to).account.lid, target_id))

    async def send_message(
        self, to: Phone | str, message: e2e.Message, *, mode: Mode = "lid", msg_id: str | None = None
    ) -> str:
        """Send any body. The recipient's linked devices, its phone, and this account's own devices get it."""
        other, msg_id = self._phone(to), msg_id or message_id()
        attrs, enc_attrs = bodies.stanza_attributes(message)
        body = message.SerializeToString()
        self._keep(msg_id, Sent(body, mode, other.account.lid.user, False, attrs, enc_attrs))
        for device in [*other.devices, *self.devices]:
            self._put(device, msg_id)
        if other is not self:
            other.note(msg_id, message, self.account, self.account.phone, self.number)
        return msg_id

    async def send_group(self, group: Group, message: e2e.Message | str, *, msg_id: str | None = None) -> str:
        """Send to a group this phone is a member of."""
        if self.account.lid.user not in group.members:
            raise ValueError(f"{self.number} is not a member of {group.name}")
        message = bodies.text(message) if isinstance(message, str) else message
        msg_id = msg_id or message_id()
        attrs, enc_attrs = bodies.stanza_attributes(message)
        self._keep(msg_id, Sent(message.SerializeToString(), "lid", group.id, True, attrs, enc_attrs))
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

    async def typing(self, to: Phone | str, on: bool = True) -> None:
        """Show "typing…" to the clients that are online now."""
        for device in self._phone(to).devices:
            connection = self._hub.post.online.get(device.jid)
            if connection is not None and connection.listening:
                state = Node("composing" if on else "paused")
                attrs: dict[str, Attribute] = {"from": self.account.lid, "sender_pn": self.account.phone}
                connection.send(Node("chatstate", attrs, [state]))

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

    def media_body(self, kind: str, data: bytes, **fields: Any) -> e2e.Message:
        """Encrypt and store media; a body that refers to it."""
        stored = media.encrypt(data, kind)
        path = self._hub.store_media(message_id().lower(), stored.blob)
        return bodies.media(kind, stored, path, len(data), **fields)

    # --- stanzas ---

    def _phone(self, to: Phone | str) -> Phone:
        if isinstance(to, Phone):
            return to
        account = self._hub.world.account(to.removeprefix("+"))
        if account is None:
            raise ValueError(f"nobody in the sandbox has the number {to}")
        return self._hub.phone_of(account)

    def _quote(self, text: str, quoted: Received | str) -> e2e.Message:
        msg_id = quoted if isinstance(quoted, str) else quoted.id
        received = next((m for m in self.received if m.id == msg_id), None)
        if received is not None:
            author = self._hub.world.account(received.sender.removeprefix("+")) or self.account
            return bodies.quote(text, msg_id, author.lid, received.message)
        sent = self.account.sent.get(msg_id)
        original = e2e.Message.FromString(sent.body) if sent else bodies.text("")
        return bodies.quote(text, msg_id, self.account.lid, original)

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
        if device.jid.user == self.account.phone.user:
            chat = self._hub.world.accounts[sent.to]
            plain = bodies.device_sent(chat.lid, e2e.Message.FromString(sent.body)).SerializeToString()
        self._post(device, self._stanza(device, msg_id, [self._enc(device, plain, sent.enc_attrs, count)]))

    def _stanza(self, device: Device, msg_id: str, parts: list[Node]) -> Node:
        sent, own = self.account.sent[msg_id], self.account
        attrs: dict[str, Attribute]
        if device.jid.user == own.phone.user:
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
