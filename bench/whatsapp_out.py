"""Bursts out of the gateway and out of the bare client library, in turns: how fast, and at what cost in processor time.

Both sides write the same texts to the same people, with whom each has sessions already, and both are measured from just
before the messages are handed over (COMMIT, the first command) to the last arrival at the sandbox's server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from bench import common, sides
from bench.common import Figure, figure
from bench.sides import Processes, Side
from tests.support.stack import Stack
from tests.support.whatsapp_real import RealClient

TURNS = 5
PEOPLE = 30
SETTLE_SECONDS = 60.0


class Outward:
    """`figures()` brings all sides to the same start and then does turns. `tuned`: the library with its file opened as the
    gateway opens it, which is not how it comes."""

    def __init__(self, stack: Stack, bare: RealClient, tuned: RealClient, count: int) -> None:
        self.stack, self.bare, self.tuned, self.count = stack, bare, tuned, count
        self.people = [f"6011{n:07}" for n in range(min(PEOPLE, count))]

    async def prepare(self) -> None:
        """Everybody has heard from all sides once: what is measured begins no Signal session."""
        for number in self.people:
            self.stack.sandbox.person(f"+{number}")
        first = len(self.stack.sandbox.calls)
        await (await self._rows("Hello", len(self.people)))()
        await self._arrived(first, len(self.people))
        for number in self.people:
            await self.bare.do("send", to=number, text="Hello")
            await self.tuned.do("send", to=number, text="Hello")

    async def turns(self, turns: int = TURNS) -> tuple[Side, Side, Side]:
        ours, theirs, tuned = Side(), Side(), Side()
        for _ in range(turns):
            await self._turn(ours, sides.of_gateway(self.stack), await self._rows("Your order {} is ready."))
            for side, library in ((theirs, self.bare), (tuned, self.tuned)):
                await self._turn(side, sides.of_library(library), partial(self._sends, library))
        return ours, theirs, tuned

    async def figures(self, turns: int = TURNS) -> list[Figure]:
        await self.prepare()
        ours, theirs, tuned = await self.turns(turns)
        what = f"{self.count} out to {len(self.people)} people at once"
        return [
            figure(f"{what}: gateway, from COMMIT", common.rate(ours.rates)),
            figure(f"{what}: bare library, from the first call", common.rate(theirs.rates)),
            figure("out: gateway ÷ bare library", common.ratio(ours.rates, theirs.rates), "0.9"),
            figure(f"{what}: bare library, its file opened as ours", common.rate(tuned.rates)),
            figure(
                "out: gateway ÷ bare library, its file opened as ours", common.ratio(ours.rates, tuned.rates)
            ),
            figure("out: processor time a message, gateway", ours.cost()),
            figure("out: processor time a message, bare library", theirs.cost()),
        ]

    # ---- one burst ----

    async def _turn(self, side: Side, processes: Processes, burst: Callable[[], Awaitable[object]]) -> None:
        before = sides.times(processes)
        first = len(self.stack.sandbox.calls)
        start = time.monotonic()
        await burst()
        last = await self._arrived(first, self.count)
        side.rates.append(self.count / (last - start))
        await asyncio.sleep(0.5)  # receipts and marks belong to the cost
        side.spent(before, sides.times(processes), self.count)

    async def _sends(self, library: RealClient) -> None:
        sends = [
            library.do(
                "send",
                timeout=SETTLE_SECONDS,
                to=self.people[n % len(self.people)],
                text=f"Your order {n} is ready.",
            )
            for n in range(self.count)
        ]
        await asyncio.gather(*sends)

    async def _rows(self, text: str, count: int | None = None) -> Callable[[], Awaitable[None]]:
        """Rows of one transaction; what is returned commits them."""
        transaction = self.stack.db.transaction()
        await transaction.start()
        for n in range(count or self.count):
            await self.stack.db.execute(
                "SELECT et_enqueue_outbound($1, $2, $3, $4)",
                self.stack.tenant,
                self.stack.session,
                f"+{self.people[n % len(self.people)]}",
                text.format(n),
            )
        return transaction.commit

    async def _arrived(self, first: int, count: int) -> float:
        """When the last of `count` calls since then came to the server; each of them once."""
        calls = self.stack.sandbox.calls
        await calls.wait_for(start=first + count - 1, timeout=SETTLE_SECONDS)
        found = calls.items[first:]
        assert len({call.id for call in found}) == count, "a message came twice"
        return found[count - 1].monotonic
