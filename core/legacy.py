"""Copies a backend's older et_conversation_threads and et_chat_messages into the canonical tables, once and as history.

Never changes a legacy row; when all is copied, a trigger refuses further writes to them. Can be run again: nothing is
copied twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import asyncpg

from core import log as logs
from core.errors import MigrationError

log = logs.get(part="legacy")

LEGACY_SESSION = "legacy"


@dataclass(frozen=True, slots=True)
class LegacyCounts:
    """What one run did. `duplicates`: legacy rows whose message is already there, copied earlier or received since."""

    sessions: int
    threads: int
    messages: int
    duplicates: int


# Columns that the older tables may or may not have are read through to_jsonb: absent is NULL.
_OBSTACLES = """
SELECT 'et_conversation_threads ' || t.id || ': lead ' || coalesce(t.lead_id::TEXT, 'NULL')
       || ' does not exist in its tenant'
FROM public.et_conversation_threads t
WHERE NOT EXISTS (SELECT 1 FROM public.et_leads l WHERE l.id = t.lead_id AND l.tenant_id = t.tenant_id)
UNION ALL
SELECT 'et_conversation_threads ' || t.id || ': session ' || (to_jsonb(t) ->> 'channel_session_id')
       || ' does not exist in its tenant'
FROM public.et_conversation_threads t
WHERE (to_jsonb(t) ->> 'channel_session_id') IS NOT NULL
  AND NOT EXISTS (
      SELECT 1 FROM public.et_channel_sessions s
      WHERE s.id = (to_jsonb(t) ->> 'channel_session_id')::BIGINT AND s.tenant_id = t.tenant_id)
UNION ALL
SELECT 'et_chat_messages ' || m.id || ': thread ' || coalesce(m.thread_id::TEXT, 'NULL') || ' does not exist'
FROM public.et_chat_messages m
WHERE NOT EXISTS (SELECT 1 FROM public.et_conversation_threads t WHERE t.id = m.thread_id)
LIMIT 50
"""

_SESSIONS = """
INSERT INTO public.et_channel_sessions (tenant_id, channel_type, session_identifier, session_name, status, status_reason)
SELECT DISTINCT t.tenant_id, 'whatsapp', $1::TEXT, $1::TEXT, 'disconnected', 'legacy'
FROM public.et_conversation_threads t
WHERE (to_jsonb(t) ->> 'channel_session_id') IS NULL
ON CONFLICT DO NOTHING
"""

# The newest thread of a lead and session stays active, unless live messages have opened one since.
_THREADS = """
WITH legacy AS (
    SELECT t.id, t.tenant_id, t.lead_id, s.id AS session_id, s.channel_type,
           coalesce((to_jsonb(t) ->> 'created_at')::TIMESTAMPTZ, now()) AS created_at,
           (SELECT max(m.created_at)::TIMESTAMPTZ FROM public.et_chat_messages m WHERE m.thread_id = t.id) AS latest
    FROM public.et_conversation_threads t
    JOIN public.et_channel_sessions s
      ON s.tenant_id = t.tenant_id
     AND CASE WHEN (to_jsonb(t) ->> 'channel_session_id') IS NULL
              THEN s.channel_type = 'whatsapp' AND s.session_identifier = $1
              ELSE s.id = (to_jsonb(t) ->> 'channel_session_id')::BIGINT END
    WHERE NOT EXISTS (SELECT 1 FROM public.et_legacy_threads c WHERE c.legacy_id = t.id)
), ranked AS (
    SELECT l.*, nextval(pg_get_serial_sequence('public.et_threads', 'id')) AS thread_id,
           row_number() OVER (PARTITION BY l.tenant_id, l.lead_id, l.session_id
                              ORDER BY coalesce(l.latest, l.created_at) DESC, l.id DESC) AS age
    FROM legacy l
), copied AS (
    INSERT INTO public.et_threads
        (id, tenant_id, lead_id, channel, channel_session_id, status, last_message_at, history_only, created_at)
    SELECT r.thread_id, r.tenant_id, r.lead_id, r.channel_type, r.session_id,
           CASE WHEN r.age = 1 AND NOT EXISTS (
                    SELECT 1 FROM public.et_threads a
                    WHERE a.tenant_id = r.tenant_id AND a.lead_id = r.lead_id
                      AND a.channel_session_id = r.session_id AND a.status = 'active')
                THEN 'active' ELSE 'archived' END,
           coalesce(r.latest, r.created_at), true, r.created_at
    FROM ranked r
    ORDER BY r.id
)
INSERT INTO public.et_legacy_threads (legacy_id, tenant_id, thread_id)
SELECT r.id, r.tenant_id, r.thread_id FROM ranked r
"""

_MESSAGES = """
INSERT INTO public.et_messages
    (tenant_id, lead_id, thread_id, channel_session_id, channel, channel_message_id, channel_timestamp, occurred_at,
     direction, role, sender_identifier, message_type, content, media_url, media_metadata, raw_payload, is_history,
     created_at)
SELECT t.tenant_id, t.lead_id, t.id, t.channel_session_id, t.channel,
       coalesce(m.j ->> 'channel_message_id', 'legacy_' || m.id),
       m.at, to_timestamp(m.at / 1000.0), m.direction,
       CASE WHEN m.role IN ('user', 'assistant', 'system') THEN m.role
            WHEN m.direction = 'inbound' THEN 'user' ELSE 'assistant' END,
       m.j ->> 'sender_identifier',
       CASE WHEN m.type IN ('text', 'image', 'video', 'audio', 'document', 'sticker', 'location', 'contact', 'poll',
                            'reaction', 'edited', 'deleted') THEN m.type ELSE 'unsupported' END,
       m.content, m.j ->> 'media_url', nullif(m.j -> 'media_metadata', 'null'),
       CASE jsonb_typeof(m.j -> 'raw_payload') WHEN 'object' THEN m.j -> 'raw_payload' ELSE '{}' END
           || jsonb_build_object('origin', 'legacy', 'legacy_id', m.id, 'legacy_role', m.role, 'legacy_type', m.type),
       true, m.created_at
FROM (
    SELECT c.id, c.thread_id, c.role, c.content, to_jsonb(c) AS j,
           c.created_at::TIMESTAMPTZ AS created_at,
           coalesce((to_jsonb(c) ->> 'channel_timestamp')::BIGINT,
                    (extract(epoch FROM c.created_at::TIMESTAMPTZ) * 1000)::BIGINT) AS at,
           CASE WHEN (to_jsonb(c) ->> 'direction') IN ('inbound', 'outbound') THEN to_jsonb(c) ->> 'direction'
                WHEN c.role = 'user' THEN 'inbound' ELSE 'outbound' END AS direction,
           coalesce(to_jsonb(c) ->> 'message_type', 'text') AS type
    FROM public.et_chat_messages c
) m
JOIN public.et_legacy_threads copied ON copied.legacy_id = m.thread_id
JOIN public.et_threads t ON t.id = copied.thread_id
ORDER BY m.id
ON CONFLICT DO NOTHING
"""


async def migrate_legacy(conn: asyncpg.Connection[Any]) -> LegacyCounts:
    """Copy everything in one transaction. `conn` is the login that owns the schema, already migrated.

    Raises MigrationError when the legacy tables are not there, or with the list of rows that cannot be placed.
    """
    missing = [
        table
        for table in ("et_conversation_threads", "et_chat_messages", "et_legacy_threads")
        if await conn.fetchval("SELECT to_regclass('public.' || $1) IS NULL", table)
    ]
    if missing:
        raise MigrationError(
            f"there is no {' and no '.join(missing)} in this database: "
            + ("run the migrations first" if "et_legacy_threads" in missing else "there is nothing to copy")
        )
    async with conn.transaction():
        await conn.execute("SET LOCAL statement_timeout = 0")
        # Wall-clock times were written by servers that run in UTC (see schema/001_tables.sql).
        await conn.execute("SET LOCAL TimeZone = 'UTC'")
        # Nothing may be written while it is being copied; readers go on.
        await conn.execute(
            "LOCK TABLE public.et_conversation_threads, public.et_chat_messages IN SHARE ROW EXCLUSIVE MODE"
        )
        found = [row[0] for row in await conn.fetch(_OBSTACLES)]
        if found:
            listed = "\n".join(f"  - {line}" for line in found)
            raise MigrationError(f"these legacy rows cannot be placed; nothing was copied:\n{listed}")
        total = await conn.fetchval("SELECT count(*) FROM public.et_chat_messages")
        sessions = _count(await conn.execute(_SESSIONS, LEGACY_SESSION))
        threads = _count(await conn.execute(_THREADS, LEGACY_SESSION))
        messages = _count(await conn.execute(_MESSAGES))
        for table in ("et_conversation_threads", "et_chat_messages"):
            await conn.execute(
                f"CREATE OR REPLACE TRIGGER et_legacy_is_closed "
                f"BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON public.{table} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION public.et_legacy_is_closed()"
            )
    counts = LegacyCounts(sessions, threads, messages, total - messages)
    log.info("legacy.copied", threads=threads, messages=messages, duplicates=counts.duplicates)
    return counts


def _count(status: str) -> int:
    return int(status.rsplit(" ", 1)[-1])
