"""What a tenant may want shown besides the message: "typing…" before it, what was answered as read, the account's name.

Only courtesies: they cost nothing when off, never fail a send, and never outlive the link.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from core import log
from core.channel import InboundMessage, MessageType
from gateway.whatsapp.process import ChildGone, ChildProcess, ChildRefused, ChildTimeout
from gateway.whatsapp.settings import SessionSettings
from gateway.whatsapp.timings import Timings
from gateway.whatsapp.values import Json, obj

SECONDS_PER_CHARACTER = 0.03
SHORTEST = 0.5
CHATS = 1000
PER_CHAT = 50
GESTURE_SECONDS = 5.0
"""A gesture that takes longer is given up."""
_NOT_READ = frozenset({MessageType.REACTION, MessageType.EDITED, MessageType.DELETED})

logger = log.get(part="whatsapp")


@dataclass(frozen=True, slots=True)
class Unread:
    chat: str
    sender: str
    message_id: str


@dataclass(slots=True)
class Chat:
    """Under every form of the person's address, once."""

    unread: list[Unread] = field(default_factory=list)


class Manners:
    def __init__(self, settings: SessionSettings, timings: Timings) -> None:
        self._settings, self._timings = settings, timings
        self._chats: OrderedDict[str, Chat] = OrderedDict()
        self._typing = 0
        self._introducing = False
        self._named: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- typing ----

    @asynccontextmanager
    async def typing(self, child: ChildProcess, to: str, text: str | None) -> AsyncIterator[None]:
        """Show it for a moment that fits the text, do what is inside, then stop showing it. Without a text, only the inside.

        Entering may be cancelled: nothing has been sent by then.
        """
        if text is None or not self._settings.typing:
            yield
            return
        self._typing += 1
        try:
            await self._gesture(child, "typing", to=to, on=True)
            # The other side shows "typing…" only of somebody who is online, so the child says that too while it lasts.
            await asyncio.sleep(min(self._timings.typing, SHORTEST + SECONDS_PER_CHARACTER * len(text)))
            yield
        finally:
            self._typing -= 1
            self._later(self._gesture(child, "typing", to=to, on=False, leave=self._typing == 0))

    # ---- read receipts ----

    def noticed(self, messages: Sequence[InboundMessage]) -> None:
        """Messages that are stored now. Those of an earlier run of the gateway are not remembered."""
        if not self._settings.read_receipts:
            return
        for message in messages:
            unread = _unread(message)
            if unread is None:
                continue
            person = message.person
            names = (person.external_id, *person.aliases)
            chat = next((self._chats[n] for n in names if n in self._chats), None) or Chat()
            chat.unread = [*chat.unread, unread][-PER_CHAT:]
            for name in names:
                self._chats[name] = chat
                self._chats.move_to_end(name)
        while len(self._chats) > CHATS:
            self._chats.popitem(last=False)

    def answered(self, child: ChildProcess, recipient: str) -> None:
        """Something was sent to this external id: what came from there is read."""
        chat = self._chats.get(recipient)
        if chat is None or not chat.unread:
            return
        unread, chat.unread = chat.unread, []
        authors: dict[tuple[str, str], list[str]] = {}
        for item in unread:
            authors.setdefault((item.chat, item.sender), []).append(item.message_id)
        self._later(self._mark(child, authors))

    async def _mark(self, child: ChildProcess, authors: dict[tuple[str, str], list[str]]) -> None:
        for (chat, sender), ids in authors.items():
            await self._gesture(child, "read", chat=chat, sender=sender, ids=ids)

    # ---- the name beside the number ----

    def introduce(self, child: ChildProcess | None, known_as: str | None) -> None:
        """Called when the session has connected: write the wanted name to WhatsApp where it is another one."""
        wanted = self._settings.display_name
        if child is None or wanted is None or wanted in (known_as, self._named):
            return
        if not self._introducing:
            self._introducing = True
            self._later(self._introduce(child, wanted))

    async def _introduce(self, child: ChildProcess, name: str) -> None:
        """The phone hands over the keys that it takes some time after a pairing, so a refusal is no end."""
        problem = ""
        try:
            for wait in (0.0, *self._timings.name):
                await asyncio.sleep(wait)
                try:
                    await child.ask("name", seconds=self._timings.command, name=name)
                except (ChildTimeout, ChildRefused) as error:
                    problem = str(error)
                else:
                    self._named = name
                    logger.info("session.named", result="the name is written to WhatsApp")
                    return
            logger.warning(
                "session.not_named", error=problem, action="set the name on the phone, or connect again later"
            )
        except ChildGone:
            pass  # the next child tries again
        finally:
            self._introducing = False

    # ---- how ----

    async def _gesture(self, child: ChildProcess, op: str, **fields: Any) -> None:
        try:
            await child.ask(op, seconds=GESTURE_SECONDS, **fields)
        except (ChildGone, ChildTimeout, ChildRefused) as error:
            logger.debug("gesture.failed", action=op, error=str(error))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _unread(message: InboundMessage) -> Unread | None:
    """As the message itself was addressed: a receipt in the other form (LID, phone) would not be understood."""
    if message.direction != "inbound" or message.is_history or message.placeholder:
        return None
    if message.message_type in _NOT_READ:
        return None
    source = obj(obj(message.raw_payload.get("Info")).get("MessageSource"))
    chat, sender = _jid(obj(source.get("Chat"))), _jid(obj(source.get("Sender")))
    if not chat or not sender:
        return None
    return Unread(chat, sender, message.channel_message_id)


def _jid(fields: Json) -> str:
    user, server = fields.get("User"), fields.get("Server")
    return f"{user}@{server}" if user and server else ""
