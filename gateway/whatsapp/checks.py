"""Which numbers are on WhatsApp: remembered for a day, asked slowly, and never more of them than needed.

WhatsApp watches who looks numbers up in bulk; a session that does so is a session that gets banned.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection

from core.errors import ThrottledError

YES_SECONDS = 24 * 3600.0
NO_SECONDS = 3600.0
"""Somebody who is not on WhatsApp may be soon."""
REMEMBERED = 20_000
PACE = 2.0
"""Seconds between two questions of one session."""

Ask = Callable[[list[str]], Awaitable[dict[str, bool]]]


class Checks:
    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        """`ask`: the real question, about digits without `+`."""
        self._ask, self._clock = ask, clock
        self._known: OrderedDict[str, tuple[float, bool]] = OrderedDict()
        self._next = 0.0

    async def __call__(self, phones: Collection[str]) -> dict[str, bool]:
        """Raises ThrottledError when it is too early to ask again, and what `ask` raises."""
        known = {phone: found for phone in phones if (found := self._remembered(phone)) is not None}
        unknown = sorted(set(phones) - known.keys())
        if not unknown:
            return known
        now = self._clock()
        if now < self._next:
            raise ThrottledError(
                f"This session may look up numbers once in {PACE:g} seconds; what it knew already needs no waiting.",
                retry_after=self._next - now,
                code="check_paced",
            )
        self._next = now + PACE
        asked = await self._ask(unknown)
        until_yes, until_no = self._clock() + YES_SECONDS, self._clock() + NO_SECONDS
        for phone in unknown:
            on = asked.get(phone, False)
            self._known[phone] = (until_yes if on else until_no, on)
            self._known.move_to_end(phone)
            known[phone] = on
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    def _remembered(self, phone: str) -> bool | None:
        until, on = self._known.get(phone, (0.0, False))
        return on if self._clock() < until else None
