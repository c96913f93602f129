"""Threads: who answers in them. Found and created by the trigger of et_messages, never here."""

from __future__ import annotations

from collections.abc import Sequence

from core.store.audit import Conn
from core.store.dispatching import AUTOMATIC


async def hand_to_person(conn: Conn, thread_ids: Sequence[int]) -> list[int]:
    """A person answers in these threads from now on: automatic replies still queued are withdrawn, in the caller's
    transaction. Returns the ids of the withdrawn queue rows."""
    await conn.execute(
        """
        UPDATE et_threads SET handled_by = 'human', updated_at = now()
        WHERE id IN (
            SELECT id FROM et_threads
            WHERE id = ANY ($1::bigint[]) AND handled_by <> 'human'
            ORDER BY id
            FOR NO KEY UPDATE
        )
        """,
        thread_ids,
    )
    rows = await conn.fetch(
        """
        UPDATE et_outbound_queue
        SET status = 'cancelled', error_code = 'human_takeover',
            last_error = 'a person has taken this conversation over'
        WHERE status = 'queued' AND id IN (
            SELECT q.id
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            WHERE q.thread_id = ANY ($1::bigint[]) AND q.thread_id > 0 AND q.status = 'queued'
              AND (q.dedupe_key LIKE 'reply:%' OR m.raw_payload ->> 'origin' = ANY ($2::text[]))
            ORDER BY q.id
            FOR NO KEY UPDATE OF q
        )
        RETURNING id
        """,
        thread_ids,
        list(AUTOMATIC),
    )
    return [row["id"] for row in rows]


async def awaiting_same_text(conn: Conn, typed: Sequence[tuple[int, str | None]]) -> set[int]:
    """Of (thread id, text): the threads in which a send of ours with that very text has no outcome yet. What looks
    like typed on the phone is then most likely our own echo, ahead of its mark."""
    rows = await conn.fetch(
        """
        SELECT DISTINCT t.thread_id
        FROM unnest($1::bigint[], $2::text[]) AS t (thread_id, content)
        JOIN et_outbound_queue q ON q.thread_id = t.thread_id AND q.status IN ('dispatching', 'unknown')
        JOIN et_messages m ON m.id = q.message_id AND m.content IS NOT DISTINCT FROM t.content
        """,
        [thread_id for thread_id, _ in typed],
        [text for _, text in typed],
    )
    return {row["thread_id"] for row in rows}
