"""Sessions that log in with credentials: a form's values in, checked by the channel on the spot, kept sealed.

Knows no channel: what is asked for and how it is checked come from its `ChannelKind`. Never logs, shows or returns a secret.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from core import log as logs
from core.channel import ChannelKind, CredentialField, Json, LogIn, SessionStatus
from core.errors import ChannelError, Conflict, Invalid, InvalidField, ThrottledError
from core.secrets import KeyRing, SecretError
from core.store import credentials, sessions
from core.store.audit import Conn
from core.store.sessions import SessionRow

log = logs.get(part="log_in")

CHECK_SECONDS = 25.0
"""A channel has 20 s for it; this is for one that does not keep to them."""
ROOT = "credentials"
PROXY = "proxy"
"""Stands among the credentials when it holds a password."""
MOST_CHARACTERS = 4096
_SECRET_NAMES = ("password", "secret", "token", "key")
_HIDDEN = "•••"


# ---- a form's values


def name_of(field: CredentialField) -> str:
    """What a form and an error call it: `imap.host`."""
    return ".".join(field.path)


def from_form(
    kind: ChannelKind, values: Mapping[str, str], *, stored: Json | None = None
) -> tuple[Json, dict[str, str]]:
    """Credentials from the values of the channel's form, and by field what is wrong with them.

    `stored`: what is kept already; a field that is left empty then stays as it is.
    """
    given: Json = deepcopy(stored) if stored else {}
    wrong: dict[str, str] = {}
    for field in kind.form:
        name = name_of(field)
        text = values.get(name, "")
        # A password may begin or end with a space.
        text = text if field.kind == "secret" else text.strip()
        if not text and stored is None:
            text = field.default or ""
        if not text:
            if field.required and stored is None:
                wrong[name] = "Fill this in."
            continue
        problem, value = _value(field, text)
        if problem is not None:
            wrong[name] = problem
        else:
            _put(given, field.path, value)
    return given, wrong


def _value(field: CredentialField, text: str) -> tuple[str | None, Any]:
    if len(text) > MOST_CHARACTERS or any(ord(c) < 32 for c in text):
        return "This is too long, or has characters in it that cannot be typed.", None
    if field.kind == "number":
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            return "Enter a number.", None
        return None, int(text)
    if field.kind == "choice" and text not in field.choices:
        return f"Choose one of: {', '.join(field.choices)}.", None
    return None, text


def _put(target: Json, path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        inner = target.get(part)
        if not isinstance(inner, dict):
            inner = target[part] = {}
        target = inner
    target[path[-1]] = value


# ---- the check


async def check(kind: ChannelKind, given: Json, metadata: Mapping[str, Any]) -> LogIn:
    """Log in once and out again. Raises InvalidField that says which field (`credentials.imap.host`) and why, ThrottledError
    when the channel wants to be left alone, Conflict when this channel has no such log-in."""
    if kind.check_credentials is None:
        raise Conflict(f"{kind.name} sessions do not log in with credentials")
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            found = await kind.check_credentials(deepcopy(given), metadata)
    except InvalidField as error:
        raise InvalidField(error.field, _without_secrets(kind, given, error.reason)) from None
    except ThrottledError:
        raise
    except (Invalid, ChannelError) as error:
        raise InvalidField(ROOT, _without_secrets(kind, given, error.detail)) from None
    except TimeoutError:
        raise InvalidField(
            ROOT, f"no answer within {CHECK_SECONDS:.0f} s; check the address and try again"
        ) from None
    except Exception as error:
        # Its text and its frames may hold the secret: neither goes any further.
        log.error("credentials.check_failed", action=kind.name, error=type(error).__name__)
        raise InvalidField(
            ROOT,
            f"they could not be checked ({type(error).__name__}); try again, then look at the gateway's log",
        ) from None
    # The contract's identifier is a bare address.
    return LogIn(found.identifier.removeprefix(f"{kind.name}:"), found.credentials, found.name)


def _without_secrets(kind: ChannelKind, given: Json, text: str) -> str:
    """A server may say back what it was told."""
    asked = {field.path: field.kind == "secret" for field in kind.form}
    for path, value in _leaves(given, ()):
        last = path[-1].lower()
        named = any(word in last for word in _SECRET_NAMES) and not last.endswith("url")
        if asked.get(path, named) and len(value) > 2:
            text = text.replace(value, _HIDDEN)
    return text


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, str(name)))
    elif isinstance(value, str) and path:
        yield path, value


# ---- rows: as worker, inside the caller's transaction


async def create(
    conn: Conn,
    ring: KeyRing,
    *,
    tenant_id: int,
    kind: ChannelKind,
    found: LogIn,
    name: str | None,
    metadata: Mapping[str, Any],
) -> SessionRow:
    """The session with these credentials, not started. An address that the tenant has already and that is not live goes on
    with the new credentials: its conversations stay. Raises Conflict when it is live."""
    older = await sessions.by_identifier(conn, tenant_id, kind.name, found.identifier)
    if older is None:
        row = await sessions.create(
            conn,
            tenant_id,
            kind.name,
            name=name or found.name,
            identifier=found.identifier,
            metadata=metadata,
            status=SessionStatus.DISCONNECTED,
        )
    elif older.status in (SessionStatus.ACTIVE, SessionStatus.CONNECTING):
        raise Conflict(
            f"this tenant has {found.identifier} already: session {older.id}, which is {older.status}",
            action=f"to change its credentials, change session {older.id}",
        )
    else:
        row = await sessions.patch(conn, tenant_id, older.id, name=name, metadata=metadata)
    await _keep(conn, ring, row, found.credentials)
    return await sessions.get(conn, tenant_id, row.id)


async def renew(conn: Conn, ring: KeyRing, session: SessionRow, found: LogIn) -> None:
    """New credentials for a session; its proxy stays. Raises InvalidField when they are somebody else's."""
    same_account(session, found)
    old = await stored(conn, ring, session)
    kept = {name: value for name, value in old.items() if name == PROXY}
    await _keep(conn, ring, session, kept | found.credentials)


async def stored(conn: Conn, ring: KeyRing, session: SessionRow) -> Json:
    """What is kept for a session, to be replaced; nothing when it cannot be opened any more."""
    try:
        ids = {"tenant_id": int(session.tenant_id), "session_id": int(session.id)}
        return await credentials.get(conn, ring, **ids, lock=True)
    except SecretError as error:
        log.warning("credentials.unreadable", session_id=session.id, error=error.code)
        return {}


def same_account(session: SessionRow, found: LogIn) -> None:
    """Raises InvalidField."""
    if not session.pending and found.identifier.casefold() != session.identifier.casefold():
        raise InvalidField(
            ROOT,
            f"they are those of {found.identifier}, and this session is {session.identifier}: add another session",
        )


async def try_again(conn: Conn, session: SessionRow) -> None:
    """One that stands still because its old credentials were refused tries the new ones by itself."""
    if session.wanted == "connected":
        await sessions.want(conn, session.id, "connected")


async def _keep(conn: Conn, ring: KeyRing, session: SessionRow, secrets: Json) -> None:
    ids = {"tenant_id": int(session.tenant_id), "session_id": int(session.id)}
    await credentials.put(conn, ring, **ids, credentials=secrets)
    await try_again(conn, session)
