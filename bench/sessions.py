"""What a WhatsApp session costs: memory of its child, and how long a gateway takes from its start to active sessions.

    python -m bench.sessions [--sessions 1 10 30]

The real client against the sandbox. Sessions are paired first; then the gateway is stopped and started again, for each
number of sessions. Memory is read when all are connected and idle: resident, and proportional (what the processes share
counted once).
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import common
from bench.common import Figure, figure
from sandbox.whatsapp.phone import Phone
from tests.support.stack import Stack

ACTIVE_SECONDS = 120.0
MOST = 30


class Bench:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._paired = 1

    @property
    def _gateway(self) -> int:
        assert self.stack.gateway.process is not None
        return self.stack.gateway.process.pid

    async def run(self, counts: Sequence[int]) -> list[Figure]:
        found: list[Figure] = []
        for count in counts:
            try:
                await self._pair_up_to(count)
                found += [await self._restart(count), self._memory()]
            except AssertionError as error:
                # Too much for this machine just now; what fewer sessions cost is known all the same.
                reason = (str(error).splitlines() or [""])[0][:200]
                found.append(figure(f"{count} sessions", f"did not finish: {reason}"))
                break
        return found

    async def _pair_up_to(self, count: int) -> None:
        for number in range(self._paired, count):
            shop = self.stack.sandbox.phone(f"+601234568{number:02}", f"Shop {number}")
            await self.stack.pair(await self.stack.new_session(), shop)
            self._paired = number + 1

    def _memory(self) -> Figure:
        children = [common.memory_mb(pid) for pid in common.whatsapp_children(self._gateway).values()]
        resident, shared = (sum(numbers) / len(children) for numbers in zip(*children, strict=True))
        own, _ = common.memory_mb(self._gateway)
        count = len(children)
        return figure(
            f"memory with {count} idle session{'s' if count > 1 else ''}",
            f"a session's child {resident:.0f} MB resident, {shared:.0f} MB proportional; "
            f"the gateway's process {own:.0f} MB",
        )

    async def _restart(self, count: int) -> Figure:
        """From the start of the process, embedded database included, to every session active."""
        await self.stack.gateway.stop()
        started = time.monotonic()
        await self.stack.gateway.start()
        listening = time.monotonic() - started
        # The embedded server may have been stopped with the gateway; and what the rows said before counts for nothing:
        # a session is active when the sandbox sees its client and the row says so.
        await self.stack.reopen_db()

        async def active() -> bool:
            devices = [device for phone in self._shops() for device in phone.devices]
            online = sum(self.stack.sandbox.is_online(device) for device in devices)
            rows = await self.stack.db.fetchval(
                "SELECT count(*) FROM et_channel_sessions WHERE status = 'active'"
            )
            return bool(online >= count and rows >= count)

        await self.stack.until(active, f"{count} sessions are active", ACTIVE_SECONDS)
        took = time.monotonic() - started
        return figure(
            f"start of the gateway to {count} active session{'s' if count > 1 else ''}",
            f"{took:.1f} s (serving HTTP after {listening:.1f} s)",
        )

    def _shops(self) -> list[Phone]:
        return [
            self.stack.shop,
            *(p for p in self.stack.sandbox.people if p.devices and p is not self.stack.shop),
        ]


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sessions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sessions", type=int, nargs="+", default=[1, 10], metavar="N", help=f"at most {MOST}"
    )
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        async with asyncio.timeout(600), Stack(Path(folder), None) as stack:
            print(
                f"sessions: {common.machine(await common.postgres_version(stack.database_url))}", flush=True
            )
            return await Bench(stack).run(sorted({min(count, MOST) for count in options.sessions}))


if __name__ == "__main__":
    common.quiet()
    common.run(main())
