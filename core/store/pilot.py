"""The figures the pilot is judged by, over a span of hours and by channel, across tenants.

Sends and retries are read from the queue, where an outcome that was settled later counts as what it became; duplicates
leave no row, so gateways add them to `et_pilot_hours`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.store.audit import Conn

KEPT_DAYS = 90


@dataclass(frozen=True, slots=True)
class Figures:
    """Of what was put into the queue in the span: how it ended. `waiting` has not ended; withdrawn items are left out."""

    channel: str
    sent: int = 0
    failed: int = 0
    unknown: int = 0
    waiting: int = 0
    retries: int = 0
    duplicates: int = 0

    @property
    def finished(self) -> int:
        return self.sent + self.failed + self.unknown

    @property
    def success(self) -> float | None:
        """Share of finished sends that the channel accepted; None while nothing has finished."""
        return self.sent / self.finished if self.finished else None

    @property
    def retries_per_send(self) -> float | None:
        return self.retries / self.finished if self.finished else None


async def figures(conn: Conn, *, hours: int) -> list[Figures]:
    """By channel, those that have something to tell."""
    sends = await conn.fetch(
        """
        SELECT channel,
               count(*) FILTER (WHERE status = 'sent') AS sent,
               count(*) FILTER (WHERE status = 'failed') AS failed,
               count(*) FILTER (WHERE status = 'unknown') AS unknown,
               count(*) FILTER (WHERE status IN ('queued', 'dispatching')) AS waiting,
               coalesce(sum(retry_count) FILTER (WHERE status IN ('sent', 'failed', 'unknown')), 0)::BIGINT AS retries
        FROM et_outbound_queue
        WHERE created_at > now() - make_interval(hours => $1)
          AND status <> 'cancelled'
        GROUP BY channel
        """,
        hours,
    )
    duplicates = await conn.fetch(
        """
        SELECT channel, sum(duplicates)::BIGINT AS duplicates
        FROM et_pilot_hours
        WHERE hour > now() - make_interval(hours => $1)
        GROUP BY channel
        """,
        hours,
    )
    suppressed: dict[str, int] = {row["channel"]: row["duplicates"] for row in duplicates}
    found = [Figures(**dict(row), duplicates=suppressed.pop(row["channel"], 0)) for row in sends]
    found += [Figures(channel, duplicates=count) for channel, count in suppressed.items()]
    return sorted(found, key=lambda one: one.channel)


async def add_duplicates(conn: Conn, counted: Mapping[str, int]) -> None:
    """Add what a gateway counted since it last said so, to the hour that it is now on the database's clock."""
    await conn.execute(
        """
        INSERT INTO et_pilot_hours AS h (hour, channel, duplicates)
        SELECT date_trunc('hour', now(), 'UTC'), c.channel, c.duplicates
        FROM unnest($1::TEXT[], $2::BIGINT[]) AS c (channel, duplicates)
        ON CONFLICT (hour, channel) DO UPDATE SET duplicates = h.duplicates + excluded.duplicates
        """,
        list(counted),
        list(counted.values()),
    )


async def forget_old(conn: Conn) -> None:
    await conn.execute("DELETE FROM et_pilot_hours WHERE hour < now() - make_interval(days => $1)", KEPT_DAYS)
