"""Credentials of sessions, sealed by the key ring. Only `et_worker` may touch them: use `db.worker()`.

Never returns them to anything but the channel that logs in with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from core.secrets import KeyRing, SecretError, key_id
from core.store.audit import Conn


async def put(
    conn: Conn, ring: KeyRing, *, tenant_id: int, session_id: int, credentials: Mapping[str, Any]
) -> None:
    """Store or replace."""
    sealed = ring.seal(orjson.dumps(dict(credentials)), tenant_id=tenant_id, row_id=session_id)
    await conn.execute(
        """
        INSERT INTO et_session_credentials AS c (session_id, tenant_id, ciphertext, key_id)
        VALUES ($1, $2, $3, $4)
        ON CONFLICT (session_id) DO UPDATE
        SET ciphertext = excluded.ciphertext, key_id = excluded.key_id, updated_at = now()
        """,
        session_id,
        tenant_id,
        sealed,
        key_id(sealed),
    )


_READ = "SELECT ciphertext FROM et_session_credentials WHERE session_id = $1 AND tenant_id = $2"
_LOCKED = f"{_READ} FOR UPDATE"


async def get(
    conn: Conn, ring: KeyRing, *, tenant_id: int, session_id: int, lock: bool = False
) -> dict[str, Any]:
    """Empty when there are none. `lock`: to change them in this transaction, nobody else does meanwhile. Raises
    SecretError."""
    sealed = await conn.fetchval(
        _LOCKED if lock else _READ,
        session_id,
        tenant_id,
    )
    if sealed is None:
        return {}
    opened: dict[str, Any] = orjson.loads(ring.open(sealed, tenant_id=tenant_id, row_id=session_id))
    return opened


async def exchange(
    conn: Conn, ring: KeyRing, *, tenant_id: int, session_id: int, path: Sequence[str], old: str, new: str
) -> bool:
    """Put `new` where `old` stands, in the caller's transaction. False, and nothing changed, when something else stands
    there: somebody has entered other credentials. Said twice it is no error. Raises SecretError."""
    whole = await get(conn, ring, tenant_id=tenant_id, session_id=session_id, lock=True)
    place: Any = whole
    for name in path[:-1]:
        place = place.get(name) if isinstance(place, dict) else None
    present = place.get(path[-1]) if isinstance(place, dict) else None
    if present == new:
        return True
    if present != old:
        return False
    place[path[-1]] = new
    await put(conn, ring, tenant_id=tenant_id, session_id=session_id, credentials=whole)
    return True


async def delete(conn: Conn, *, tenant_id: int, session_id: int) -> None:
    await conn.execute(
        "DELETE FROM et_session_credentials WHERE session_id = $1 AND tenant_id = $2", session_id, tenant_id
    )


async def move(conn: Conn, ring: KeyRing, *, tenant_id: int, old_id: int, new_id: int) -> None:
    """They are bound to their row, so a move seals them again. The new row keeps its own when the old one has none."""
    credentials = await get(conn, ring, tenant_id=tenant_id, session_id=old_id)
    if credentials:
        await put(conn, ring, tenant_id=tenant_id, session_id=new_id, credentials=credentials)
        await delete(conn, tenant_id=tenant_id, session_id=old_id)


async def rotate(conn: Conn, ring: KeyRing) -> tuple[int, list[str]]:
    """Seal everything again that an older key sealed: how many, and which rows could not be opened, in words.

    Run it after a new key was put first in SECRET_KEYS; then the older one may go. Can be run again at any time.
    """
    rows = await conn.fetch(
        "SELECT session_id, tenant_id, ciphertext FROM et_session_credentials WHERE key_id <> $1 ORDER BY session_id",
        ring.newest,
    )
    done, problems = 0, []
    for row in rows:
        ids = {"tenant_id": row["tenant_id"], "row_id": row["session_id"]}
        try:
            sealed = ring.seal(ring.open(row["ciphertext"], **ids), **ids)
        except SecretError as error:
            problems.append(f"session {row['session_id']}: {error.detail}")
            continue
        # Only if nobody replaced them meanwhile.
        status = await conn.execute(
            """
            UPDATE et_session_credentials
            SET ciphertext = $3, key_id = $4, updated_at = now()
            WHERE session_id = $1
              AND ciphertext = $2
            """,
            row["session_id"],
            row["ciphertext"],
            sealed,
            key_id(sealed),
        )
        done += status == "UPDATE 1"
    return done, problems
