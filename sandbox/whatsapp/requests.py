"""The bodies that the admin API takes; an unknown field is an error, so that a typing mistake is not silence."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


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


class Scan(Body):
    qr: str


class Code(Body):
    code: str


class Send(Body):
    to: str | None = None
    group: str | None = None
    text: str = ""
    mode: Literal["lid", "pn", "lid-only"] = "lid"
    quoted: str | None = None
    id: str | None = None
    kind: Literal["image", "video", "audio", "document", "sticker"] | None = None
    data: str = ""  # base64
    mimetype: str = "application/octet-stream"
    filename: str | None = None


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


class ScriptRun(Body):
    to: str
    script: str
    patience: float = 30.0


class NewGroup(Body):
    name: str
    members: list[str]


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


class Restart(Body):
    down_for: float = 0.0
