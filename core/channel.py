"""The contract every channel keeps: one small Protocol, optional capability Protocols, and the messages both sides speak.

Nothing here does IO, and nothing here knows a channel by name: a new channel is a folder that keeps this contract
and one line in the registry of `gateway.app`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NewType, Protocol, runtime_checkable

TenantId = NewType("TenantId", int)
SessionId = NewType("SessionId", int)
LeadId = NewType("LeadId", int)
ThreadId = NewType("ThreadId", int)
MessageId = NewType("MessageId", int)
QueueId = NewType("QueueId", int)

Json = dict[str, Any]


class MessageType(StrEnum):
    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
    DOCUMENT = "document"
    STICKER = "sticker"
    LOCATION = "location"
    CONTACT = "contact"
    POLL = "poll"
    REACTION = "reaction"
    EDITED = "edited"
    DELETED = "deleted"
    UNSUPPORTED = "unsupported"


class SessionStatus(StrEnum):
    PAIRING = "pairing"
    CONNECTING = "connecting"
    ACTIVE = "active"
    DISCONNECTED = "disconnected"
    LOGGED_OUT = "logged_out"
    SUSPENDED = "suspended"


# --- what comes in ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Person:
    """Who a message is from, or for an own echo who it is to: a person or a whole group.

    `external_id` is the best known form (`whatsapp:+60123456789`); `aliases` are other forms proven to be the same
    person (`whatsapp-lid:…`), so that ingest can find or merge the lead.
    """

    external_id: str
    kind: Literal["person", "group"] = "person"
    name: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a pull channel (IMAP, Bot API) continues; stored in the transaction of the message that carries it."""

    name: str
    value: Json


@dataclass(frozen=True, slots=True)
class InboundMessage:
    """One message as a channel saw it, ready to be stored.

    Also used for what went out without us: a text typed on the paired phone is `direction='outbound'`,
    `role='assistant'` with `raw_payload['origin'] = 'phone'`, and history.
    """

    tenant_id: TenantId
    session_id: SessionId
    channel: str
    channel_message_id: str
    person: Person
    message_type: MessageType
    content: str | None
    channel_timestamp: int | None
    """Unix epoch, milliseconds, as the channel says."""
    direction: Literal["inbound", "outbound"] = "inbound"
    role: Literal["user", "assistant", "system"] = "user"
    sender_identifier: str | None = None
    chat_identifier: str | None = None
    reply_to_message_id: str | None = None
    media_metadata: Json | None = None
    raw_payload: Json = field(default_factory=dict)
    is_history: bool = False
    placeholder: bool = False
    """The channel could not read it (yet): stored as `unsupported`; the same id read later fills the row."""
    message_secret: str | None = None
    """Hex of the secret an own echo carries: it proves which queue item it is (see `Attempt`)."""
    cursor: Cursor | None = None
    arrived_at: float = field(default_factory=time.time)
    """Wall clock of the arrival in seconds, for `wa_write_latency_seconds`."""


@dataclass(frozen=True, slots=True)
class StatusUpdate:
    """A receipt: what became of messages of ours. `message_ids` are the channel's own ids.

    `chat`: the external id of the other side, when the channel says it (ids are unique only per chat).
    """

    tenant_id: TenantId
    session_id: SessionId
    channel: str
    message_ids: tuple[str, ...]
    status: Literal["sent", "delivered", "read", "failed"]
    chat: Person | None = None
    occurred_at: datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionState:
    """Where a session stands. `reason` is a short code (`stream_replaced`), `action` what a person must do, or None."""

    status: SessionStatus
    reason: str | None = None
    action: str | None = None
    identifier: str | None = None
    """The session's own address once known (`+60123456789`)."""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class PairingUpdate:
    """A step of a pairing: a new QR, a phone code, the end. `expires_at` is wall clock, aware."""

    kind: Literal["qr", "code", "paired", "timeout", "failed"]
    qr: str | None = None
    code: str | None = None
    expires_at: datetime | None = None
    identifier: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of an inbound message: committed now, or already there (`duplicate`)."""

    message_id: MessageId
    thread_id: ThreadId
    lead_id: LeadId
    duplicate: bool = False
    erased: bool = False
    """Not stored and never to be: the person was erased after it was said. Then it is a duplicate as well, ids are 0."""


class Sink(Protocol):
    """How a channel reports. `received` and `status` return only after the commit, so the caller may then
    acknowledge, release its journal entry or forget; they raise `DatabaseUnavailable` when that cannot be had now."""

    async def received(self, messages: Sequence[InboundMessage]) -> list[Stored]: ...
    async def status(self, updates: Sequence[StatusUpdate]) -> None: ...
    async def state(self, state: SessionState) -> None: ...
    async def pairing(self, update: PairingUpdate) -> None: ...


# --- what goes out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quoted:
    """The message a reply quotes."""

    channel_message_id: str
    sender_identifier: str | None
    content: str | None
    from_me: bool
    raw_payload: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to send one queue item. `(queue_id, claim_epoch)` is what the send is fenced and resolved by."""

    tenant_id: TenantId
    session_id: SessionId
    queue_id: QueueId
    message_id: MessageId
    claim_epoch: int
    recipient: str
    """An external id without its channel prefix is not accepted: `whatsapp:+60…`, `whatsapp-group:<jid>`, `email:…`."""
    channel_message_id: str | None = None
    """When an earlier look already learned it."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of ours on this machine's disk, ready to be read. The path is its content's name and has no extension;
    `filename` is what a person may see (safe: no folder, no control characters)."""

    path: Path
    mime_type: str
    filename: str
    size: int
    sha256: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class OutboundMessage:
    attempt: Attempt
    message_type: MessageType
    content: str | None = None
    media_url: str | None = None
    payload: Json = field(default_factory=dict)
    quoted: Quoted | None = None
    first_contact: bool = False
    """True when this person never wrote to this session."""
    automatic: bool = False
    """An agent's reply, not a person's or a backend's."""
    media: LocalFile | None = None
    """What `media_url` names, fetched and checked, when there is one."""


@dataclass(frozen=True, slots=True)
class Sent:
    channel_message_id: str
    sent_at: datetime


@dataclass(frozen=True, slots=True)
class NotSent:
    """Proven: it never left. Only said while the session's exclusive lock is held."""

    reason: str = "not_sent"


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing proves it either way. The id, when known, lets a later receipt settle it."""

    reason: str
    channel_message_id: str | None = None


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What a channel is made with. `folder` is the session's own directory for keys and journal (it exists, mode 0700)."""

    tenant_id: TenantId
    session_id: SessionId
    channel: str
    identifier: str
    name: str | None
    metadata: Mapping[str, Any]
    credentials: Mapping[str, Any]
    folder: Path


class Channel(Protocol):
    """One live session on a channel."""

    @property
    def state(self) -> SessionState:
        """Where it stands; no IO, a cached value."""
        ...

    async def connect(self) -> None:
        """Start and keep the session alive, healing by itself, until `disconnect`. Returns once started, not once
        connected; problems come through `sink.state`. Idempotent."""
        ...

    async def disconnect(self) -> None:
        """Stop within 10 s; the session can be connected again. Idempotent."""
        ...

    async def logout(self) -> None:
        """End the session on the channel's side where that exists, stop, and forget local keys. Idempotent."""
        ...

    async def send(self, message: OutboundMessage) -> Sent:
        """Hand one message to the channel. Raises `NotSentError`, `ThrottledError`, `RefusedError`,
        `UnknownOutcomeError`; any other exception counts as unknown."""
        ...

    async def resolve(self, attempt: Attempt) -> Sent | NotSent | Unknown:
        """What became of a send that was cut off, perhaps in an earlier process."""
        ...


@runtime_checkable
class Pairable(Protocol):
    """A channel that a person links by QR or phone code. Progress goes to `sink.pairing`."""

    async def pair_qr(self) -> None:
        """Start a pairing by QR (or let the running one go on)."""
        ...

    async def pair_code(self, phone: str) -> None:
        """Start a pairing by code for this phone (E.164)."""
        ...


@runtime_checkable
class NumberCheck(Protocol):
    async def check(self, recipients: Sequence[str]) -> dict[str, bool]:
        """Which of these addresses the channel can reach."""
        ...


@runtime_checkable
class Typing(Protocol):
    async def typing(self, recipient: str, on: bool) -> None: ...


@runtime_checkable
class ReadReceipts(Protocol):
    async def mark_read(
        self, recipient: str, message_ids: Sequence[str], sender: str | None = None
    ) -> None: ...


@runtime_checkable
class History(Protocol):
    async def sync_history(self) -> int:
        """Have older messages brought, as far as the channel can; how many parts of them are under way now. They are
        stored as history. Raises Conflict, with an `action`, when the channel gives no more than it gave."""
        ...


@dataclass(frozen=True, slots=True)
class StoredMedia:
    """A stored message whose media is still on the channel. `media_metadata` and `raw_payload` are what `convert` made;
    `hints`: what `request_media_retry` learned earlier; `attempt` counts from 1."""

    tenant_id: TenantId
    session_id: SessionId
    message_id: MessageId
    channel: str
    channel_message_id: str
    message_type: MessageType
    direction: Literal["inbound", "outbound"]
    chat_identifier: str | None
    sender_identifier: str | None
    media_metadata: Json
    raw_payload: Json
    hints: Json | None = None
    attempt: int = 1


class MediaTarget(Protocol):
    """Where a download goes: a file that keeps what an attempt before this one got."""

    @property
    def path(self) -> Path:
        """The file itself (it exists), for a client that writes files. Do not use `write` as well."""
        ...

    @property
    def offset(self) -> int:
        """Bytes that are there already: go on from here, or `restart`."""
        ...

    async def write(self, chunk: bytes) -> None:
        """Add bytes; never blocks the loop. Raises RefusedError (grows too large) and NotSentError (disk full)."""
        ...

    async def restart(self) -> None:
        """Forget what is there."""
        ...


@runtime_checkable
class MediaSource(Protocol):
    """A channel whose messages carry media that is downloaded after they were stored."""

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        """Bring all of it into `target`, decrypted. Raises NotSentError (try again later), `MediaExpired` (the channel
        has dropped it), RefusedError (it can never be had); any other exception counts as "try again"."""
        ...


@runtime_checkable
class MediaRetry(Protocol):
    """A channel that can ask for dropped media once more (WhatsApp: the sender's or our own phone uploads it again)."""

    async def request_media_retry(self, message: StoredMedia) -> Json | None:
        """Ask, and wait up to a minute for the answer: what the next `download` needs (it comes back as `hints`), or
        None when no answer came yet. Raises RefusedError when it is gone for good."""
        ...


class ChannelFactory(Protocol):
    def __call__(self, context: SessionContext, sink: Sink) -> Channel: ...


@dataclass(frozen=True, slots=True)
class Converted:
    """What one webhook body held: messages, receipts, and per bad item its index and what is wrong with it."""

    messages: tuple[InboundMessage, ...] = ()
    updates: tuple[StatusUpdate, ...] = ()
    errors: tuple[tuple[int, str], ...] = ()
    ignored: int = 0


class WebhookConverter(Protocol):
    """Pure: a parsed webhook body in, messages out. Never raises on bad items, it names them in `errors`."""

    def __call__(self, body: Any, context: SessionContext) -> Converted: ...


@dataclass(frozen=True, slots=True)
class CredentialField:
    """One line of a channel's log-in form. `path` is where its value stands in `credentials` (`("imap", "host")`)."""

    path: tuple[str, ...]
    label: str
    kind: Literal["text", "secret", "number", "choice"] = "text"
    required: bool = True
    default: str | None = None
    choices: tuple[str, ...] = ()
    help: str | None = None


@dataclass(frozen=True, slots=True)
class LogIn:
    """What a channel said to these credentials: whose they are, and what is kept of them (defaults filled in)."""

    identifier: str
    """The session's own address (`shop@example.com`, `@shop_bot`)."""
    credentials: Json
    name: str | None = None


class CredentialCheck(Protocol):
    async def __call__(self, credentials: Json, metadata: Mapping[str, Any]) -> LogIn:
        """Log in once and out again, within 20 s. Raises `InvalidField` that names the field (`credentials.imap.host`) and
        what the server said, never the secret itself."""
        ...


@dataclass(frozen=True, slots=True)
class ChannelKind:
    """A line of the registry: everything the rest of the gateway needs to know of a channel."""

    name: str
    factory: ChannelFactory | None
    webhook: WebhookConverter | None = None
    settings: Callable[[Json], Json] | None = None
    """Checks a session's `metadata.settings` before they are stored; raises InvalidField."""
    live: bool = True
    """False: only fed by its webhook."""
    files: bool = True
    """Whether keys or a journal live in the session's folder: then only a gateway that shares its `DATA_DIR` may take a
    session over. False for channels that keep everything in the database (email, Telegram)."""
    check_credentials: CredentialCheck | None = None
    """Set: sessions of this channel log in with credentials, which are checked before they are stored."""
    form: tuple[CredentialField, ...] = ()
    """What the console asks for when such a session is added."""
    sending: Mapping[str, Any] = field(default_factory=dict)
    """How its sessions pace what they send where `metadata.settings.sending` says nothing else; see `core.sending`."""
