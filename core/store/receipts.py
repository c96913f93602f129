"""What receipts do to et_messages: a few statements per batch, each moving rows one step along the published graph.

Every statement guards by the present status, so a receipt that comes late or twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncpg import Record

from core.store.audit import Conn


@dataclass(frozen=True, slots=True)
class Receipt:
    tenant_id: int
    session_id: int
    channel_message_id: str
    status: str
    occurred_at: datetime | None
    reason: str | None
    chat: tuple[str, ...]
    """External ids of the other side; empty when the channel does not say."""


async def apply(conn: Conn, receipts: Sequence[Receipt]) -> tuple[list[int], int]:
    """Move what is known, park the rest; in the caller's transaction. Returns the ids of the messages that moved and
    how many receipts were parked."""
    rows = await _find(conn, receipts)
    matches: dict[int, list[Record]] = {}
    for row in rows:
        matches.setdefault(row["n"] - 1, []).append(row)
    reached: dict[str, list[int]] = {"sent": [], "delivered": [], "read": []}
    failed: dict[int, str] = {}
    parked: list[Receipt] = []
    for n, receipt in enumerate(receipts):
        found = _of_chat(receipt, matches.get(n, []))
        if not found or all(row["delivery_status"] == "queued" for row in found):
            parked.append(receipt)
        for row in found:
            if receipt.status == "failed":
                failed[row["id"]] = receipt.reason or "the channel says that it could not be delivered"
            else:
                reached[receipt.status].append(row["id"])
    moved: set[int] = set()
    known = [i for ids in reached.values() for i in ids]
    if known:
        moved.update(await _prove(conn, known))
    for step, ids in (("delivered", reached["delivered"] + reached["read"]), ("read", reached["read"])):
        if ids:
            moved.update(await _step(conn, step, ids))
    if failed:
        moved.update(await _fail(conn, failed))
    if parked:
        await _park(conn, parked)
    return sorted(moved), len(parked)


def _of_chat(receipt: Receipt, found: list[Record]) -> list[Record]:
    """Where ids are unique per chat only, those of the chat that was named."""
    if len(found) < 2 or not receipt.chat:
        return found
    return [row for row in found if set(receipt.chat) & set(row["identities"] or ())]


async def _find(conn: Conn, receipts: Sequence[Receipt]) -> list[Record]:
    # Locked in id order: queue rows before messages would be the marker's order too, but it takes one thread's rows
    # at a time, and a deadlock is repeated.
    return await conn.fetch(
        """
        SELECT r.n, m.id, m.delivery_status,
               CASE WHEN r.named THEN (
                   SELECT array_agg(i.external_id)
                   FROM et_lead_identities i
                   WHERE i.tenant_id = m.tenant_id AND i.lead_id = m.lead_id
               ) END AS identities
        FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::boolean[]) WITH ORDINALITY
            AS r (tenant_id, session_id, channel_message_id, named, n)
        JOIN et_messages m
            ON m.channel_session_id = r.session_id AND m.channel_message_id = r.channel_message_id
           AND m.tenant_id = r.tenant_id AND m.direction = 'outbound'
        """,
        [r.tenant_id for r in receipts],
        [r.session_id for r in receipts],
        [r.channel_message_id for r in receipts],
        [bool(r.chat) for r in receipts],
    )


async def _prove(conn: Conn, message_ids: Sequence[int]) -> list[int]:
    """Somebody has it: a call whose outcome is open went through. The trigger moves the messages."""
    rows = await conn.fetch(
        """
        UPDATE et_outbound_queue
        SET status = 'sent', error_code = NULL, last_error = NULL
        WHERE message_id = ANY ($1::bigint[]) AND status IN ('dispatching', 'unknown')
        RETURNING message_id
        """,
        message_ids,
    )
    return [row["message_id"] for row in rows]


async def _step(conn: Conn, status: str, message_ids: Sequence[int]) -> list[int]:
    rows = await conn.fetch(
        """
        UPDATE et_messages
        SET delivery_status = $2
        WHERE id IN (
            SELECT id FROM et_messages
            WHERE id = ANY ($1::bigint[]) AND delivery_status = CASE $2 WHEN 'read' THEN 'delivered' ELSE 'sent' END
            ORDER BY id
            FOR NO KEY UPDATE
        )
        RETURNING id
        """,
        message_ids,
        status,
    )
    return [row["id"] for row in rows]


async def _fail(conn: Conn, failed: dict[int, str]) -> list[int]:
    """A bounce. Queue rows and, by trigger, their messages; then messages that have no queue row."""
    ids = sorted(failed)
    rows = await conn.fetch(
        """
        UPDATE et_outbound_queue q
        SET status = 'failed', error_code = 'undelivered', last_error = f.reason
        FROM unnest($1::bigint[], $2::text[]) AS f (message_id, reason)
        JOIN et_messages m ON m.id = f.message_id
        WHERE q.message_id = f.message_id
          AND q.status IN ('sent', 'dispatching', 'unknown')
          AND m.delivery_status IN ('sent', 'delivered', 'dispatching', 'unknown')
        RETURNING q.message_id
        """,
        ids,
        [failed[i] for i in ids],
    )
    others = await conn.fetch(
        """
        UPDATE et_messages m
        SET delivery_status = 'failed'
        WHERE m.id = ANY ($1::bigint[])
          AND m.delivery_status IN ('sent', 'delivered')
          AND NOT EXISTS (SELECT 1 FROM et_outbound_queue q WHERE q.message_id = m.id)
        RETURNING m.id
        """,
        ids,
    )
    return [row["message_id"] for row in rows] + [row["id"] for row in others]


async def _park(conn: Conn, receipts: Sequence[Receipt]) -> None:
    """Sessions that are gone take their receipts with them."""
    await conn.execute(
        """
        INSERT INTO et_parked_receipts (tenant_id, channel_session_id, channel_message_id, status, occurred_at)
        SELECT p.tenant_id, p.session_id, p.channel_message_id, p.status, coalesce(p.occurred_at, now())
        FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::timestamptz[])
            AS p (tenant_id, session_id, channel_message_id, status, occurred_at)
        JOIN et_channel_sessions s ON s.tenant_id = p.tenant_id AND s.id = p.session_id
        ORDER BY 1, 2, 3, 4
        ON CONFLICT DO NOTHING
        """,
        [r.tenant_id for r in receipts],
        [r.session_id for r in receipts],
        [r.channel_message_id for r in receipts],
        [r.status for r in receipts],
        [r.occurred_at for r in receipts],
    )


async def apply_parked(conn: Conn) -> int:
    """Parked receipts whose message is there by now; those older than a day go. How many were applied."""
    applied = await conn.fetchval(
        "SELECT et_apply_parked_receipts() WHERE EXISTS (SELECT FROM et_parked_receipts)"
    )
    return applied or 0
