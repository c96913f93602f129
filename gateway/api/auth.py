"""Who is calling: API keys, scopes, and the audit row of every denial.

A key is 256 random bits behind a short prefix that finds its row; only its SHA-256 is stored, and compared in constant time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from aiohttp import web

from core import log as logs
from core.audit_trail import AuditTrail
from core.database import Database, is_unavailable
from core.errors import SettingsError
from core.settings import Settings
from core.store import audit, keys
from gateway.api.problems import Problem, unavailable

log = logs.get(part="auth")

Scope = Literal["send", "sessions", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("admin", "read", "send", "sessions")

FRESH_SECONDS = 1.0
"""How long a look-up is believed: a revoked key is dead after this at the latest."""
CACHE_SIZE = 4096
TOUCH_SECONDS = 30.0
_FORM = re.compile(r"cg_([0-9a-z]{10})_[A-Za-z0-9_-]{43}")
_ALPHABET = "0123456789abcdefghijkmnpqrstuvwxyz"


def new_key() -> tuple[str, str, bytes]:
    """A fresh key, its prefix and its hash."""
    prefix = "".join(secrets.choice(_ALPHABET) for _ in range(10))
    key = f"cg_{prefix}_{secrets.token_urlsafe(32)}"
    return key, prefix, hash_of(key)


def hash_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def prefix_of(key: str) -> str:
    """What finds the row. An operator's own `ADMIN_API_KEY` has no prefix in it, so a piece of its hash serves."""
    form = _FORM.fullmatch(key)
    return form[1] if form else f"x{hash_of(key).hex()[:15]}"


async def ensure_platform_key(db: Database, settings: Settings) -> str | None:
    """Make sure that somebody can sign in. Returns a new key to print once, or None when there is one already.

    With `ADMIN_API_KEY` set that key is a platform key from now on. Several gateways may start at once.
    """
    async with db.worker() as conn, conn.transaction():
        none_yet = await keys.lock_bootstrap(conn)
        if settings.admin_api_key is not None:
            given = settings.admin_api_key.get_secret_value()
            if len(given) < 16:
                raise SettingsError("ADMIN_API_KEY=(not shown): at least 16 characters, best 32 random ones")
            fresh = await keys.ensure_platform(
                conn, name="ADMIN_API_KEY", prefix=prefix_of(given), key_hash=hash_of(given), scopes=SCOPES
            )
            if fresh:
                await _created(conn, "ADMIN_API_KEY")
            return None
        if not none_yet:
            return None
        key, prefix, key_hash = new_key()
        await keys.ensure_platform(conn, name="first start", prefix=prefix, key_hash=key_hash, scopes=SCOPES)
        await _created(conn, "first start")
        return key


async def _created(conn: audit.Conn, name: str) -> None:
    await audit.write(
        conn, "key_created", tenant_id=None, actor="operator", subject_type="key", detail={"name": name}
    )


@dataclass(frozen=True, slots=True)
class Principal:
    """A key that was proven. `tenant_id` None: the platform."""

    key_id: int
    tenant_id: int | None
    scopes: frozenset[str]
    suspended: bool

    @property
    def platform(self) -> bool:
        return self.tenant_id is None

    @property
    def actor(self) -> str:
        return f"key:{self.key_id}"


def bearer(request: web.Request) -> str | None:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" and value.strip() else None


def unauthenticated(detail: str) -> Problem:
    return Problem(401, "unauthenticated", detail, headers={"WWW-Authenticate": 'Bearer realm="gateway"'})


class Keys:
    """Proves keys against the database, with a look-up believed for a second and kept for an outage."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._cache: OrderedDict[str, tuple[float, keys.Key | None]] = OrderedDict()
        self._used: dict[int, datetime] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._touch_forever(), name="keys-last-used")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        with contextlib.suppress(Exception):  # the last few times of use are not worth a failed shutdown
            async with asyncio.timeout(2):
                await self._flush()

    async def principal(self, key: str, *, offline: bool = False) -> Principal:
        """Raises 401 for a key that is wrong, expired or revoked, 503 when that cannot be known.

        `offline`: while the database is away a key that was good when last seen is believed. For webhooks alone:
        refusing them would lose messages.
        """
        if len(key) > 512:
            raise unauthenticated("the key is not valid; check that it was copied whole")
        row = await self._row(prefix_of(key), offline)
        # Compared even when there is no row, so that an unknown prefix takes no less time.
        stored = row.key_hash if row is not None else bytes(32)
        same = hmac.compare_digest(hash_of(key), stored)
        if row is None or not same:
            raise unauthenticated("the key is not valid; check that it was copied whole")
        now = datetime.now(UTC)
        if row.revoked_at is not None:
            raise unauthenticated("the key was revoked; ask for a new one")
        if row.expires_at is not None and row.expires_at <= now:
            raise unauthenticated("the key has expired; ask for a new one")
        self._used[row.id] = now
        return Principal(row.id, row.tenant_id, row.scopes, row.tenant_status == "suspended")

    def forget(self) -> None:
        """After a key or a tenant changed through this process: look again at once."""
        for prefix, (_, row) in list(self._cache.items()):
            self._cache[prefix] = (0.0, row)

    async def _row(self, prefix: str, offline: bool) -> keys.Key | None:
        now = time.monotonic()
        cached = self._cache.get(prefix)
        if cached is not None and now - cached[0] < FRESH_SECONDS:
            return cached[1]
        try:
            async with self._db.worker() as conn:
                row = await keys.by_prefix(conn, prefix)
        except Exception as error:
            if not is_unavailable(error):
                raise
            if offline and cached is not None and cached[1] is not None:
                return cached[1]
            raise unavailable(
                "the database cannot be reached, so the key cannot be checked; try again soon"
            ) from error
        if row is not None or cached is not None:
            # Guesses are not remembered: they must not push real keys out.
            self._cache[prefix] = (now, row)
            self._cache.move_to_end(prefix)
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        return row

    async def _touch_forever(self) -> None:
        while True:
            await asyncio.sleep(TOUCH_SECONDS)
            try:
                await self._flush()
            except Exception as error:
                if not is_unavailable(error):
                    log.error("keys.touch_failed", error=repr(error))

    async def _flush(self) -> None:
        used, self._used = self._used, {}
        if not used:
            return
        try:
            async with self._db.worker() as conn:
                await keys.touch(conn, used)
        except BaseException:
            self._used = {**used, **self._used}
            raise


async def record_denial(
    trail: AuditTrail,
    principal: Principal,
    *,
    reason: str,
    subject_type: str,
    subject_id: int | str | None,
    method: str,
    route: str,
    request_id: str,
) -> None:
    """The `access_denied` row, in the log of the tenant whose key it was: that is who must look after the key."""
    log.warning("access.denied", action=f"{method} {route}", result=reason, key_id=principal.key_id)
    await trail.write(
        "access_denied",
        tenant_id=principal.tenant_id,
        actor=principal.actor,
        subject_type=subject_type,
        subject_id=subject_id,
        detail={"reason": reason, "method": method, "route": route, "request_id": request_id},
    )
