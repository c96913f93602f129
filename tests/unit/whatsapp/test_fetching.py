"""The child's fetching of history files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.whatsapp.fetching import Fetching
from gateway.whatsapp.history_files import HistoryFolder, Notice
from gateway.whatsapp.holds import Holds


async def test_a_file_that_came_while_the_folder_was_looked_at_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = HistoryFolder(tmp_path)
    notice = folder.announce("A1", {"kind": "historySyncNotification", "path": "/gone"})
    assert notice is not None
    looked = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = HistoryFolder.waiting

    def waiting(self: HistoryFolder) -> list[Notice]:
        found = real(self)
        if found:
            # Between the look and what is made of it the file arrives and is stored.
            folder.partial(notice).write_bytes(b"past")
            folder.fetched(notice)
            folder.stored(folder.blobs()[0])
        loop.call_soon_threadsafe(looked.set)
        return found

    monkeypatch.setattr(HistoryFolder, "waiting", waiting)
    said: list[str] = []

    def say(event: str, **_fields: Any) -> None:
        said.append(event)

    async def library(_remote: Any) -> bytes:
        raise AssertionError("it was fetched again")

    fetching = Fetching(tmp_path, Holds(), say, proxy="socks5://x", library=library)
    running = asyncio.create_task(fetching.run())
    async with asyncio.timeout(10):
        await looked.wait()
        await asyncio.to_thread(lambda: None)
        await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert said == []
    assert folder.failures() == 0
