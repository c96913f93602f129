"""Bursts into the gateway and into the bare client library, in turns: how fast, and at what cost in processor time.

Both sides get the same texts from the same people, with whom each has sessions already. Both are measured from the first
write on the wire: the gateway until another connection has read the last row, the library until its handler had the last
message (it keeps nothing).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from bench import common, sides
from bench.common import Figure, figure
from bench.sides import Side
from bench.watching import watching
from sandbox.whatsapp.phone import Phone
from tests.support.stack import Stack
from tests.support.whatsapp_real import RealClient

TURNS = 5
BURST, SENDERS = 300, 20
SETTLE_SECONDS = 60.0
LOOK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Library:
    """A process with the client library alone, linked to this phone."""

    client: RealClient
    shop: Phone


class Inward:
    """`figures()` does a round that is not counted and then turns of all sides. `tuned`: the library with its file opened
    as the gateway opens it, which is not how it comes: what is left then is what keeping messages costs."""

    def __init__(self, stack: Stack, bare: Library, tuned: Library) -> None:
        self.stack, self.bare, self.tuned = stack, bare, tuned
        self.people = [stack.sandbox.person(f"+6011{n:07}", f"P{n}") for n in range(SENDERS)]

    async def figures(self, turns: int = TURNS) -> list[Figure]:
        ours, theirs, tuned = await self.turns(turns)
        what = f"a burst of {BURST} from {SENDERS} senders, in"
        return [
            figure(f"{what}: gateway, to commit", common.rate(ours.rates)),
            figure(f"{what}: bare library, to handler", common.rate(theirs.rates)),
            figure("in: gateway ÷ bare library", common.ratio(ours.rates, theirs.rates), "0.9"),
            figure(f"{what}: bare library, its file opened as ours, to handler", common.rate(tuned.rates)),
            figure(
                "in: gateway ÷ bare library, its file opened as ours", common.ratio(ours.rates, tuned.rates)
            ),
            figure("in: processor time a message, gateway", ours.cost()),
            figure("in: processor time a message, bare library", theirs.cost()),
        ]

    async def turns(self, turns: int) -> tuple[Side, Side, Side]:
        await self._turn(
            Side(), Side(), Side()
        )  # the first messages of new people begin their Signal sessions
        ours, theirs, tuned = Side(), Side(), Side()
        for _ in range(turns):
            await self._turn(ours, theirs, tuned)
        return ours, theirs, tuned

    async def _turn(self, ours: Side, theirs: Side, tuned: Side) -> None:
        await self._gateway(ours)
        await self._library(theirs, self.bare)
        await self._library(tuned, self.tuned)

    async def _gateway(self, side: Side) -> None:
        async with watching(self.stack.database_url) as watcher:
            processes = sides.of_gateway(self.stack)
            before = sides.times(processes)
            ids = await self._burst(self.stack.shop)
            await self._until(ids, self._stored)
            after = sides.times(processes)
            seen = await watcher.seen()
        self._done(side, ids, seen)
        side.spent(before, after, len(ids))

    async def _library(self, side: Side, library: Library) -> None:
        async def handled(ids: Collection[str]) -> int:
            return len(set(ids) & (await library.client.do("seen")).keys())

        processes = sides.of_library(library.client)
        before = sides.times(processes)
        ids = await self._burst(library.shop)
        await self._until(ids, handled)
        after = sides.times(processes)
        self._done(side, ids, await library.client.do("seen"))
        side.spent(before, after, len(ids))

    def _done(self, side: Side, ids: Collection[str], seen: dict[str, float]) -> None:
        first = min(self.stack.sandbox.written(i)[0].monotonic for i in ids)
        side.rates.append(len(ids) / (max(seen[i] for i in ids) - first))

    async def _burst(self, shop: Phone) -> list[str]:
        """Everybody writes at once, each message after the one before: a phone writes one after the other."""

        async def write(sender: int) -> list[str]:
            person = self.people[sender]
            return [
                await person.send_text(shop, f"Is number {number} still there?")
                for number in range(sender, BURST, SENDERS)
            ]

        return [i for ids in await asyncio.gather(*map(write, range(SENDERS))) for i in ids]

    async def _until(
        self, ids: Collection[str], arrived: Callable[[Collection[str]], Awaitable[int]]
    ) -> None:
        """Asked seldom: the question costs more than a message does. Both sides know themselves when each came."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                if await arrived(ids) == len(ids):
                    return

    async def _stored(self, ids: Collection[str]) -> int:
        count: int = await self.stack.db.fetchval(
            "SELECT count(DISTINCT channel_message_id) FROM et_messages WHERE channel_message_id = ANY ($1)",
            list(ids),
        )
        return count
