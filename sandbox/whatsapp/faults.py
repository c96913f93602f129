"""What a test or the admin API can make go wrong; read by the connections, changed only from outside."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from sandbox.whatsapp.nodes import JID


class SendAction(StrEnum):
    NACK = "nack"  # refuse with a code
    SWALLOW_ACK = "swallow_ack"  # deliver, but never say so
    SWALLOW = "swallow"  # neither deliver nor answer
    DELAY_ACK = "delay_ack"  # deliver, and say so later


class Silence(StrEnum):
    DEAF = "deaf"  # keepalives are answered, nothing else happens
    DEAD = "dead"  # nothing is answered at all


@dataclass
class SendFault:
    action: SendAction
    code: int = 0
    seconds: float = 0
    times: int | None = None  # None: until cleared
    to: str | None = None  # lid user or group id; None: everyone


@dataclass
class Refusal:
    """How logins are turned away for a while."""

    reason: int
    attrs: dict[str, str]
    until: float | None  # on the monotonic clock; None: until cleared
    device: JID | None = None


class MediaAction(StrEnum):
    STATUS = "status"  # answer with a status: 404 and 410 are how WhatsApp says that it has dropped a medium
    SLOW = "slow"  # spread over some seconds
    CUT = "cut"  # the connection breaks half way
    CORRUPT = "corrupt"  # all bytes come, one of them is wrong
    HANG = "hang"  # nothing comes at all for some seconds, then the connection breaks


@dataclass
class MediaFault:
    action: MediaAction
    status: int = 404
    seconds: float = 0
    times: int | None = None  # None: until cleared
    token: str | None = None  # of one blob; None: all of them
    upload: bool = False  # meets uploads instead of downloads


@dataclass
class Faults:
    media: list[MediaFault] = field(default_factory=list)
    sends: list[SendFault] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    silent: dict[JID, Silence] = field(default_factory=dict)
    lose_receipts: bool = False

    def for_send(self, to: str) -> SendFault | None:
        """The fault this send meets; a limited one is used up by it."""
        for fault in self.sends:
            if fault.to is not None and fault.to != to:
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.sends.remove(fault)
            return fault
        return None

    def for_media(self, token: str, *, upload: bool) -> MediaFault | None:
        """The fault this transfer meets; a limited one is used up by it."""
        for fault in self.media:
            if fault.upload is not upload or fault.token not in (None, token):
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.media.remove(fault)
            return fault
        return None

    def for_login(self, device: JID) -> Refusal | None:
        now = time.monotonic()
        self.refusals = [r for r in self.refusals if r.until is None or r.until > now]
        return next((r for r in self.refusals if r.device in (None, device)), None)

    def clear(self) -> None:
        self.media.clear()
        self.sends.clear()
        self.refusals.clear()
        self.lose_receipts = False
