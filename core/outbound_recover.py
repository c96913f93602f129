"""Finds what a dead owner left: asks the channel what became of its calls, and fails what waited too long.

Never puts a row back into the queue without proof that it was not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asyncpg import Record

from core import faults
from core import log as logs
from core.channel import Attempt, MessageId, NotSent, QueueId, Sent, SessionId, TenantId
from core.database import Database
from core.dispatch import Claimed, Dispatcher, Key, NotReady, Timings, Verdict, cut_off, not_called, sent
from core.errors import Invalid
from core.identity import external_id
from core.outbound_marks import Ended, Marker
from core.store import audit, dispatching
from core.store.dispatching import Left

log = logs.get(part="outbound")

AT_ONCE = 8
"""Questions asked at the same time: each may cost the channel a round trip or a look into its store."""
NOBODY = (
    "the gateway that was sending this has ended and nothing proves whether it went out; look before retrying"
)


class Recovery:
    def __init__(
        self,
        db: Database,
        dispatcher: Dispatcher,
        marker: Marker,
        owner: str,
        timings: Timings,
        clock: Callable[[], float],
        is_ours: Callable[[Key], bool | None],
    ) -> None:
        self._db = db
        self._dispatcher = dispatcher
        self._marker = marker
        self._owner = owner
        self._timings = timings
        self._clock = clock
        self._is_ours = is_ours
        self._began = clock()
        self._asked: dict[Key, float] = {}
        """Since when we ask about a row in vain."""
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._unwritten: list[tuple[Claimed, str]] = []
        self._hurry = False
        self.cleared: set[Key] = set()
        """Doubtful claims that the last look has settled."""

    def begin(self) -> None:
        self._began = self._clock()

    def hurry(self) -> None:
        """A session became ours: what its last owner left is looked at with the next sweep."""
        self._hurry = True

    async def look(self) -> None:
        """One round over the `dispatching` rows of our sessions."""
        owned = self._dispatcher.owned()
        self.cleared = set()
        if not owned:
            return
        async with self._db.worker() as conn:
            rows = await dispatching.left_behind(conn, owned, alive_seconds=self._timings.owner_alive)
        mine = [row for row in rows if self._is_for_us(row)]
        present = {(row.queue_id, row.claim_epoch) for row in rows}
        self._asked = {key: since for key, since in self._asked.items() if key in present}
        if mine:
            log.info("send.resolving", count=len(mine), message_ids=[row.message_id for row in mine])
            await asyncio.gather(*(self._settle(row) for row in mine))

    def _is_for_us(self, row: Left) -> bool:
        key = (row.queue_id, row.claim_epoch)
        known = self._is_ours(key)
        if known is True:
            return False
        if known is False:
            return True
        if row.claimed_by == self._owner:
            # Of an earlier life under the same name. What was claimed since is another worker's of that name.
            return row.age > self._clock() - self._began
        # A gateway that lives may still be calling, and will say so; not for ever.
        return not row.owner_alive or row.age > self._timings.watchdog + self._timings.owner_alive

    async def _settle(self, row: Left) -> None:
        claimed = Claimed(
            queue_id=QueueId(row.queue_id),
            claim_epoch=row.claim_epoch,
            tenant_id=TenantId(row.tenant_id),
            session_id=SessionId(row.session_id),
            message_id=MessageId(row.message_id),
            channel=row.channel,
            retry_count=0,
        )
        if self._is_ours(claimed.key) is False:
            # Our own claim whose commit was not answered: it was never called, no need to ask.
            self.cleared.add(claimed.key)
            self._marker.put(Ended(claimed, not_called(claimed)))
            return
        async with self._slots:
            verdict = await self._ask(row, claimed)
        if verdict is not None:
            self._asked.pop(claimed.key, None)
            log.info("send.resolved", queue_id=row.queue_id, message_id=row.message_id, tenant_id=row.tenant_id,
                     session_id=row.session_id, result=verdict.mark.status, error=verdict.mark.error_code)  # fmt: skip
            self._marker.put(Ended(claimed, verdict))

    async def _ask(self, row: Left, claimed: Claimed) -> Verdict | None:
        """What the channel knows; None: ask again later."""
        since = self._asked.setdefault(claimed.key, self._clock())
        try:
            attempt = Attempt(
                tenant_id=claimed.tenant_id,
                session_id=claimed.session_id,
                queue_id=claimed.queue_id,
                message_id=claimed.message_id,
                claim_epoch=claimed.claim_epoch,
                recipient=external_id(row.channel, row.recipient),
                channel_message_id=row.channel_message_id,
            )
            faults.point("outbound.resolve.before")
            async with asyncio.timeout(self._timings.resolve):
                found = await self._dispatcher.resolve(attempt)
        except Invalid:
            # No channel can have been called with an address that is none.
            return not_called(claimed)
        except NotReady:
            if self._clock() - since < self._timings.resolve_patience:
                return None
            return cut_off(claimed, "not_resolved", NOBODY)
        except Exception as error:
            log.warning(
                "send.resolve_failed", queue_id=row.queue_id, session_id=row.session_id, error=repr(error)
            )
            if self._clock() - since < self._timings.resolve_patience:
                return None
            return cut_off(claimed, "not_resolved", NOBODY)
        match found:
            case Sent():
                return sent(claimed, found)
            case NotSent():
                return not_called(claimed)
            case _:
                return cut_off(claimed, found.reason or "outcome_unknown", NOBODY, found.channel_message_id)

    async def sweep(self) -> list[Record]:
        """What needs no channel: expired rows (returned), rows nobody will ever look at, early receipts."""
        if self._hurry:
            self._hurry = False
            await self.look()
        async with self._db.worker() as conn:
            async with conn.transaction():
                expired = await dispatching.expire(conn)
                late, self._unwritten = self._unwritten, []
                entries = [
                    (
                        c.tenant_id,
                        int(c.queue_id),
                        {"outcome": "failed", "code": code, "message_id": c.message_id},
                    )
                    for c, code in late
                ]
                entries += [
                    (
                        r["tenant_id"],
                        r["id"],
                        {"outcome": "failed", "code": "expired", "message_id": r["message_id"]},
                    )
                    for r in expired
                ]
                if entries:
                    await dispatching.audit_failures(conn, f"worker:{self._owner}", entries)
            await dispatching.apply_parked_receipts(conn)
            lost = await dispatching.abandoned(
                conn, alive_seconds=self._timings.owner_alive, patience=self._timings.abandoned
            )
        for row in lost:
            claimed = Claimed(
                queue_id=row["id"],
                claim_epoch=row["claim_epoch"],
                tenant_id=row["tenant_id"],
                session_id=row["channel_session_id"],
                message_id=row["message_id"],
                channel=row["channel"],
                retry_count=row["retry_count"],
            )
            if self._is_ours(claimed.key) is None:
                self._marker.put(Ended(claimed, cut_off(claimed, "owner_gone", NOBODY)))
        return expired

    def audit_later(self, claimed: Claimed, code: str) -> None:
        """A failure that the claim itself wrote; its audit row goes with the next sweep."""
        self._unwritten.append((claimed, code))

    async def audit_error(self, event: str, error: Exception) -> None:
        """A `worker_error` row, when that can be had."""
        try:
            async with self._db.worker() as conn:
                await audit.write(
                    conn,
                    "worker_error",
                    tenant_id=None,
                    actor=f"worker:{self._owner}",
                    subject_type="worker",
                    subject_id=event,
                    detail={"error": type(error).__name__},
                )
        except Exception as problem:
            log.warning("audit.unwritten", action=event, error=repr(problem))
