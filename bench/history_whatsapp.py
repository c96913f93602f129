"""A phone's history through everything but WhatsApp: files as the child leaves them, read, converted and stored.

    python -m bench.history_whatsapp [DATABASE_URL] [--messages 100000] [--chats 500] [--chunk 2000] [--rate 50]

Without a URL an embedded server is started in a temporary folder and removed again. The files are made before the clock
starts. Live messages go through ingest in the same process meanwhile, as in a gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
import zlib
from collections.abc import AsyncIterable, Callable, Mapping
from pathlib import Path

from bench import common
from bench.common import Figure, figure, percentiles
from bench.history import Bench
from core.channel import SessionContext, SessionId, TenantId
from core.database import Database
from core.history import Counts, Item
from core.ingest import Ingest
from core.metrics import Metrics
from core.migrate import migrate
from gateway.session_sinks import SessionStore
from gateway.whatsapp import history as sync
from gateway.whatsapp.history_files import HistoryFolder
from sandbox.whatsapp import bodies
from sandbox.whatsapp.protos import history


def make_files(folder: HistoryFolder, messages: int, chats: int, chunk: int) -> int:
    """What a phone would send; bytes on disk. Chats are spread over files as phones do it."""
    size = 0
    per_chat = -(-messages // chats)
    numbers = [(chat, n) for chat in range(chats) for n in range(per_chat)][:messages]
    for start in range(0, len(numbers), chunk):
        blob = history.HistorySync(syncType=history.HistorySync.RECENT, chunkOrder=start // chunk, progress=1)
        conversation = None
        for chat, n in numbers[start : start + chunk]:
            jid = f"{100_000_000_000_000 + chat}@lid"
            if conversation is None or jid != conversation.ID:
                conversation = blob.conversations.add(
                    ID=jid, pnJID=f"6012{chat:08d}@s.whatsapp.net", lidJID=jid
                )
            info = conversation.messages.add(msgOrderID=n).message
            info.key.remoteJID, info.key.fromMe, info.key.ID = jid, n % 3 == 2, f"3EB2{chat:08X}{n:08X}"
            info.messageTimestamp, info.pushName = 1_700_000_000 + n * 60, f"Person {chat}"
            info.message.CopyFrom(
                bodies.text(f"Is the {n} still on offer? I would take two of them on Friday.")
            )
        data = zlib.compress(blob.SerializeToString(), 1)
        folder.announce(f"B{start}", {"sync": "RECENT", "chunk": start // chunk}, data)
        size += len(data)
    return size


class Sink:
    def __init__(self, store: SessionStore, tenant: int, session: int) -> None:
        self._store, self._tenant, self._session = store, TenantId(tenant), SessionId(session)
        self.runs: list[Counts] = []

    async def history(
        self, source: AsyncIterable[Item], committed: Callable[[int], None], *, kind: str = "sync"
    ) -> Counts:
        counts = await self._store.history(self._tenant, self._session, source, committed, kind)
        self.runs.append(counts)
        return counts

    async def names(self, names: Mapping[str, str]) -> None:
        await self._store.names(self._tenant, names)


class WhatsAppBench(Bench):
    def __init__(self, url: str, options: argparse.Namespace) -> None:
        options.rows, options.contacts = options.messages, options.chats
        super().__init__(url, options)
        self.chats, self.chunk = options.chats, options.chunk

    async def run(self) -> list[Figure]:
        await migrate(self.url)
        db = await Database.open(self.url, application_name="bench")
        self.ingest = Ingest(db, Metrics())
        await self.ingest.start()
        try:
            await self._set_up()
            with tempfile.TemporaryDirectory() as folder:
                return await self._measured(db, Path(folder))
        finally:
            await self.ingest.stop()
            await db.close()

    async def _bring(self, sink: Sink, folder: Path) -> float:
        """The files, as a session's own task brings them; seconds until the last commit."""
        context = SessionContext(
            TenantId(self.tenant), SessionId(self.session), "whatsapp", "+60123456789", None, {}, {}, folder
        )
        files = HistoryFolder(folder)
        began = time.monotonic()
        task = asyncio.create_task(sync.HistorySync(context, sink).run())
        while sum(counts.lines for counts in sink.runs) < self.rows:
            if task.done():
                task.result()
            await asyncio.sleep(0.02)
        took = time.monotonic() - began - sync.LINGER_SECONDS
        while files.blobs():  # noqa: ASYNC110 - nothing tells when they are gone
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return took

    async def _measured(self, db: Database, folder: Path) -> list[Figure]:
        sync.LINGER_SECONDS = 0.5
        store = SessionStore(db, lambda: self.ingest.depth)
        size = await asyncio.to_thread(make_files, HistoryFolder(folder), self.rows, self.chats, self.chunk)
        found = [
            figure("files of the phone", f"{-(-self.rows // self.chunk)}, {size / 1e6:.1f} MB compressed")
        ]
        over = asyncio.Event()
        quiet = asyncio.create_task(self.live(over))
        await asyncio.sleep(3)
        over.set()
        found.append(figure(f"live traffic at {self.rate}/s, alone", percentiles(await quiet)))
        before, _ = common.memory_mb(os.getpid())
        sink, over = Sink(store, self.tenant, self.session), asyncio.Event()
        busy = asyncio.create_task(self.live(over))
        took = await self._bring(sink, folder)
        over.set()
        waits = await busy
        after, _ = common.memory_mb(os.getpid())
        stored = sum(counts.stored for counts in sink.runs)
        assert stored == self.rows, sink.runs
        found += [
            figure(f"{self.rows:,} messages beside live traffic", f"{self.rows / took:,.0f}/s", "≥ 5,000/s"),
            figure(f"live traffic meanwhile ({len(waits)} messages)", percentiles(waits), "p95 < 100 ms"),
            figure("memory of the process, more at the end than before", f"{after - before:.0f} MB"),
        ]
        again = folder / "again"
        again.mkdir()
        await asyncio.to_thread(make_files, HistoryFolder(again), self.rows, self.chats, self.chunk)
        sink = Sink(store, self.tenant, self.session)
        took = await self._bring(sink, again)
        stored = sum(counts.stored for counts in sink.runs)
        found += [
            figure("the same again", f"{stored} stored, {self.rows / took:,.0f}/s", "0 stored"),
            figure("load average at the end", f"{os.getloadavg()[0]:.1f}"),
        ]
        return found


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.history_whatsapp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="a database that may be thrown away afterwards")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--chats", type=int, default=500)
    parser.add_argument("--chunk", type=int, default=2000)
    parser.add_argument("--rate", type=int, default=50)
    options = parser.parse_args(words)
    async with common.database(options.url) as url:
        print(f"history_whatsapp: {common.machine(await common.postgres_version(url))}", flush=True)
        return await WhatsAppBench(url, options).run()


if __name__ == "__main__":
    common.quiet()
    common.run(main())
