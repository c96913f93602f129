"""Claims of inbound messages: take, renew, give back. The claim itself is one statement, `et_claim_inbound()`.

Never decides anything; a claim that nobody renews runs out on the database's clock and anybody may give it back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta

from asyncpg import Record

from core.store.audit import Conn


async def claim(conn: Conn, owner: str, *, threads: int, lease: timedelta) -> list[Record]:
    """What waits in up to `threads` threads is ours now, in order of thread and message."""
    return await conn.fetch(
        """
        SELECT id, tenant_id, thread_id, channel, placeholder
        FROM et_claim_inbound($1, $2, $3)
        """,
        owner,
        threads,
        lease,
    )


async def claim_unreadable(
    conn: Conn, owner: str, *, older_than: timedelta, lease: timedelta
) -> list[Record]:
    """Placeholders that nobody filled in time. A thread that is being worked on comes next time."""
    return await conn.fetch(
        """
        WITH due AS (
            SELECT m.id, m.tenant_id, m.thread_id, m.channel
            FROM et_messages m
            JOIN et_tenants t ON t.id = m.tenant_id AND t.status = 'active'
            WHERE m.inbound_work = 3
              AND m.created_at < now() - $2::interval
              AND NOT EXISTS (SELECT 1 FROM et_inbound_claims c WHERE c.thread_id = m.thread_id)
              -- The lock of `et_claim_inbound`: never two workers in one thread.
              AND pg_try_advisory_xact_lock(hashtextextended('et_thread:' || m.thread_id, 0))
            ORDER BY m.created_at
            LIMIT 100
            FOR UPDATE OF m SKIP LOCKED
        ), claimed AS (
            INSERT INTO et_inbound_claims (message_id, tenant_id, thread_id, owner, expires_at)
            SELECT due.id, due.tenant_id, due.thread_id, $1, clock_timestamp() + $3::interval
            FROM due
        ), moved AS (
            UPDATE et_messages m
            SET delivery_status = 'inbound_processing'
            FROM due
            WHERE m.id = due.id
            RETURNING m.id
        )
        SELECT due.id, due.tenant_id, due.thread_id, due.channel, true AS placeholder
        FROM due
        JOIN moved ON moved.id = due.id
        ORDER BY due.thread_id, due.id
        """,
        owner,
        older_than,
        lease,
    )


async def renew(conn: Conn, owner: str, message_ids: Collection[int], *, lease: timedelta) -> None:
    """Only what is really being worked on: a claim whose answer got lost on the way must be able to run out."""
    await conn.execute(
        """
        UPDATE et_inbound_claims
        SET expires_at = clock_timestamp() + $3::interval
        WHERE owner = $1
          AND message_id = ANY ($2::bigint[])
        """,
        owner,
        list(message_ids),
        lease,
    )


async def release_expired(conn: Conn) -> int:
    """Give back what a dead or stuck worker holds; answers how many messages."""
    released: int = await conn.fetchval("SELECT et_release_inbound()")
    return released


async def release_owned(conn: Conn, owner: str) -> int:
    """Give back all that this owner holds: it stops in good order."""
    released: int = await conn.fetchval("SELECT et_release_inbound($1)", owner)
    return released


# ---- what a decider is shown ----


async def read_threads(conn: Conn, thread_ids: Sequence[int]) -> list[Record]:
    """Thread, lead, tenant, and the agent: the thread's own, else the workspace's (the lead's, else the session's)."""
    return await conn.fetch(
        """
        SELECT h.id AS thread_id, h.channel, h.channel_session_id, h.handled_by,
               t.id AS tenant_id, t.name AS tenant_name, t.status AS tenant_status, t.settings AS tenant_settings,
               l.id AS lead_id, l.external_id, l.kind, l.name AS lead_name, l.timezone AS lead_timezone,
               l.tags, l.opted_out_at,
               w.timezone AS workspace_timezone,
               a.id AS agent_id, a.name AS agent_name, a.instructions, a.decider, a.model, a.settings AS agent_settings,
               now() AS database_now
        FROM et_threads h
        JOIN et_tenants t ON t.id = h.tenant_id
        JOIN et_leads l ON l.tenant_id = h.tenant_id AND l.id = h.lead_id
        JOIN et_channel_sessions s ON s.tenant_id = h.tenant_id AND s.id = h.channel_session_id
        LEFT JOIN et_workspaces w ON w.tenant_id = h.tenant_id AND w.id = coalesce(
            l.workspace_id,
            CASE WHEN s.metadata ->> 'default_workspace_id' ~ '^[0-9]{1,18}$'
                 THEN (s.metadata ->> 'default_workspace_id')::bigint END
        )
        LEFT JOIN et_agents a ON a.tenant_id = h.tenant_id AND a.id = coalesce(h.agent_id, w.agent_id)
        WHERE h.id = ANY ($1::bigint[])
        """,
        thread_ids,
    )


async def read_burst(conn: Conn, message_ids: Sequence[int]) -> list[Record]:
    """The claimed messages as they stand now (a placeholder may have been filled, a merge may have moved them)."""
    return await conn.fetch(
        """
        SELECT m.id, m.thread_id, m.channel_message_id, m.message_type, m.content, m.occurred_at, m.created_at,
               m.reply_to_message_id, m.media_metadata, m.direction, m.is_history, m.placeholder,
               m.raw_payload ->> 'auto_submitted' IN ('true', 'auto-replied', 'auto-generated', 'list') AS automatic
        FROM et_messages m
        WHERE m.id = ANY ($1::bigint[])
        ORDER BY m.id
        """,
        message_ids,
    )


async def read_history(
    conn: Conn, thread_ids: Sequence[int], without: Sequence[int], *, limit: int
) -> list[Record]:
    """The last messages of each thread, both directions, oldest first; what still waits is left out."""
    return await conn.fetch(
        """
        SELECT h.thread_id, m.*
        FROM unnest($1::bigint[]) AS h (thread_id)
        JOIN et_threads t ON t.id = h.thread_id
        CROSS JOIN LATERAL (
            SELECT m.id, m.channel_message_id, m.reply_to_message_id, m.direction, m.role, m.message_type, m.content,
                   m.occurred_at, m.raw_payload ->> 'origin' AS origin
            FROM et_messages m
            WHERE m.tenant_id = t.tenant_id
              AND m.thread_id = t.id
              AND m.id <> ALL ($2::bigint[])
              AND m.delivery_status NOT IN ('received', 'cancelled', 'failed')
              AND NOT m.placeholder
            ORDER BY m.occurred_at DESC, m.id DESC
            LIMIT $3
        ) m
        ORDER BY h.thread_id, m.occurred_at, m.id
        """,
        thread_ids,
        without,
        limit,
    )


async def read_traffic(
    conn: Conn, thread_ids: Sequence[int], *, automatic: Sequence[str], people: Sequence[str]
) -> list[Record]:
    """Per thread: automatic replies of the last 10 minutes and day since a person last wrote, and when each named text
    was last said (a month back)."""
    return await conn.fetch(
        """
        SELECT h.thread_id, c.in_10min, c.in_a_day, s.said
        FROM unnest($1::bigint[]) AS h (thread_id)
        JOIN et_threads t ON t.id = h.thread_id
        CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE m.occurred_at > now() - INTERVAL '10 minutes') AS in_10min,
                   count(*) AS in_a_day
            FROM et_messages m
            WHERE m.tenant_id = t.tenant_id
              AND m.thread_id = t.id
              AND m.direction = 'outbound'
              AND m.occurred_at > now() - INTERVAL '1 day'
              AND m.raw_payload ->> 'origin' = ANY ($2::text[])
              AND m.delivery_status NOT IN ('cancelled', 'failed')
              AND NOT EXISTS (
                  SELECT 1
                  FROM et_messages p
                  WHERE p.tenant_id = t.tenant_id
                    AND p.thread_id = t.id
                    AND p.direction = 'outbound'
                    AND p.occurred_at > m.occurred_at
                    AND p.raw_payload ->> 'origin' = ANY ($3::text[])
              )
        ) c
        CROSS JOIN LATERAL (
            SELECT jsonb_object_agg(e.name, e.at) AS said
            FROM (
                SELECT w.name, max(m.occurred_at) AS at
                FROM et_messages m
                CROSS JOIN LATERAL jsonb_array_elements_text(
                    CASE jsonb_typeof(m.raw_payload -> 'said') WHEN 'array' THEN m.raw_payload -> 'said' ELSE '[]' END
                ) AS w (name)
                WHERE m.tenant_id = t.tenant_id
                  AND m.thread_id = t.id
                  AND m.direction = 'outbound'
                  AND m.occurred_at > now() - INTERVAL '31 days'
                  AND m.delivery_status NOT IN ('cancelled', 'failed')
                GROUP BY w.name
            ) e
        ) s
        """,
        thread_ids,
        automatic,
        people,
    )
