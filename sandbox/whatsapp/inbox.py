"""What arrives at a phone: messages from clients, read or asked for again, and the receipts that go back.

The half of a phone that listens; `phone.Phone` is the whole.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from sandbox.whatsapp import ciphers, media, mediaretry, reading
from sandbox.whatsapp.hub import Event, Hub
from sandbox.whatsapp.ledger import Ledger
from sandbox.whatsapp.nodes import GROUP_SERVER, JID, Attribute, Node
from sandbox.whatsapp.protos import e2e
from sandbox.whatsapp.queries import key_nodes
from sandbox.whatsapp.signal import AlreadyRead, DecryptError, SenderKey
from sandbox.whatsapp.world import Account, Device, Group

AutoReceipts = Literal["delivered", "read"] | None

_NOT_FOR_PEOPLE = "peer"  # category of what a client says to its own phone


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

    @property
    def kind(self) -> str:
        """text, image, voice, poll, vote, reaction, …: see `reading.kind_of`."""
        return reading.kind_of(self.message)

    @property
    def about(self) -> dict[str, Any]:
        """What the kind adds to the text: options of a poll, a place, what a reaction is about."""
        return reading.describe(self.message)


@dataclass(frozen=True)
class ReceiptSeen:
    """One receipt that a linked device sent for a message of this phone; kind as on the wire, else `delivery`."""

    id: str
    kind: str
    device: JID
    at: float
    monotonic: float


@dataclass(frozen=True)
class Asked:
    """Something that an own linked device wanted from the phone; `answer` is what it got."""

    what: str  # media, history, message
    id: str  # the message it is about
    answer: str
    device: JID


class Inbox:
    def __init__(self, account: Account, hub: Hub) -> None:
        self.account = account
        self.received: Ledger[Received] = Ledger()
        self.written: Ledger[Received] = Ledger()  # what the person wrote on this phone
        self.receipts: Ledger[ReceiptSeen] = Ledger()
        self.typing_seen: Ledger[str] = Ledger()
        self.undecryptable: Ledger[str] = Ledger()
        self.asked: Ledger[Asked] = Ledger()
        self.answers_media_retries: mediaretry.Answer = "yes"
        self._hub = hub
        self._had: set[tuple[str, str]] = set()
        self.seen: set[str] = set()  # ids of what was read here
        self.last_typing: tuple[str, str, float] = ("", "", 0.0)  # number, state, monotonic time

    @property
    def number(self) -> str:
        return self.account.number

    @property
    def auto_receipts(self) -> str | None:
        """What is sent back for every message: `delivered`, `read` (both), or nothing."""
        return self.account.auto_receipts

    @auto_receipts.setter
    def auto_receipts(self, value: AutoReceipts) -> None:
        self.account.auto_receipts = value

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
        if kind == "read":
            self.seen.add(msg_id)
            self._hub.pulse.touch()
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
        """What an image, video, voice note, … contains, decrypted; also after the server has dropped it."""
        found = reading.media_of(message)
        if found is None:
            raise ValueError("the message carries no media")
        kind, part = found
        blob = self._hub.media.read(part.directPath)
        if blob is None:
            raise ValueError("the media was never uploaded here")
        return media.decrypt(blob, part.mediaKey, kind)

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
        text = reading.text_of(message)
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
        self._hub.pulse.touch()

    def _answer(self, msg_id: str, author: Account) -> None:
        if author is self.account or self.auto_receipts is None or not author.devices:
            return
        self._receipt(msg_id, None)
        if self.auto_receipts == "read":
            self._receipt(msg_id, "read")

    def _note_again(self, msg_id: str, author: Account) -> bool:
        """The same message once more: a phone shows it once, and says again that it has it. False: never seen."""
        same = (m for m in self.received if m.id == msg_id and m.sender == author.number)
        first = next(same, None)
        if first is not None:
            self.received.add(replace(first, duplicate=True, at=time.time(), monotonic=time.monotonic()))
            self._answer(msg_id, author)
        return first is not None

    def take(self, device: Device, stanza: Node, enc: Node) -> None:
        """A ciphertext for this phone from a linked device, its own account's or another's."""
        author = self._hub.world.account(device.jid.user)
        if author is None:
            return
        try:
            message = e2e.Message.FromString(ciphers.decrypt(self.account, device, enc))
        except AlreadyRead as error:
            # Another message under a key that was used already: two threads of the client's Signal session raced.
            if not self._note_again(stanza.text("id"), author) and stanza.text("category") != _NOT_FOR_PEOPLE:
                self._ask_again(device, stanza, enc, str(error) or "key used before")
            return
        except DecryptError as error:
            self._ask_again(device, stanza, enc, str(error))
            return
        self._hub.changed()
        if message.HasField("senderKeyDistributionMessage"):
            self._learn_key(message, device)
        if author is self.account and self._is_request(device, stanza.text("id"), message):
            return
        if stanza.text("category") != _NOT_FOR_PEOPLE:
            self.note(stanza.text("id"), message, author, device.jid, author.number)

    def _is_request(self, device: Device, msg_id: str, message: e2e.Message) -> bool:
        """Whether a message from an own device is a question to the phone; it is answered then.

        A client library without peer messages can only write it to its own number: that is answered too.
        """
        change = reading.unwrap(message).protocolMessage
        if change.type != e2e.ProtocolMessage.PEER_DATA_OPERATION_REQUEST_MESSAGE:
            return False
        if (
            self.account.lid.user,
            msg_id,
        ) not in self._had:  # a copy may come for each address of the own phone
            self._had.add((self.account.lid.user, msg_id))
            self._hub.spawn(self.asked_by_device(device, msg_id, change.peerDataOperationRequestMessage))
        return True

    async def asked_by_device(self, device: Device, msg_id: str, request: Any) -> None:
        """A linked device wants something of its phone, which `Phone` can answer."""

    def take_group(
        self,
        device: Device,
        stanza: Node,
        own: Node | None,
        shared: Node | None,
        group: Group,
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
            self._ask_again(device, stanza, failed, str(error))
            return
        self._hub.changed()
        if message is not None and author is not self.account:
            self.note(stanza.text("id"), message, author, device.jid, group.id)

    def _learn_key(self, message: e2e.Message, device: Device) -> None:
        part = message.senderKeyDistributionMessage
        group_id = part.groupID.partition("@")[0]
        key = SenderKey.from_distribution(part.axolotlSenderKeyDistributionMessage)
        self.account.sender_keys[group_id, device.lid] = key

    def forget_sessions(self) -> None:
        """Lose every Signal session: whatever clients send next must be asked for again."""
        self.account.sessions.clear()
        self.account.sender_keys.clear()

    def _ask_again(self, device: Device, stanza: Node, enc: Node, why: str) -> None:
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
        if to is not None and to.server == GROUP_SERVER:
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
        self._hub.pulse.touch()

    def media_asked(self, device: Device, stanza: Node) -> None:
        """A linked device could not download a medium: put it back, or say that it is gone."""
        msg_id = stanza.text("id")
        known = [*self.received.items, *self.written.items]
        message = next((m.message for m in reversed(known) if m.id == msg_id), None)
        found = reading.media_of(message) if message is not None else None
        path = found[1].directPath if found else ""
        key = found[1].mediaKey if found else b""
        node, answer = mediaretry.answer(
            stanza, key, self.answers_media_retries, lambda: self._hub.media.upload_again(path)
        )
        self.asked.add(Asked("media", msg_id, answer, device.jid))
        if node is not None:
            node.attrs |= {"from": self.account.phone, "t": int(time.time())}
            self._hub.post.put(device, "notification", self.account.lid.user, node)

    def saw_typing(self, device: JID, state: str) -> None:
        self.typing_seen.add(state)
        author = self._hub.world.account(device.user)
        self.last_typing = (author.number if author else "", state, time.monotonic())
        self._hub.pulse.touch()
