"""The outbound worker: claims due rows of the sessions it may send on, calls the channel, hands the outcome on.

A row is committed as `dispatching` before its channel is called, and never goes back to `queued` on a guess. Knows no
channel: `Dispatcher` is its way to them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from asyncpg import Record

from core import dispatch, faults
from core import log as logs
from core.channel import OutboundMessage, SessionId
from core.database import Database, is_transient
from core.dispatch import Claimed, Dispatcher, Key, Timings, Verdict, Windows
from core.errors import GatewayError, ThrottledError
from core.metrics import Metrics
from core.outbound_marks import Ended, Marker
from core.outbound_pace import Pacer
from core.outbound_recover import Recovery
from core.outbound_report import Reporter
from core.outbound_wait import Outcome, OutcomeWaiter
from core.sending import Sending
from core.store import claiming, dispatching
from core.store.claiming import STRANGER, Due
from core.store.dispatching import Mark

__all__ = ["DispatchResult", "OutboundWorker", "Outcome", "Timings"]

log = logs.get(part="outbound")

ERROR_PAUSE = 0.5
MOST_PAUSE = 0.02


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class DispatchResult:
    """What `dispatch_next` did. `status` is the row's after the call."""

    queue_id: int
    message_id: int
    channel: str
    status: str
    retry_count: int
    detail: str | None = None


@dataclass(slots=True)
class Flight:
    """A call that is open. `given_up`: the watchdog has said unknown about it."""

    claimed: Claimed
    recipient: str
    began: float
    proven_until: float
    patience: float
    """Seconds until the watchdog gives it up."""
    task: asyncio.Task[None] | None = field(default=None, compare=False)
    given_up: bool = False


class OutboundWorker:
    """`await start()`, `await stop()`, `healthy`. One per gateway."""

    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        dispatcher: Dispatcher,
        *,
        owner: str,
        max_attempts: int = 3,
        poll_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        timings: Timings | None = None,
        sending: Mapping[str, Sending] | None = None,
        today: Callable[[], datetime] = _utc_now,
    ) -> None:
        """`sending`: how channels pace where a session says nothing else; `today` is the wall clock, aware."""
        self.owner = owner
        self._db = db
        self._dispatcher = dispatcher
        self._max_attempts = max_attempts
        self._clock = clock
        self._chance = chance
        self._timings = timings or Timings()
        self._poll = self._timings.poll if poll_seconds is None else poll_seconds
        self._windows = Windows(clock)
        self._flights: dict[Key, Flight] = {}
        self._committing: set[Key] = set()
        """Claims whose commit is being answered."""
        self._doubtful: set[Key] = set()
        """Claims whose commit was not answered: if they are in force they were never called."""
        self._claiming = asyncio.Lock()
        self._kick = asyncio.Event()
        self._soon = False
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._marker = Marker(
            db, actor=f"worker:{owner}", on_done=self._committed, more_to_come=self._calling
        )
        self._report = Reporter(metrics)
        self._pacer = Pacer(
            db, metrics, sending or {}, self._timings, clock=clock, today=today, chance=chance
        )
        self._recovery = Recovery(db, dispatcher, self._marker, owner, self._timings, clock, self._is_ours)
        self._waiter = OutcomeWaiter(db)

    # --- life

    async def start(self) -> None:
        self._stopping = False
        self._recovery.begin()
        self._run("outbound.mark", self._marker.run())
        self._run("outbound.wait", self._waiter.run())
        self._run("outbound.listen", self._listen())
        self._run("outbound.changed", self._follow_sessions())
        self._run("outbound.claim", self._claim_loop())
        self._run("outbound.tend", self._every(self._timings.tend, self._tend))
        self._run("outbound.recover", self._every(self._timings.recover, self._recover))
        self._run("outbound.gauges", self._every(self._timings.gauges, self._measure))

    async def stop(self) -> None:
        """Claim nothing more, give open calls some seconds, write what they said. What is still open then stays
        `dispatching`: whoever owns the session next asks the channel about it."""
        self._stopping = True
        self._kick.set()
        ends = self._clock() + self._timings.stop
        claims = [t for t in self._tasks if t.get_name() == "outbound.claim"]
        # Its last round may just have committed a claim: that one is undone properly rather than cut off.
        await asyncio.wait(claims, timeout=2) if claims else None
        calls = [f.task for f in self._flights.values() if f.task is not None]
        if calls:
            await asyncio.wait(calls, timeout=max(0.1, ends - self._clock()))
        drained = await self._marker.drain(max(0.5, ends - self._clock()))
        open_calls = [f.task for f in self._flights.values() if f.task is not None and not f.task.done()]
        if open_calls or not drained:
            log.warning("worker.stopped", result="incomplete", calls=len(open_calls), marks=len(self._marker))
        ending = [*self._tasks, *open_calls]
        self._tasks = []
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending, timeout=1)
        self._marker.close()
        self._waiter.close()

    @property
    def healthy(self) -> bool:
        """False when one of its tasks has died, or before the start and after the stop."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def kick(self) -> None:
        """Look for work now."""
        self._kick.set()

    # --- what the API asks for

    async def wait_outcome(self, queue_id: int, timeout: float) -> Outcome | None:  # noqa: ASYNC109
        """Where the row ended (sent, failed, unknown, cancelled), or None when it has not within `timeout` seconds."""
        return await self._waiter.wait(queue_id, timeout)

    async def dispatch_next(self, tenant_id: int, *, timeout: float = 30.0) -> DispatchResult | None:  # noqa: ASYNC109
        """Send the tenant's next due row now and say what became of it; None when none is due that this gateway may
        send. Raises DatabaseUnavailable and the like."""
        rows = await self._claim(limit=1, tenant_id=tenant_id)
        if not rows:
            return None
        row = rows[0]
        outcome = await self._waiter.wait(row["id"], timeout, retried=row["retry_count"])
        status = outcome.status if outcome else "dispatching"
        detail = (
            (outcome.last_error or outcome.channel_message_id)
            if outcome
            else "the channel has not answered yet"
        )
        return DispatchResult(
            queue_id=row["id"],
            message_id=row["message_id"],
            channel=row["channel"],
            status=status,
            retry_count=outcome.retry_count if outcome else row["retry_count"],
            detail=detail,
        )

    # --- claiming

    async def _claim_loop(self) -> None:
        """Round after round while there is work; between two rounds whatever came in gathers into the next."""
        while not self._stopping:
            self._kick.clear()
            room = self._timings.inflight - len(self._flights) - len(self._marker)
            found, began = 0, time.monotonic()
            try:
                if room > 0:
                    found = len(await self._claim(limit=min(room, self._timings.batch)))
            except Exception as error:
                self._pacer.forget()
                await self._trouble("outbound.claim_failed", error)
                continue
            if found and found >= min(room, self._timings.batch):
                continue
            if found:
                # What comes in meanwhile makes one larger claim; the busier everything is the more so.
                await asyncio.sleep(min(MOST_PAUSE, (time.monotonic() - began) / 4))
            pause = self._pacer.next_in()
            try:
                async with asyncio.timeout(self._poll if pause is None else min(pause, self._poll)):
                    await self._kick.wait()
            except TimeoutError:
                pass

    async def _claim(self, *, limit: int, tenant_id: int | None = None) -> list[Record]:
        async with self._claiming:
            sendable = self._dispatcher.sendable()
            await self._pacer.know(sendable.keys())
            due, proofs = self._claimable(sendable, limit)
            if not due:
                return []
            rows: list[Record] = []
            async with self._db.worker() as conn:
                transaction = conn.transaction()
                await transaction.start()
                try:
                    await conn.execute(dispatching.ALONE)
                    rows = await claiming.claim(conn, self.owner, due, limit=limit, tenant_id=tenant_id)
                    faults.point("outbound.claim.before_commit")
                except BaseException:
                    await _rollback(transaction)
                    raise
                keys = {(row["id"], row["claim_epoch"]) for row in rows if row["stop"] is None}
                with self._deciding(keys):
                    await transaction.commit()
                    faults.point("outbound.claim.after_commit")
                    self._took(rows)
                    for row in rows:
                        self._take_up(row, proofs.get(row["channel_session_id"], 0.0))
            return rows

    @contextmanager
    def _deciding(self, keys: set[Key]) -> Iterator[None]:
        """From the commit to the call these claims are in our hands, so that recovery leaves them alone although it may
        see them committed before we do. Whatever interrupts that, they were never called."""
        self._committing |= keys
        try:
            yield
        except BaseException:
            self._doubtful |= keys
            raise
        finally:
            self._committing -= keys

    def _claimable(
        self, sendable: Mapping[SessionId, float], limit: int
    ) -> tuple[list[Due], dict[SessionId, float]]:
        now = self._clock()
        due: list[Due] = []
        proofs: dict[SessionId, float] = {}
        for session_id, proven_until in sendable.items():
            room = self._windows.room(session_id)
            if room > 0 and proven_until - now > self._timings.margin:
                allowed = self._pacer.due(session_id, min(room, limit))
                if allowed is not None:
                    proofs[session_id] = proven_until
                    due.append(allowed)
        return due, proofs

    def _took(self, rows: Sequence[Record]) -> None:
        counts: Counter[SessionId] = Counter()
        strangers: Counter[SessionId] = Counter()
        for row in rows:
            if row["stop"] is None:
                counts[row["channel_session_id"]] += 1
                strangers[row["channel_session_id"]] += row["lane"] == STRANGER and row["untried"]
        for session_id, count in counts.items():
            self._pacer.took(session_id, count, strangers[session_id])

    def _take_up(self, row: Record, proven_until: float) -> None:
        """A claimed row: call it, or end it when it cannot be called."""
        claimed = dispatch.read_claimed(row)
        if row["stop"] is not None:
            self._withdrawn(claimed, row["stop"])
            return
        try:
            message = dispatch.read_message(row)
        except (GatewayError, ValueError) as error:
            code = getattr(error, "code", "invalid")
            words = getattr(error, "detail", None) or str(error)
            verdict = Verdict(Mark(claimed.queue_id, claimed.claim_epoch, "failed", code, words), "refused")
            self._marker.put(Ended(claimed, verdict))
            return
        recipient = message.attempt.recipient
        if self._stopping:
            self._marker.put(Ended(claimed, dispatch.not_called(claimed), recipient))
            return
        patience = self._timings.watchdog
        if message.media_url is None:
            patience = min(patience, self._timings.watchdog_text)
        flight = Flight(claimed, recipient, self._clock(), proven_until, patience)
        self._flights[claimed.key] = flight
        self._windows.began(claimed.session_id)
        flight.task = asyncio.create_task(self._call(flight, message))

    def _withdrawn(self, claimed: Claimed, stop: str) -> None:
        if stop == "expired":
            self._recovery.audit_later(claimed, stop)
        self._report.withdrawn(claimed, stop)
        self._waiter.nudge([claimed.queue_id])

    # --- calling

    async def _call(self, flight: Flight, message: OutboundMessage) -> None:
        claimed = flight.claimed
        try:
            faults.point("outbound.call.before")
            if self._provable(flight):
                result = await self._dispatcher.send(message)
                faults.point("outbound.call.after")
                verdict = dispatch.sent(claimed, result)
            else:
                verdict = dispatch.not_called(claimed)
        except Exception as error:
            verdict = await self._judge(claimed, error)
        self._settle(flight, verdict)

    def _provable(self, flight: Flight) -> bool:
        """The last look before the call: is the session ours for certain at this moment?"""
        now = self._clock()
        if flight.proven_until > now:
            return True
        return self._dispatcher.sendable().get(flight.claimed.session_id, 0.0) > now

    async def _judge(self, claimed: Claimed, error: Exception) -> Verdict:
        verdict = dispatch.failed(
            claimed, error, max_attempts=self._max_attempts, timings=self._timings, jitter=self._chance()
        )
        if isinstance(error, ThrottledError) and error.first_contacts_only:
            await self._refused(claimed, error)
        if (
            verdict.outcome in ("retried", "failed")
            and claimed.session_id not in self._dispatcher.sendable()
            and verdict.mark.counts
        ):
            # It went away under the message: that is waiting for the session, not a failure of the message.
            return dispatch.not_called(claimed, after=1.0)
        if verdict.outcome == "unknown" and not isinstance(error, GatewayError):
            log.error("send.unexpected_error", queue_id=claimed.queue_id, error=repr(error), exc_info=error)
        return verdict

    async def _refused(self, claimed: Claimed, error: ThrottledError) -> None:
        try:
            await self._pacer.refused(claimed.session_id, error)
        except Exception as problem:
            # It is remembered here; only another gateway would have to learn it again.
            log.warning("hold.unwritten", session_id=claimed.session_id, error=repr(problem))

    def _settle(self, flight: Flight, verdict: Verdict) -> None:
        claimed = flight.claimed
        if flight.given_up:
            # The watchdog has said unknown. Only proof changes that, and nothing puts it back into the queue.
            if verdict.mark.status in ("sent", "failed"):
                self._marker.put(Ended(claimed, verdict, flight.recipient))
            return
        self._windows.ended(claimed.session_id, self._clock() - flight.began)
        self._marker.put(Ended(claimed, verdict, flight.recipient))
        del self._flights[claimed.key]

    def _committed(self, batch: Sequence[Ended], rows: Sequence[Record]) -> None:
        """The marker's news: metrics, log, waiters, and another look for work."""
        moved = {row["id"] for row in rows}
        self._report.ended([ended for ended in batch if ended.claimed.queue_id in moved])
        self._waiter.nudge(moved)
        if not self._flights:
            self._kick.set()
        elif not self._soon:
            # Calls are open, so nobody stands idle: rows that these held back make one claim with what ends meanwhile.
            self._soon = True
            asyncio.get_running_loop().call_later(MOST_PAUSE, self._look_again)

    def _calling(self) -> bool:
        return bool(self._flights)

    def _look_again(self) -> None:
        self._soon = False
        self._kick.set()

    # --- keeping order

    def _is_ours(self, key: Key) -> bool | None:
        """True: a call or its outcome is in our hands. False: never called. None: not ours, as far as we know."""
        if key in self._flights or key in self._committing or self._marker.holds(key):
            return True
        return False if key in self._doubtful else None

    async def _tend(self) -> None:
        """Calls that never return, rows that waited too long, receipts that came early."""
        now = self._clock()
        for key, flight in list(self._flights.items()):
            if now - flight.began > flight.patience:
                del self._flights[key]
                self._give_up(flight)
        for row in await self._recovery.sweep():
            self._report.expired(row)
            self._waiter.nudge([row["id"]])
        if await self._pacer.sweep():
            self._kick.set()

    def _give_up(self, flight: Flight) -> None:
        claimed = flight.claimed
        flight.given_up = True
        self._windows.ended(claimed.session_id, flight.patience)
        words = (
            f"the channel did not answer within {flight.patience:g} s; the message may have gone out: "
            "look before retrying"
        )
        self._marker.put(Ended(claimed, dispatch.cut_off(claimed, "no_answer", words), flight.recipient))
        if flight.task is not None:
            # It may ignore this; its answer, should one come, still counts.
            flight.task.cancel()

    async def _recover(self) -> None:
        await self._recovery.look()
        # Doubtful claims that are not in force, or were put back, need no memory.
        self._doubtful -= self._recovery.cleared

    async def _measure(self) -> None:
        await self._report.measure(self._db)

    # --- tasks

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._stopping:
            return
        log.error("worker.died", action=task.get_name(), error=repr(task.exception()))

    async def _every(self, seconds: float, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while not self._stopping:
            try:
                await step()
            except Exception as error:
                await self._trouble(f"outbound.{step.__name__.strip('_')}_failed", error)
            await asyncio.sleep(seconds)

    async def _listen(self) -> None:
        subscription = self._db.hub.subscribe("et_outbound")
        try:
            while True:
                if await subscription.wait(30):
                    self._kick.set()
        finally:
            subscription.close()

    async def _follow_sessions(self) -> None:
        changed = self._dispatcher.changed
        while True:
            await changed.wait()
            changed.clear()
            self._kick.set()
            self._recovery.hurry()

    async def _trouble(self, event: str, error: Exception) -> None:
        """An error of a round. The database being gone is expected and ends by itself."""
        if is_transient(error):
            log.warning(event, error=repr(error), result="trying again")
        else:
            log.error(event, error=repr(error), exc_info=error)
            await self._recovery.audit_error(event, error)
        await asyncio.sleep(ERROR_PAUSE)


async def _rollback(transaction: Any) -> None:
    try:
        await transaction.rollback()
    except Exception as error:
        # The connection is gone, and with it the transaction.
        log.debug("outbound.rollback", error=repr(error))
