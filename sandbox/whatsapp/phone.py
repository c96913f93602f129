"""A phone and the person who holds it: sends, reads, answers retry receipts, links clients.

Every account of the sandbox has one, the customers' as well as the business's own. Its linked devices are real
clients; the phone itself is played here.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sandbox.whatsapp import bodies, ciphers, media
from sandbox.whatsapp.connection import device_removed
from sandbox.whatsapp.hub import Event, Hub
from sandbox.whatsapp.ledger import Ledger
from sandbox.whatsapp.nodes import JID, Attribute, Node
from sandbox.whatsapp.protos import e2e
from sandbox.whatsapp.queries import key_nodes
from sandbox.whatsapp.signal import AlreadyRead, DecryptError, SenderKey
from sandbox.whatsapp.world import Account, Device, Group, Sent, message_id

if TYPE_CHECKING:
    from sandbox.whatsapp.connection import Connection

Mode = Literal["lid", "pn", "lid-only"]
Repair = Literal["yes", "never", "garbage"]
AutoReceipts = Literal["delivered", "read"] | None

_SENT_KEPT = 20_000  # messages a phone can encrypt anew
_SEEN_BY_PHONE = ("peer",)  # categories of stanzas that are not for people


@dataclass(frozen=True)
class Received:
    """One message as a phone got it. `duplicate`: this phone already had that id from that account."""

    id: str
    text: str
    message: e2e.Message
    sender: str  # E.164 of the account that wrote it
    device: JID  # the linked device that sent it
    chat: str  # E.164 of the other side, or the group's id
    from_me: bool  # a copy of what a linked device of this very account sent
    duplicate: bool
    at: float
    monotonic: float


@dataclass(frozen=True)
class ReceiptSeen:
    """One receipt that a linked device sent for a message of this phone; kind as on the wire, else `delivery`."""

    id: str
    kind: str
    device: JID
    at: float
    monotonic: float


class Phone:
    def __init__(self, account: Account, hub: Hub) -> None:
        self.account = account
        self.received: Ledger[Received] = Ledger()
        self.receipts: Ledger[ReceiptSeen] = Ledger()
        self.typing_seen: Ledger[str] = Ledger()
        self.undecryptable: Ledger[str] = Ledger()
        self.answers_retries = True
        self.retry_delay = 0.0
        self._hub = hub
        self._had: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        return f"Phone({self.number}, {self.name!r})"

    @property
    def number(self) -> str:
        return self.account.number

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

    @property
    def auto_receipts(self) -> str | None:
        """What is sent back for every message: `delivered`, `read` (both), or nothing."""
        return self.account.auto_receipts

    @auto_receipts.setter
    def auto_receipts(self, value: AutoReceipts) -> None:
        self.account.auto_receipts = value

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

    # --- receipts ---

    async def deliver(self, msg_id: str) -> None:
        """Say that a message arrived here (two grey ticks)."""
        self._receipt(msg_id, None)

    async def read(self, msg_id: str) -> None:
        """Say that a message was read (two blue ticks)."""
        self._receipt(msg_id, "read")

    async def played(self, msg_id: str) -> None:
        self._receipt(msg_id, "played")

    def _receipt(self, msg_id: str, kind: str | None) -> None:
        message = next((m for m in reversed(self.received.items) if m.id == msg_id), None)
        if message is None:
            raise ValueError(f"{self.number} has not received {msg_id}")
        author = self._hub.world.account(message.sender.removeprefix("+"))
        if author is None:
            return
        group = self._hub.world.groups.get(message.chat)
        attrs: dict[str, Attribute] = {"id": msg_id, "t": int(time.time()), "type": kind}
        if group is None:
            attrs |= {"from": self.account.lid, "sender_pn": self.account.phone}
        else:
            attrs |= {"from": group.jid, "participant": self.account.lid}
        for device in author.devices.values():
            self._hub.post.put(device, "receipt", self.account.lid.user, Node("receipt", dict(attrs)))

    # --- reading ---

    async def next_message(self, timeout: float = 10) -> Received:
        """The next message nobody has asked for yet. Raises TimeoutError."""
        return await self.received.next(timeout)

    async def wait_for_text(self, part: str, timeout: float = 10) -> Received:
        """The first message, also an earlier one, with this in its text. Raises TimeoutError."""
        return await self.received.wait_for(lambda m: part in m.text, timeout=timeout)

    def media_bytes(self, message: e2e.Message) -> bytes:
        """What a received image, video, … contains, decrypted."""
        found = bodies.media_of(message)
        if found is None:
            raise ValueError("the message carries no media")
        kind, part = found
        token = part.directPath.removeprefix("/v/t62/").partition("?")[0]
        blob = self._hub.media(token)
        if blob is None:
            raise ValueError("the media was never uploaded here")
        return media.decrypt(blob, part.mediaKey, kind)

    def media_body(self, kind: str, data: bytes, **fields: Any) -> e2e.Message:
        """Encrypt and store media; a body that refers to it."""
        stored = media.encrypt(data, kind)
        path = self._hub.store_media(message_id().lower(), stored.blob)
        return bodies.media(kind, stored, path, len(data), **fields)

    def note(
        self,
        msg_id: str,
        message: e2e.Message,
        author: Account,
        device: JID,
        chat: str,
    ) -> None:
        """A message is on this phone's screen."""
        from_me = author is self.account
        if message.HasField("deviceSentMessage"):
            destination = self._hub.world.account(JID.parse(message.deviceSentMessage.destinationJID).user)
            chat = destination.number if destination else message.deviceSentMessage.destinationJID
            message = message.deviceSentMessage.message
        duplicate = (author.lid.user, msg_id) in self._had
        self._had.add((author.lid.user, msg_id))
        text = bodies.text_of(message)
        self.received.add(
            Received(
                msg_id,
                text,
                message,
                author.number,
                device,
                chat,
                from_me,
                duplicate,
                time.time(),
                time.monotonic(),
            )
        )
        self._answer(msg_id, author)

    def _answer(self, msg_id: str, author: Account) -> None:
        if author is self.account or self.auto_receipts is None or not author.devices:
            return
        self._receipt(msg_id, None)
        if self.auto_receipts == "read":
            self._receipt(msg_id, "read")

    def _note_again(self, msg_id: str, author: Account) -> None:
        """The same ciphertext once more: a phone shows it once, and says again that it has it."""
        same = (m for m in self.received if m.id == msg_id and m.sender == author.number)
        first = next(same, None)
        if first is not None:
            self.received.add(replace(first, duplicate=True, at=time.time(), monotonic=time.monotonic()))
            self._answer(msg_id, author)

    def take(self, device: Device, stanza: Node, enc: Node, chat: Account, connection: Connection) -> None:
        """A ciphertext for this phone from a linked device, its own account's or another's."""
        author = self._hub.world.account(device.jid.user)
        if author is None:
            return
        try:
            message = e2e.Message.FromString(ciphers.decrypt(self.account, device, enc))
        except AlreadyRead:
            self._note_again(stanza.text("id"), author)
            return
        except DecryptError as error:
            self._ask_again(device, stanza, enc, connection, str(error))
            return
        self._hub.changed()
        if message.HasField("senderKeyDistributionMessage"):
            self._learn_key(message, device)
        if stanza.text("category") not in _SEEN_BY_PHONE:
            self.note(stanza.text("id"), message, author, device.jid, author.number)

    def take_group(
        self,
        device: Device,
        stanza: Node,
        own: Node | None,
        shared: Node | None,
        group: Group,
        connection: Connection,
    ) -> None:
        """A group message from a linked device: perhaps its sender key, and the ciphertext all members share."""
        author = self._hub.world.account(device.jid.user)
        if author is None:
            return
        message: e2e.Message | None = None
        try:
            if own is not None:
                message = e2e.Message.FromString(ciphers.decrypt(self.account, device, own))
                if message.HasField("senderKeyDistributionMessage"):
                    self._learn_key(message, device)
            if shared is not None and author is not self.account:
                plain = ciphers.decrypt_group(self.account, group.id, device, shared)
                message = e2e.Message.FromString(plain)
        except AlreadyRead:
            self._note_again(stanza.text("id"), author)
            return
        except DecryptError as error:
            failed = shared or own or Node("enc")
            self._ask_again(device, stanza, failed, connection, str(error))
            return
        self._hub.changed()
        if message is not None and author is not self.account:
            self.note(stanza.text("id"), message, author, device.jid, group.id)

    def _learn_key(self, message: e2e.Message, device: Device) -> None:
        part = message.senderKeyDistributionMessage
        group_id = part.groupID.partition("@")[0]
        key = SenderKey.from_distribution(part.axolotlSenderKeyDistributionMessage)
        self.account.sender_keys[group_id, device.lid] = key

    def _ask_again(self, device: Device, stanza: Node, enc: Node, connection: Connection, why: str) -> None:
        """What a phone does with a message it cannot read: a retry receipt, with keys from the second on."""
        msg_id, count = stanza.text("id"), enc.number("count") + 1
        self.undecryptable.add(msg_id)
        self._hub.events.add(Event("undecryptable", f"{msg_id} at {self.number}: {why}", device.jid))
        bundle = self.account.keys.bundle()
        retry = Node("retry", {"count": count, "id": msg_id, "t": int(time.time()), "v": "1"})
        parts = [retry, Node("registration", {}, bundle.registration.to_bytes(4, "big"))]
        if count > 1:
            parts.append(Node("keys", {}, key_nodes(bundle)))
        to = stanza.jid("to")
        attrs: dict[str, Attribute] = {"id": msg_id, "type": "retry", "t": int(time.time())}
        if to is not None and to.server == "g.us":
            attrs |= {"from": to, "participant": self.account.lid}
        else:
            attrs["from"] = self.account.lid
            if self._hub.world.account(device.jid.user) is self.account:
                attrs["recipient"] = to
            else:
                attrs["sender_pn"] = self.account.phone
        self._hub.post.put(device, "receipt", self.account.lid.user, Node("receipt", attrs, parts))

    def receipt_from(self, device: Device, kind: str, ids: list[str], stanza: Node) -> None:
        for msg_id in ids:
            self.receipts.add(ReceiptSeen(msg_id, kind, device.jid, time.time(), time.monotonic()))

    def saw_typing(self, device: Device, state: str) -> None:
        self.typing_seen.add(state)

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
