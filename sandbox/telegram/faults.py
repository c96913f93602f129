"""What a test can make go wrong with a call of the Bot API; read by the server, changed only from outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Action(StrEnum):
    ANSWER = "answer"  # an error instead of a result: nothing happens
    CUT_BEFORE = "cut_before"  # the connection breaks before the call is read: nothing happens
    CUT_DURING = "cut_during"  # … while it is read: nothing happens
    CUT_AFTER = "cut_after"  # it happens, then the connection breaks before the answer
    FAIL_AFTER = "fail_after"  # it happens, and the answer is an error all the same
    HANG_BEFORE = "hang_before"  # nothing happens, and nothing is answered
    HANG_AFTER = "hang_after"  # it happens, and nothing is answered
    SLOW = "slow"  # it happens, and is answered after a while
    GARBAGE = "garbage"  # it happens, and the answer cannot be read


@dataclass
class Fault:
    action: Action
    method: str | None = None
    """None: any call that sends, changes or deletes something."""
    code: int = 500
    description: str = "Internal Server Error"
    retry_after: int | None = None
    times: int | None = 1
    """None: until cleared."""
    chat_id: int | None = None


SENDING = ("send", "edit", "delete", "setmessagereaction")


def sends(method: str) -> bool:
    low = method.lower()
    return low.startswith(SENDING) and low not in ("sendchataction", "deletewebhook")


@dataclass
class Faults:
    calls: list[Fault] = field(default_factory=list)
    hanging: bool = False
    """Nothing is answered at all."""
    refused: bool = False
    """Every token is refused."""

    def meets(self, method: str, chat_id: int | None) -> Fault | None:
        """The fault this call meets; a limited one is used up by it."""
        for fault in self.calls:
            fits = method.lower() == fault.method.lower() if fault.method else sends(method)
            if not fits or (fault.chat_id is not None and fault.chat_id != chat_id):
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.calls.remove(fault)
            return fault
        return None
