"""The bodies that the admin API takes; an unknown field is an error, so that a typing mistake is not silence."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewPerson(Body):
    number: str
    name: str = ""
    auto_receipts: Literal["delivered", "read"] | None = "delivered"


class Habits(Body):
    auto_receipts: Literal["delivered", "read", "none"] | None = None
    answers_retries: bool | None = None
    retry_delay: float | None = None
    answers_media_retries: Literal["yes", "no", "never"] | None = None


class Scan(Body):
    qr: str


class Code(Body):
    code: str


class Card(Body):
    name: str
    phone: str


class Ad(Body):
    source_id: str
    title: str
    body: str = ""
    url: str = "https://fb.me/sandbox"
    click_id: str = ""


Kind = Literal[
    "text",
    "image",
    "video",
    "audio",
    "voice",
    "document",
    "sticker",
    "location",
    "live_location",
    "contacts",
    "poll",
    "vote",
    "reaction",
    "edit",
    "revoke",
    "button",
    "list",
]


class Send(Body):
    to: str | None = None
    group: str | None = None
    kind: Kind = "text"
    text: str = ""
    mode: Literal["lid", "pn", "lid-only"] = "lid"
    id: str | None = None

    # any kind that has content of its own
    quoted: str | None = None
    forwarded: int = 0  # how many times it was passed on
    ephemeral: int = 0  # seconds
    view_once: bool = False
    ad: Ad | None = None

    # media
    data: str = ""  # base64
    mimetype: str | None = None
    filename: str | None = None
    seconds: int | None = None

    # places, cards, polls, answers
    latitude: float = 0.0
    longitude: float = 0.0
    name: str = ""
    address: str = ""
    contacts: list[Card] = Field(default_factory=list)
    question: str = ""
    options: list[str] = Field(default_factory=list)  # of a poll; of a vote: the chosen ones
    choices: int = 1
    button: str = ""  # id of the button or row that was chosen

    # about another message
    target: str = ""
    emoji: str = ""


class Garbage(Body):
    to: str
    text: str = "repaired"
    repair: Literal["yes", "never", "garbage"] = "yes"


class Receipt(Body):
    id: str
    kind: Literal["delivered", "read", "played"] = "read"


class Typing(Body):
    to: str
    on: bool = True
    recording: bool = False


class Presence(Body):
    to: str
    online: bool = True
    last_seen: int | None = None


class Ring(Body):
    to: str
    video: bool = False


class HangUp(Body):
    to: str
    reason: str = "timeout"


class ScriptRun(Body):
    to: str
    script: str
    patience: float = 30.0


class MadeUpHistory(Body):
    """Texts with each of these people, the newest now; handed over at the next pairing, or at once."""

    people: list[str] = Field(min_length=1, max_length=1_000)
    each: int = Field(default=20, ge=1, le=100_000)
    apart: int = Field(default=3_600, ge=1)  # seconds between two messages
    per_chunk: int = Field(default=2_000, ge=1)
    send: bool = False


class NewGroup(Body):
    name: str
    members: list[str]


class GroupChange(Body):
    by: str
    do: Literal["rename", "describe", "add", "remove", "promote", "demote"]
    text: str = ""
    people: list[str] = Field(default_factory=list)


class Act(Body):
    do: Literal["drop", "abort", "replace", "remove", "silence", "deafen", "talk", "stream-error", "forget"]
    code: int = 503


class SendFaults(Body):
    action: Literal["nack", "swallow_ack", "swallow", "delay_ack"] = "nack"
    code: int = 463
    seconds: float = 0
    times: int | None = None
    to: str | None = None


class LoginFaults(Body):
    reason: int = 503
    seconds: float | None = None
    attrs: dict[str, str] = {}


class MediaFaults(Body):
    action: Literal["status", "slow", "cut", "corrupt", "hang"] = "status"
    status: int = 404
    seconds: float = 0
    times: int | None = None
    message_id: str | None = None
    upload: bool = False


class DropMedia(Body):
    id: str
    status: int = Field(default=410, ge=400, le=599)


class Restart(Body):
    down_for: float = 0.0
