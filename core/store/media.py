"""Files a tenant has, uploads, and the downloads that are still to be done. The bytes are the media store's business.

Rows of files are written as `et_worker` alone, after the bytes were durable: a row is the right to read them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from asyncpg import Record

from core.channel import Json
from core.store.audit import Conn


@dataclass(frozen=True, slots=True)
class File:
    """A content as one tenant has it. `sha256` in hex, `size` in bytes."""

    sha256: str
    size: int
    mime_type: str
    filename: str
    width: int | None = None
    height: int | None = None


async def own(conn: Conn, tenant_id: int, sha256: str, size: int) -> None:
    """This tenant has this content: in the transaction that writes the row which names it, after the bytes are durable."""
    await conn.execute(
        """
        INSERT INTO et_media_files AS f (tenant_id, sha256, size)
        VALUES ($1, $2, $3)
        ON CONFLICT (tenant_id, sha256) DO UPDATE SET touched_at = clock_timestamp()
        """,
        tenant_id,
        sha256,
        size,
    )


# --- uploads, and what was fetched for sending


async def add_upload(
    conn: Conn, tenant_id: int, file: File, *, seconds: float, source_key: str | None = None
) -> int:
    """A file that outbound messages may name as `upload:<id>` for so long. With a `source_key` the newest wins."""
    await own(conn, tenant_id, file.sha256, file.size)
    upload_id: int = await conn.fetchval(
        """
        INSERT INTO et_uploads AS u
            (tenant_id, sha256, mime_type, filename, size, width, height, source_key, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp() + make_interval(secs => $9))
        ON CONFLICT (tenant_id, source_key) DO UPDATE
        SET sha256 = excluded.sha256, mime_type = excluded.mime_type, filename = excluded.filename,
            size = excluded.size, width = excluded.width, height = excluded.height,
            created_at = clock_timestamp(), expires_at = excluded.expires_at
        RETURNING u.id
        """,
        tenant_id,
        file.sha256,
        file.mime_type,
        file.filename,
        file.size,
        file.width,
        file.height,
        source_key,
        seconds,
    )
    return upload_id


async def upload(conn: Conn, tenant_id: int, upload_id: int) -> File | None:
    """An upload of this tenant. One that has run out is there as long as a waiting row names it."""
    row = await conn.fetchrow(
        """
        SELECT sha256, size, mime_type, filename, width, height
        FROM et_uploads
        WHERE tenant_id = $1
          AND id = $2
          AND source_key IS NULL
        """,
        tenant_id,
        upload_id,
    )
    return None if row is None else File(**dict(row))


async def fetched(conn: Conn, tenant_id: int, source_key: str) -> File | None:
    """What was fetched from this address not long ago."""
    row = await conn.fetchrow(
        """
        SELECT sha256, size, mime_type, filename, width, height
        FROM et_uploads
        WHERE tenant_id = $1
          AND source_key = $2
          AND expires_at > clock_timestamp()
        """,
        tenant_id,
        source_key,
    )
    return None if row is None else File(**dict(row))


# --- messages


async def of_message(conn: Conn, tenant_id: int, message_id: int) -> Record | None:
    """What a message says of its media; `owned` is the SHA-256 when this tenant really has that content."""
    return await conn.fetchrow(
        """
        SELECT m.direction, m.media_url, m.media_metadata, f.sha256 AS owned, f.size
        FROM et_messages m
        LEFT JOIN et_media_files f
          ON f.tenant_id = m.tenant_id
         AND f.sha256 = m.media_metadata ->> 'sha256'
         AND m.media_metadata ->> 'state' = 'stored'
        WHERE m.tenant_id = $1
          AND m.id = $2
        """,
        tenant_id,
        message_id,
    )


async def describe_outgoing(conn: Conn, tenant_id: int, message_id: int, file: File, patch: Json) -> None:
    """Note on an outbound row which file it is sent with."""
    await own(conn, tenant_id, file.sha256, file.size)
    await conn.execute(
        """
        UPDATE et_messages
        SET media_metadata = coalesce(media_metadata, '{}') || $3::jsonb
        WHERE tenant_id = $1
          AND id = $2
          AND direction = 'outbound'
          AND NOT coalesce(media_metadata, '{}') @> $3::jsonb
        """,
        tenant_id,
        message_id,
        patch,
    )


# --- downloads


async def claim(conn: Conn, sessions: Collection[int], *, limit: int, lease: float) -> list[Record]:
    """Take up due downloads of these sessions, each for `lease` seconds: when we die, they are due again after that."""
    return await conn.fetch(
        """
        WITH due AS (
            SELECT j.message_id
            FROM et_media_jobs j
            WHERE j.session_id = ANY ($1::BIGINT[])
              AND j.next_attempt_at <= clock_timestamp()
            ORDER BY j.is_history, j.next_attempt_at
            LIMIT $2
            FOR UPDATE SKIP LOCKED
        )
        UPDATE et_media_jobs j
        SET attempts = j.attempts + 1,
            next_attempt_at = clock_timestamp() + make_interval(secs => $3)
        FROM due
        JOIN et_messages m ON m.id = due.message_id
        WHERE j.message_id = due.message_id
        RETURNING j.message_id, j.tenant_id, j.session_id, j.attempts, j.hints,
                  extract(epoch FROM clock_timestamp() - j.created_at)::FLOAT8 AS age,
                  m.channel, m.channel_message_id, m.message_type, m.direction, m.chat_identifier,
                  m.sender_identifier, m.media_metadata, m.raw_payload
        """,
        list(sessions),
        limit,
        lease,
    )


async def next_due(conn: Conn, sessions: Collection[int]) -> Record:
    """How many downloads of these sessions wait, and in how many seconds the next one is due (None: no one waits)."""
    row = await conn.fetchrow(
        """
        SELECT count(*) AS waiting,
               extract(epoch FROM min(next_attempt_at) - clock_timestamp())::FLOAT8 AS seconds
        FROM et_media_jobs
        WHERE session_id = ANY ($1::BIGINT[])
        """,
        list(sessions),
    )
    assert row is not None
    return row


async def settle(conn: Conn, tenant_id: int, message_id: int, media_url: str | None, patch: Json) -> bool:
    """The download has ended, for good or not: write it on the message. False when somebody else did, or it is gone."""
    done = await conn.fetchval(
        """
        WITH job AS (
            DELETE FROM et_media_jobs
            WHERE tenant_id = $1
              AND message_id = $2
            RETURNING message_id
        )
        UPDATE et_messages m
        SET media_url = coalesce($3, m.media_url),
            media_metadata = coalesce(m.media_metadata, '{}') - 'error'::text - 'reason'::text || $4::jsonb
        FROM job
        WHERE m.tenant_id = $1
          AND m.id = job.message_id
        RETURNING m.id
        """,
        tenant_id,
        message_id,
        media_url,
        patch,
    )
    return done is not None


async def postpone(
    conn: Conn, message_id: int, seconds: float, error: str, *, counts: bool = True, hints: Json | None = None
) -> None:
    """Try again in so many seconds. `counts` False: the attempt was not the message's fault."""
    await conn.execute(
        """
        UPDATE et_media_jobs
        SET next_attempt_at = clock_timestamp() + make_interval(secs => $2),
            last_error = $3,
            attempts = attempts - CASE WHEN $4 THEN 0 ELSE 1 END,
            hints = coalesce($5::jsonb, hints)
        WHERE message_id = $1
        """,
        message_id,
        seconds,
        error[:500],
        counts,
        hints,
    )


async def overdue(conn: Conn, *, seconds: float, limit: int = 500) -> list[Record]:
    """Downloads that nobody could do in all that time (their session never came back)."""
    return await conn.fetch(
        """
        SELECT message_id, tenant_id, last_error
        FROM et_media_jobs
        WHERE created_at < clock_timestamp() - make_interval(secs => $1)
          AND next_attempt_at < clock_timestamp()
        ORDER BY created_at
        LIMIT $2
        """,
        seconds,
        limit,
    )


# --- what nobody needs any more


async def contents_of_lead(conn: Conn, tenant_id: int, lead_id: int) -> list[str]:
    """Contents that this lead's messages name: to be forgotten after the lead was erased."""
    rows = await conn.fetch(
        """
        SELECT DISTINCT media_metadata ->> 'sha256' AS sha256
        FROM et_messages
        WHERE tenant_id = $1
          AND lead_id = $2
          AND media_metadata ->> 'state' = 'stored'
        """,
        tenant_id,
        lead_id,
    )
    return [row["sha256"] for row in rows if row["sha256"]]


async def prune(
    conn: Conn, *, grace: float, tenant_id: int | None = None, only: Sequence[str] | None = None
) -> None:
    """Forget uploads that have run out and files that no row names. `grace`: seconds since they were last touched."""
    # now() and not clock_timestamp(): a file that is touched while we wait for its row must then look new.
    await conn.execute(
        """
        DELETE FROM et_uploads u
        WHERE u.expires_at < clock_timestamp()
          AND NOT EXISTS (
              SELECT 1 FROM et_messages m
              WHERE m.tenant_id = u.tenant_id
                AND m.media_url = 'upload:' || u.id
                AND m.media_url LIKE 'upload:%'
                AND m.delivery_status IN ('queued', 'dispatching'))
        """
    )
    await conn.execute(
        """
        DELETE FROM et_media_files f
        WHERE f.touched_at < now() - make_interval(secs => $1)
          AND ($2::BIGINT IS NULL OR f.tenant_id = $2)
          AND ($3::TEXT[] IS NULL OR f.sha256 = ANY ($3))
          AND NOT EXISTS (
              SELECT 1 FROM et_uploads u WHERE u.tenant_id = f.tenant_id AND u.sha256 = f.sha256)
          AND NOT EXISTS (
              SELECT 1 FROM et_messages m
              WHERE m.tenant_id = f.tenant_id
                AND m.media_metadata ->> 'sha256' = f.sha256
                AND m.media_metadata ->> 'state' = 'stored')
        """,
        grace,
        tenant_id,
        list(only) if only is not None else None,
    )


async def owned_by_someone(conn: Conn, contents: Sequence[str]) -> set[str]:
    """Those of these contents that some tenant has."""
    rows = await conn.fetch(
        "SELECT DISTINCT sha256 FROM et_media_files WHERE sha256 = ANY ($1::TEXT[])", list(contents)
    )
    return {row["sha256"] for row in rows}
