"""What every benchmark shares: the machine's line, percentiles, processor time, a throw-away database, figures.

Measures nothing by itself. A figure is a sentence for a table, never an assertion.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import statistics
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import structlog

from core.embedded import EmbeddedPostgres

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    what: str
    value: str
    goal: str = ""


def figure(what: str, value: str, goal: str = "") -> Figure:
    """A figure, printed at once: a run that is cut off has still said what it knew."""
    print(f"  {what}: {value}" + (f"   (goal {goal})" if goal else ""), flush=True)
    return Figure(what, value, goal)


def percentile(values: Iterable[float], percent: float) -> float:
    """Nearest rank; 0 for no values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def percentiles(seconds: Sequence[float]) -> str:
    """`p50 1.2 ms, p95 3.4 ms, p99 5.6 ms` of seconds."""
    return ", ".join(f"p{p} {percentile(seconds, p) * 1000:.1f} ms" for p in (50, 95, 99))


def rate(values: Sequence[float]) -> str:
    """The median and how far the rounds were apart: `12,300/s (11,900 to 12,800)`."""
    middle = f"{statistics.median(values):,.0f}/s"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.0f} to {max(values):,.0f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios round by round: neighbours that disturb one round disturb both sides of it."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
    if not ratios:
        return "–"
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


# --- the machine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    cores: int
    cpu: str
    memory_mb: int
    python: str
    postgres: str
    load: float
    """Processes that wanted to run in the minute before the start: more than there are cores means disturbed figures."""

    def __str__(self) -> str:
        return (
            f"{self.cores} cores ({self.cpu}), {self.memory_mb / 1024:.0f} GB, {platform.system()}, "
            f"Python {self.python}, PostgreSQL {self.postgres}, load average at the start {self.load:.1f}"
        )


def machine(postgres: str) -> Machine:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu=_cpu_model(),
        memory_mb=pages >> 20,
        python=platform.python_version(),
        postgres=postgres,
        load=os.getloadavg()[0],
    )


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


async def postgres_version(url: str) -> str:
    conn = await asyncpg.connect(url)
    try:
        return str(await conn.fetchval("SELECT split_part(current_setting('server_version'), ' ', 1)"))
    finally:
        await conn.close()


# --- processes ----------------------------------------------------------------------------------------------------


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of these processes so far. One that is gone, or on another host, counts 0."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident and proportional (shared pages divided among their users) megabytes of a process."""
    found = {"Rss": 0.0, "Pss": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) / 1024
    return found["Rss"], found["Pss"]


def children(parent: int) -> list[int]:
    """Process ids of the direct children of this process."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def whatsapp_children(gateway: int) -> dict[int, int]:
    """Session id → process id of the WhatsApp children of this gateway."""
    children: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if parent == gateway and b"--folder" in words:
                folder = words[words.index(b"--folder") + 1].decode()
                children[int(Path(folder).name)] = int(entry.name)
    return children


# --- running ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def database(url: str | None) -> AsyncIterator[str]:
    """The one given, or an embedded server in a temporary folder that is removed again."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        embedded = EmbeddedPostgres(Path(folder))
        try:
            yield await embedded.start()
        finally:
            await embedded.stop()


def quiet() -> None:
    """The benchmark's own log would be in its way; what goes wrong still shows."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """As the gateway runs: on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
