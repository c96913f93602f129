"""Removes what no row names any more: uploads that have run out, contents of erased people.

A content goes only when no tenant has it, and never one that was stored a moment ago: its row may be about to commit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import islice

from core import log as logs
from core.database import Database
from core.store import media as rows
from gateway.media.store import MediaStore

log = logs.get(part="media")

GRACE = 3600.0
"""Seconds a content without a row is left alone by the regular round."""
BATCH = 1000


async def forget(
    db: Database, store: MediaStore, tenant_id: int, contents: Sequence[str], *, grace: float = 5.0
) -> int:
    """After an erasure: remove these contents now unless something else names them. Returns how many files went.

    `contents`: what `core.store.media.contents_of_lead` gave before the rows went. One that came in the last `grace`
    seconds is left to the regular round.
    """
    if not contents:
        return 0
    async with db.worker() as conn:
        await rows.prune(conn, grace=grace, tenant_id=tenant_id, only=contents)
    return await _remove(db, store, list(contents), grace)


async def sweep(db: Database, store: MediaStore, *, grace: float = GRACE) -> int:
    """One regular round over rows and files. Returns how many files went."""
    async with db.worker() as conn:
        await rows.prune(conn, grace=grace)
    removed = 0
    stored = store.contents()
    cutoff = time.time() - grace
    while batch := await asyncio.to_thread(lambda: list(islice(stored, BATCH))):
        removed += await _remove(db, store, [name for name, at in batch if at < cutoff], grace)
    drafts = await asyncio.to_thread(store.prune_drafts)
    if removed or drafts:
        log.info("media.swept", result="removed", files=removed, drafts=drafts)
    return removed


async def _remove(db: Database, store: MediaStore, contents: list[str], grace: float) -> int:
    removed = 0
    for names in (contents[i : i + BATCH] for i in range(0, len(contents), BATCH)):
        cutoff = time.time() - grace
        async with db.worker() as conn:
            needed = await rows.owned_by_someone(conn, names)
        for name in names:
            if name not in needed and await asyncio.to_thread(store.remove, name, unless_since=cutoff):
                removed += 1
    return removed
