"""WhatsApp's other side: the sandbox's server, the shop's phone and the customers' phones, for the unmodified library.

Knows nothing of the gateway but how its child is started.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from core.channel import Channel, ChannelKind, Converted, Json, MessageType, SessionContext, Sink
from core.metrics import Metrics
from core.settings import Settings
from gateway.whatsapp.channel import WhatsAppChannel
from gateway.whatsapp.convert import convert_event, convert_webhook
from gateway.whatsapp.settings import check
from gateway.whatsapp.timings import Timings
from sandbox.whatsapp import reading
from sandbox.whatsapp.inbox import Received
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from sandbox.whatsapp.world import Device
from tests.contract.peer import Arrival, Can, LogIn, Peer, context_for, recorded_json

SHOP = "+60123456789"
SECRET = "whatsapp-app-secret-91c4"
QUICK = Timings(
    ping=0.3,
    pong=2.0,
    silence=1.0,
    probe=2.0,
    grace=0.5,
    backoff_first=0.05,
    backoff_cap=0.5,
    reconnect=15.0,
    poll=0.1,
    store_retry=0.05,
    store_retry_cap=0.2,
    gate_alarm=5.0,
    send=1.5,
    link=1.0,
)
TYPES = {"voice": MessageType.AUDIO, "edit": MessageType.EDITED}


@dataclass
class WhatsAppCustomer:
    phone: Phone
    shop: Phone
    said: dict[str, str] = field(default_factory=dict)

    @property
    def external_id(self) -> str:
        return f"whatsapp:{self.phone.number}"

    @property
    def address(self) -> str:
        return self.phone.number

    @property
    def arrivals(self) -> Sequence[Arrival]:
        return [self._seen(got) for got in self.phone.received]

    def _seen(self, got: Received) -> Arrival:
        kind = TYPES.get(got.kind) or MessageType(got.kind)
        media = None
        if reading.media_of(got.message) is not None:
            media = hashlib.sha256(self.phone.media_bytes(got.message)).hexdigest()
        return Arrival(got.id, got.text or None, kind, media, reading.quoted_of(got.message) or None)

    async def say(self, text: str, *, reply_to: str | None = None) -> str:
        quoted: Any = None
        if reply_to is not None:
            quoted = next(got for got in self.phone.received if got.id == reply_to)
        message_id = await self.phone.send_text(self.shop, text, quoted=quoted)
        self.said[message_id] = text
        return message_id

    async def send_media(
        self, kind: MessageType, data: bytes, *, mime_type: str, filename: str, caption: str | None = None
    ) -> str:
        return await self.phone.send_media(self.shop, str(kind), data, mimetype=mime_type, caption=caption)

    async def redeliver(self, message_id: str) -> None:
        await self.phone.send_text(self.shop, self.said[message_id], msg_id=message_id)


class WhatsAppPeer:
    channel: ClassVar[str] = "whatsapp"
    cannot: ClassVar[Mapping[Can, str]] = {
        Can.CHECK: "a session is linked by its phone, there are no credentials to try",
    }
    never: ClassVar[Mapping[MessageType, str]] = {}

    async def open(self, folder: Path) -> None:
        self.wa = WhatsAppSandbox(folder)
        await self.wa.start()
        self.shop = self.wa.phone(SHOP, "Shop")
        self._down = False

    async def close(self) -> None:
        await self.wa.stop()

    def settings(self) -> Mapping[str, str]:
        return {**self.wa.launch_env(), "WHATSAPP_CLIENT_COMMAND": self.wa.client_command()}

    def kind(self, settings: Settings, metrics: Metrics) -> ChannelKind:
        def factory(context: SessionContext, sink: Sink) -> Channel:
            return WhatsAppChannel(
                context, sink, command=settings.whatsapp_command, metrics=metrics, timings=QUICK
            )

        return ChannelKind("whatsapp", factory, webhook=convert_webhook, settings=check)

    def log_in(self) -> LogIn:
        """The only secret a person types in is the one that signs webhooks; keys never leave the session's folder."""
        return LogIn(None, {"app_secret": SECRET}, method="qr")

    async def scan(self, qr: str) -> None:
        await self.shop.scan(qr)

    def secrets(self) -> Sequence[str]:
        return [SECRET]

    def wrong_credentials(self) -> Mapping[str, Json]:
        return {}

    def customer(self, name: str) -> WhatsAppCustomer:
        return WhatsAppCustomer(self.wa.person(f"+{60111444000 + len(self.wa.people)}", name), self.shop)

    def unreachable(self) -> str:
        return "+60199990000"

    def recorded(self) -> Iterator[tuple[str, Converted]]:
        context = context_for("whatsapp", SHOP)
        for name, given in recorded_json("whatsapp"):
            yield (
                name,
                convert_event(given, context)
                if name.startswith("event/")
                else convert_webhook(given, context),
            )

    # --- faults

    @property
    def device(self) -> Device:
        [device] = self.shop.devices
        return device

    async def throttle_next(self) -> None:
        self.wa.fail_sends("nack", code=463, times=1)

    async def fail_next(self) -> None:
        self.wa.fail_sends("nack", code=500, times=1)

    async def cut_before_acceptance(self) -> None:
        self.wa.fail_sends("swallow", times=1)

    async def cut_after_acceptance(self) -> None:
        self.wa.fail_sends("swallow_ack", times=1)

    async def drop_connections(self) -> None:
        self._down = True
        await self.wa.go_down()

    async def hang(self) -> None:
        self.wa.silence(self.device)

    async def refuse_login(self) -> None:
        self.wa.refuse_logins(405)
        await self.wa.drop(self.device)

    async def come_back(self) -> None:
        if self._down:
            self._down = False
            await self.wa.come_back()
        self.wa.clear_faults()


def _keeps_the_contract() -> Peer:
    peer: Peer = WhatsAppPeer()
    return peer
