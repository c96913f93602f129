"""Mail behind the gateway: the sandbox's IMAP and SMTP servers, with people who write and read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from core.channel import ChannelKind, Converted, Json, MessageType
from core.metrics import Metrics
from core.settings import Settings
from gateway.email import parse
from gateway.email.kind import email_kind
from gateway.email.timings import Timings
from gateway.media.guard import Guard
from sandbox.mail import Letter, MailSandbox, Person
from tests.contract.peer import Arrival, Can, LogIn, Peer, recorded_json
from tests.support.mail import convert_given

SHORT = Timings(
    connect=3.0,
    command=2.0,
    fetch=5.0,
    idle=1.5,
    data=3.0,
    keep=5.0,
    probe=1.0,
    backoff_first=0.1,
    backoff_most=0.5,
    refused=0.5,
    throttled=0.5,
    store=0.2,
    sent_copy=5.0,
)
WRONG = "not-the-password-93b1"


@dataclass
class EmailCustomer:
    person: Person
    said: dict[str, bytes] = field(default_factory=dict)
    """By the id it is stored under."""
    ids: dict[str, str] = field(default_factory=dict)
    """The id of what was said, by its Message-ID."""

    @property
    def external_id(self) -> str:
        return f"email:{self.person.address}"

    @property
    def address(self) -> str:
        return self.person.address

    @property
    def arrivals(self) -> Sequence[Arrival]:
        return [self._arrival(letter) for letter in self.person.letters]

    def _arrival(self, letter: Letter) -> Arrival:
        kind, digest = MessageType.TEXT, None
        for _, mime_type, data in letter.files:
            kind = {"image": MessageType.IMAGE, "video": MessageType.VIDEO, "audio": MessageType.AUDIO}.get(
                mime_type.partition("/")[0], MessageType.DOCUMENT
            )
            digest = hashlib.sha256(data).hexdigest()
        answered = self.ids.get(letter.in_reply_to or "")
        return Arrival(letter.message_id, letter.text, kind, digest, answered)

    async def say(self, text: str, *, reply_to: str | None = None) -> str:
        answers = next((one for one in self.person.letters if one.message_id == reply_to), None)
        return self._sent(self.person.write(text, answers=answers))

    async def send_media(
        self, kind: MessageType, data: bytes, *, mime_type: str, filename: str, caption: str | None = None
    ) -> str:
        # Who sends a picture without a word writes what it is into the subject.
        return self._sent(self.person.write("", subject=caption or "", files=[(filename, mime_type, data)]))

    async def redeliver(self, message_id: str) -> None:
        self.person.sandbox.deliver(self.said[message_id])

    def _sent(self, raw: bytes) -> str:
        digest = parse.digest(raw)
        self.said[digest] = raw
        self.ids[str(parse.surface(raw)["message_id"])] = digest
        return digest


class EmailPeer:
    channel: ClassVar[str] = "email"
    cannot: ClassVar[Mapping[Can, str]] = {}
    never: ClassVar[Mapping[MessageType, str]] = {
        MessageType.STICKER: "mail has no stickers: a picture is a picture",
        MessageType.LOCATION: "mail has no places: people send a link",
        MessageType.CONTACT: "a vCard comes as the document it is",
        MessageType.POLL: "mail has no polls",
        MessageType.REACTION: "mail has no reactions: an answer of one emoji is a text",
        MessageType.EDITED: "a mail cannot be changed once it is sent",
        MessageType.DELETED: "a mail cannot be taken back once it is sent",
    }

    def __init__(self) -> None:
        self.mail = MailSandbox(saves_sent=True)

    async def open(self, folder: Path) -> None:
        await self.mail.start()

    async def close(self) -> None:
        await self.mail.stop()

    def settings(self) -> Mapping[str, str]:
        return self.mail.launch_env()

    def kind(self, settings: Settings, metrics: Metrics) -> ChannelKind:
        return email_kind(metrics, SHORT, guard=Guard(networks=settings.mail_private_networks))

    def log_in(self) -> LogIn:
        return LogIn(self.mail.account.address, self.mail.credentials, {"settings": {"save_sent": False}})

    async def scan(self, qr: str) -> None:
        raise AssertionError("a mailbox is not paired")

    def secrets(self) -> Sequence[str]:
        return [self.mail.account.password, WRONG]

    def wrong_credentials(self) -> Mapping[str, Json]:
        right = self.mail.credentials
        closed: dict[str, Any] = {**right["imap"], "port": 1}
        return {
            "credentials.password": {**right, "password": WRONG},
            "credentials.imap.port": {**right, "imap": closed},
            "credentials.smtp.port": {**right, "smtp": closed},
            "credentials.imap.host": {**right, "ca": None},
        }

    def customer(self, name: str) -> EmailCustomer:
        return EmailCustomer(self.mail.person(name))

    def unreachable(self) -> str:
        address = "nobody@customers.example"
        self.mail.refuse(address)
        return address

    def recorded(self) -> Iterator[tuple[str, Converted]]:
        for name, given in recorded_json("email"):
            yield name, convert_given(given)

    async def throttle_next(self) -> None:
        self.mail.answer_next("450 4.7.0 too many messages from this mailbox")

    async def fail_next(self) -> None:
        self.mail.answer_next("451 4.3.0 the queue file could not be written")

    async def cut_before_acceptance(self) -> None:
        self.mail.cut_next("data")

    async def cut_after_acceptance(self) -> None:
        self.mail.cut_next("accepted")

    async def drop_connections(self) -> None:
        await self.mail.down()

    async def hang(self) -> None:
        self.mail.hang()

    async def refuse_login(self) -> None:
        self.mail.refuse_log_ins()

    async def come_back(self) -> None:
        await self.mail.up()


def _keeps_the_contract() -> Peer:
    peer: Peer = EmailPeer()
    return peer
