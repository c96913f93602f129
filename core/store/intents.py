"""Notes that a call begins, for channels that cannot say afterwards whether it was made. The first writer decides."""

from __future__ import annotations

from core.store.audit import Conn

KEPT_DAYS = 7
PRUNE_EVERY = 500


async def write(
    conn: Conn, tenant_id: int, session_id: int, queue_id: int, claim_epoch: int, kind: str
) -> str:
    """`new <kind>`, or the kind that somebody wrote before. Committed when it returns."""
    written: str | None = await conn.fetchval(
        """
        INSERT INTO et_send_intents (tenant_id, channel_session_id, queue_id, claim_epoch, kind)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (queue_id, claim_epoch) DO NOTHING
        RETURNING kind
        """,
        tenant_id,
        session_id,
        queue_id,
        claim_epoch,
        kind,
    )
    if written is not None:
        if queue_id % PRUNE_EVERY == 0:
            await prune(conn, tenant_id, session_id)
        return f"new {written}"
    found: str = await conn.fetchval(
        "SELECT kind FROM et_send_intents WHERE queue_id = $1 AND claim_epoch = $2", queue_id, claim_epoch
    )
    return found


async def prune(conn: Conn, tenant_id: int, session_id: int) -> None:
    """Forget what was settled long ago."""
    await conn.execute(
        """
        DELETE FROM et_send_intents
        WHERE tenant_id = $1
          AND channel_session_id = $2
          AND created_at < now() - make_interval(days => $3)
        """,
        tenant_id,
        session_id,
        KEPT_DAYS,
    )
