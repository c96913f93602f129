"""P4 through the real WhatsApp client: one queue item is sent at most once, or says `unknown`, however a send is cut off."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter

from sandbox.whatsapp.hub import Call
from tests.faults.checker import Report
from tests.faults.run import Plan
from tests.faults.whatsapp.killing import Kill, Killer, database
from tests.faults.whatsapp.orders import Orders
from tests.faults.whatsapp.rig import Line, Rig

CHILD = ("random", "called", "point:whatsapp.send.before", "called", "point:whatsapp.send.after", "swallowed")
GATEWAY = (
    None,
    "outbound.claim.after_commit",
    "outbound.call.before",
    "whatsapp.send.command",
    "whatsapp.send.replied",
    "outbound.call.after",
    "outbound.mark.before_commit",
    "outbound.mark.after_commit",
    "outbound.claim.before_commit",
)


class Cutting(Killer):
    """Kills around a send."""

    def __init__(self, rig: Rig, orders: Orders, rng: random.Random) -> None:
        super().__init__(rig, rng)
        self.orders = orders
        self.swallowed = 0

    async def child(self, line: Line, how: str) -> None:
        kill = await getattr(self, f"_{how.partition(':')[0]}")(line, how)
        if kill is None:
            self.missed[how] += 1
            return
        self.kills.append(kill)
        await self.rig.online(line, kill.logins)

    async def _random(self, line: Line, how: str) -> Kill | None:
        placing = asyncio.create_task(self.orders.place_some(line, self.rng.randint(3, 10)))
        await asyncio.sleep(self.rng.uniform(0.0, 0.3))
        kill = self.strike(line, how)
        await placing
        return kill

    async def _called(self, line: Line, how: str) -> Kill | None:
        """The server has the message; its answer finds nobody."""
        pid, struck = line.pid, asyncio.get_running_loop().create_future()
        count = self.rng.randint(1, 4)

        def strike(call: Call) -> None:
            nonlocal count
            if call.device == line.device.jid and not struck.done():
                count -= 1
                if count <= 0:
                    struck.set_result(self.strike(line, how, pid))

        if pid is None:
            return None
        self.orders.on_call = strike
        try:
            await self.orders.place_some(line, 5)
            async with asyncio.timeout(20):
                found: Kill | None = await struck
                return found
        except TimeoutError:
            return None
        finally:
            self.orders.on_call = None

    async def _point(self, line: Line, how: str) -> Kill | None:
        pid = await self.armed(line, f"{how.partition(':')[2]}=kill:{self.rng.randint(1, 3)}")
        await self.orders.place_some(line, 5)
        if pid is None or not await self.rig.child_gone(pid, within=30):
            return None
        return Kill(how, line.session, self.rig.logins(line))

    async def _swallowed(self, line: Line, how: str) -> Kill | None:
        """Nobody is killed by us: the answer to a send gets lost, and the gateway ends the client that waits for it."""
        pid, to = line.pid, self.rng.choice(line.people[:-1])
        self.rig.sandbox.fail_sends("swallow_ack", times=1, to=to)
        self.swallowed += 1
        await self.orders.place(line, to.number)
        if pid is None or not await self.rig.child_gone(pid, within=60):
            return None
        return Kill(how, line.session, self.rig.logins(line))

    async def gateway(self, point: str | None) -> None:
        rig = self.rig
        if point is not None:
            await self.armed_gateway(point, self.rng.randint(1, 3))
        placing = [asyncio.create_task(self.orders.place_some(line, 6, 0.03)) for line in rig.lines]
        if point is None:
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))
        elif not await self.gateway_died():
            self.missed[f"gateway:{point}"] += 1
        kills = await self.end_gateway(f"gateway:{point or 'random'}")
        await asyncio.gather(*placing)
        await rig.restart_gateway()
        for line, kill in zip(rig.lines, kills, strict=True):
            await rig.online(line, kill.logins)


async def run(plan: Plan, *, url: str | None = None) -> Report:
    report, count = plan.report("P4 through WhatsApp"), plan.times(5, 60)
    rng = plan.rng("p4")
    async with (
        database(url) as (_, address),
        Rig(plan.folder, address, lines=1 if plan.short else 2, rng=rng) as rig,
    ):
        await rig.greet()
        for line in rig.lines:
            line.people[-1].auto_receipts = None  # a phone that is off says nothing about what it got
        orders = Orders(rig, rng)
        orders.watch()
        cutting = Cutting(rig, orders, rng)
        of_gateway = iter(GATEWAY[: max(1, count // 3)])
        lines = itertools.cycle(rig.lines)
        for n, how in enumerate(itertools.cycle(CHILD)):
            if len(cutting.kills) >= count:
                break
            await cutting.child(next(lines), how)
            if n % 2 == 0 and (point := next(of_gateway, "none")) != "none":
                await cutting.gateway(point)
        await orders.finished(within=300)
        await judge(cutting, orders, report)
        await orders.close()
    return report


async def judge(cutting: Cutting, orders: Orders, report: Report) -> None:
    rows = await orders.rows()
    classes, second = orders.judge(rows)
    report.figures |= cutting.told()
    report.figures["answers swallowed"] = cutting.swallowed
    report.add("sent", classes)
    report.zero("second sends", second)
    unknown, not_begun = orders.doubted()
    status = {row["id"]: row["status"] for row in rows.values()}
    report.figures["proven by the secret never to have begun, sent again"] = len(not_begun)
    report.figures["cut off under way"] = len(unknown)
    report.figures["of these proven sent, by secret and receipt"] = sum(status[q] == "sent" for q in unknown)
    left = [row for row in rows.values() if row["status"] == "unknown"]
    report.figures["left unknown"] = f"{len(left)} of {len(rows)} ({len(left) / max(1, len(rows)):.1%})"
    reached = {call.id for call in cutting.rig.sandbox.calls}
    silent = {line.people[-1].number for line in cutting.rig.lines}
    why = Counter(
        row["error_code"]
        if row["channel_message_id"].startswith("out_")
        else "written down, and it never left"
        if row["channel_message_id"] not in reached
        else "the phone is off"
        if orders.placed[row["content"]].to in silent
        else "no receipt"
        for row in left
    )
    report.figures["left unknown, why"] = dict(why)
