"""A real PostgreSQL server for the tests: own data folder, unix socket only, fsync on, dies with pytest.

It never touches a server that was there before. `TEST_POSTGRES` picks the binaries: unset for the
embedded ones, `system` or a major version (`15`) for those under /usr/lib/postgresql.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from core import embedded_server as server

START_SECONDS = 30.0
STOP_SECONDS = 10.0

SUPERUSER = "postgres"
LOGIN = "gateway"


def find_binaries() -> server.Binaries:
    """What `TEST_POSTGRES` asks for."""
    wanted = os.environ.get("TEST_POSTGRES", "embedded")
    if wanted == "embedded":
        return server.find_binaries()
    pattern = "*/bin" if wanted == "system" else f"{wanted}/bin"
    found = sorted(Path("/usr/lib/postgresql").glob(pattern), key=lambda path: int(path.parent.name))
    assert found, f"TEST_POSTGRES={wanted}: no /usr/lib/postgresql/{pattern}; install postgresql"
    return server.find_binaries(folders=found[-1:])


class PostgresServer:
    """One server. `start()` is called by the fixture; `kill()` and `restart()` are for fault tests."""

    def __init__(self, *settings: str) -> None:
        """`settings`: `name=value`, on the server's command line."""
        self._binaries = find_binaries()
        self._settings = {"max_connections": "200"} | dict(setting.split("=", 1) for setting in settings)
        self._folder = Path(tempfile.mkdtemp(prefix="cgpg-"))
        self._data = self._folder / "data"
        self._log_path = self._folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    # ---- life ----

    def start(self) -> None:
        """Make the data folder, start, and return once connections are accepted."""
        self._log_path.touch()
        user = server.choose_user(self._data)
        for folder in (self._folder, self._data):
            server.own_folder(folder, user)
        self._user = server.with_access(user, self._binaries, [self._data])
        made = self._run([*server.initdb_command(self._binaries, self._data, SUPERUSER), "--no-sync"])
        assert made.wait(60) == 0, self._log_path.read_text()
        self._spawn()
        self.superuser_sql(f"CREATE ROLE {LOGIN} LOGIN CREATEROLE")

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return server.popen(self._user, command, log.fileno(), death_signal=signal.SIGQUIT)

    def _spawn(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        command = server.postgres_command(self._binaries, self._data, self._folder, self._settings)
        while True:
            self._process = self._run(command)
            while self._process.poll() is None:
                if self._accepts():
                    return
                assert time.monotonic() < deadline, self._log_path.read_text()[-2000:]
                time.sleep(0.02)
            # The backends of a killed server are still leaving its shared memory: try again.
            assert time.monotonic() < deadline, self._log_path.read_text()[-2000:]
            time.sleep(0.1)

    def _accepts(self) -> bool:
        tool = self._binaries.path("pg_isready")
        ready = [tool, "-q", "-h", str(self._folder), "-U", SUPERUSER, "-d", "postgres"]
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
        return server.url(self._folder, database, user)

    def superuser_url(self, url_or_database: str = "postgres") -> str:
        """The superuser's address of the same database: for making backend logins, for looking behind walls."""
        name = url_or_database.split("?")[0].rsplit("/", 1)[-1]
        return self.url(name, SUPERUSER)

    def superuser_sql(self, sql: str, database: str = "postgres") -> str:
        """Run statements one by one as the superuser; returns what psql prints, unaligned, without headers."""
        command = [self._binaries.path("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"]
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
        return self.url(name)

    def drop_database(self, url: str) -> None:
        name = url.split("?")[0].rsplit("/", 1)[-1]
        self.superuser_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE);")
