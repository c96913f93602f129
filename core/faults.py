"""Fault points: named places at every fsync, commit and channel call where a test can stop, kill or delay the process.

In production `point()` is one dictionary look-up of an empty dict. Armed only by the environment variable `FAULTS`
(`name=action[:argument]`, comma-separated; actions `kill`, `kill:<passing>`, `exit`, `sleep:<seconds>`, `raise`) or by `arm`
in tests.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable

_armed: dict[str, Callable[[], None]] = {}


class InjectedFault(Exception):
    """Raised at a point armed with `raise`."""


def point(name: str) -> None:
    """Do what was armed for this place; usually nothing."""
    action = _armed.get(name)
    if action is not None:
        action()


def arm(name: str, action: Callable[[], None]) -> None:
    _armed[name] = action


def disarm(name: str | None = None) -> None:
    if name is None:
        _armed.clear()
    else:
        _armed.pop(name, None)


def arm_from_environment(text: str | None = None) -> None:
    """Arm what `FAULTS` names. Raises ValueError for an action it does not know."""
    for entry in filter(None, (text if text is not None else os.environ.get("FAULTS", "")).split(",")):
        name, _, spec = entry.partition("=")
        verb, _, argument = spec.partition(":")
        if verb == "kill":
            arm(name, _kill_at(int(argument or 1)))
        elif verb == "exit":
            arm(name, lambda: os._exit(70))
        elif verb == "sleep":
            seconds = float(argument)
            arm(name, lambda s=seconds: time.sleep(s))  # type: ignore[misc]
        elif verb == "raise":
            arm(name, lambda n=name: _raise(n))  # type: ignore[misc]
        else:
            raise ValueError(f"FAULTS: {entry!r} is not name=kill[:n]|exit|sleep:<s>|raise")


def _kill_at(passing: int) -> Callable[[], None]:
    """Kill this process the n-th time it comes by."""
    left = itertools.count(passing - 1, -1)

    def action() -> None:
        if next(left) <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def _raise(name: str) -> None:
    raise InjectedFault(name)
