"""What ingest says about what it stored, once that is committed: metrics and log lines. Never message text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from core import log as logs
from core.channel import InboundMessage
from core.errors import DatabaseUnavailable, GatewayError
from core.ingest_batch import Work, Written
from core.metrics import Metrics
from core.prepare import Prepared

log = logs.get(part="ingest")


Kind: TypeAlias = tuple[int, str, str]
"""Tenant, channel, direction: what the metrics of stored messages are told apart by."""


class _Counts(NamedTuple):
    written: Callable[[float], None]
    messages: Callable[[float], None]
    latency: Callable[[float], None]


class Report:
    """Labels are looked up once, not four times a message."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._received: dict[int, Callable[[], None]] = {}
        self._counts: dict[Kind, _Counts] = {}

    def received(self, tenant_id: int) -> None:
        count = self._received.get(tenant_id)
        if count is None:
            count = self._received[tenant_id] = self._metrics.received.labels(str(tenant_id)).inc
        count()

    def failed(self, message: InboundMessage, error: GatewayError) -> None:
        kind = error.code if error.__cause__ is None or isinstance(error, DatabaseUnavailable) else None
        self._metrics.write_errors.labels(
            str(message.tenant_id), kind or type(error.__cause__).__name__
        ).inc()
        if not isinstance(error, DatabaseUnavailable):
            log.error(
                "message.refused",
                tenant_id=message.tenant_id,
                session_id=message.session_id,
                error=error.detail,
                result="refused",
                action="the original stays in the journal",
            )

    def stored(self, works: Sequence[Work], written: Written) -> None:
        """Everything of one committed transaction."""
        now = time.time()
        fresh: list[int] = []
        waits: dict[Kind, list[float]] = {}
        messages: list[Prepared] = []
        duplicates = erased = 0
        for n, (work, outcome) in enumerate(zip(works, written.outcomes, strict=True)):
            if not isinstance(work, Prepared):
                continue
            messages.append(work)
            if outcome is None:
                continue
            row = work.row
            if n in written.fresh:
                fresh.append(outcome.message_id)
                kind = (row.tenant_id, row.channel, row.direction)
                waits.setdefault(kind, []).append(max(0.0, now - work.message.arrived_at))
            elif outcome.erased:
                erased += 1
            else:
                duplicates += 1
                self._metrics.duplicates.labels(row.channel).inc()
        for kind, seconds in waits.items():
            self._count(kind, seconds)
        if not fresh and not duplicates and not erased:
            return
        sessions = sorted({work.row.session_id for work in messages})
        tenants = sorted({work.row.tenant_id for work in messages})
        fields: dict[str, object] = {
            "count": len(fresh),
            "duplicates": duplicates,
            "message_ids": fresh,
            "duration_ms": round((now - messages[0].message.arrived_at) * 1000, 1),
            "result": "stored",
        }
        if len(tenants) == 1:
            fields["tenant_id"] = tenants[0]
        else:
            fields["tenant_ids"] = tenants
        if len(sessions) == 1:
            fields["session_id"] = sessions[0]
        else:
            fields["session_ids"] = sessions
        if erased:
            fields["erased"] = erased
        if written.filled:
            fields["filled"] = written.filled
        if written.echoes:
            fields["own_echoes"] = written.echoes
        log.info("messages.stored", **fields)
        if written.handed_over:
            log.info(
                "threads.handed_over",
                thread_ids=written.handed_over,
                cancelled_queue_ids=written.cancelled,
                result="a person answered on the phone",
            )

    def _count(self, kind: Kind, seconds: Sequence[float]) -> None:
        counts = self._counts.get(kind)
        if counts is None:
            tenant = str(kind[0])
            counts = self._counts[kind] = _Counts(
                self._metrics.written.labels(tenant).inc,
                self._metrics.messages.labels(*kind[1:]).inc,
                self._metrics.write_latency.labels(tenant).observe,
            )
        counts.written(len(seconds))
        counts.messages(len(seconds))
        for wait in seconds:
            counts.latency(wait)
