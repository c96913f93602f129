"""What a phone remembers from before a client was linked, and how it hands it over: history sync in chunks.

A phone sends it after a pairing, and whenever a client asks for more. Nothing here knows a socket.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sandbox.whatsapp import bodies, media
from sandbox.whatsapp.hub import Event, Hub
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.protos import e2e, history, web
from sandbox.whatsapp.world import Account, Device, Group, message_id

if TYPE_CHECKING:
    from sandbox.whatsapp.phone import Phone

_KEYS_LIMIT = 60.0  # seconds a client may take after a pairing until it has uploaded its keys
_RECENT = 90 * 86_400
_BOOTSTRAP = 5  # newest messages per chat that the first chunk brings
KIND = "md-msg-hist"


@dataclass(frozen=True, slots=True)
class Past:
    """One message of before, in the order of `at` (seconds since 1970)."""

    id: str
    at: int
    from_me: bool
    message: e2e.Message
    author: Account | None = None  # who wrote it in a group
    pushname: str = ""


@dataclass
class PastChat:
    """A chat with one person or a group; `messages` from the oldest to the newest."""

    account: Account | None
    group: Group | None = None
    messages: list[Past] = field(default_factory=list)
    unread: int = 0

    @property
    def jid(self) -> JID:
        if self.group is not None:
            return self.group.jid
        assert self.account is not None
        return self.account.lid


@dataclass
class Terms:
    """How history is handed over."""

    after_pairing: bool = True
    per_chunk: int = 2_000
    address: str = "lid"  # how people's chats are named: `lid` or `pn`
    on_demand: bool = True  # whether requests of clients are answered


class Archive:
    """One phone's memory of before."""

    def __init__(self, phone: Phone, hub: Hub) -> None:
        self.chats: list[PastChat] = []
        self.terms = Terms()
        self._phone = phone
        self._hub = hub

    # --- filling it ---

    def chat(self, other: Phone | Group) -> PastChat:
        """The remembered chat with somebody, made when it is new."""
        group = other if isinstance(other, Group) else None
        account = None if isinstance(other, Group) else other.account
        for chat in self.chats:
            if chat.group is group and chat.account is account:
                return chat
        self.chats.append(PastChat(account, group))
        return self.chats[-1]

    def remember(
        self,
        other: Phone | Group,
        message: e2e.Message | str,
        at: int,
        *,
        from_me: bool = False,
        author: Phone | None = None,
        msg_id: str | None = None,
    ) -> str:
        """Add one message of before; its id. Older ones first."""
        body = bodies.text(message) if isinstance(message, str) else message
        writer = author.account if author is not None else None
        name = "" if from_me else (author or other).name
        past = Past(msg_id or message_id(), at, from_me, body, writer, name)
        self.chat(other).messages.append(past)
        return past.id

    def fill(self, people: Iterable[Phone], each: int, *, until: int, apart: int = 60) -> int:
        """Make up `each` texts with every one of them, `apart` seconds between two, the last at `until`; how many."""
        count = 0
        for number, person in enumerate(people):
            chat, name = self.chat(person), person.name
            for index in range(each):
                from_me = index % 3 == 2
                words = f"{'answer' if from_me else 'question'} {index} in chat {number}"
                at = until - (each - 1 - index) * apart
                chat.messages.append(
                    Past(
                        f"3EB0A{number:06X}{index:07X}",
                        at,
                        from_me,
                        bodies.text(words),
                        None,
                        "" if from_me else name,
                    )
                )
            count += each
        return count

    # --- handing it over ---

    def linked(self, device: Device) -> None:
        if self.terms.after_pairing and self.chats:
            self._hub.spawn(self._after_pairing(device))

    async def _after_pairing(self, device: Device) -> None:
        async with asyncio.timeout(_KEYS_LIMIT):
            while not device.signed_key:
                await asyncio.sleep(0.05)
        await self.send(device)

    async def send(self, device: Device, *, per_chunk: int | None = None) -> list[str]:
        """Everything, as after a pairing: names, the newest of each chat, the last months, the rest. Ids of the notices."""
        size = per_chunk or self.terms.per_chunk
        newest = max((m.at for chat in self.chats for m in chat.messages[-1:]), default=0)
        first = [(chat, chat.messages[-_BOOTSTRAP:]) for chat in self.chats]
        before = [(chat, chat.messages[:-_BOOTSTRAP]) for chat in self.chats]
        recent = [(chat, [m for m in old if m.at > newest - _RECENT]) for chat, old in before]
        older = [
            (chat, old[: len(old) - len(new)]) for (chat, old), (_, new) in zip(before, recent, strict=True)
        ]
        ids = [await self._hand_over(device, self._names())]
        for kind, part in (
            (history.HistorySync.INITIAL_BOOTSTRAP, first),
            (history.HistorySync.RECENT, recent),
            (history.HistorySync.FULL, older),
        ):
            chunks = list(_cut(part, size))
            for order, chunk in enumerate(chunks, start=1):
                blob = self._chunk(kind, chunk, order, 100 * order // len(chunks))
                ids.append(await self._hand_over(device, blob))
        return ids

    async def asked(self, device: Device, msg_id: str, request: Any) -> None:
        """A client wants older messages of one chat than it has."""
        self._hub.events.add(
            Event("history_asked", f"{request.chatJID} {request.onDemandMsgCount}", device.jid)
        )
        if not self.terms.on_demand:
            return
        jid = JID.parse(request.chatJID)
        account = self._hub.world.account(jid.user)
        chat = next(
            (
                c
                for c in self.chats
                if c.jid.user == jid.user or (account is not None and c.account is account)
            ),
            None,
        )
        older = [m for m in chat.messages if m.at * 1000 < request.oldestMsgTimestampMS] if chat else []
        part = [(chat, older[-(request.onDemandMsgCount or 50) :])] if chat else []
        blob = self._chunk(history.HistorySync.ON_DEMAND, part, 1, 100)
        await self._hand_over(device, blob, session=msg_id)

    def _names(self) -> history.HistorySync:
        sync = history.HistorySync(syncType=history.HistorySync.PUSH_NAME, chunkOrder=1, progress=100)
        for account in {id(a): a for chat in self.chats for a in _people(chat)}.values():
            sync.pushnames.add(ID=str(account.phone), pushname=account.name)
        return sync

    def _chunk(
        self, kind: Any, part: Iterable[tuple[PastChat, list[Past]]], order: int, progress: int
    ) -> history.HistorySync:
        sync = history.HistorySync(syncType=kind, chunkOrder=order, progress=progress)
        for chat, messages in part:
            conversation = sync.conversations.add(unreadCount=chat.unread)
            account, named = chat.account, str(chat.jid)
            if account is not None:
                if self.terms.address == "pn":
                    named = str(account.phone)
                conversation.pnJID, conversation.lidJID = str(account.phone), str(account.lid)
                conversation.displayName = account.name
                sync.phoneNumberToLidMappings.add(pnJID=str(account.phone), lidJID=str(account.lid))
            elif chat.group is not None:
                conversation.name = chat.group.name
            conversation.ID = named
            if messages:
                conversation.conversationTimestamp = messages[-1].at
            for number in range(len(messages) - 1, -1, -1):  # the newest first, as phones send them
                past = messages[number]
                item = conversation.messages.add(msgOrderID=number + 1)
                info = item.message
                info.key.remoteJID, info.key.fromMe, info.key.ID = named, past.from_me, past.id
                info.messageTimestamp = past.at
                info.message.CopyFrom(past.message)
                info.status = web.WebMessageInfo.READ if past.from_me else web.WebMessageInfo.DELIVERY_ACK
                if past.author is not None:
                    info.key.participant = info.participant = str(past.author.lid)
                if past.pushname:
                    info.pushName = past.pushname
        return sync

    async def _hand_over(self, device: Device, sync: history.HistorySync, *, session: str = "") -> str:
        """Upload one chunk and tell the client where it is."""
        plain = zlib.compress(sync.SerializeToString(), 1)
        stored = media.encrypt(plain, KIND)
        path = self._hub.media.store(message_id().lower(), stored.blob)
        message = e2e.Message()
        message.protocolMessage.type = e2e.ProtocolMessage.HISTORY_SYNC_NOTIFICATION
        notice = message.protocolMessage.historySyncNotification
        notice.directPath, notice.mediaKey, notice.fileLength = path, stored.key, len(plain)
        notice.fileSHA256, notice.fileEncSHA256 = stored.plain_sha256, stored.blob_sha256
        notice.syncType, notice.chunkOrder, notice.progress = sync.syncType, sync.chunkOrder, sync.progress
        if session:
            notice.peerDataRequestSessionID = session
        msg_id = self._phone.send_to_own(device, message)
        await asyncio.sleep(0)  # a long history must not hold up what people write meanwhile
        return msg_id


def _people(chat: PastChat) -> Iterator[Account]:
    if chat.account is not None:
        yield chat.account
    yield from {id(m.author): m.author for m in chat.messages if m.author is not None}.values()


def _cut(
    part: Iterable[tuple[PastChat, list[Past]]], size: int
) -> Iterator[list[tuple[PastChat, list[Past]]]]:
    """Chunks of at most `size` messages; a long chat is spread over several, its newest messages first."""
    chunk: list[tuple[PastChat, list[Past]]] = []
    room = size
    for chat, messages in part:
        end = len(messages)
        while end > 0:
            start = max(0, end - room)
            chunk.append((chat, messages[start:end]))
            room -= end - start
            end = start
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk
