"""The durable disk queue: real files, real processes, real kills."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core import faults
from core.errors import JournalError
from core.journal import Journal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal(path) as opened:
        yield opened


@pytest.fixture
def no_faults() -> Iterator[None]:
    yield
    faults.disarm()


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_entries_come_back_in_the_order_they_were_appended(journal: Journal) -> None:
    first = journal.append("message", "A", b"\x00one")
    rest = journal.append_many([("message", "B", b"two"), ("receipt", "C", b"")])
    entries = journal.pending()
    assert [e.number for e in entries] == [first, *rest]
    assert [(e.kind, e.key, e.payload) for e in entries] == [
        ("message", "A", b"\x00one"),
        ("message", "B", b"two"),
        ("receipt", "C", b""),
    ]
    assert abs(entries[0].appended_at - time.time()) < 60
    assert [e.key for e in journal.pending(after=first, limit=1)] == ["B"]


def test_appending_nothing_is_nothing(journal: Journal) -> None:
    assert journal.append_many([]) == []
    assert journal.depth() == 0


def test_a_released_entry_is_not_pending_but_still_known(journal: Journal) -> None:
    numbers = journal.append_many([("message", key, b"x") for key in "ABC"])
    journal.release([numbers[1], numbers[1], 999])
    assert [e.key for e in journal.pending()] == ["A", "C"]
    assert journal.depth() == 2
    assert journal.keys("message") == {"A", "B", "C"}
    assert journal.keys("receipt") == set()


def test_replay_brings_released_entries_back(journal: Journal) -> None:
    numbers = journal.append_many([("message", str(i), b"x") for i in range(450)])
    journal.release(numbers)
    assert journal.depth() == 0
    assert journal.replay(since=time.time() + 60) == 0
    assert journal.replay(since=time.time() - 60) == 450
    assert [e.number for e in journal.pending(limit=1000)] == numbers


def test_what_was_released_can_be_read_again_page_by_page(journal: Journal) -> None:
    numbers = journal.append_many([("message", str(i), b"x") for i in range(5)])
    assert journal.newest() == numbers[-1]
    journal.release(numbers[:4])
    journal.append("message", "later", b"x")
    since = time.time() - 60
    first = journal.released(since, after=0, through=numbers[-1], limit=3)
    rest = journal.released(since, after=first[-1].number, through=numbers[-1], limit=3)
    assert [e.key for e in (*first, *rest)] == ["0", "1", "2", "3"]  # what is pending comes by itself
    assert journal.released(since, after=0, through=numbers[1]) == first[:2]
    assert journal.released(time.time() + 60, after=0, through=numbers[-1]) == []


def test_what_was_discarded_is_gone_and_its_key_is_still_known(journal: Journal, path: Path) -> None:
    one, two = journal.append_many([("message", "A", b"private"), ("message", "B", b"x")])
    journal.release([one, two])
    journal.discard([one])
    journal.discard([journal.append("message", "C", b"private")])
    assert journal.depth() == 0
    assert [e.key for e in journal.released(0, after=0, through=journal.newest())] == ["B"]
    assert journal.keys("message") == {"A", "B", "C"}


def test_an_empty_journal_has_no_newest_entry(journal: Journal) -> None:
    assert journal.newest() == 0


def test_prune_deletes_only_what_was_released_long_ago(journal: Journal) -> None:
    numbers = journal.append_many([("message", str(i), b"x" * 1000) for i in range(450)])
    journal.release(numbers[:420])
    assert journal.prune() == 0
    assert journal.prune(older_than=0) == 420
    assert journal.depth() == 30
    assert journal.keys("message") == {str(i) for i in range(420, 450)}


def test_prune_gives_the_space_back(path: Path) -> None:
    with Journal(path) as journal:
        numbers = journal.append_many([("message", str(i), b"x" * 10_000) for i in range(400)])
        journal.release(numbers)
        journal.prune(older_than=0)
    assert path.stat().st_size < 1_000_000


def test_a_number_is_never_given_twice(path: Path) -> None:
    with Journal(path) as journal:
        number = journal.append("message", "A", b"x")
        journal.release([number])
        journal.prune(older_than=0)
    with Journal(path) as journal:
        assert journal.append("message", "B", b"x") > number


def test_only_the_owner_can_read_it(path: Path) -> None:
    path.touch(mode=0o644)
    with Journal(path) as journal:
        journal.append("message", "A", b"x")
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    assert len(modes) == 3


def test_appends_wait_for_the_disk(journal: Journal) -> None:
    assert journal._appender.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert journal._reader.execute("PRAGMA synchronous").fetchone()[0] == 1  # NORMAL


def test_threads_append_at_once(journal: Journal) -> None:
    def work(name: int) -> None:
        for i in range(25):
            journal.append("message", f"{name}-{i}", b"x")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert journal.depth() == 200
    keys = [e.key for e in journal.pending(limit=1000)]
    for name in range(8):
        assert [k for k in keys if k.startswith(f"{name}-")] == [f"{name}-{i}" for i in range(25)]


APPENDER = """
import sys
from core.journal import Journal
journal = Journal(sys.argv[1])
for i in range(int(sys.argv[2])):
    journal.append("message", f"{sys.argv[3]}-{i}", b"x" * 300)
    sys.stdout.write(f"{sys.argv[3]}-{i}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("lines", [1, 37, 200])
def test_kill_9_loses_nothing_that_append_returned_for(path: Path, lines: int) -> None:
    process = spawn(APPENDER, path, 1_000_000, "k")
    assert process.stdout is not None
    confirmed = [process.stdout.readline().strip() for _ in range(lines)]
    process.send_signal(signal.SIGKILL)
    confirmed += process.stdout.read().split()
    process.wait(30)
    process.stdout.close()
    with Journal(path) as journal:
        pending = [e.key for e in journal.pending(limit=1_000_000)]
        assert pending[: len(confirmed)] == confirmed
        assert len(pending) <= len(confirmed) + 1  # the one that was under way
        journal.append("message", "after", b"x")


@pytest.mark.parametrize(("point", "kept"), [("journal.before_fsync", 0), ("journal.after_fsync", 1)])
def test_killed_around_the_fsync(path: Path, point: str, kept: int) -> None:
    code = (
        "import sys; from core import faults; from core.journal import Journal\n"
        "faults.arm_from_environment(sys.argv[2] + '=kill')\n"
        "Journal(sys.argv[1]).append('message', 'A', b'x')"
    )
    process = spawn(code, path, point)
    assert process.wait(30) == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()
    with Journal(path) as journal:
        assert journal.depth() == kept


def test_a_fault_inside_an_append_leaves_the_journal_usable(journal: Journal, no_faults: None) -> None:
    faults.arm_from_environment("journal.before_fsync=raise")
    with pytest.raises(faults.InjectedFault):
        journal.append("message", "A", b"x")
    faults.disarm()
    journal.append("message", "B", b"x")
    assert [e.key for e in journal.pending()] == ["B"]


def test_two_processes_append_while_a_third_reads_and_releases(path: Path) -> None:
    # All of them also open the new file at the same moment.
    processes = [spawn(APPENDER, path, 150, name) for name in ("one", "two")]
    seen: list[str] = []
    with Journal(path) as journal:
        deadline = time.monotonic() + 60
        while len(seen) < 300:
            assert time.monotonic() < deadline
            entries = journal.pending(limit=50)
            seen += [e.key for e in entries]
            journal.release(e.number for e in entries)
            time.sleep(0.001)
        for process in processes:
            assert process.stdout is not None
            process.stdout.read()
            process.stdout.close()
            assert process.wait(30) == 0
        assert journal.depth() == 0
    for name in ("one", "two"):
        assert [k for k in seen if k.startswith(name)] == [f"{name}-{i}" for i in range(150)]


FULL_DISK = """
import resource, sys
from core.errors import JournalError
from core.journal import Journal
journal = Journal(sys.argv[1])
journal.append("message", "first", b"x")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
kept = ["first"]
try:
    for i in range(10_000):
        journal.append("message", str(i), b"x" * 5000)
        kept.append(str(i))
except JournalError as error:
    print(error)
try:
    journal.append("message", "still full", b"x" * 500_000)
    raise SystemExit("accepted on a full disk")
except JournalError:
    pass
assert [e.key for e in journal.pending(limit=100_000)] == kept, "unreadable while the disk is full"
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
journal.append("message", "room again", b"x")
kept.append("room again")
journal.close()
with Journal(sys.argv[1]) as journal:
    assert [e.key for e in journal.pending(limit=100_000)] == kept, "not as confirmed"
print(len(kept))
"""


def test_a_full_disk_refuses_and_damages_nothing(path: Path) -> None:
    # A limit on the size of files is how a process without rights gets a disk that stops taking writes.
    process = spawn(FULL_DISK, path)
    output = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0, output
    assert "disk" in output[0]
    assert "nothing" in output[0]
    assert int(output[1]) > 10
    conn = sqlite3.connect(path)
    assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    conn.close()


def test_a_file_that_is_not_a_journal_is_named(path: Path) -> None:
    path.write_bytes(b"this is a letter, not a database" * 200)
    with pytest.raises(JournalError, match="move the file away") as caught:
        Journal(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_named(path: Path) -> None:
    with Journal(path) as journal:
        journal.append_many([("message", str(i), b"x" * 3000) for i in range(50)])
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(os.path.getsize(path) - 4096))
    with pytest.raises(JournalError, match="damaged"), Journal(path) as journal:
        journal.pending(limit=1000)


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="folder must exist"):
        Journal(tmp_path / "none" / "journal.db")


def test_a_folder_in_the_place_of_the_file_is_a_clear_error(path: Path) -> None:
    path.mkdir()
    with pytest.raises(JournalError, match="journal"):
        Journal(path)


def test_a_file_taken_away_while_in_use_is_noticed(journal: Journal, path: Path) -> None:
    journal.append("message", "A", b"x")
    path.rename(path.with_suffix(".away"))
    with pytest.raises(JournalError, match="moved or deleted"):
        journal.append("message", "B", b"x")


def test_a_closed_journal_says_so(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    journal.close()
    with pytest.raises(JournalError):
        journal.append("message", "A", b"x")
