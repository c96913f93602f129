"""Who is signed in to the console: sessions in this process's memory, behind an opaque cookie.

The API key is proven once and never kept; what it may do is read again every few seconds, so a revoked key is out at once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from core.database import Database
from core.store import keys, tenants

Scope = Literal["send", "sessions", "read", "admin"]

COOKIE = "gateway_console"
FORM_COOKIE = "gateway_console_form"
IDLE_SECONDS = 8 * 3600.0
LIFE_SECONDS = 24 * 3600.0
FRESH_SECONDS = 2.0
"""How long the rights of a key are believed."""
MOST = 5000
"""Sessions kept; the least recently used goes first."""


class Principal(Protocol):
    """A key that was proven. `tenant_id` None: the platform's."""

    @property
    def key_id(self) -> int: ...
    @property
    def tenant_id(self) -> int | None: ...
    @property
    def scopes(self) -> frozenset[str]: ...
    @property
    def suspended(self) -> bool: ...


class SignInRefused(Exception):
    """The key was not accepted, or could not be checked; the text says which."""

    def __init__(self, detail: str, status: int = 401) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to say once, on the next page."""

    text: str
    kind: Literal["done", "error"] = "done"


@dataclass(slots=True, eq=False)
class Visitor:
    """One signed-in browser."""

    key_id: int
    tenant_id: int | None
    scopes: frozenset[str]
    suspended: bool
    csrf: str
    born: float
    seen: float
    checked: float
    notice: Notice | None = None

    @property
    def platform(self) -> bool:
        return self.tenant_id is None

    @property
    def actor(self) -> str:
        return f"key:{self.key_id}"

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes

    def take_notice(self) -> Notice | None:
        notice, self.notice = self.notice, None
        return notice


class Visitors:
    """Every browser that is signed in through this process. Tokens are stored hashed: a dump of memory opens nothing."""

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._clock = clock
        self._all: OrderedDict[bytes, Visitor] = OrderedDict()

    def enter(self, principal: Principal) -> str:
        """The cookie's value for a key that was just proven."""
        token = secrets.token_urlsafe(32)
        now = self._clock()
        self._all[_digest(token)] = Visitor(
            key_id=principal.key_id,
            tenant_id=principal.tenant_id,
            scopes=principal.scopes,
            suspended=principal.suspended,
            csrf=secrets.token_urlsafe(24),
            born=now,
            seen=now,
            checked=now,
        )
        while len(self._all) > MOST:
            self._all.popitem(last=False)
        return token

    def leave(self, token: str) -> None:
        self._all.pop(_digest(token), None)

    async def find(self, token: str | None, *, idle: bool = False) -> Visitor | None:
        """Whose cookie this is; None when nobody's, or no longer. Raises what the database raises.

        `idle`: an open stream asks, which is no sign of a person.
        """
        if not token or len(token) > 100:
            return None
        digest = _digest(token)
        visitor = self._all.get(digest)
        if visitor is None:
            return None
        now = self._clock()
        if now - visitor.seen > IDLE_SECONDS or now - visitor.born > LIFE_SECONDS:
            self._all.pop(digest, None)
            return None
        if now - visitor.checked > FRESH_SECONDS and not await self._still_good(visitor):
            self._all.pop(digest, None)
            return None
        if not idle:
            visitor.seen = now
            if digest in self._all:
                self._all.move_to_end(digest)
        return visitor

    async def _still_good(self, visitor: Visitor) -> bool:
        async with self._db.worker() as conn:
            key = await keys.read(conn, visitor.key_id)
            status = None if visitor.tenant_id is None else await tenants.status(conn, visitor.tenant_id)
        if key is None or key["revoked_at"] is not None:
            return False
        if key["expires_at"] is not None and key["expires_at"] <= datetime.now(UTC):
            return False
        visitor.scopes = frozenset(key["scopes"])
        visitor.suspended = status == "suspended"
        visitor.checked = self._clock()
        return True


class FormGuard:
    """CSRF protection of the one form that comes before a session: the field must match the browser's own cookie."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def issue(self) -> tuple[str, str]:
        """The cookie, and the hidden field that goes with it."""
        cookie = secrets.token_urlsafe(18)
        return cookie, self._field(cookie)

    def matches(self, cookie: str | None, field: str) -> bool:
        return cookie is not None and same(self._field(cookie), field)

    def _field(self, cookie: str) -> str:
        return hmac.new(self._secret, cookie.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def same(one: str, other: str) -> bool:
    """Compared in constant time, whatever is in them."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
