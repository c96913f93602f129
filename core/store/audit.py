"""The audit log: who was denied, what failed, what was created. Never message text, never a secret."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asyncpg import Connection

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    Conn: TypeAlias = Connection[Record] | PoolConnectionProxy[Record]
else:
    Conn = Connection  # generic for the type checker alone

Event = Literal[
    "access_denied",
    "send_failure",
    "worker_error",
    "session_paired",
    "session_logged_out",
    "session_created",
    "session_deleted",
    "session_credentials_changed",
    "key_created",
    "key_revoked",
    "lead_merged",
    "lead_erased",
    "thread_taken_over",
    "thread_released",
    "outbound_retried",
    "outbound_settled",
]


async def write(
    conn: Conn,
    event: Event,
    *,
    tenant_id: int | None,
    actor: str,
    subject_type: str,
    subject_id: int | str | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    """Add one row. `actor` is `key:<id>`, `worker:<name>`, `session:<id>` or `operator`."""
    await conn.execute(
        """
        INSERT INTO et_audit_log (tenant_id, actor, event, subject_type, subject_id, detail)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        tenant_id,
        actor,
        event,
        subject_type,
        None if subject_id is None else str(subject_id),
        detail or {},
    )


async def write_past(
    conn: Conn,
    event: Event,
    *,
    at: datetime,
    tenant_id: int | None,
    actor: str,
    subject_type: str,
    subject_id: str | None,
    detail: dict[str, Any],
    again: bool = False,
) -> None:
    """As `write`, for what happened at `at`. `again`: it may be there already, and is not written twice then."""
    await conn.execute(
        """
        INSERT INTO et_audit_log (tenant_id, actor, event, subject_type, subject_id, detail, created_at)
        SELECT $1, $2, $3, $4, $5, $6, $7
        WHERE NOT $8 OR NOT EXISTS (
            SELECT
            FROM et_audit_log a
            -- It can only be among the newest: no outage writes that many, and nothing is indexed by time.
            WHERE a.id > (SELECT coalesce(max(l.id), 0) - 100000 FROM et_audit_log l)
              AND a.tenant_id IS NOT DISTINCT FROM $1
              AND a.created_at = $7
              AND a.actor = $2
              AND a.event = $3
              AND a.detail = $6
        )
        """,
        tenant_id,
        actor,
        event,
        subject_type,
        subject_id,
        detail,
        at,
        again,
    )
