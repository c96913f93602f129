"""Telegram's other side: the sandbox's Bot API server and people who write to the shop's bot.

Knows nothing of the gateway but the address it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core.channel import ChannelKind, Converted, Json, MessageType
from core.metrics import Metrics
from core.settings import Settings
from gateway.telegram import kind
from gateway.telegram.api import Timings
from gateway.telegram.convert import convert_webhook
from gateway.telegram.pace import Limits
from sandbox.telegram import TelegramSandbox
from sandbox.telegram.people import Person
from sandbox.telegram.world import Bot, Received
from tests.contract.peer import Arrival, Can, LogIn, Peer, context_for, recorded_json

QUICK = Timings(
    poll=1, slack=1.5, connect=1.0, read=2.0, upload=5.0, first_wait=0.1, most_wait=0.5, look=0.5, stop=2.0
)
UNHURRIED = Limits(per_second=1000, chat_seconds=0.0, group_per_minute=1000)
TYPES = {
    "photo": MessageType.IMAGE,
    "animation": MessageType.VIDEO,
    "video_note": MessageType.VIDEO,
    "voice": MessageType.AUDIO,
    "venue": MessageType.LOCATION,
}
SECRET = "telegram-webhook-secret-5d1"


@dataclass
class TelegramCustomer:
    person: Person
    bot: Bot

    @property
    def external_id(self) -> str:
        return self.person.address

    @property
    def address(self) -> str:
        return self.person.address

    @property
    def arrivals(self) -> Sequence[Arrival]:
        return [_seen(got) for got in self.person.received]

    async def say(self, text: str, *, reply_to: str | None = None) -> str:
        return await self.person.say(self.bot, text, reply_to=reply_to)

    async def send_media(
        self, kind: MessageType, data: bytes, *, mime_type: str, filename: str, caption: str | None = None
    ) -> str:
        if kind is MessageType.IMAGE:
            return await self.person.send_photo(self.bot, data, caption)
        return await self.person.send_file(
            self.bot, str(kind), data, filename=filename, mime_type=mime_type, caption=caption
        )

    async def redeliver(self, message_id: str) -> None:
        await self.person.redeliver(self.bot, message_id)


def _seen(got: Received) -> Arrival:
    kind = TYPES.get(got.kind) or MessageType(got.kind)
    return Arrival(got.key, got.text, kind, got.file.sha256 if got.file else None, got.reply_to)


class TelegramPeer:
    channel: ClassVar[str] = "telegram"
    cannot: ClassVar[Mapping[Can, str]] = {
        Can.FAIL: "what Telegram does not take for a passing reason (no connection, 429) waits and costs no attempt",
        Can.PROVE_SENT: "the Bot API has no key of ours, no receipts and no way to look a message up",
    }
    never: ClassVar[Mapping[MessageType, str]] = {
        MessageType.DELETED: "bots are not told when somebody deletes a message",
    }

    async def open(self, folder: Path) -> None:
        self.tg = TelegramSandbox()
        await self.tg.start()
        self.bot = self.tg.bot("@shop_bot", "Shop")

    async def close(self) -> None:
        await self.tg.stop()

    def settings(self) -> Mapping[str, str]:
        return {"TELEGRAM_BASE_URL": self.tg.url}

    def kind(self, settings: Settings, metrics: Metrics) -> ChannelKind:
        return kind(settings, timings=QUICK, limits=UNHURRIED)

    def log_in(self) -> LogIn:
        return LogIn("@shop_bot", {"token": self.bot.token, "webhook_secret": SECRET})

    async def scan(self, qr: str) -> None:
        raise AssertionError("a bot has no code to scan")

    def secrets(self) -> Sequence[str]:
        return [self.bot.token, self.bot.token.partition(":")[2], SECRET]

    def wrong_credentials(self) -> Mapping[str, Json]:
        return {
            "credentials.token": {"token": f"{self.bot.id}:{'a' * 35}"},
            "credentials.webhook_secret": {"token": self.bot.token, "webhook_secret": "not allowed!"},
        }

    def customer(self, name: str) -> TelegramCustomer:
        return TelegramCustomer(self.tg.person(name), self.bot)

    def unreachable(self) -> str:
        return "telegram:123456789"

    def recorded(self) -> Iterator[tuple[str, Converted]]:
        context = context_for("telegram", "@shop_bot")
        for name, given in recorded_json("telegram"):
            yield name, convert_webhook(given, context)

    # --- faults

    async def throttle_next(self) -> None:
        self.tg.flood(1)

    async def fail_next(self) -> None:
        raise AssertionError("see cannot")

    async def cut_before_acceptance(self) -> None:
        self.tg.cut("before")

    async def cut_after_acceptance(self) -> None:
        self.tg.cut("after")

    async def drop_connections(self) -> None:
        await self.tg.drop_connections()

    async def hang(self) -> None:
        self.tg.hang()

    async def refuse_login(self) -> None:
        self.tg.refuse_tokens()

    async def come_back(self) -> None:
        await self.tg.come_back()


def _keeps_the_contract() -> Peer:
    peer: Peer = TelegramPeer()
    return peer
