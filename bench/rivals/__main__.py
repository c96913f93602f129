"""Items a second through our queue and through others, all waiting before the start, on one server in alternating rounds.

    python -m bench.rivals [DATABASE_URL] [--rounds 3] [--items 10000] [--threads 2000] [--sessions 10]

procrastinate (with a lock per thread, which is its thread order, and in no order), pgqueuer and graphile-worker (as it
comes, and tuned as its documentation recommends; both in no order) run in processes and environments of their own, each
with work that does nothing. Ours keeps the order of every thread, commits before each call and after it, and calls a
channel that answers at once. Everybody's clock runs from the worker's start to the last item's call. Slow ones get fewer
items.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from bench import common, outbound
from bench.common import Figure, figure
from bench.rivals import places
from core.migrate import migrate

RUN_SECONDS = 120.0
CONCURRENCY = 10


@dataclass(slots=True)
class Rival:
    """`run` returns the version and the items a second of one round."""

    name: str
    how: str
    run: Callable[[], Awaitable[tuple[str, float]]]
    rates: list[float] = field(default_factory=list)
    version: str = ""
    missing: str = ""

    async def round(self) -> None:
        if self.missing:
            return
        try:
            self.version, rate = await self.run()
        except places.NotHad as error:
            self.missing = str(error)
        else:
            self.rates.append(rate)

    def figure(self) -> Figure:
        if self.missing:
            return figure(f"{self.name}, {self.how}", f"could not be had here: {self.missing}")
        return figure(f"{self.name} {self.version}, {self.how}", common.rate(self.rates))


def rivals(url: str) -> list[Rival]:
    async def script(name: str, items: int, *words: str) -> tuple[str, float]:
        if name.endswith(".mjs"):
            command = ["node", str(await places.node() / name)]
        else:
            command = [str(await places.python()), str(places.HERE / name)]
        printed = await places.output([*command, url, str(items), *words], seconds=RUN_SECONDS)
        found = json.loads(printed.splitlines()[-1])
        if found["items"] != items:
            raise places.NotHad(f"it did {found['items']} of {items} items")
        return found["version"], items / found["seconds"]

    many = str(CONCURRENCY)
    return [
        Rival(
            "procrastinate",
            f"a lock per thread, {many} at a time",
            lambda: script("run_procrastinate.py", 400, many, "80"),
        ),
        Rival(
            "procrastinate",
            f"in no order, {many} at a time",
            lambda: script("run_procrastinate.py", 400, many, "0"),
        ),
        Rival(
            "pgqueuer",
            "in no order, batches of 100",
            lambda: script("run_pgqueuer.py", 3_000, "4", "100"),
        ),
        Rival(
            "graphile-worker",
            f"in no order, {many} at a time",
            lambda: script("run_graphile.mjs", 2_000, many, "default"),
        ),
        Rival(
            "graphile-worker",
            "in no order, tuned: local queue of 500, completions in batches",
            lambda: script("run_graphile.mjs", 10_000, many, "tuned"),
        ),
    ]


async def ours(url: str, items: int, threads: int, sessions: int) -> float:
    found = await outbound.measure(url, items, threads, sessions, 0)
    for line in found:
        if match := re.match(r"([\d,]+)/s", line.value):
            return float(match[1].replace(",", ""))
    raise ValueError(f"bench.outbound gave no rate in {[line.value for line in found]}")


async def compare(url: str, options: argparse.Namespace) -> list[Figure]:
    mine: list[float] = []
    others = rivals(url)
    for _ in range(options.rounds):
        mine.append(await ours(url, options.items, options.threads, options.sessions))
        for rival in others:
            await rival.round()
    found = [figure("ours, in thread order", common.rate(mine)), *(rival.figure() for rival in others)]
    for name, goal in (("procrastinate", "40, aim 60"), ("graphile-worker", "0.9, aim 1.2")):
        # Against its faster way, so that nobody can say it was held back.
        there = [rival for rival in others if rival.name == name and len(rival.rates) == len(mine)]
        if there:
            best = max(there, key=lambda rival: statistics.median(rival.rates))
            found.append(figure(f"ours ÷ {name}, {best.how}", common.ratio(mine, best.rates), goal))
    return found


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="a database that may be thrown away afterwards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2_000)
    parser.add_argument("--sessions", type=int, default=10)
    options = parser.parse_args(words)
    async with common.database(options.url) as url:
        print(f"rivals: {common.machine(await common.postgres_version(url))}", flush=True)
        await migrate(url)
        return await compare(url, options)


if __name__ == "__main__":
    common.quiet()
    common.run(main())
