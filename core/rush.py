"""Whether messages come in a rush: the part of the process that can wait then lets those pass that cannot.

A counter that fades. It knows nothing of what it counts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

FADE_SECONDS = 0.1
MANY = 4.0
"""In about the last FADE_SECONDS: 40 a second, more than twice the thousand a minute at which nobody waits for anybody."""


class Rush:
    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count, self._at = 0.0, clock()

    def note(self, count: int) -> None:
        """So many more, now."""
        now = self._clock()
        self._count, self._at = self._count * math.exp((self._at - now) / FADE_SECONDS) + count, now

    @property
    def lasts(self) -> float:
        """Seconds until it is over, if no more come; 0 when there is none."""
        if self._count <= MANY:
            return 0.0
        return max(0.0, self._at + FADE_SECONDS * math.log(self._count / MANY) - self._clock())

    async def over(self, *, within: float) -> None:
        """Wait for its end, at most `within` seconds."""
        deadline = self._clock() + within
        while True:
            wait = min(self.lasts, deadline - self._clock())
            if wait <= 0:
                return
            await asyncio.sleep(wait)
