"""What a database error means: gone for now, worth another try, or a setting a person must mend.

Only classifies and words errors; never connects and never retries by itself.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from core.errors import DatabaseError, DatabaseUnavailable, SettingsError

_GONE: tuple[type[BaseException], ...] = (
    DatabaseUnavailable,
    OSError,  # refused, reset, no socket file; TimeoutError too: whether it committed is unknown
    asyncpg.PostgresConnectionError,  # class 08
    asyncpg.OperatorInterventionError,  # class 57: shut down, crashed, starting up, cancelled by a time limit
    asyncpg.InsufficientResourcesError,  # class 53: disk full, out of memory, too many connections
    asyncpg.PostgresSystemError,  # class 58: the server's own disk failed
    asyncpg.PostgresIOError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # we talk to a replica, or a failover is under way
    # Neither PostgresError nor OSError, and what a connection that dies mid-statement often raises.
    asyncpg.InternalClientError,
)
_TRANSIENT: tuple[type[BaseException], ...] = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
)
# asyncpg raises InterfaceError both for these and for wrong use; only the words tell.
_CLOSED_WORDS = ("closed", "closing", "released back", "connection was lost", "being initialized")


def is_unavailable(error: BaseException | None) -> bool:
    """The database is gone, refuses work for now, or the outcome of a commit is unknown.

    The answer to all of these is the same: repeat the same idempotent batch unchanged, later.
    """
    if error is None:
        return False
    if isinstance(error, BaseExceptionGroup):
        return all(is_unavailable(part) for part in error.exceptions)
    if isinstance(error, _GONE):
        return True
    if isinstance(error, asyncpg.InterfaceError) and not isinstance(error, ValueError):
        text = str(error)
        return any(word in text for word in _CLOSED_WORDS)
    return False


def is_transient(error: BaseException | None) -> bool:
    """`is_unavailable`, or the server rolled back because of somebody else (deadlock, lock time limit)."""
    return is_unavailable(error) or isinstance(error, _TRANSIENT)


def describe(url: str) -> str:
    """The address without the password, for messages: `user@host:port/database`."""
    try:
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        host = parts.hostname or query.get("host") or "localhost"
        port = parts.port or query.get("port") or 5432
    except ValueError:
        return "(not a valid URL)"
    user = unquote(parts.username or query.get("user") or "")
    database = unquote(parts.path.lstrip("/")) or query.get("dbname") or user
    where = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else f"{host}:{port}"
    return f"{user + '@' if user else ''}{where}/{database}"


def check_url(url: str) -> None:
    """Raise SettingsError with one line when `url` cannot be a PostgreSQL URL."""
    form = "expected postgresql://user:password@host:5432/database"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL: {error}; {form}") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise SettingsError(f"DATABASE_URL: starts with {parts.scheme or 'no scheme'!r}; {form}")
    if not parts.hostname and "host" not in parse_qs(parts.query):
        raise SettingsError(f"DATABASE_URL: names no host; {form}")
    if not parts.path.lstrip("/") and "dbname" not in parse_qs(parts.query):
        raise SettingsError(f"DATABASE_URL: names no database; {form}")


def explain(error: BaseException, url: str, *, seconds: float) -> DatabaseError | SettingsError:
    """The one line a person needs when connecting failed; `seconds` is how long was tried."""
    where = describe(url)
    host = urlsplit(url).hostname or ""
    match error:
        case DatabaseError() | SettingsError():
            return error
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            text = f"{where}: the server refused the login ({_line(error)}); check user and password"
            return SettingsError(f"DATABASE_URL: {text}", code="database_login")
        case asyncpg.InvalidCatalogNameError():
            text = f"{where}: {_line(error)}; create it first, owned by the login"
            return SettingsError(f"DATABASE_URL: {text}", code="database_missing")
        case asyncpg.InsufficientPrivilegeError():
            return SettingsError(f"DATABASE_URL: {where}: {_line(error)}; GRANT CONNECT to the login")
        case asyncpg.ClientConfigurationError():
            return SettingsError(f"DATABASE_URL: {_line(error)}")
        case asyncpg.CannotConnectNowError() | asyncpg.TooManyConnectionsError():
            return DatabaseUnavailable(f"DATABASE_URL: {where}: {_line(error)}; try again in a moment")
        case socket.gaierror():
            return DatabaseUnavailable(f"DATABASE_URL: the host name {host!r} is unknown ({error.strerror})")
        case FileNotFoundError() | ConnectionRefusedError():
            return DatabaseUnavailable(
                f"DATABASE_URL: nothing answers at {where}; is PostgreSQL running there?"
            )
        case PermissionError():
            return SettingsError(f"DATABASE_URL: this user may not enter the socket's folder of {where}")
        case ssl.SSLError():
            return SettingsError(f"DATABASE_URL: {where}: TLS failed ({_line(error)}); check sslmode")
        case TimeoutError():
            return DatabaseUnavailable(
                f"DATABASE_URL: {where}: no PostgreSQL answered within {seconds:g} s; check host, port, firewall"
            )
        case asyncpg.PostgresError() if not is_unavailable(error):
            return DatabaseError(f"DATABASE_URL: {where}: {_line(error)}")
        case OSError() if Path(str(getattr(error, "filename", "") or "")).is_absolute():
            return DatabaseUnavailable(f"DATABASE_URL: {where}: {error.strerror or error}")
        case OSError() if not isinstance(error, ConnectionError):
            return DatabaseUnavailable(f"DATABASE_URL: {where} cannot be reached: {_line(error)}")
        case _:
            # Something listens there and hung up on us, or said what no PostgreSQL says.
            return DatabaseUnavailable(
                f"DATABASE_URL: what answers at {where} does not speak PostgreSQL ({_line(error)}); check host and port"
            )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
