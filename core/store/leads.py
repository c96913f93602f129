"""Leads and their identities: who a message is from. One person is one lead per tenant.

Every statement is race-free with other gateways: rows go in sorted by key, losers of a race look again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from core.store.audit import Conn
from core.store.suppressions import identity_hash

Key: TypeAlias = tuple[int, str]
"""(tenant id, external id)"""


@dataclass(frozen=True, slots=True)
class Known:
    lead_id: int
    external_id: str
    """The lead's main one."""
    named: bool
    kind: str


@dataclass(frozen=True, slots=True)
class NewLead:
    tenant_id: int
    external_id: str
    kind: Literal["person", "group"]
    name: str | None
    workspace_id: int | None


async def find(conn: Conn, keys: Iterable[Key]) -> dict[Key, Known]:
    """Whom these external ids belong to; those nobody has are left out."""
    known, _ = await look_up(conn, keys)
    return known


async def look_up(conn: Conn, keys: Iterable[Key]) -> tuple[dict[Key, Known], dict[Key, float]]:
    """Whom these external ids belong to, and until when (epoch seconds) what their people said was erased; those nobody
    has, and those never erased, are left out. One statement sees both: who is erased meanwhile is here or there."""
    wanted = sorted(set(keys))
    rows = await conn.fetch(
        """
        SELECT k.tenant_id, k.external_id, l.id, l.external_id AS main, l.name IS NOT NULL AS named, l.kind,
               extract(epoch FROM s.erased_through)::float8 AS erased_through
        FROM unnest($1::bigint[], $2::text[], $3::bytea[]) AS k (tenant_id, external_id, identity_hash)
        LEFT JOIN et_lead_identities i ON i.tenant_id = k.tenant_id AND i.external_id = k.external_id
        LEFT JOIN et_leads l ON l.tenant_id = i.tenant_id AND l.id = i.lead_id
        LEFT JOIN et_suppressions s ON s.tenant_id = k.tenant_id AND s.identity_hash = k.identity_hash
        WHERE l.id IS NOT NULL
           OR s.erased_through IS NOT NULL
        """,
        [key[0] for key in wanted],
        [key[1] for key in wanted],
        [identity_hash(*key) for key in wanted],
    )
    known = {
        (r["tenant_id"], r["external_id"]): Known(r["id"], r["main"], r["named"], r["kind"])
        for r in rows
        if r["id"] is not None
    }
    erased = {
        (r["tenant_id"], r["external_id"]): r["erased_through"]
        for r in rows
        if r["erased_through"] is not None
    }
    return known, erased


async def create(conn: Conn, leads: Sequence[NewLead]) -> dict[Key, int]:
    """Create those nobody has, in one statement; returns the created ones.

    Raises UniqueViolationError when an external id meanwhile became another lead's identity: roll back and resolve again.
    """
    leads = sorted(leads, key=lambda lead: (lead.tenant_id, lead.external_id))
    rows = await conn.fetch(
        """
        INSERT INTO et_leads (tenant_id, external_id, kind, name, workspace_id)
        SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[])
        ON CONFLICT (tenant_id, external_id) DO NOTHING
        RETURNING tenant_id, external_id, id
        """,
        [lead.tenant_id for lead in leads],
        [lead.external_id for lead in leads],
        [lead.kind for lead in leads],
        [lead.name for lead in leads],
        [lead.workspace_id for lead in leads],
    )
    return {(r["tenant_id"], r["external_id"]): r["id"] for r in rows}


async def add_identities(conn: Conn, identities: Mapping[Key, int]) -> None:
    """Give leads further external ids; one that somebody has already stays with them (look again to see whose it is)."""
    keys = sorted(identities)
    await conn.execute(
        """
        INSERT INTO et_lead_identities (tenant_id, external_id, lead_id)
        SELECT * FROM unnest($1::bigint[], $2::text[], $3::bigint[])
        ON CONFLICT (tenant_id, external_id) DO NOTHING
        """,
        [key[0] for key in keys],
        [key[1] for key in keys],
        [identities[key] for key in keys],
    )


async def upgrade(conn: Conn, tenant_id: int, lead_id: int, external_id: str) -> None:
    """Make a better external id the main one; the old one stays an identity (trigger)."""
    await conn.execute(
        """
        UPDATE et_leads SET external_id = $3
        WHERE tenant_id = $1 AND id = $2 AND external_id <> $3
        """,
        tenant_id,
        lead_id,
        external_id,
    )


async def fill_names(conn: Conn, names: Mapping[tuple[int, int], str]) -> None:
    """Names for leads that have none, by (tenant id, lead id). A name a person gave is never overwritten."""
    keys = sorted(names)
    await conn.execute(
        """
        UPDATE et_leads l SET name = n.name
        FROM (
            SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS n (tenant_id, id, name)
            ORDER BY tenant_id, id
        ) n
        WHERE l.tenant_id = n.tenant_id AND l.id = n.id AND l.name IS NULL
        """,
        [key[0] for key in keys],
        [key[1] for key in keys],
        [names[key] for key in keys],
    )


async def merge(conn: Conn, tenant_id: int, one: int, other: int) -> int:
    """Make two leads one (see docs: the lower id survives); returns the survivor. In the caller's transaction."""
    survivor = await conn.fetchval("SELECT et_merge_leads($1, $2, $3)", tenant_id, one, other)
    assert isinstance(survivor, int)
    return survivor


async def default_workspaces(
    conn: Conn, session_ids: Iterable[int]
) -> dict[int, tuple[int | None, str | None]]:
    """Per session: the workspace its new leads get, and what its metadata asks for. They differ when the workspace
    does not exist in the tenant; the caller says so in the log."""
    rows = await conn.fetch(
        """
        SELECT s.id, w.id AS workspace_id, s.metadata ->> 'default_workspace_id' AS wanted
        FROM et_channel_sessions s
        LEFT JOIN et_workspaces w
            ON w.tenant_id = s.tenant_id AND w.id::text = s.metadata ->> 'default_workspace_id'
        WHERE s.id = ANY ($1::bigint[])
        """,
        sorted(set(session_ids)),
    )
    return {r["id"]: (r["workspace_id"], r["wanted"]) for r in rows}
