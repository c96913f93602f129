"""What one transaction does with a batch of inbound messages: own echoes, leads, rows, hand-overs, cursors.

Nothing here commits, retries or tells anybody: `core.ingest` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncpg import Record

from core import log as logs
from core.channel import Cursor, LeadId, MessageId, Stored, ThreadId
from core.errors import Invalid
from core.leads import Resolved, Wanted
from core.prepare import Prepared
from core.store import messages as store
from core.store import threads
from core.store.audit import Conn
from core.store.leads import Key
from core.store.messages import Echo, MessageKey

log = logs.get(part="ingest")

ERASED = Stored(MessageId(0), ThreadId(0), LeadId(0), duplicate=True, erased=True)


@dataclass(frozen=True, slots=True)
class CursorMove:
    """A pull channel continues elsewhere, without a message."""

    session_id: int
    cursor: Cursor


Work: TypeAlias = Prepared | CursorMove


@dataclass(slots=True)
class Written:
    """What one transaction did, told to the log and the metrics once it is committed."""

    outcomes: list[Stored | None]
    fresh: set[int] = field(default_factory=set)
    """Positions of what was new, or filled a placeholder."""
    filled: int = 0
    echoes: int = 0
    handed_over: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)


def people_of(works: Sequence[Work], written: Written) -> list[Wanted]:
    """Whose messages have no outcome yet."""
    return [
        work.wanted
        for work, outcome in zip(works, written.outcomes, strict=True)
        if isinstance(work, Prepared) and outcome is None
    ]


def leads_of(works: Sequence[Work], resolved: dict[Key, Resolved], written: Written) -> list[int]:
    """The lead of each; what was said before its person was erased has its outcome now."""
    lead_ids = [0] * len(works)
    for n, work in enumerate(works):
        if isinstance(work, Prepared) and written.outcomes[n] is None:
            entry = resolved[work.wanted.keys[0]]
            lead_ids[n] = entry.lead_id
            if entry.erased(work.wanted):
                written.outcomes[n] = ERASED
    return lead_ids


async def recognise(conn: Conn, works: Sequence[Work], written: Written) -> None:
    """Echoes of our own queue items: the item moves on, no second row is made."""
    seen = [
        (n, work.echo) for n, work in enumerate(works) if isinstance(work, Prepared) and work.seen_outbound
    ]
    if not seen:
        return
    for position, item in (await store.own(conn, [echo for _, echo in seen])).items():
        n, echo = seen[position]
        await _settle(conn, item, echo)
        written.outcomes[n] = Stored(
            MessageId(item["id"]), ThreadId(item["thread_id"]), LeadId(item["lead_id"]), duplicate=True
        )
        written.echoes += 1


async def _settle(conn: Conn, item: Record, echo: Echo) -> None:
    if item["status"] in ("failed", "cancelled"):
        log.warning(
            "send.contradicted",
            tenant_id=echo.tenant_id,
            session_id=echo.session_id,
            queue_id=item["queue_id"],
            message_id=item["id"],
            result=item["status"],
            action="it went out all the same; do not send it again",
        )
        return
    if item["status"] == "queued":
        if echo.queue_id != item["queue_id"]:
            return  # an id alone does not prove which try it was
        await store.claim_proven(conn, item["queue_id"])
    await store.prove_sent(conn, [item["id"]])
    if item["channel_message_id"].startswith("out_"):
        await store.merge_echo(conn, item["id"], echo.channel_message_id)


async def store_rows(conn: Conn, works: Sequence[Work], lead_ids: Sequence[int], written: Written) -> None:
    """Insert what has no outcome yet, then look up what was there already."""
    same: dict[MessageKey, list[int]] = {}
    for n, work in enumerate(works):
        if isinstance(work, Prepared) and written.outcomes[n] is None:
            row = work.row
            key = (row.tenant_id, row.session_id, lead_ids[n], row.channel_message_id)
            same.setdefault(key, []).append(n)
    if not same:
        return
    # Twice in one batch: what can be read goes before a placeholder, else the first.
    chosen = {
        key: ns[0] if len(ns) == 1 else min(ns, key=lambda n: (_prepared(works[n]).row.placeholder, n))
        for key, ns in same.items()
    }
    # By tenant, session, lead, so that two gateways lock threads and keys in one order; by arrival inside a thread.
    ordered = sorted(same, key=lambda key: (key[:3], same[key][0]))
    rows = [_prepared(works[chosen[key]]).row for key in ordered]
    for record in await store.insert(conn, rows, [key[2] for key in ordered]):
        key = _key(record)
        _outcome(written, same[key], chosen[key], record, fresh=True)
    if len(written.fresh) == len(works):
        return
    missing = [key for key, n in chosen.items() if written.outcomes[n] is None]
    if not missing:
        return
    for record in await store.find(conn, missing):
        key = _key(record)
        row = _prepared(works[chosen[key]]).row
        filled = record["placeholder"] and not row.placeholder and await store.fill(conn, record["id"], row)
        if row.direction == "outbound" and record["delivery_status"] in ("dispatching", "unknown"):
            written.echoes += await store.prove_sent(conn, [record["id"]])
        written.filled += bool(filled)
        _outcome(written, same[key], chosen[key], record, fresh=bool(filled))


def _outcome(written: Written, positions: list[int], chosen: int, record: Record, *, fresh: bool) -> None:
    for n in positions:
        new = fresh and n == chosen
        written.outcomes[n] = Stored(
            MessageId(record["id"]),
            ThreadId(record["thread_id"]),
            LeadId(record["lead_id"]),
            duplicate=not new,
        )
        if new:
            written.fresh.add(n)


async def hand_over(conn: Conn, works: Sequence[Work], written: Written) -> None:
    """Somebody answered on the phone: the thread is theirs."""
    typed = [
        (outcome.thread_id, work.row.content)
        for n, (work, outcome) in enumerate(zip(works, written.outcomes, strict=True))
        if n in written.fresh and isinstance(work, Prepared) and work.typed_on_phone and outcome is not None
    ]
    if not typed:
        return
    ours = await threads.awaiting_same_text(conn, typed)
    written.handed_over = sorted({thread_id for thread_id, _ in typed} - ours)
    if written.handed_over:
        written.cancelled = await threads.hand_to_person(conn, written.handed_over)


async def move_cursors(conn: Conn, works: Sequence[Work]) -> None:
    moves = [
        (work.session_id if isinstance(work, CursorMove) else work.row.session_id, work.cursor)
        for work in works
        if work.cursor is not None
    ]
    if not moves:
        return
    existing = await store.set_cursors(conn, moves)
    if len(works) == 1 and moves[0][0] not in existing:
        raise Invalid(f"session {moves[0][0]} does not exist")


def _prepared(work: Work) -> Prepared:
    assert isinstance(work, Prepared)
    return work


def _key(record: Record) -> MessageKey:
    return (
        record["tenant_id"],
        record["channel_session_id"],
        record["lead_id"],
        record["channel_message_id"],
    )
