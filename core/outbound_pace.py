"""What each session may send now: its rate, its first contacts of the day, its quiet hours, what its channel refuses.

Counts live in the database (`core/store/pacing.py`); this is what one worker knows of them. Never claims and never calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from zoneinfo import ZoneInfo

from asyncpg import Record

from core import log as logs
from core.channel import SessionId, TenantId
from core.database import Database
from core.dispatch import Timings
from core.errors import ThrottledError
from core.metrics import Metrics
from core.sending import UNPACED, Reason, Sending, local_day, next_day, read, zone_of
from core.store import pacing
from core.store.audit import Conn
from core.store.claiming import KNOWN, REPLY, STRANGER, Due

log = logs.get(part="outbound")

BURST = 0.1
"""Seconds of its rate that a session may catch up on at once."""
STEP, AT_ONCE = 1_000, 20_000
"""Rows put off in one statement, and in one round."""
UNLIMITED = 1_000_000


@dataclass(frozen=True, slots=True)
class Hold:
    """Rows of lanes up to and with `lane` wait until then."""

    lane: int
    until: datetime
    reason: Reason
    code: str
    detail: str


@dataclass(slots=True)
class _Session:
    """What is known of one session. Times of `until` and `ready_at` are monotonic."""

    tenant_id: TenantId
    channel: str
    sending: Sending
    zone: ZoneInfo
    used: dict[date, int]
    days: int
    ready_at: float = 0.0
    quota: int = 0
    """What its rate allowed the claim that is going on."""
    limited: bool = False
    """The rate, not the queue, ended the last claim."""
    refused_until: float = 0.0
    refused_code: str = ""
    refused_detail: str = ""
    look_at: float = 0.0
    put_off: frozenset[str] = field(default_factory=frozenset)
    """Codes with which rows may have been put off."""


class Pacer:
    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        defaults: Mapping[str, Sending],
        timings: Timings,
        *,
        clock: Callable[[], float],
        today: Callable[[], datetime],
        chance: Callable[[], float],
    ) -> None:
        self._db = db
        self._metrics = metrics
        self._defaults = defaults
        self._timings = timings
        self._clock = clock
        self._now = today
        self._chance = chance
        self._sessions: dict[SessionId, _Session] = {}
        self._loaded_at = -math.inf

    # --- knowing

    async def know(self, sessions: Collection[SessionId]) -> None:
        """Read what is missing, and everything again now and then. Raises what the database raises."""
        stale = self._clock() - self._loaded_at > self._timings.settings
        wanted = sessions if stale else [s for s in sessions if s not in self._sessions]
        if not wanted:
            return
        began = self._clock()
        async with self._db.worker() as conn:
            rows = await pacing.load(conn, wanted)
        if stale:
            self._loaded_at = began
            for gone in self._sessions.keys() - set(sessions):
                del self._sessions[gone]
        for row in rows:
            self._learn(row, began)

    def forget(self) -> None:
        """Our counts may be wrong (a claim whose commit was not answered): read them before the next claim."""
        self._loaded_at = -math.inf

    def _learn(self, row: Record, began: float) -> None:
        session_id = SessionId(row["id"])
        channel = str(row["channel_type"])
        recent: Mapping[str, int] = row["recent"]
        found = _Session(
            tenant_id=TenantId(row["tenant_id"]),
            channel=channel,
            sending=read(row["sending"], self._defaults.get(channel, UNPACED)),
            zone=zone_of(row["timezone"]),
            used={date.fromisoformat(day): count for day, count in recent.items()},
            days=row["days"],
            put_off=frozenset((pacing.FIRST_CONTACTS, pacing.QUIET_HOURS)),
        )
        if row["code"] is not None:
            found.refused_until = began + float(row["held_seconds"])
            found.refused_code, found.refused_detail = str(row["code"]), str(row["detail"])
        known = self._sessions.get(session_id)
        if known is not None:
            found.ready_at, found.limited, found.look_at = known.ready_at, known.limited, known.look_at
            found.put_off = known.put_off
            if known.refused_until > found.refused_until:
                found.refused_until = known.refused_until
                found.refused_code, found.refused_detail = known.refused_code, known.refused_detail
            if known.sending != found.sending or known.zone != found.zone:
                found.look_at, found.ready_at = 0.0, min(found.ready_at, began)
        self._sessions[session_id] = found

    # --- what may go

    def due(self, session_id: SessionId, room: int) -> Due | None:
        """What may be claimed now, of at most `room` rows; None: nothing."""
        session = self._sessions.get(session_id)
        if session is None:
            return None
        session.limited = False
        quota = room
        if session.sending.per_minute is not None:
            now = self._clock()
            if session.ready_at > now:
                session.limited = True
                return None
            pause = 60 / session.sending.per_minute
            quota = 1 + int((now - max(session.ready_at, now - BURST)) / pause)
            session.quota = quota
            quota = min(quota, room)
        floor, strangers, day = STRANGER, UNLIMITED, None
        if self._quiet_until(session) is not None:
            floor = REPLY
        elif session.refused_until > self._clock():
            floor = KNOWN
        elif session.sending.first_contacts is not None:
            day = local_day(self._now(), session.zone)
            strangers = self._strangers_left(session, day)
            if strangers == 0:
                floor = KNOWN
        return Due(session_id, quota, floor, strangers, day)

    def took(self, session_id: SessionId, rows: int, strangers: int) -> None:
        """A claim of so many rows is committed, so many of them begun with strangers."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        if strangers and session.sending.first_contacts is not None:
            day = local_day(self._now(), session.zone)
            if not session.used.get(day):
                session.days += 1
            session.used[day] = session.used.get(day, 0) + strangers
        if session.sending.per_minute is not None and rows:
            now = self._clock()
            pause, jitter = 60 / session.sending.per_minute, session.sending.jitter
            waits = sum(pause * (1 + jitter * (2 * self._chance() - 1)) for _ in range(rows))
            session.ready_at = max(session.ready_at, now - BURST) + waits
            session.limited = rows >= session.quota
            if session.limited:
                self._metrics.sends_held.labels(session.channel, "rate").inc()

    def next_in(self) -> float | None:
        """Seconds until a session that waits for its rate may go on; None: none waits for that."""
        now = self._clock()
        waits = [s.ready_at - now for s in self._sessions.values() if s.limited]
        return max(0.001, min(waits)) if waits else None

    async def refused(self, session_id: SessionId, error: ThrottledError) -> None:
        """The channel takes no first contacts of this session for now. Remembered for whoever owns it next."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        until = self._clock() + error.retry_after
        if until <= session.refused_until:
            return
        session.refused_until, session.look_at = until, 0.0
        session.refused_code, session.refused_detail = error.code, error.detail
        log.warning("session.first_contacts_held", session_id=session_id, tenant_id=session.tenant_id,
                    error=error.code, seconds=round(error.retry_after))  # fmt: skip
        async with self._db.worker() as conn:
            await pacing.hold(
                conn,
                tenant_id=session.tenant_id,
                session_id=session_id,
                seconds=error.retry_after,
                code=error.code,
                detail=error.detail,
            )

    def _quiet_until(self, session: _Session) -> datetime | None:
        quiet = session.sending.quiet_hours
        return quiet.until(self._now(), session.zone) if quiet is not None else None

    def _strangers_left(self, session: _Session, day: date) -> int:
        limit = session.sending.first_contacts
        assert limit is not None
        used = session.used.get(day, 0)
        return max(0, limit.on_day(session.days + (0 if used else 1)) - used)

    # --- rows that wait say why

    def holds(self, session_id: SessionId) -> list[Hold]:
        """What keeps rows of this session back now, the widest first."""
        session = self._sessions[session_id]
        now, zone = self._now(), session.zone
        holds: list[Hold] = []
        if (quiet := self._quiet_until(session)) is not None:
            words = f"quiet hours of this session until {quiet:%H:%M} ({zone.key}); replies go out"
            holds.append(Hold(KNOWN, quiet, "quiet_hours", pacing.QUIET_HOURS, words))
        wait = session.refused_until - self._clock()
        if wait > 0:
            until = datetime.fromtimestamp(now.timestamp() + wait, now.tzinfo)
            words = f"{session.refused_detail} (the channel refused another message of this session to a stranger)"
            holds.append(Hold(STRANGER, until, "channel_limit", session.refused_code, words))
        elif session.sending.first_contacts is not None:
            day = local_day(now, zone)
            if self._strangers_left(session, day) == 0:
                limit = session.used.get(day, 0) or session.sending.first_contacts.first
                words = (
                    f"today's {limit} messages to people who never wrote to this session are used up; "
                    "replies and everybody else go out"
                )
                until = next_day(now, zone)
                holds.append(Hold(STRANGER, until, "first_contacts", pacing.FIRST_CONTACTS, words))
        return holds

    async def sweep(self) -> bool:
        """Put rows off that may not go now, bring those back whose reason has gone. True when some came back."""
        back = 0
        now = self._clock()
        for session_id, session in list(self._sessions.items()):
            holds = self.holds(session_id)
            if not holds and not session.put_off:
                continue
            if session.look_at > now:
                continue
            session.look_at = now + self._timings.held
            async with self._db.worker() as conn:
                if gone := session.put_off - {hold.code for hold in holds}:
                    count = await pacing.bring_back(conn, session_id, codes=gone, limit=AT_ONCE)
                    back += count
                    if count < AT_ONCE:
                        session.put_off -= gone
                    else:
                        session.look_at = now
                for hold in holds:
                    session.put_off |= {hold.code}
                    await self._put_off(conn, session_id, session, hold)
        return back > 0

    async def _put_off(self, conn: Conn, session_id: SessionId, session: _Session, hold: Hold) -> None:
        count, moved = 0, STEP
        while moved == STEP and count < AT_ONCE:
            moved = await pacing.put_off(
                conn,
                session_id,
                lane=hold.lane,
                until=hold.until,
                code=hold.code,
                detail=hold.detail,
                limit=STEP,
            )
            count += moved
        if moved == STEP:
            session.look_at = 0.0
        if count:
            self._metrics.sends_held.labels(session.channel, hold.reason).inc(count)
            log.info("send.held", session_id=session_id, tenant_id=session.tenant_id, count=count, error=hold.code,
                     until=hold.until.isoformat())  # fmt: skip
