"""The folder of media: once per content, durable, bounded."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path

import pytest

from core import faults
from core.errors import NotSentError, RefusedError
from gateway.media import Content, MediaStore

BIG = 1 << 30


def files(store: MediaStore) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file()]


async def interrupted(store: MediaStore, body: bytes, name: str | None = None) -> None:
    async with store.draft(name, limit=BIG) as draft:
        await draft.write(body)
        raise ZeroDivisionError


async def written_by_a_client(store: MediaStore, body: bytes, limit: int) -> Content:
    async with store.draft("message-2", limit=limit) as draft:
        draft.path.write_bytes(body)
        return await draft.keep()


async def keep(store: MediaStore, *chunks: bytes) -> str:
    async with store.draft(limit=BIG) as draft:
        for chunk in chunks:
            await draft.write(chunk)
        return (await draft.keep()).sha256


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", reserve=0)


async def test_a_content_is_stored_once_under_its_digest_and_for_us_alone(store: MediaStore) -> None:
    body = os.urandom(3_000_000)
    first = await keep(store, body)
    again = await keep(store, body[:1000], body[1000:])
    assert first == again == hashlib.sha256(body).hexdigest()
    assert files(store) == [store.path(first)]
    assert store.path(first).read_bytes() == body
    assert stat.S_IMODE(store.path(first).stat().st_mode) == 0o600
    assert {stat.S_IMODE(p.stat().st_mode) for p in store.folder.rglob("*") if p.is_dir()} == {0o700}
    assert await store.has(first)


async def test_it_is_read_in_pieces_from_anywhere(store: MediaStore) -> None:
    body = os.urandom(2_500_000)
    sha256 = await keep(store, body)
    assert b"".join([piece async for piece in store.read(sha256)]) == body
    middle = [piece async for piece in store.read(sha256, start=1000, length=1_500_000)]
    assert b"".join(middle) == body[1000:1_501_000]
    assert max(map(len, middle)) <= 1 << 20


async def test_what_is_not_kept_leaves_nothing(store: MediaStore) -> None:
    with pytest.raises(ZeroDivisionError):
        await interrupted(store, b"x" * 2_000_000)
    assert files(store) == []


async def test_a_named_draft_goes_on_where_it_was_cut_off(store: MediaStore) -> None:
    with pytest.raises(ZeroDivisionError):
        await interrupted(store, b"first ", "message-1")
    async with store.draft("message-1", limit=BIG) as draft:
        assert draft.offset == 6
        await draft.write(b"second")
        content = await draft.keep()
    assert content.path.read_bytes() == b"first second"
    async with store.draft("message-1", limit=BIG) as draft:
        assert draft.offset == 0
        await draft.write(b"wrong")
        await draft.restart()
        await draft.write(b"right")
        draft.drop()
    assert files(store) == [content.path]


async def test_a_client_may_write_the_file_itself(store: MediaStore) -> None:
    content = await written_by_a_client(store, b"from a client", BIG)
    assert (content.size, content.head) == (13, b"from a client")
    with pytest.raises(RefusedError, match="larger than"):
        await written_by_a_client(store, b"from a client", 5)


async def test_too_large_is_refused_before_it_is_written(store: MediaStore) -> None:
    with pytest.raises(RefusedError) as error:
        async with store.draft(limit=10) as draft:
            await draft.write(b"x" * 11)
    assert error.value.code == "media_too_large"
    with pytest.raises(RefusedError):
        async with store.draft(limit=10, expected=11):
            pass
    assert files(store) == []


async def test_a_disk_without_room_is_a_clear_error(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", reserve=1 << 60)
    with pytest.raises(NotSentError, match="free some space or move DATA_DIR") as error:
        async with store.draft(limit=BIG):
            pass
    assert error.value.code == "media_disk_full"
    assert files(store) == []


async def test_a_full_disk_in_the_middle_is_the_same_error(store: MediaStore) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    faults.arm("media.before_fsync", full)
    try:
        with pytest.raises(NotSentError) as error:
            await keep(store, b"x")
    finally:
        faults.disarm("media.before_fsync")
    assert error.value.code == "media_disk_full"
    assert files(store) == []


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "/x"])
def test_nothing_but_a_digest_names_a_content(store: MediaStore, name: str) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        store.path(name)


async def test_removing_spares_what_was_stored_again(store: MediaStore) -> None:
    sha256 = await keep(store, b"x")
    before = time.time() - 10
    assert not store.remove(sha256, unless_since=before)
    assert store.path(sha256).read_bytes() == b"x"
    os.utime(store.path(sha256), (before - 10, before - 10))
    assert [name for name, _ in store.contents()] == [sha256]
    await keep(store, b"x")  # makes it fresh again
    assert not store.remove(sha256, unless_since=before)
    os.utime(store.path(sha256), (before - 10, before - 10))
    assert store.remove(sha256, unless_since=before)
    assert not store.remove(sha256, unless_since=before)
    assert files(store) == []


async def test_abandoned_drafts_are_pruned(store: MediaStore) -> None:
    async with store.draft("message-3", limit=BIG) as draft:
        await draft.write(b"half")
    (left,) = files(store)
    assert store.prune_drafts() == 0
    os.utime(left, (1, 1))
    assert store.prune_drafts() == 1
