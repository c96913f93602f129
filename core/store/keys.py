"""API keys: look-up by prefix, making, revoking. Only hashes are stored; nothing here ever sees a key again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncpg import Record

from core.store.audit import Conn

_COLUMNS = "id, tenant_id, name, prefix, scopes, expires_at, revoked_at, last_used_at, created_at"


@dataclass(frozen=True, slots=True)
class Key:
    """A key as authentication needs it. `tenant_id` None: the platform's."""

    id: int
    tenant_id: int | None
    key_hash: bytes
    scopes: frozenset[str]
    expires_at: datetime | None
    revoked_at: datetime | None
    tenant_status: str | None


async def by_prefix(conn: Conn, prefix: str) -> Key | None:
    row = await conn.fetchrow(
        """
        SELECT k.id, k.tenant_id, k.key_hash, k.scopes, k.expires_at, k.revoked_at, t.status AS tenant_status
        FROM et_api_keys k
        LEFT JOIN et_tenants t ON t.id = k.tenant_id
        WHERE k.prefix = $1
        """,
        prefix,
    )
    if row is None:
        return None
    return Key(**{**dict(row), "scopes": frozenset(row["scopes"])})


async def create(
    conn: Conn,
    *,
    tenant_id: int | None,
    name: str,
    prefix: str,
    key_hash: bytes,
    scopes: Sequence[str],
    expires_at: datetime | None = None,
) -> Record:
    row = await conn.fetchrow(
        f"""
        INSERT INTO et_api_keys (tenant_id, name, prefix, key_hash, scopes, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        RETURNING {_COLUMNS}
        """,  # noqa: S608  (our own column list)
        tenant_id,
        name,
        prefix,
        key_hash,
        sorted(set(scopes)),
        expires_at,
    )
    assert row is not None
    return row


async def listed(
    conn: Conn, *, tenant_id: int | None, after: int | None, limit: int, platform: bool = False
) -> list[Record]:
    """The tenant's keys, or with `platform` the platform's own."""
    return await conn.fetch(
        f"""
        SELECT {_COLUMNS}
        FROM et_api_keys
        WHERE ($1::bigint IS NOT NULL AND tenant_id = $1 OR $4 AND tenant_id IS NULL)
          AND id > coalesce($2, 0)
        ORDER BY id
        LIMIT $3
        """,  # noqa: S608
        tenant_id,
        after,
        limit,
        platform,
    )


async def read(conn: Conn, key_id: int) -> Record | None:
    return await conn.fetchrow(f"SELECT {_COLUMNS} FROM et_api_keys WHERE id = $1", key_id)  # noqa: S608


async def update(
    conn: Conn, key_id: int, *, name: str | None, scopes: Sequence[str] | None, expires_at: datetime | None
) -> Record | None:
    """What is None stays as it is."""
    return await conn.fetchrow(
        f"""
        UPDATE et_api_keys
        SET name = coalesce($2, name),
            scopes = coalesce($3, scopes),
            expires_at = coalesce($4, expires_at)
        WHERE id = $1
        RETURNING {_COLUMNS}
        """,  # noqa: S608
        key_id,
        name,
        sorted(set(scopes)) if scopes is not None else None,
        expires_at,
    )


async def revoke(conn: Conn, key_id: int) -> Record | None:
    """Revoked keys stay as rows: the audit log names them. The first revocation's time is kept."""
    return await conn.fetchrow(
        f"""
        UPDATE et_api_keys
        SET revoked_at = coalesce(revoked_at, now())
        WHERE id = $1
        RETURNING {_COLUMNS}
        """,  # noqa: S608
        key_id,
    )


async def touch(conn: Conn, used: dict[int, datetime]) -> None:
    """When each key was last used; never moves a time back."""
    await conn.execute(
        """
        UPDATE et_api_keys k
        SET last_used_at = greatest(k.last_used_at, u.at)
        FROM unnest($1::bigint[], $2::timestamptz[]) AS u(id, at)
        WHERE k.id = u.id
        """,
        list(used),
        list(used.values()),
    )


async def ensure_platform(
    conn: Conn, *, name: str, prefix: str, key_hash: bytes, scopes: Sequence[str]
) -> bool:
    """Store this platform key unless the prefix is there already. True when it is new. Run inside a transaction."""
    done = await conn.execute(
        """
        INSERT INTO et_api_keys (tenant_id, name, prefix, key_hash, scopes)
        VALUES (NULL, $1, $2, $3, $4)
        ON CONFLICT (prefix) DO NOTHING
        """,
        name,
        prefix,
        key_hash,
        sorted(scopes),
    )
    return done.endswith(" 1")


async def lock_bootstrap(conn: Conn) -> bool:
    """Take the lock of the first start; True when no usable platform key exists. Run inside a transaction."""
    await conn.execute("SELECT pg_advisory_xact_lock(hashtext('channel-gateway platform key'))")
    return bool(
        await conn.fetchval(
            """
            SELECT NOT EXISTS (
                SELECT 1
                FROM et_api_keys
                WHERE tenant_id IS NULL
                  AND revoked_at IS NULL
                  AND (expires_at IS NULL OR expires_at > now())
            )
            """
        )
    )
