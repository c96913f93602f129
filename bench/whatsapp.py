"""Messages through the real WhatsApp client: 1,000 from 100 senders in a minute, in; rows enqueued by SQL, out.

    python -m bench.whatsapp [--messages 1000] [--senders 100] [--seconds 60] [--outbound 300]
                             [--webhook] [--kill-child] [--alone]

The sandbox runs in this process, the gateway as a process of its own on its embedded database, the client library is the
unmodified one. Arrivals are an open loop at random moments. Inbound figures go from the first write on the wire to the
moment a third process, with a connection of its own, has read the committed row (see bench.watch): a little more than
the commit, never less. Outbound figures go from just before COMMIT to the message's arrival at the sandbox's server.

--webhook      posts Baileys objects to /webhook instead; arrival is when the request is begun
--kill-child   kills the child of another session of the same gateway every few seconds meanwhile
--alone        afterwards the same burst through the bare client library, without a gateway: in and out
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from bench import common
from bench.common import Figure, figure, percentiles
from bench.watching import watching
from bench.whatsapp_in import Inward, Library
from bench.whatsapp_out import Outward
from gateway.whatsapp.store import opened_as
from sandbox.whatsapp.phone import Phone
from tests.support.stack import Stack
from tests.support.whatsapp_real import RealClient

OTHER_NUMBER, BARE_NUMBER, TUNED_NUMBER = "+60123456700", "+60123456701", "+60123456702"
KILL_EVERY = 5.0
SETTLE_SECONDS = 60.0
BARE = Path(__file__).with_name("bare.py")


def arrivals(count: int, seconds: float, rng: random.Random) -> list[float]:
    """Moments at which messages are due: independent of each other, spread over the whole span, in order."""
    return sorted(rng.uniform(0.0, seconds) for _ in range(count))


def inversions(order: Sequence[tuple[int, str]], written: dict[str, float]) -> int:
    """How many messages stand behind one of their thread that was written later. `order`: (thread, id) as stored."""
    latest: dict[int, float] = {}
    count = 0
    for thread, message_id in order:
        at = written[message_id]
        count += at < latest.get(thread, 0.0)
        latest[thread] = max(at, latest.get(thread, 0.0))
    return count


class Bench:
    def __init__(self, stack: Stack, options: argparse.Namespace) -> None:
        self.stack = stack
        self.options = options
        self.rng = random.Random(options.seed)
        self.kills = 0

    # ---- in ----

    async def inbound(self) -> list[Figure]:
        """The open loop, by the client or by the webhook."""
        options = self.options
        way = "webhook" if options.webhook else "client"
        write = (
            self._posts(options.senders)
            if options.webhook
            else self._people(options.senders, self.stack.shop)
        )
        ids: list[str] = []
        begun: dict[str, float] = {}
        answered: list[float] = []
        async with watching(self.stack.database_url) as watcher:
            due = arrivals(options.messages, options.seconds, self.rng)
            start = time.monotonic()
            async with asyncio.TaskGroup() as group:

                async def one(number: int, sender: int) -> None:
                    at = time.monotonic()
                    message_id = await write(number, sender)
                    answered.append(time.monotonic() - at)
                    begun[message_id] = at
                    ids.append(message_id)

                for number, at in enumerate(due):
                    await asyncio.sleep(max(0.0, start + at - time.monotonic()))
                    group.create_task(one(number, number % options.senders))
            await self._all_stored(ids)
            await asyncio.sleep(0.5)
            seen = await watcher.seen()
        written = begun if options.webhook else self._written(ids)
        took = [seen[i] - written[i] for i in ids if i in seen]
        what = f"{options.messages:,} messages, {options.senders} senders, {options.seconds:.0f} s, {way}"
        if options.kill_child:
            what += f", another session's child killed {self.kills} times"
        found = [figure(f"{what}: arrival to commit", percentiles(took), "p95 ≤ 50 ms")]
        if options.webhook:
            found.append(figure(f"{what}: request to answer", percentiles(answered)))
        found.append(
            figure(f"{what}: lost, doubled, out of order", await self._checked(ids, written), "0, 0, 0")
        )
        found.append(
            figure(f"{what}: the gateway's own wa_write_latency_seconds", await self._own_histogram())
        )
        return found

    def _people(self, count: int, shop: Phone, first: int = 0) -> Callable[[int, int], Any]:
        people = [self.stack.sandbox.person(f"+6011{n + first:07}", f"P{n}") for n in range(count)]
        # A phone writes one message after the other; what waits here has not arrived yet.
        locks = [asyncio.Lock() for _ in people]

        async def write(number: int, sender: int) -> str:
            async with locks[sender]:
                return await people[sender].send_text(shop, f"Is number {number} still there?")

        return write

    def _posts(self, senders: int) -> Callable[[int, int], Any]:
        path = f"/webhook/{self.stack.tenant}/{self.stack.session}"
        locks = [asyncio.Lock() for _ in range(senders)]

        async def write(number: int, sender: int) -> str:
            message_id = f"3EB0BE{number:014X}"
            body = {
                "key": {"id": message_id, "remoteJid": f"6013{sender:07}@s.whatsapp.net", "fromMe": False},
                "messageTimestamp": str(int(time.time())),
                "pushName": f"P{sender}",
                "message": {"conversation": f"Is number {number} still there?"},
            }
            async with locks[sender]:
                await self.stack.gateway.ok("POST", path, body)
            return message_id

        return write

    def _written(self, ids: Sequence[str]) -> dict[str, float]:
        return {i: found[0].monotonic for i in ids if (found := self.stack.sandbox.written(i))}

    async def _all_stored(self, ids: list[str]) -> None:
        async def stored() -> bool:
            count = await self.stack.db.fetchval(
                "SELECT count(DISTINCT channel_message_id) FROM et_messages WHERE channel_message_id = ANY ($1)",
                ids,
            )
            return bool(count == len(set(ids)))

        # Seldom: the question costs the server more than a message does. What is missing in the end is counted as lost.
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while True:
                    if await stored():
                        return
                    await asyncio.sleep(0.25)

    async def _checked(self, ids: Sequence[str], written: dict[str, float]) -> str:
        rows = await self.stack.db.fetch(
            "SELECT thread_id, channel_message_id FROM et_messages WHERE channel_message_id = ANY ($1) ORDER BY id",
            ids,
        )
        order = [(row["thread_id"], row["channel_message_id"]) for row in rows]
        distinct = {message_id for _, message_id in order}
        return f"{len(set(ids) - distinct)}, {len(order) - len(distinct)}, {inversions(order, written)}"

    async def _own_histogram(self) -> str:
        _, text = await self.stack.gateway.api("GET", "/metrics")
        mine = [line for line in text.splitlines() if line.startswith("wa_write_latency_seconds_")]
        values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in mine}
        count = sum(value for name, value in values.items() if "_count" in name) or 1.0
        total = sum(value for name, value in values.items() if "_sum" in name)

        def share(bound: str) -> float:
            return sum(v for n, v in values.items() if f'le="{bound}"' in n) / count * 100

        return (
            f"mean {total / count * 1000:.1f} ms; {share('0.01'):.1f} % ≤ 10 ms, {share('0.05'):.1f} % ≤ 50 ms, "
            f"{share('0.1'):.1f} % ≤ 100 ms"
        )

    # ---- out ----

    async def outbound(self) -> list[Figure]:
        """Rows that a backend commits one by one, ten a second; then as many at once."""
        count = self.options.outbound
        shop_people = [f"+6011{n:07}" for n in range(min(30, self.options.senders))]
        for number in shop_people:
            self.stack.sandbox.person(number)
        committed: dict[int, float] = {}

        async def put(numbers: range, suffix: str) -> None:
            async with self.stack.db.transaction():
                found = [
                    await self.stack.db.fetchval(
                        "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, $4)",
                        self.stack.tenant,
                        self.stack.session,
                        shop_people[n % len(shop_people)],
                        f"Your order {n} is ready{suffix}.",
                    )
                    for n in numbers
                ]
                now = time.monotonic()
            committed.update(dict.fromkeys(found, now))

        first = len(self.stack.sandbox.calls)
        paced = min(count, 100)
        start = time.monotonic()
        for n in range(paced):
            await asyncio.sleep(max(0.0, start + n / 10 - time.monotonic()))
            await put(range(n, n + 1), "")
        calls = await self._calls(first, paced)
        waits = await self._waits(committed, calls)
        found = [
            figure(
                f"{paced} rows, ten a second: commit to the server of the channel",
                percentiles(waits),
                "100 % ≤ 1 s",
            )
        ]
        committed.clear()
        first = len(self.stack.sandbox.calls)
        await put(range(count), " now")
        calls = await self._calls(first, count)
        waits = await self._waits(committed, calls)
        last = max(waits, default=1.0)
        found.append(
            figure(
                f"{count} rows in one transaction: until the last one is out",
                f"{last:.1f} s, {len(waits) / last:.0f}/s; sent twice {len(calls) - len(set(calls))}, "
                f"not sent {count - len(waits)}",
            )
        )
        return found

    async def _calls(self, first: int, count: int) -> list[str]:
        """Ids that reached the server since then, once `count` are there or time is up."""
        ledger = self.stack.sandbox.calls
        with suppress(TimeoutError):
            await ledger.wait_for(start=first + count - 1, timeout=SETTLE_SECONDS)
        await asyncio.sleep(0.3)  # a second sending of one would come now
        return [call.id for call in ledger.items[first:] if not call.repeat]

    async def _waits(self, committed: dict[int, float], calls: Sequence[str]) -> list[float]:
        rows = await self.stack.db.fetch(
            "SELECT q.id, m.channel_message_id FROM et_outbound_queue q JOIN et_messages m ON m.id = q.message_id "
            "WHERE q.id = ANY ($1)",
            list(committed),
        )
        queue = {row["channel_message_id"]: row["id"] for row in rows}
        at = {call.id: call.monotonic for call in reversed(self.stack.sandbox.calls.items)}
        return [at[i] - committed[queue[i]] for i in dict.fromkeys(calls) if i in queue]

    # ---- beside the bare library ----

    async def beside_the_bare_library(self) -> list[Figure]:
        """A burst into and out of the gateway, and the same through the library alone, in turns."""
        bare = await self._library(BARE_NUMBER, str(self.stack.folder / "bare.db"))
        try:
            tuned = await self._library(TUNED_NUMBER, opened_as(self.stack.folder / "tuned.db"))
            try:
                found = await Inward(self.stack, bare, tuned).figures()
                outward = Outward(self.stack, bare.client, tuned.client, self.options.outbound)
                return found + await outward.figures()
            finally:
                await tuned.client.kill()
        finally:
            await bare.client.kill()

    async def _library(self, number: str, file: str) -> Library:
        shop = self.stack.sandbox.phone(number, "Bare")
        client = await RealClient.start(self.stack.sandbox, script=BARE)
        await client.do("connect", db=file)
        device = await shop.scan((await client.wait("qr"))["qr"])
        await client.wait("ConnectedEv")
        await self.stack.sandbox.wait_online(device)
        return Library(client, shop)

    # ---- trouble ----

    @asynccontextmanager
    async def trouble(self) -> AsyncIterator[None]:
        """With --kill-child: a second session whose child is killed every few seconds."""
        if not self.options.kill_child:
            yield
            return
        other = await self.stack.new_session()
        await self.stack.pair(other, self.stack.sandbox.phone(OTHER_NUMBER, "Other"))
        assert self.stack.gateway.process is not None
        gateway = self.stack.gateway.process.pid

        async def kill() -> None:
            while True:
                await asyncio.sleep(KILL_EVERY)
                if pid := common.whatsapp_children(gateway).get(other):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        self.kills += 1

        killing = asyncio.create_task(kill())
        try:
            yield
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)


def options_from(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.whatsapp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--senders", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most 600")
    parser.add_argument("--outbound", type=int, default=300, help="rows to send; 0: none")
    parser.add_argument("--webhook", action="store_true")
    parser.add_argument("--kill-child", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    options.seconds = min(options.seconds, 600.0)
    return options


async def main(words: list[str] | None = None) -> list[Figure]:
    options = options_from(words)
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        async with asyncio.timeout(options.seconds + 300), Stack(Path(folder), None) as stack:
            print(
                f"whatsapp: {common.machine(await common.postgres_version(stack.database_url))}", flush=True
            )
            bench = Bench(stack, options)
            async with bench.trouble():
                found = await bench.inbound()
            if options.outbound and not options.webhook:
                found += await bench.outbound()
                if options.alone:
                    found += await bench.beside_the_bare_library()
            return found


if __name__ == "__main__":
    common.quiet()
    common.run(main())
