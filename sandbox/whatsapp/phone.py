"""A phone and the person who holds it: everything people do with it, and linking clients.

Every account of the sandbox has one, the customers' as well as the business's own. Its linked devices are real
clients; the phone itself is played here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sandbox.whatsapp import bodies, groups, polls, presence, reading
from sandbox.whatsapp.connection import device_removed
from sandbox.whatsapp.history import Archive
from sandbox.whatsapp.hub import Hub
from sandbox.whatsapp.inbox import Asked, AutoReceipts, ReceiptSeen, Received
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.outbox import Mode, Outbox, Repair, To
from sandbox.whatsapp.protos import e2e, web
from sandbox.whatsapp.world import Account, Device, Group, message_id

__all__ = ["AutoReceipts", "Mode", "Phone", "ReceiptSeen", "Received", "Repair"]


class Phone(Outbox):
    def __init__(self, account: Account, hub: Hub) -> None:
        super().__init__(account, hub)
        self.archive = Archive(self, hub)

    def __repr__(self) -> str:
        return f"Phone({self.number}, {self.name!r})"

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

    def linked(self, device: Device) -> None:
        """A client was linked: a phone sends it what it remembers."""
        self.archive.linked(device)

    async def asked_by_device(self, device: Device, msg_id: str, request: Any) -> None:
        kind = request.peerDataOperationRequestType
        if kind == e2e.HISTORY_SYNC_ON_DEMAND:
            await self.archive.asked(device, msg_id, request.historySyncOnDemandRequest)
            self.asked.add(Asked("history", msg_id, "on demand", device.jid))
        elif kind == e2e.PLACEHOLDER_MESSAGE_RESEND:
            for wanted in request.placeholderMessageResendRequest:
                self._resend(device, msg_id, wanted.messageKey)

    def _resend(self, device: Device, request_id: str, key: Any) -> None:
        """Hand a linked device a message that it was told of but could not get."""
        found = next((m for m in [*self.received.items, *self.written.items] if m.id == key.ID), None)
        self.asked.add(Asked("message", key.ID, "sent" if found else "unknown", device.jid))
        if found is None or not self.answers_retries:
            return
        info = web.WebMessageInfo(messageTimestamp=int(found.at), message=found.message)
        info.key.CopyFrom(key)
        author = self._hub.world.account(found.sender.removeprefix("+"))
        info.pushName = author.name if author is not None else ""
        message = e2e.Message()
        message.protocolMessage.type = e2e.ProtocolMessage.PEER_DATA_OPERATION_REQUEST_RESPONSE_MESSAGE
        answer = message.protocolMessage.peerDataOperationRequestResponseMessage
        answer.peerDataOperationRequestType, answer.stanzaID = e2e.PLACEHOLDER_MESSAGE_RESEND, request_id
        result = answer.peerDataOperationResult.add()
        result.placeholderMessageResendResponse.webMessageInfoBytes = info.SerializeToString()
        self.send_to_own(device, message)

    # --- writing ---

    async def send_text(
        self,
        to: To,
        text: str,
        *,
        mode: Mode = "lid",
        quoted: Received | str | None = None,
        msg_id: str | None = None,
    ) -> str:
        """Write to someone; the message's id. A repeated `msg_id` is encrypted again under the same id."""
        body = bodies.text(text) if quoted is None else self.quote(bodies.text(text), quoted)
        return await self.send_message(to, body, mode=mode, msg_id=msg_id)

    async def type_text(self, to: To, text: str, **options: Any) -> str:
        """The same, by the name of what it is on a business phone: its linked devices get an own echo."""
        return await self.send_text(to, text, **options)

    async def send_image(
        self,
        to: To,
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
        to: To,
        kind: str,
        data: bytes,
        *,
        mode: Mode = "lid",
        msg_id: str | None = None,
        **fields: Any,
    ) -> str:
        """`kind`: image, video, audio, document, sticker; `fields` as in its protobuf (mimetype, fileName, …)."""
        return await self.send_message(to, self.media_body(kind, data, **fields), mode=mode, msg_id=msg_id)

    async def send_voice(self, to: To, data: bytes, seconds: int = 3, **options: Any) -> str:
        """A voice note: audio recorded with the microphone button."""
        body = self.media_body(
            "audio",
            data,
            mimetype="audio/ogg; codecs=opus",
            PTT=True,
            seconds=seconds,
            waveform=bytes(range(64)),
        )
        return await self.send_message(to, body, **options)

    async def send_location(
        self, to: To, latitude: float, longitude: float, name: str = "", address: str = ""
    ) -> str:
        return await self.send_message(to, bodies.location(latitude, longitude, name, address))

    async def send_live_location(
        self, to: To, latitude: float, longitude: float, caption: str = "", *, sequence: int = 1
    ) -> str:
        return await self.send_message(
            to, bodies.live_location(latitude, longitude, caption, sequence=sequence)
        )

    async def send_contacts(self, to: To, *people: tuple[str, str]) -> str:
        """Cards of (name, phone): one is a `contactMessage`, more are a `contactsArrayMessage`."""
        body = bodies.contact(*people[0]) if len(people) == 1 else bodies.contacts(people)
        return await self.send_message(to, body)

    async def send_view_once(self, to: To, kind: str, data: bytes, **fields: Any) -> str:
        """As linked devices are told of it today, see `send_unavailable`; the body itself goes to the phone alone."""
        body = bodies.view_once(self.media_body(kind, data, **fields))
        if isinstance(to, Group):
            return await self.send_message(to, body)
        return await self.send_unavailable(to, body)

    async def forward(self, to: To, message: Received, *, score: int = 1) -> str:
        body = e2e.Message()
        body.CopyFrom(message.message)
        body.ClearField("messageContextInfo")
        return await self.send_message(to, bodies.forwarded(body, score))

    # --- about other messages ---

    async def react(self, to: To, target_id: str, emoji: str) -> str:
        """An empty emoji takes the reaction back."""
        return await self.send_message(to, bodies.reaction(emoji, self.target(to, target_id)))

    async def edit(self, to: To, target_id: str, text: str, *, wrapped: bool = True) -> str:
        return await self.send_message(to, bodies.edit(self.target(to, target_id), text, wrapped=wrapped))

    async def revoke(self, to: To, target_id: str) -> str:
        return await self.send_message(to, bodies.revoke(self.target(to, target_id)))

    def quote(self, body: e2e.Message, quoted: Received | str) -> e2e.Message:
        """The body as an answer to a message that this phone has received or sent."""
        msg_id = quoted if isinstance(quoted, str) else quoted.id
        author, original = self._known(msg_id)
        return bodies.quoting(body, msg_id, author.lid, original)

    def target(self, to: To, target_id: str) -> bodies.Target:
        author, _ = self._known(target_id)
        if isinstance(to, Group):
            return bodies.Target(to.jid, target_id, author is self.account, author.lid)
        return bodies.Target(self._phone(to).account.lid, target_id, author is self.account)

    def _known(self, msg_id: str) -> tuple[Account, e2e.Message]:
        """(author, body) of a message on this phone; of an unknown one, this account and an empty text."""
        for message in reversed(self.received.items):
            if message.id == msg_id:
                return self._hub.world.account(
                    message.sender.removeprefix("+")
                ) or self.account, message.message
        sent = self.account.sent.get(msg_id)
        return self.account, e2e.Message.FromString(sent.body) if sent else bodies.text("")

    # --- polls ---

    async def send_poll(
        self, to: To, question: str, options: Iterable[str], *, choices: int = 1, version: int = 3
    ) -> str:
        """`choices`: how many options one may pick, 0 for any number."""
        return await self.send_message(to, bodies.poll(question, options, choices=choices, version=version))

    async def vote(self, to: To, poll_id: str, options: Sequence[str], *, mode: Mode = "lid") -> str:
        """Vote on a poll this phone has received or sent; no option takes the vote back. Raises ValueError."""
        author, poll = self._known(poll_id)
        form = reading.poll_of(poll)
        if form is None:
            raise ValueError(f"{poll_id} is not a poll on this phone")
        unknown = set(options) - {option.optionName for option in form.options}
        if unknown:
            raise ValueError(f"the poll does not offer {', '.join(sorted(unknown))}")
        voter = self.account.phone if mode == "pn" else self.account.lid
        payload, iv = polls.seal(reading.secret_of(poll), poll_id, author.lid, voter, options)
        # In a chat of two the key's address names the poll's author when that is the other one, else the chat.
        return await self.send_message(to, bodies.vote(self.target(to, poll_id), payload, iv), mode=mode)

    def votes(self, poll_id: str) -> dict[str, list[str]]:
        """Each voter's present choice, by number, as far as this phone has seen the votes."""
        author, poll = self._known(poll_id)
        form = reading.poll_of(poll)
        if form is None:
            raise ValueError(f"{poll_id} is not a poll on this phone")
        names = {bodies.option_hash(option.optionName): option.optionName for option in form.options}
        found: dict[str, list[str]] = {}
        for message in sorted([*self.received, *self.written], key=lambda m: m.monotonic):
            update = reading.unwrap(message.message).pollUpdateMessage
            voter = self._hub.world.account(message.sender.removeprefix("+"))
            if poll_id != update.pollCreationMessageKey.ID or voter is None:
                continue
            chosen = polls.open_vote(
                reading.secret_of(poll),
                poll_id,
                (author.lid, author.phone),
                (voter.lid, voter.phone),
                update.vote.encPayload,
                update.vote.encIV,
            )
            found[voter.number] = [names[choice] for choice in chosen if choice in names]
        return found

    # --- being there, calling ---

    def set_picture(self, data: bytes) -> None:
        """A profile picture; it is not encrypted. Empty takes it away."""
        self.account.picture = self._hub.media.store(message_id().lower(), data) if data else ""
        self._hub.changed()

    async def typing(self, to: To, on: bool = True, *, recording: bool = False) -> None:
        """Show "typing…" or "recording…" to the clients that are online now."""
        presence.typing(self._hub, self.account, self._devices_of(to), on, recording, _group_jid(to))

    async def come_online(self, to: To) -> None:
        presence.here(self._hub, self.account, self._devices_of(to))

    async def go_offline(self, to: To, last_seen: int | None = None) -> None:
        """`last_seen`: seconds since 1970; 0 hides it; None is now."""
        presence.gone(self._hub, self.account, self._devices_of(to), last_seen)

    async def call(self, to: Phone | str, *, video: bool = False) -> str:
        """Ring; the call's id. What clients do about it is in `WhatsAppSandbox.rings`."""
        return presence.ring(self._hub, self.account, self._phone(to).account, video)

    async def hang_up(self, to: Phone | str, call_id: str, reason: str = "timeout") -> None:
        presence.hang_up(self._hub, self.account, self._phone(to).account, call_id, reason)

    def _devices_of(self, to: To) -> list[Device]:
        if isinstance(to, Group):
            members = (self._hub.world.accounts[user] for user in to.members)
            return [device for m in members if m is not self.account for device in m.devices.values()]
        return self._phone(to).devices

    # --- groups ---

    async def rename_group(self, group: Group, name: str) -> None:
        groups.rename(self._hub, group, self.account, name)

    async def describe_group(self, group: Group, description: str) -> None:
        groups.describe(self._hub, group, self.account, description)

    async def add_to_group(self, group: Group, *people: Phone) -> None:
        groups.add(self._hub, group, self.account, [person.account for person in people])

    async def remove_from_group(self, group: Group, *people: Phone) -> None:
        """Removing oneself is leaving."""
        groups.remove(self._hub, group, self.account, [person.account for person in people])

    async def promote_in_group(self, group: Group, *people: Phone, on: bool = True) -> None:
        groups.promote(self._hub, group, self.account, [person.account for person in people], on)


def _group_jid(to: To) -> JID | None:
    return to.jid if isinstance(to, Group) else None
