"""Runs promises by name with a seed, prints what was found, and writes it down: the long form of the fault harness.

Knows no promise: each is a module with `async def run(plan) -> Report`, named in `PROMISES`.
"""

from __future__ import annotations

import asyncio
import importlib
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import click
import orjson

from core import log
from tests.faults.checker import Report

PROMISES = {
    "p1": "tests.faults.whatsapp.p1",
    "p2": "tests.faults.promises.p2",
    "p3": "tests.faults.promises.p3",
    "p4": "tests.faults.promises.p4",
    "p4-whatsapp": "tests.faults.whatsapp.p4",
    "p5": "tests.faults.promises.p5",
    "p6": "tests.faults.promises.p6",
    "p7": "tests.faults.promises.p7",
    "p8": "tests.faults.promises.p8",
    "p8-whatsapp": "tests.faults.whatsapp.p8",
    "p9": "tests.faults.whatsapp.p9",
    "p14": "tests.faults.whatsapp.p14",
    "soak": "tests.faults.whatsapp.p14",
    "channels": "tests.faults.channels.p146",
}
"""Name on the command line → module."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of. Everything that is left to chance comes from `rng`, so a seed says it all."""

    seed: int
    folder: Path
    """Empty, the run's own."""
    minutes: float | None = None
    """How long to go on; None: the promise's own length."""
    kills: int | None = None
    """How many faults to inject; None: the promise's own number."""
    short: bool = False
    """CI's form: the same faults, few of each, with the waits that settings allow to be short."""
    began: float = field(default_factory=time.monotonic)

    def rng(self, name: str = "") -> random.Random:
        """A stream of chance of this name: another part that draws more does not change this one."""
        return random.Random(f"{self.seed}/{name}")

    def times(self, short: int, long: int) -> int:
        """How many faults: as asked for, else by the form."""
        return self.kills if self.kills is not None else short if self.short else long

    def seconds(self, short: float, long: float) -> float:
        """How long: as asked for, else by the form."""
        return self.minutes * 60 if self.minutes is not None else short if self.short else long

    def within(self, folder: Path) -> Plan:
        """The same plan for a world beside another one."""
        return replace(self, folder=folder)

    def report(self, promise: str) -> Report:
        return Report(promise, self.seed)

    def done(self, report: Report) -> Report:
        report.seconds = time.monotonic() - self.began
        return report


Run = Callable[..., Awaitable[Report]]


def load(name: str) -> Run:
    run: Run = importlib.import_module(PROMISES[name]).run
    return run


@click.command(context_settings={"show_default": True})
@click.argument("promises", nargs=-1, type=click.Choice(list(PROMISES)))
@click.option("--seed", type=int, help="Repeat the run that printed this seed; left out: a new one.")
@click.option("--minutes", type=float, help="How long each promise runs, where it can run on.")
@click.option("--kills", type=int, help="How many faults of its kind each promise injects.")
@click.option("--short", is_flag=True, help="What CI runs.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Keep ledgers, logs and the report in this folder."
)
def main(
    promises: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    kills: int | None,
    short: bool,
    keep: Path | None,
) -> None:
    """Break the product in every way a promise names, and count what became of every item.

    Exit code 1 when a promise did not hold.
    """
    if not promises:
        click.echo("\n".join(f"{name}  {_title(name)}" for name in PROMISES))
        return
    log.configure("error")
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    held = True
    for name in promises:
        click.echo(f"{name}: seed={seed}", err=True)
        with tempfile.TemporaryDirectory(prefix="cgfaults-") as made:
            # Ledgers are appended to: each run has a folder that nobody had before.
            stamp = f"{name}-{seed}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
            folder = (keep / stamp if keep else Path(made)).resolve()
            folder.mkdir(parents=True, exist_ok=not keep)
            report = run_blocking(name, Plan(seed, folder, minutes, kills, short))
            (folder / "report.json").write_bytes(
                orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
            )
        click.echo(report.text())
        held = held and report.held
    sys.exit(0 if held else 1)


def run_blocking(name: str, plan: Plan) -> Report:
    async def run() -> Report:
        return plan.done(await load(name)(plan))

    return asyncio.run(run())


def _title(name: str) -> str:
    try:
        module = importlib.import_module(PROMISES[name])
    except ModuleNotFoundError:
        return "(not here)"
    return (module.__doc__ or "").strip().splitlines()[0]
