"""Who and what there is: bots with their updates, people, groups, files, messages. No network, no clock of its own."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from sandbox.whatsapp.ledger import Ledger

Json = dict[str, Any]

NOT_BY_DEFAULT = frozenset({"chat_member", "message_reaction", "message_reaction_count"})
"""Update kinds a bot gets only when it names them."""


class ApiError(Exception):
    """What the Bot API answers instead of a result."""

    def __init__(self, code: int, description: str, **parameters: int) -> None:
        super().__init__(description)
        self.code, self.description, self.parameters = code, description, parameters


@dataclass
class File:
    file_id: str
    path: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Webhook:
    url: str
    secret: str
    last_error: str | None = None
    last_error_at: int | None = None


@dataclass
class Bot:
    """A bot as Telegram knows it; also what a person writes to."""

    id: int
    username: str
    name: str
    token: str = field(repr=False)
    updates: deque[Json] = field(default_factory=deque, repr=False)
    """What has not been confirmed yet, oldest first."""
    next_update: int = 1
    next_message: int = 1
    allowed: tuple[str, ...] | None = None
    webhook: Webhook | None = None
    polling: asyncio.Future[Json | None] | None = field(default=None, repr=False)
    """The getUpdates that waits now; another one ends it with 409."""
    news: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    revoked: bool = False
    history: dict[int, Json] = field(default_factory=dict, repr=False)
    """Every update ever made, by its id."""

    @property
    def user(self) -> Json:
        return {"id": self.id, "is_bot": True, "first_name": self.name, "username": self.username}

    @property
    def address(self) -> str:
        return f"@{self.username}"

    def wants(self, kind: str) -> bool:
        return kind in self.allowed if self.allowed else kind not in NOT_BY_DEFAULT

    def tell(self, kind: str, body: Json) -> int | None:
        """A new update; its id, or None when the bot has not asked for this kind."""
        if not self.wants(kind):
            return None
        number, self.next_update = self.next_update, self.next_update + 1
        update = {"update_id": number, kind: deepcopy(body)}
        self.history[number] = update
        self.updates.append(update)
        self.news.set()
        return number

    def tell_again(self, update_id: int) -> None:
        """Hand an update over once more, whatever was confirmed: what a lost confirmation looks like."""
        self.updates.append({**self.history[update_id], "_again": True})
        self.news.set()


@dataclass(frozen=True)
class Received:
    """What a bot's message looks like at the person's end."""

    key: str
    kind: str
    text: str | None
    message: Json
    bot: Bot
    chat_id: int
    message_id: int
    file: File | None = None
    reply_to: str | None = None
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Accepted:
    """A send that the server took: whatever the caller was told about it. The proof of how often something went out."""

    method: str
    bot: Bot
    chat_id: int
    message_id: int | None
    text: str | None
    params: Json
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Call:
    """Every request, with what became of it: `ok`, an error code, or the fault it met."""

    method: str
    bot: Bot
    params: Json
    outcome: str
    at: float = field(default_factory=time.monotonic)


@dataclass
class Chat:
    """What a bot writes to: a person's private chat, or a group."""

    id: int
    type: str
    title: str | None = None
    is_forum: bool = False
    members: list[Any] = field(default_factory=list)
    bots: list[Bot] = field(default_factory=list)
    migrated_to: int | None = None
    next_message: int = 1


class World:
    def __init__(self) -> None:
        self.bots: dict[str, Bot] = {}
        self.people: dict[int, Any] = {}
        self.groups: dict[int, Chat] = {}
        self.files: dict[str, File] = {}
        self.messages: dict[tuple[int, int, int], Json] = {}
        """By bot, chat and message id: private chats are numbered per bot."""
        self.reactions: dict[tuple[int, int, int], dict[int, list[Json]]] = {}
        """By message as above, then by person."""
        self.polls: dict[str, tuple[Bot, Json, int]] = {}
        """Sent by bots: the bot, the poll, the chat."""
        self.accepted: Ledger[Accepted] = Ledger()
        self.calls: Ledger[Call] = Ledger()
        self._next_person = 700_000_001
        self._next_bot = 8_000_000_001
        self._next_group = 5_000_001
        self._next_poll = 1

    def add_bot(self, username: str, name: str) -> Bot:
        number, self._next_bot = self._next_bot, self._next_bot + 1
        # As long as a real one, so that whatever looks for tokens finds it.
        bot = Bot(number, username.removeprefix("@"), name, f"{number}:{secrets.token_hex(17)}x")
        self.bots[bot.token] = bot
        return bot

    def new_token(self, bot: Bot) -> str:
        del self.bots[bot.token]
        bot.token = f"{bot.id}:{secrets.token_hex(17)}x"
        self.bots[bot.token] = bot
        return bot.token

    def new_person_id(self) -> int:
        self._next_person += 1
        return self._next_person

    def new_group_id(self, *, supergroup: bool) -> int:
        self._next_group += 1
        return -(1_000_000_000_000 + self._next_group) if supergroup else -self._next_group

    def new_poll_id(self) -> str:
        self._next_poll += 1
        return str(5_000_000_000_000_000_000 + self._next_poll)

    def add_file(self, data: bytes, folder: str, extension: str) -> File:
        token = secrets.token_urlsafe(24)
        file = File(f"BQAC{token}", f"{folder}/file_{len(self.files) + 1}{extension}", data)
        self.files[file.file_id] = file
        return file

    def message_number(self, bot: Bot, chat_id: int) -> int:
        holder: Any = self.groups[chat_id] if chat_id in self.groups and chat_id < -(10**12) else bot
        number: int = holder.next_message
        holder.next_message += 1
        return number

    def chat_json(self, chat_id: int) -> Json:
        group = self.groups.get(chat_id)
        if group is not None:
            found: Json = {"id": group.id, "type": group.type, "title": group.title}
            return found | ({"is_forum": True} if group.is_forum else {})
        person = self.people[chat_id]
        return {
            **{k: v for k, v in person.user.items() if k not in ("is_bot", "language_code")},
            "type": "private",
        }

    def keep(self, bot: Bot, message: Json) -> None:
        self.messages[bot.id, message["chat"]["id"], message["message_id"]] = message

    def find(self, bot: Bot, chat_id: int, message_id: int) -> Json | None:
        return self.messages.get((bot.id, chat_id, message_id))

    def chat_for(self, bot: Bot, chat_id: int) -> None:
        """Whether this bot may write there. Raises ApiError, in Telegram's words."""
        if chat_id in self.groups:
            group = self.groups[chat_id]
            if group.migrated_to is not None:
                raise ApiError(
                    400,
                    "Bad Request: group chat was upgraded to a supergroup chat",
                    migrate_to_chat_id=group.migrated_to,
                )
            if bot not in group.bots:
                raise ApiError(403, "Forbidden: bot was kicked from the supergroup chat")
            return
        person = self.people.get(chat_id)
        if person is None:
            raise ApiError(400, "Bad Request: chat not found")
        if bot.id in person.blocked:
            raise ApiError(403, "Forbidden: bot was blocked by the user")
        if bot.id not in person.started:
            raise ApiError(403, "Forbidden: bot can't initiate conversation with a user")
