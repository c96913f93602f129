"""The embedded PostgreSQL under our own supervisor: started with the gateway, restarted when it dies, gone with it.

Everything it stores lives in one folder, DATA_DIR/postgres. Not meant to be shared: several gateways need DATABASE_URL.

    DATA_DIR/postgres/          data/        the cluster, the server's user alone
                                run/         the socket (elsewhere when this path is too long for one)
                                server.log   what the server says, bounded
                                lock         held by the one gateway that runs it; names its pid

The gateway never works as the superuser: the first start makes a login and a database of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import asyncpg

from core import embedded_server as server
from core import log as logs
from core.database_errors import is_unavailable
from core.errors import DatabaseError

log = logs.get(part="embedded_postgres")

SUPERUSER = "postgres"
LOGIN = "gateway"
DATABASE = "gateway"

START_SECONDS = 60.0
STOP_SECONDS = 5.0
WATCH_SECONDS = 0.1
SOCKET_CHECK_SECONDS = 5.0
BACKOFF_FIRST = 0.1
BACKOFF_MOST = 5.0
LOG_BYTES = 5_000_000
# A killed server's backends need a moment to leave its shared memory; then the same start succeeds.
_PASSING = (
    "pre-existing shared memory block",
    'lock file "postmaster.pid" already exists',
    "is still in use",
)


def running_url(folder: Path) -> str | None:
    """The address of the server that another process runs in `folder` just now, or None."""
    try:
        with (folder.resolve() / "lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (folder.resolve() / "url").read_text()
    except OSError:
        return None
    return None


class EmbeddedPostgres:
    """`url = await EmbeddedPostgres(data_dir / "postgres").start()`, then `await stop()`. On the main thread's loop."""

    def __init__(
        self,
        folder: Path,
        *,
        bin_folders: Sequence[Path] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`folder` is all its own and made when missing; `bin_folders`: look for the server's programs there and nowhere
        else; `settings`: further server settings.
        """
        self._home = folder.resolve()
        self._data = self._home / "data"
        self._log_path = self._home / "server.log"
        self._bin_folders = bin_folders
        self._settings = dict(settings or {})
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._on_restart: list[Callable[[], None]] = []
        self._running = False

    # ---- what others may ask ----

    @property
    def url(self) -> str:
        """The gateway's own login. The same across restarts of server and gateway."""
        return server.url(self._sockets, DATABASE, LOGIN)

    @property
    def superuser_url(self) -> str:
        """For making backend logins and for backups; the gateway itself never uses it."""
        return server.url(self._sockets, DATABASE, SUPERUSER)

    @property
    def running(self) -> bool:
        """Whether the server accepts connections, as far as the supervisor knows."""
        return self._running

    @property
    def healthy(self) -> bool:
        """False once the supervisor itself has died."""
        return self._supervisor is not None and not self._supervisor.done()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def on_restart(self, callback: Callable[[], None]) -> None:
        """Call `callback` each time the server died and is back."""
        self._on_restart.append(callback)

    # ---- start and stop ----

    async def start(self) -> str:
        """Start the server, making the cluster when there is none; returns the URL.

        Raises DatabaseError with one line: another gateway runs here, the folder cannot be written, no programs, no
        user, or the server's own reason.
        """
        if threading.current_thread() is not threading.main_thread():
            # Its parent-death signal fires when the creating thread ends, not the process.
            raise DatabaseError("the embedded database must be started from the main thread")
        if self._supervisor is not None:
            return self.url
        try:
            await self._start()
        except BaseException as error:
            await self.stop()
            if isinstance(error, OSError):
                reason = f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
                raise DatabaseError(
                    f"DATA_DIR: the embedded database cannot use its folder: {reason}"
                ) from error
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded_postgres")
        self._supervisor.add_done_callback(self._supervisor_ended)
        log.info("embedded_postgres.started", folder=str(self._home), pid=self.pid)
        return self.url

    async def _start(self) -> None:
        self._home.parent.mkdir(parents=True, exist_ok=True)
        # This one folder is ours: the server's user must be able to pass through, nobody needs to list it.
        with contextlib.suppress(FileExistsError):
            self._home.mkdir(mode=0o700)
            self._home.chmod(0o711 if os.geteuid() == 0 else 0o700)
        self._take_lock()
        self._binaries = server.find_binaries(self._data, self._bin_folders)
        user = server.choose_user(self._data)
        self._sockets = server.socket_folder(self._home, user)
        fresh = not (self._data / "PG_VERSION").exists()
        place = self._home / "data.new" if fresh else self._data
        if fresh:
            # Made aside and renamed: a start that is cut off leaves nothing that looks like a database.
            shutil.rmtree(place, ignore_errors=True)
            server.own_folder(place, user)
        self._user = await asyncio.to_thread(server.with_access, user, self._binaries, [place, self._sockets])
        self._rotate_log()
        if fresh:
            await self._initdb(place)
            place.rename(self._data)
            _sync_folder(self._home)
        await self._end_previous()
        await self._launch(time.monotonic() + START_SECONDS)
        await self._bootstrap()
        (self._home / "url").write_text(self.url)

    async def stop(self) -> None:
        """Stop the server in order; within `STOP_SECONDS`, then less politely. Safe to call twice, or after a failure."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.remove_done_callback(self._supervisor_ended)
            supervisor.cancel()
            await asyncio.wait([supervisor], timeout=STOP_SECONDS)
        await self._end(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()
            log.info("embedded_postgres.stopped")

    # ---- parts of a start ----

    def _take_lock(self) -> None:
        """Held by this process until it ends, however it ends."""
        descriptor = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        file = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "unknown"
            file.close()
            raise DatabaseError(
                f"another gateway (pid {holder}) runs the embedded database in {self._home}; stop it, "
                "choose another DATA_DIR, or let both share one PostgreSQL by DATABASE_URL"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file

    async def _initdb(self, place: Path) -> None:
        process = self._spawn(server.initdb_command(self._binaries, place, SUPERUSER), signal.SIGKILL)
        self._process = process
        if not await _wait(process, START_SECONDS) or process.returncode != 0:
            raise DatabaseError(f"the embedded database could not be made: {self._last_words()}")
        self._process = None

    async def _end_previous(self) -> None:
        """Wait for the server of a gateway that was killed: it is on its way down; help it when it is not."""
        pid = self._previous_pid()
        signals = iter((signal.SIGINT, signal.SIGQUIT, signal.SIGKILL))
        deadline = 0.0
        while pid is not None and self._previous_pid() == pid:
            if time.monotonic() > deadline:
                number = next(signals, None)
                if number is None:
                    raise DatabaseError(
                        f"an older embedded server (pid {pid}) does not end; kill it and start again"
                    )
                log.warning("embedded_postgres.left_over", pid=pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                deadline = time.monotonic() + STOP_SECONDS
            await asyncio.sleep(WATCH_SECONDS)

    def _previous_pid(self) -> int | None:
        """The live server of our data folder, or None. A pid that now belongs to something else does not count."""
        try:
            pid = int((self._data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, 0)
        except (OSError, ValueError, IndexError):
            return None
        if Path("/proc/self").exists():
            try:
                return pid if Path(f"/proc/{pid}/cwd").samefile(self._data) else None
            except OSError:
                return None
        return pid

    async def _launch(self, deadline: float) -> None:
        """Return once the server accepts connections. Raises DatabaseError with the server's own reason."""
        command = server.postgres_command(self._binaries, self._data, self._sockets, self._settings)
        while True:
            started_at = self._log_path.stat().st_size if self._log_path.exists() else 0
            self._process = process = self._spawn(command, signal.SIGINT)
            while process.poll() is None:
                if await self._accepts():
                    self._running = True
                    return
                if time.monotonic() > deadline:
                    raise DatabaseError(f"the embedded PostgreSQL did not get ready: {self._last_words()}")
                await asyncio.sleep(0.02)
            self._process = None
            words = self._said_since(started_at)
            if time.monotonic() > deadline or not any(passing in words for passing in _PASSING):
                raise DatabaseError(f"the embedded PostgreSQL did not start: {self._last_words()}")
            await asyncio.sleep(WATCH_SECONDS)

    async def _accepts(self) -> bool:
        if not self._socket.exists():
            return False
        try:
            conn = await asyncpg.connect(server.url(self._sockets, "postgres", SUPERUSER), timeout=5)
        except Exception as error:
            if is_unavailable(error):
                return False
            raise
        await _close(conn)
        return True

    async def _bootstrap(self) -> None:
        """The gateway's login and database; and proof that this server waits for the disk."""
        conn = await self._superuser("postgres")
        try:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                if await conn.fetchval("SELECT current_setting($1)", setting) == "off":
                    raise DatabaseError(
                        f"the embedded PostgreSQL runs with {setting} = off and may lose acknowledged messages; "
                        f"remove that setting from {self._data} and start again"
                    )
            if not await conn.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", LOGIN):
                await conn.execute(f"CREATE ROLE {LOGIN} LOGIN CREATEROLE NOSUPERUSER NOBYPASSRLS")
            if not await conn.fetchval("SELECT count(*) FROM pg_database WHERE datname = $1", DATABASE):
                await conn.execute(f"CREATE DATABASE {DATABASE} OWNER {LOGIN}")
        finally:
            await _close(conn)

    async def _superuser(self, database: str) -> asyncpg.Connection[Any]:
        conn: asyncpg.Connection[Any] = await asyncpg.connect(
            server.url(self._sockets, database, SUPERUSER), timeout=10, command_timeout=30
        )
        return conn

    @property
    def _socket(self) -> Path:
        return self._sockets / f".s.PGSQL.{server.PORT}"

    # ---- the server's life ----

    async def _supervise(self) -> None:
        delay = BACKOFF_FIRST
        checked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            process = self._process
            if process is not None and process.poll() is None:
                if time.monotonic() - checked < SOCKET_CHECK_SECONDS:
                    continue
                checked = time.monotonic()
                self._bound_log()
                if self._socket.exists():
                    continue
                # Something swept it away, and nobody can connect any more: a dead address.
                log.error("embedded_postgres.socket_gone", socket=str(self._socket))
                await self._end(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
            elif process is not None:
                log.error("embedded_postgres.died", pid=process.pid, code=process.returncode)
            self._running, self._process = False, None
            began = time.monotonic()
            try:
                self._sockets = server.socket_folder(self._home, self._user)
                await self._end_previous()
                await self._launch(time.monotonic() + START_SECONDS)
            except (DatabaseError, OSError) as error:
                log.error("embedded_postgres.restart_failed", error=str(error), retry_in=delay)
                await self._end(signal.SIGKILL)
                await asyncio.sleep(delay)
                delay = min(delay * 2, BACKOFF_MOST)
                continue
            delay = BACKOFF_FIRST
            log.warning(
                "embedded_postgres.restarted",
                pid=self.pid,
                duration_ms=round((time.monotonic() - began) * 1000),
            )
            for callback in self._on_restart:
                callback()

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        log.error("embedded_postgres.supervisor_died", error=repr(error))

    async def _end(self, *numbers: int) -> None:
        process = self._process
        self._running = False
        for number in numbers if process is not None else ():
            assert process is not None
            if process.poll() is not None:
                break
            process.send_signal(number)
            if await _wait(process, STOP_SECONDS):
                break
        self._process = None

    def _spawn(self, command: list[str], death_signal: int) -> subprocess.Popen[bytes]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        descriptor = os.open(self._log_path, flags, 0o600)
        try:
            return server.popen(self._user, command, descriptor, death_signal=death_signal)
        finally:
            os.close(descriptor)

    # ---- the server's log ----

    def _rotate_log(self) -> None:
        """One older log is kept."""
        with contextlib.suppress(FileNotFoundError):
            if self._log_path.stat().st_size > LOG_BYTES:
                self._log_path.replace(self._log_path.with_suffix(".log.1"))

    def _bound_log(self) -> None:
        """A server that complains for days must not fill the disk; it appends, so it goes on at the new end."""
        with contextlib.suppress(OSError):
            if self._log_path.stat().st_size > 4 * LOG_BYTES:
                shutil.copyfile(self._log_path, self._log_path.with_suffix(".log.1"))
                os.truncate(self._log_path, 0)

    def _said_since(self, offset: int) -> str:
        with contextlib.suppress(OSError), self._log_path.open("rb") as file:
            file.seek(offset)
            return file.read(100_000).decode(errors="replace")
        return ""

    def _last_words(self) -> str:
        """The server's reason, one line, and where the rest is."""
        size = self._log_path.stat().st_size if self._log_path.exists() else 0
        lines = [line.strip() for line in self._said_since(max(0, size - 8000)).splitlines() if line.strip()]
        telling = [
            line for line in lines if any(word in line for word in ("FATAL", "PANIC", "error:", "launcher:"))
        ]
        return f"{(telling or lines or ['it said nothing'])[-1]} (see {self._log_path})"


async def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ended in time. Polled: it works alike on every system and beside any event loop."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def _close(conn: asyncpg.Connection[Any]) -> None:
    try:
        await conn.close(timeout=5)
    except Exception:
        conn.terminate()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
