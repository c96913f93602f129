"""What two sides of a comparison did, the gateway and the bare library: how fast, and whose processor time it took."""

from __future__ import annotations

import os
import statistics
from contextlib import suppress
from dataclasses import dataclass, field

from bench import common
from tests.support.stack import Stack
from tests.support.whatsapp_real import RealClient

Processes = dict[str, list[int]]


@dataclass(slots=True)
class Side:
    """What one of the two did: messages a second, and milliseconds of processor time a message by process."""

    rates: list[float] = field(default_factory=list)
    costs: dict[str, list[float]] = field(default_factory=dict)

    def cost(self) -> str:
        medians = {name: statistics.median(values) for name, values in self.costs.items()}
        return (
            f"{sum(medians.values()):.1f} ms (" + ", ".join(f"{n} {v:.1f}" for n, v in medians.items()) + ")"
        )

    def spent(self, before: dict[str, float], after: dict[str, float], count: int) -> None:
        """Both as `times` gave them."""
        for name, seconds in after.items():
            self.costs.setdefault(name, []).append((seconds - before[name]) / count * 1000)


def times(processes: Processes) -> dict[str, float]:
    return {name: common.cpu_seconds(pids) for name, pids in processes.items()}


def of_gateway(stack: Stack) -> Processes:
    assert stack.gateway.process is not None
    gateway = stack.gateway.process.pid
    return {
        "gateway": [gateway],
        "child": list(common.whatsapp_children(gateway).values()),
        "database": _database(stack),
        "sandbox": [os.getpid()],
    }


def of_library(bare: RealClient) -> Processes:
    return {"library": [bare.process.pid], "sandbox": [os.getpid()]}


def _database(stack: Stack) -> list[int]:
    """The embedded server and its processes as they are now; none when the database is another one."""
    with suppress(OSError, ValueError, StopIteration):
        pid_file = next((stack.folder / "data/postgres").rglob("postmaster.pid"))
        first = int(pid_file.read_text().split()[0])
        return [first, *common.children(first)]
    return []
