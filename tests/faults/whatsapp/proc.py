"""Memory and open descriptors of processes over time, and how fast they grow."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
WARM_SECONDS = 120.0
"""Of each process's life: caches, pools and Signal sessions are being filled."""


@dataclass(frozen=True, slots=True)
class Sample:
    at: float
    memory: float
    """Resident megabytes."""
    descriptors: int


@dataclass(slots=True)
class Watched:
    """The lives of one part: a new process id begins a new life."""

    lives: dict[int, list[Sample]] = field(default_factory=dict)

    def look(self, pid: int | None) -> None:
        if pid is None:
            return
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            return
        self.lives.setdefault(pid, []).append(Sample(time.monotonic(), pages * PAGE_MB, descriptors))

    def longest(self) -> list[Sample]:
        """The longest life, without its beginning (without a quarter of it when it was short)."""
        life = max(self.lives.values(), key=lambda samples: samples[-1].at - samples[0].at, default=[])
        if not life:
            return []
        warm = min(WARM_SECONDS, (life[-1].at - life[0].at) / 4)
        return [sample for sample in life if sample.at >= life[0].at + warm]

    def told(self) -> dict[str, float | str]:
        life = self.longest()
        if len(life) < 3:
            return {"lives": len(self.lives)}
        hours = [(sample.at - life[0].at) / 3600 for sample in life]
        memory, descriptors = [s.memory for s in life], [float(s.descriptors) for s in life]
        return {
            "lives": len(self.lives),
            "longest, minutes": round(hours[-1] * 60, 1),
            "MB": f"{memory[0]:.0f} to {memory[-1]:.0f}",
            "MB an hour": round(slope(hours, memory), 2),
            "descriptors": f"{descriptors[0]:.0f} to {descriptors[-1]:.0f}",
            "descriptors an hour": round(slope(hours, descriptors), 2),
        }


def slope(x: list[float], y: list[float]) -> float:
    """Least squares."""
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
