"""Receipts: delivered, read, failed. They only move our messages forward; late ones are dropped, early ones parked.

Race-free with the outbound worker without a lock: a receipt that finds no message is committed as parked and looked at
once more in a fresh transaction; should the send's mark commit only after that, the outbound worker's sweep applies what
is parked, within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core import faults
from core import log as logs
from core.batcher import Batcher
from core.channel import StatusUpdate
from core.database import Database
from core.database_json import clean_text
from core.errors import GatewayError
from core.store import receipts as store
from core.store.audit import Conn

log = logs.get(part="receipts")

RANK = {"sent": 0, "delivered": 1, "read": 2, "failed": 3}


@dataclass(frozen=True, slots=True)
class Receipt:
    update: StatusUpdate
    channel_message_id: str


class Receipts:
    def __init__(self, db: Database, *, patience: float = 15.0) -> None:
        self._db = db
        # One lane: receipts of one message never race each other, and one connection is plenty.
        self._batcher: Batcher[Receipt, None] = Batcher(
            "receipts", self._write, lanes=1, size=200, patience=patience
        )

    async def start(self) -> None:
        await self._batcher.start()

    async def stop(self, limit: float = 5.0) -> None:
        await self._batcher.stop(limit)

    @property
    def healthy(self) -> bool:
        return self._batcher.healthy

    async def apply(self, updates: Sequence[StatusUpdate]) -> None:
        """Returns after the commit. Raises DatabaseUnavailable: bring them again, twice does no harm."""
        futures = [
            self._batcher.submit(update.session_id, Receipt(update, clean_text(message_id)))
            for update in updates
            for message_id in dict.fromkeys(update.message_ids)
            if message_id
        ]
        first: GatewayError | None = None
        for future in futures:
            try:
                await future
            except GatewayError as error:
                first = first or error
        if first is not None:
            raise first

    async def sweep(self, conn: Conn) -> None:
        """Apply parked receipts whose message is known by now, in a transaction of their own."""
        applied = await store.apply_parked(conn)
        if applied:
            log.info("receipts.applied", count=applied, result="parked earlier")

    async def _write(self, batch: Sequence[Receipt]) -> list[None]:
        # The furthest of several about one message counts; `failed` is not further than `read`, it is another way.
        wanted: dict[tuple[int, int, str, bool], Receipt] = {}
        for receipt in batch:
            update = receipt.update
            key = (update.tenant_id, update.session_id, receipt.channel_message_id, update.status == "failed")
            best = wanted.get(key)
            if best is None or RANK[update.status] > RANK[best.update.status]:
                wanted[key] = receipt
        receipts = [
            store.Receipt(
                update.tenant_id,
                update.session_id,
                receipt.channel_message_id,
                update.status,
                update.occurred_at,
                update.reason,
                (update.chat.external_id, *update.chat.aliases) if update.chat else (),
            )
            for receipt in wanted.values()
            for update in (receipt.update,)
        ]
        async with self._db.worker() as conn:
            async with conn.transaction():
                moved, parked = await store.apply(conn, receipts)
                faults.point("receipts.before_commit")
            faults.point("receipts.after_commit")
            if parked:
                await self.sweep(conn)
        if moved or parked:
            log.info("receipts.stored", count=len(receipts), message_ids=moved, parked=parked)
        return [None] * len(batch)
