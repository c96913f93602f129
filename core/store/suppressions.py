"""People who were erased or opted out for good, by hash alone: nothing here says who anybody is.

Their past is kept out by whoever stores messages (`core.leads.resolve` says whose). That a new lead of such a person is
opted out from the start is a trigger's work (schema/050_suppressions.sql), whoever makes the lead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, TypeAlias

from core.store.audit import Conn

Key: TypeAlias = tuple[int, str]
"""(tenant id, external id)"""


def identity_hash(tenant_id: int, external_id: str) -> bytes:
    """How a row names an address; `et_identity_hash` in SQL. Of another tenant the same address has another one."""
    return hashlib.sha256(f"{tenant_id}:{external_id}".encode()).digest()


async def add(conn: Conn, keys: Iterable[Key], *, reason: Literal["erased", "opted_out"]) -> None:
    """Remember them; `erased`: everything they said up to now stays away. Call it in the transaction that deletes the lead,
    before the deletion, with every identity the lead has: a writer that still finds the lead then waits for the end, and
    one that does not finds this."""
    wanted = sorted(set(keys))
    await conn.execute(
        """
        INSERT INTO et_suppressions AS s (tenant_id, identity_hash, reason, erased_through)
        SELECT k.tenant_id, k.identity_hash, $3, CASE WHEN $3 = 'erased' THEN clock_timestamp() END
        FROM unnest($1::bigint[], $2::bytea[]) AS k (tenant_id, identity_hash)
        ON CONFLICT (tenant_id, identity_hash) DO UPDATE
        SET reason = CASE WHEN 'erased' IN (s.reason, excluded.reason) THEN 'erased' ELSE excluded.reason END,
            erased_through = greatest(s.erased_through, excluded.erased_through)
        """,
        [key[0] for key in wanted],
        [identity_hash(*key) for key in wanted],
        reason,
    )
