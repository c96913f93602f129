"""Classes every item of a run as ok, recovered, unknown, lost, duplicated or unexpected, and counts what must be zero.

Pure: ledgers and rows in, figures out. Knows neither a channel nor a database.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.faults.ledger import ACKNOWLEDGED, ANSWERED, CALLED, OFFERED, Entry


class Class(StrEnum):
    OK = "ok"
    RECOVERED = "recovered"
    """Right in the end, after a fault: stored after it was offered again, or sent and found out by asking."""
    UNKNOWN = "unknown"
    """Nothing wrong was done and nothing was promised: never acknowledged and not stored, or a send that says so."""
    LOST = "lost"
    DUPLICATED = "duplicated"
    UNEXPECTED = "unexpected"
    """Stored though never offered, sent though never asked for, or sent against what its row says."""


BAD = (Class.LOST, Class.DUPLICATED, Class.UNEXPECTED)


@dataclass(frozen=True, slots=True)
class Classes:
    """Every item with its class."""

    by_item: Mapping[str, Class]
    expected: int = 0
    """How many items the world knows of: what a share is taken of."""

    @property
    def counts(self) -> Counter[Class]:
        return Counter(self.by_item.values())

    def of(self, *classes: Class) -> list[str]:
        return sorted(item for item, found in self.by_item.items() if found in classes)

    @property
    def bad(self) -> list[str]:
        return self.of(*BAD)


def inbound(ledger: Iterable[Entry], stored: Iterable[str]) -> Classes:
    """Messages offered by the world against the ids found in et_messages, one for each row."""
    offered: Counter[str] = Counter()
    acknowledged: set[str] = set()
    for entry in ledger:
        if entry.kind == OFFERED:
            offered[entry.item] += 1
        elif entry.kind == ACKNOWLEDGED:
            acknowledged.add(entry.item)
    rows = Counter(stored)
    return Classes(
        {item: _inbound(offered[item], item in acknowledged, rows[item]) for item in offered | rows},
        len(offered),
    )


def _inbound(offered: int, acknowledged: bool, rows: int) -> Class:
    if not offered:
        return Class.UNEXPECTED
    if rows > 1:
        return Class.DUPLICATED
    if rows == 0:
        return Class.LOST if acknowledged else Class.UNKNOWN
    return Class.OK if acknowledged and offered == 1 else Class.RECOVERED


@dataclass(frozen=True, slots=True)
class QueueRow:
    """How a queue item stands at the end."""

    item: str
    status: str
    claim_epoch: int = 1
    retry_count: int = 0


@dataclass(slots=True)
class _Sends:
    epochs: dict[int, str] = field(default_factory=dict)
    """By claim epoch what became of the call; `open` when nothing was answered."""
    twice: bool = False


def outbound(ledger: Iterable[Entry], rows: Iterable[QueueRow], *, refused: Collection[str] = ()) -> Classes:
    """Calls the world saw against the queue. A call counts unless it was told a definite `not_sent`.

    `refused`: items that the world was scripted to refuse, whose `failed` is right."""
    sends = _sends(ledger)
    queue = {row.item: row for row in rows}
    classes = {
        item: _outbound(sends.get(item, _Sends()), queue.get(item), item in refused)
        for item in {**sends, **queue}
    }
    return Classes(classes, len(queue))


def _sends(ledger: Iterable[Entry]) -> dict[str, _Sends]:
    sends: dict[str, _Sends] = defaultdict(_Sends)
    for entry in ledger:
        if entry.kind not in (CALLED, ANSWERED):
            continue
        epoch = int(entry.fields.get("epoch", 0))
        found = sends[entry.item]
        if entry.kind == ANSWERED:
            found.epochs[epoch] = str(entry.fields.get("outcome", "sent"))
        elif epoch in found.epochs:
            found.twice = True
        else:
            found.epochs[epoch] = "open"
    return sends


def _outbound(sends: _Sends, row: QueueRow | None, refused: bool) -> Class:
    if row is None:
        return Class.UNEXPECTED
    counted = [epoch for epoch, outcome in sends.epochs.items() if outcome not in ("not_sent", "refused")]
    if len(counted) > 1 or sends.twice:
        return Class.DUPLICATED
    match row.status:
        case "sent":
            if not counted:
                return Class.LOST
            clean = sends.epochs[counted[0]] == "sent" and row.claim_epoch == 1
            return Class.OK if clean else Class.RECOVERED
        case "unknown":
            return Class.UNKNOWN
        case "failed" | "cancelled":
            if counted:
                return Class.UNEXPECTED
            return Class.OK if refused or row.status == "cancelled" else Class.LOST
        case _:  # nobody got round to it
            return Class.LOST


def second_sends(ledger: Iterable[Entry]) -> int:
    """Calls beyond the first for one item, those that were told a definite `not_sent` or refused aside."""
    total = 0
    for found in _sends(ledger).values():
        counted = [o for o in found.epochs.values() if o not in ("not_sent", "refused")]
        total += max(0, len(counted) - 1) + found.twice
    return total


def inversions(rows: Iterable[tuple[Hashable, int]]) -> int:
    """(thread, place in the thread) in the order found: pairs of one thread that stand the wrong way round."""
    seen: dict[Hashable, list[int]] = defaultdict(list)
    total = 0
    for thread, place in rows:
        before = seen[thread]
        total += len(before) - bisect_right(before, place)
        insort(before, place)
    return total


@dataclass(frozen=True, slots=True)
class Stint:
    """A stretch of sending by one owner over one connection of one session."""

    session: str
    owner: str
    begin: float
    end: float


def stints(calls: Iterable[Entry]) -> list[Stint]:
    """From calls with `session`, `owner` and `connection` fields."""
    spans: dict[tuple[str, str, str], tuple[float, float]] = {}
    for entry in calls:
        if entry.kind != CALLED:
            continue
        key = tuple(str(entry.fields[name]) for name in ("session", "owner", "connection"))
        assert len(key) == 3
        first, last = spans.get(key, (entry.at, entry.at))
        spans[key] = (min(first, entry.at), max(last, entry.at))
    return [Stint(s, o, *span) for (s, o, _), span in spans.items()]


def overlap(found: Sequence[Stint]) -> float:
    """Seconds during which two owners sent on one session."""
    total = 0.0
    for n, one in enumerate(found):
        for other in found[n + 1 :]:
            if one.session == other.session and one.owner != other.owner:
                total += max(0.0, min(one.end, other.end) - max(one.begin, other.begin))
    return total


@dataclass(slots=True)
class Report:
    """What one run of a promise found. `problems` empty: the promise held."""

    promise: str
    seed: int
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, classes: Classes) -> None:
        """Counts of one kind of item; what is lost, duplicated or unexpected is a problem."""
        counts = classes.counts
        self.figures[name] = {"items": classes.expected} | {
            str(c): counts[c] for c in Class if counts[c] or c in BAD
        }
        for bad in BAD:
            if items := classes.of(bad):
                self.problems.append(f"{name}: {len(items)} {bad}: {', '.join(items[:8])}")

    def zero(self, name: str, value: float) -> None:
        """A figure that must be zero."""
        self.figures[name] = round(value, 3)
        if value:
            self.problems.append(f"{name} is {value:g}, not 0")

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.figures[name] = round(value, 3)
        if value > limit:
            self.problems.append(f"{name} is {value:.3f}, over {limit:g}")

    def check(self, name: str, right: bool, told: str = "") -> None:
        """Something that must be so."""
        self.figures[name] = right
        if not right:
            self.problems.append(f"{name}: {told or 'not so'}")

    @property
    def held(self) -> bool:
        return not self.problems

    def text(self) -> str:
        lines = [
            f"{self.promise}: {'held' if self.held else 'BROKEN'}  seed={self.seed}  length={self.seconds:.1f} s"
        ]
        for name, value in self.figures.items():
            shown = "  ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
            lines.append(f"  {name}: {shown}")
        return "\n".join([*lines, *(f"  PROBLEM {problem}" for problem in self.problems)])


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p95, p99 and the most, in the unit given."""
    found = sorted(values)
    if not found:
        return {}
    at = {name: found[max(0, math.ceil(len(found) * share) - 1)] for name, share in _SHARES.items()}
    return {name: round(value, 3) for name, value in at.items()} | {"max": round(found[-1], 3)}


_SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
