"""The other side of a channel, scripted: what the conformance suite needs of the world behind an adapter.

A peer never looks into the gateway's database and never calls the channel: it is the server, the customers and the faults.
One module per channel (`email_peer.py`) with a class that keeps `Peer`, and a test module with one class:

    class TestEmail(Contract, peer=EmailPeer): ...

Everything listens on loopback, on ports of its own, under the folder it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from core.channel import ChannelKind, Converted, Json, MessageType, SessionContext, SessionId, TenantId
from core.metrics import Metrics
from core.settings import Settings

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Can(StrEnum):
    """What not every channel can do. Everything that is not in `Peer.cannot`, with a reason, is tested."""

    REDELIVER = "redeliver"
    """The channel may hand over a message twice."""
    MEDIA_IN = "media_in"
    MEDIA_OUT = "media_out"
    REPLY_IN = "reply_in"
    """A customer's reply names the message it answers."""
    REPLY_OUT = "reply_out"
    DROP = "drop"
    """There is a connection that can break."""
    HANG = "hang"
    """The other side can stop answering without closing anything."""
    REFUSE_LOGIN = "refuse_login"
    CHECK = "check"
    """Credentials are tried before they are stored (`ChannelKind.check_credentials`)."""
    REFUSE = "refuse"
    """The channel says at once that an address can never be reached."""
    THROTTLE = "throttle"
    FAIL = "fail"
    """The channel can say of a send that it was not taken, for a reason that passes."""
    CUT_BEFORE = "cut_before"
    CUT_AFTER = "cut_after"
    PROVE_SENT = "prove_sent"
    """After a cut that came too late, something (a receipt, an echo, a look at Sent) proves that it went out."""
    SECRETS = "secrets"


@dataclass(frozen=True, slots=True)
class LogIn:
    """How a session of the business is made. `identifier` None: only known after the pairing."""

    identifier: str | None
    credentials: Json = field(default_factory=dict)
    metadata: Json = field(default_factory=dict)
    method: Literal["qr"] | None = None
    """`qr`: the suite shows the first code to `Peer.scan`."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message as the customer got it. Every arrival is kept, repeated ones too."""

    id: str
    """The id under which the gateway must have stored it."""
    text: str | None
    kind: MessageType = MessageType.TEXT
    media_sha256: str | None = None
    """Hex, of the bytes that arrived."""
    reply_to: str | None = None
    """The id (as `Customer.say` returned it) of the message this one answers."""


class Customer(Protocol):
    """A person who writes to the business and is written to."""

    @property
    def external_id(self) -> str:
        """Of the lead: `whatsapp:+60…`, `email:…`."""
        ...

    @property
    def address(self) -> str:
        """What a backend puts into `recipient`."""
        ...

    @property
    def arrivals(self) -> Sequence[Arrival]:
        """Everything that has reached this person so far, in order; no IO that blocks."""
        ...

    async def say(self, text: str, *, reply_to: str | None = None) -> str:
        """Write to the business. Returns the `channel_message_id` under which it must be stored. `reply_to`: the id of an
        arrival. Works while the gateway is cut off: the channel keeps the message and delivers it later."""
        ...

    async def send_media(
        self, kind: MessageType, data: bytes, *, mime_type: str, filename: str, caption: str | None = None
    ) -> str:
        """Send a file; the same id as `say` returns. Not needed without `Can.MEDIA_IN`."""
        ...

    async def redeliver(self, message_id: str) -> None:
        """Have the channel hand over what this person said once more, under the same id. Returns when it is on its way."""
        ...


class Peer(Protocol):
    """Everything behind one channel. Faults named `…_next` meet one send and are over; the others last until `come_back`."""

    channel: ClassVar[str]
    """`channel_type`, the name in the registry."""
    cannot: ClassVar[Mapping[Can, str]]
    """What this channel cannot do, each with the reason a person needs."""
    never: ClassVar[Mapping[MessageType, str]]
    """Message types that never come in on this channel, each with the reason. All others must be in `recorded`."""

    async def open(self, folder: Path) -> None:
        """Start the server(s). `folder` is empty and only this peer's."""
        ...

    async def close(self) -> None: ...

    def settings(self) -> Mapping[str, str]:
        """What the gateway's environment needs to reach this peer (`WHATSAPP_CLIENT_COMMAND`). Mostly empty."""
        ...

    def kind(self, settings: Settings, metrics: Metrics) -> ChannelKind:
        """The line of the registry, with waits short enough for tests: a lost or silent connection is noticed and healed
        within about 5 s, a call that gets no answer ends within about 3 s. Everything else as `gateway.app` makes it."""
        ...

    def log_in(self) -> LogIn:
        """The business's account, already known to the server."""
        ...

    async def scan(self, qr: str) -> None:
        """What a person does with the code, for `method="qr"`. Else never called."""
        ...

    def secrets(self) -> Sequence[str]:
        """Strings that must stand in no log line and no row: password, token, refresh token, keys."""
        ...

    def wrong_credentials(self) -> Mapping[str, Json]:
        """By the field that must be named (`credentials.imap.host`): log-ins with a mistake there, each with a secret of its
        own under `secrets`. Not needed without `Can.CHECK`."""
        ...

    def customer(self, name: str) -> Customer:
        """A new person nobody has heard of. `name` is unique in a run and [a-z0-9-]."""
        ...

    def unreachable(self) -> str:
        """An address (as `Customer.address`) that the channel refuses for good: not on WhatsApp, 550, chat not found. Not
        needed without `Can.REFUSE`."""
        ...

    def recorded(self) -> Iterator[tuple[str, Converted]]:
        """Every fixture of this channel, run through its `convert`, by name. See `recorded_json`."""
        ...

    # --- what can go wrong

    async def throttle_next(self) -> None:
        """The next send meets a rate limit (of 1 s, where the channel says how long)."""
        ...

    async def fail_next(self) -> None:
        """The next send is not taken for a reason that passes (SMTP 451, a connection refused once)."""
        ...

    async def cut_before_acceptance(self) -> None:
        """The connection breaks in the next send before the channel has taken the message: it never arrives."""
        ...

    async def cut_after_acceptance(self) -> None:
        """The connection breaks in the next send after the channel has taken the message, before it says so: it arrives."""
        ...

    async def drop_connections(self) -> None:
        """Cut every connection now and refuse new ones until `come_back`."""
        ...

    async def hang(self) -> None:
        """Answer nothing any more, on connections open now and (where they can be made) on new ones; close nothing."""
        ...

    async def refuse_login(self) -> None:
        """End every connection and turn the account's log-ins away: wrong password, revoked token, 401."""
        ...

    async def come_back(self) -> None:
        """All of the above is over; what was kept meanwhile is delivered when the gateway is there again. Idempotent."""
        ...


def context_for(channel: str, identifier: str) -> SessionContext:
    """A context for `convert`, which is pure: nothing in it exists."""
    return SessionContext(TenantId(1), SessionId(2), channel, identifier, None, {}, {}, Path("unused"))


def recorded_json(channel: str) -> Iterator[tuple[str, Any]]:
    """Name and `given` of every `tests/fixtures/<channel>/**/*.json` (`{"given": …, "expect": …}`), in order."""
    folder = FIXTURES / channel
    for path in sorted(folder.rglob("*.json")):
        yield path.relative_to(folder).with_suffix("").as_posix(), json.loads(path.read_bytes())["given"]
