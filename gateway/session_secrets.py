"""One session's credentials, sealed in the database: read when its channel starts, changed when its service renews one.

Keeps nothing in memory and logs nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core import log as logs
from core.database import Database, is_transient
from core.errors import DatabaseUnavailable
from core.secrets import KeyRing
from core.store import credentials
from core.store.sessions import SessionRow

log = logs.get(part="sessions")


class SessionSecrets:
    def __init__(self, db: Database, keys: KeyRing, row: SessionRow) -> None:
        self._db, self._keys = db, keys
        self._tenant_id, self._session_id = int(row.tenant_id), int(row.id)

    async def read(self) -> dict[str, Any]:
        """Raises SecretError, and what the database raises."""
        async with self._db.worker() as conn:
            return await credentials.get(
                conn, self._keys, tenant_id=self._tenant_id, session_id=self._session_id
            )

    async def renewed(self, path: Sequence[str], old: str, new: str) -> bool:
        """See `core.sinks.CredentialSink`."""
        try:
            async with self._db.worker() as conn, conn.transaction():
                done = await credentials.exchange(
                    conn,
                    self._keys,
                    tenant_id=self._tenant_id,
                    session_id=self._session_id,
                    path=path,
                    old=old,
                    new=new,
                )
        except Exception as error:
            if is_transient(error):
                raise DatabaseUnavailable("the database cannot be reached right now") from error
            raise
        log.info(
            "credentials.renewed",
            tenant_id=self._tenant_id,
            session_id=self._session_id,
            action=".".join(path),
            result="stored" if done else "others were entered meanwhile",
        )
        return done
