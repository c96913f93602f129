"""The child's downloads: media for the gateway, and the files of the phone's history sync, which it fetches by itself.

Imports no neonize; what it needs of the client is handed in. An announced history file is fetched until it is here or gone,
over restarts too; how it stands is files in the session's folder (`history_files.py`).
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from gateway.whatsapp.downloads import Broken, Downloads, Gone, Later, Remote, path_of
from gateway.whatsapp.history_files import HistoryFolder, Notice
from gateway.whatsapp.holds import Holds

MEDIA_LIMIT = 128 << 20
HISTORY_LIMIT = 512 << 20
AT_ONCE = 2
BACKOFF = (1.0, 5.0, 20.0, 60.0, 300.0)
GIVE_UP_SECONDS = 14 * 86400.0
IDLE_SECONDS = 60.0

Say = Callable[..., None]
Library = Callable[[Remote], Awaitable[bytes]]


class Fetching:
    """One per child. `announce` is called on whatsmeow's threads, the rest on the child's loop."""

    def __init__(self, folder: Path, holds: Holds, say: Say, *, proxy: str | None, library: Library) -> None:
        """`library`: whatsmeow's own download, for proxies that only it can use; a file at a time, in memory."""
        self._folder = HistoryFolder(folder)
        self._holds, self._say, self._library = holds, say, library
        self._by_library = bool(proxy) and not str(proxy).startswith("http://")
        self._media = Downloads(proxy=proxy, limit=MEDIA_LIMIT)
        self._files = Downloads(proxy=proxy, limit=HISTORY_LIMIT)
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._fetches: dict[str, asyncio.Task[None]] = {}

    # ---- media ----

    async def download(self, command: dict[str, Any]) -> dict[str, Any]:
        """Into `command["to"]`. What became of it, in words the gateway knows; never raises for what a message says."""
        try:
            remote = Remote.of(command)
            await self._fetch(self._media, remote, Path(command["to"]))
        except Gone as error:
            return {"result": "gone", "detail": str(error)}
        except Broken as error:
            return {"result": "broken", "detail": str(error)}
        except Later as error:
            return {"result": "later", "detail": str(error), "after": error.after}
        return {"result": "stored"}

    def stop_download(self, path: str) -> None:
        self._media.stop(path)

    async def _fetch(self, downloads: Downloads, remote: Remote, path: Path) -> None:
        if not self._by_library:
            await asyncio.to_thread(downloads.fetch, remote, path)
            return
        data = await self._library(remote)
        await asyncio.to_thread(path.write_bytes, data)

    # ---- history ----

    def announce(self, message_id: str, notice: Any) -> None:
        """The phone has a history file for us: durable when this returns. On a thread of whatsmeow's. Raises OSError."""
        inline = bytes(notice.initialHistBootstrapInlinePayload) or None
        fields = {
            "kind": "historySyncNotification",
            "path": path_of(notice.directPath, None),
            "key": b64encode(notice.mediaKey).decode(),
            "enc_sha256": b64encode(notice.fileEncSHA256).decode(),
            "sha256": b64encode(notice.fileSHA256).decode(),
            "sync": type(notice)
            .DESCRIPTOR.fields_by_name["syncType"]
            .enum_type.values_by_number[notice.syncType]
            .name,
            "chunk": notice.chunkOrder,
            "progress": notice.progress,
            "at": time.time(),
        }
        announced = self._folder.announce(message_id, fields, inline)
        self._holds.history_announced(message_id)
        if announced is None:
            if message_id not in {notice.message_id for notice in self._folder.waiting()}:
                self._holds.history_here(message_id)
            self._loop.call_soon_threadsafe(self._wake.set)
        elif inline is not None:
            self._arrived(announced)
        else:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> None:
        """Fetch what was announced, from this life or an earlier one."""
        while True:
            self._wake.clear()
            for notice in await asyncio.to_thread(self._folder.waiting):
                # Its fetch may have ended since that look: once more, and WhatsApp would say that the file is gone.
                if notice.stem not in self._fetches and not self._folder.here_or_over(notice.stem):
                    task = self._loop.create_task(self._until_here(notice))
                    self._fetches[notice.stem] = task
                    task.add_done_callback(partial(self._ended, notice.stem))
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _ended(self, stem: str, task: asyncio.Task[None]) -> None:
        self._fetches.pop(stem, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._say("error", error=f"history: {type(error).__name__}: {error}")

    async def _until_here(self, notice: Notice) -> None:
        tries = 0
        announced = float(notice.fields.get("at") or time.time())
        while True:
            try:
                async with self._slots:
                    remote = Remote.of(notice.fields)
                    await self._fetch(self._files, remote, self._folder.partial(notice))
                    await asyncio.to_thread(self._folder.fetched, notice)
            except (Gone, Broken) as error:
                await self._give_up(notice, str(error))
                return
            except (Later, OSError) as error:
                if time.time() - announced > GIVE_UP_SECONDS:
                    await self._give_up(notice, str(error))
                    return
                self._say("history_waits", error=str(error))
            else:
                self._arrived(notice)
                return
            await asyncio.sleep(BACKOFF[min(tries, len(BACKOFF) - 1)])
            tries += 1

    def _arrived(self, notice: Notice) -> None:
        self._holds.history_here(notice.message_id)
        self._say("history", sync=notice.fields.get("sync"), progress=notice.fields.get("progress"))

    async def _give_up(self, notice: Notice, reason: str) -> None:
        try:
            await asyncio.to_thread(self._folder.fail, notice, reason)
        except OSError as error:
            reason = f"{reason}; and that could not be written down ({error})"
        self._holds.history_here(notice.message_id)
        self._say("history_failed", error=reason, sync=notice.fields.get("sync"))


def refusal_of(error: Exception) -> Exception:
    """What whatsmeow's text about a failed download means."""
    text = str(error)
    if any(code in text for code in ("status code 403", "status code 404", "status code 410")):
        return Gone("WhatsApp does not have it any more")
    if "hash" in text or "hmac" in text.lower() or "SHA256" in text:
        return Broken("it is not what its sender sent: the hash differs")
    return Later("the client library could not download it")
