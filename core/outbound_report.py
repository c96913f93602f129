"""Tells what became of sends: metrics and log lines. Never changes a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from asyncpg import Record

from core import log as logs
from core.database import Database
from core.dispatch import Claimed
from core.metrics import Metrics
from core.outbound_marks import Ended
from core.store import dispatching

log = logs.get(part="outbound")


class Reporter:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def ended(self, batch: Sequence[Ended]) -> None:
        """Outcomes that are committed."""
        now = datetime.now(UTC)
        counts: Counter[tuple[str, str]] = Counter()
        accepted: list[Ended] = []
        for ended in batch:
            channel, outcome = ended.claimed.channel, ended.verdict.outcome
            counts[channel, outcome] += 1
            if outcome == "sent":
                accepted.append(ended)
            else:
                self._failure(ended)
        for (channel, outcome), count in counts.items():
            self._metrics.sends.labels(channel, outcome).inc(count)
            if outcome == "retried":
                self._metrics.retries.labels(channel).inc(count)
            if outcome == "sent":
                latency = self._metrics.send_latency.labels(channel)
                for ended in accepted:
                    due_at = ended.claimed.due_at
                    if ended.claimed.channel == channel and due_at is not None:
                        at = ended.verdict.mark.sent_at or now
                        latency.observe(max(0.0, (min(at, now) - due_at).total_seconds()))
        if accepted:
            self._accepted(accepted)

    def withdrawn(self, claimed: Claimed, stop: str) -> None:
        """A row that its claim ended instead of taking it."""
        outcome = "expired" if stop == "expired" else "cancelled"
        self._metrics.sends.labels(claimed.channel, outcome).inc()
        log.info(f"send.{outcome}", queue_id=claimed.queue_id, message_id=claimed.message_id,
                 tenant_id=claimed.tenant_id, session_id=claimed.session_id, error=stop)  # fmt: skip

    def expired(self, row: Record) -> None:
        """A row whose time the sweep found run out."""
        self._metrics.sends.labels(row["channel"], "expired").inc()
        log.warning("send.failed", tenant_id=row["tenant_id"], session_id=row["channel_session_id"],
                    queue_id=row["id"], message_id=row["message_id"], result="failed", error="expired")  # fmt: skip

    async def measure(self, db: Database) -> None:
        """Set the gauges of the queue."""
        async with db.worker() as conn:
            found = await dispatching.gauges(conn)
        for status in ("queued", "dispatching", "unknown"):
            self._metrics.queue_depth.labels(status).set(found[status])
        self._metrics.sends_unknown.set(found["unknown"])
        self._metrics.queue_oldest.set(max(0.0, found["oldest"]))

    def _accepted(self, accepted: Sequence[Ended]) -> None:
        if len(accepted) == 1:
            claimed = accepted[0].claimed
            log.info("send.accepted", tenant_id=claimed.tenant_id, session_id=claimed.session_id,
                     queue_id=claimed.queue_id, message_id=claimed.message_id, result="sent",
                     recipient=logs.masked(accepted[0].recipient))  # fmt: skip
        else:
            log.info("send.accepted", count=len(accepted), result="sent",
                     message_ids=[e.claimed.message_id for e in accepted])  # fmt: skip

    def _failure(self, ended: Ended) -> None:
        claimed, mark = ended.claimed, ended.verdict.mark
        fields: dict[str, Any] = {
            "tenant_id": claimed.tenant_id,
            "session_id": claimed.session_id,
            "queue_id": claimed.queue_id,
            "message_id": claimed.message_id,
            "recipient": logs.masked(ended.recipient),
            "result": mark.status,
            "error": mark.error_code,
        }
        match ended.verdict.outcome:
            case "retried" | "throttled" | "not_called":
                log.info(
                    "send.postponed", action=ended.verdict.outcome, retry_in=round(mark.retry_in, 1), **fields
                )
            case _:
                log.warning("send.unknown" if mark.status == "unknown" else "send.failed", **fields)
