"""What people read: leads, threads, messages, the timeline, the audit log; and the few things they change there.

Runs as the API's role inside the tenant; every list is read by keyset, `limit` rows from a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncpg import Record

from core.store.audit import Conn


def like(text: str) -> str:
    """A pattern that finds `text` anywhere, with nothing in it that means more than itself."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


async def bound_search(conn: Conn, seconds: float) -> None:
    """A search may look at much: it is cut off rather than left to hold a connection. Inside a transaction."""
    await conn.execute(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")


# ---- leads ----

_LEAD = """
    l.id, l.tenant_id, l.workspace_id, l.external_id, l.kind, l.name, l.timezone, l.tags, l.opted_out_at,
    l.created_at, l.updated_at,
    ARRAY(
        SELECT i.external_id
        FROM et_lead_identities i
        WHERE i.tenant_id = l.tenant_id
          AND i.lead_id = l.id
        ORDER BY i.created_at, i.external_id
    ) AS identities
"""


async def list_leads(
    conn: Conn,
    tenant_id: int,
    *,
    pattern: str | None,
    tag: str | None,
    kind: str | None,
    opted_out: bool | None,
    workspace_id: int | None,
    before: int | None,
    limit: int,
) -> list[Record]:
    """Newest first. `pattern` is looked for in the name and in every identity."""
    return await conn.fetch(
        f"""
        SELECT {_LEAD}
        FROM et_leads l
        WHERE l.tenant_id = $1
          AND ($2::text IS NULL
               OR l.name ILIKE $2
               OR EXISTS (
                   SELECT 1
                   FROM et_lead_identities i
                   WHERE i.tenant_id = l.tenant_id
                     AND i.lead_id = l.id
                     AND i.external_id ILIKE $2
               ))
          AND ($3::text IS NULL OR $3 = ANY (l.tags))
          AND ($4::text IS NULL OR l.kind = $4)
          AND ($5::boolean IS NULL OR (l.opted_out_at IS NOT NULL) = $5)
          AND ($6::bigint IS NULL OR l.workspace_id = $6)
          AND ($7::bigint IS NULL OR l.id < $7)
        ORDER BY l.id DESC
        LIMIT $8
        """,  # noqa: S608  (our own column list)
        tenant_id,
        pattern,
        tag,
        kind,
        opted_out,
        workspace_id,
        before,
        limit,
    )


async def read_lead(conn: Conn, tenant_id: int, lead_id: int) -> Record | None:
    """The lead, or the one it was merged into."""
    return await conn.fetchrow(
        f"""
        SELECT {_LEAD}
        FROM et_leads l
        WHERE l.tenant_id = $1
          AND l.id = et_current_lead($1, $2)
        """,  # noqa: S608
        tenant_id,
        lead_id,
    )


@dataclass(frozen=True, slots=True)
class LeadChange:
    """Only what `given` names is written."""

    given: frozenset[str]
    name: str | None = None
    timezone: str | None = None
    workspace_id: int | None = None
    tags: Sequence[str] | None = None
    opted_out: bool | None = None


async def update_lead(conn: Conn, tenant_id: int, lead_id: int, change: LeadChange) -> bool:
    """The first opt-out's time is kept when it is said again."""
    done = await conn.execute(
        """
        UPDATE et_leads l
        SET name = CASE WHEN 'name' = ANY ($3) THEN $4 ELSE l.name END,
            timezone = CASE WHEN 'timezone' = ANY ($3) THEN $5 ELSE l.timezone END,
            workspace_id = CASE WHEN 'workspace_id' = ANY ($3) THEN $6 ELSE l.workspace_id END,
            tags = CASE WHEN 'tags' = ANY ($3) THEN $7 ELSE l.tags END,
            opted_out_at = CASE
                WHEN NOT 'opted_out' = ANY ($3) THEN l.opted_out_at
                WHEN $8 THEN coalesce(l.opted_out_at, now())
            END
        WHERE l.tenant_id = $1
          AND l.id = et_current_lead($1, $2)
        """,
        tenant_id,
        lead_id,
        sorted(change.given),
        change.name,
        change.timezone,
        change.workspace_id,
        list(change.tags or ()),
        change.opted_out,
    )
    return done.endswith(" 1")


async def name_actor(conn: Conn, actor: str) -> None:
    """Who the audit rows that functions of the schema write are about. Inside a transaction."""
    await conn.execute("SELECT set_config('app.actor', $1, true)", actor)


# ---- messages ----

_MESSAGE = """
    m.id, m.tenant_id, m.lead_id, m.thread_id, m.channel_session_id, m.channel, m.channel_message_id,
    m.channel_timestamp, m.occurred_at, m.direction, m.role, m.sender_identifier, m.chat_identifier, m.message_type,
    m.content, m.reply_to_message_id, m.media_url, m.media_metadata, m.raw_payload -> 'payload' AS payload,
    m.raw_payload ->> 'origin' AS origin, m.delivery_status, m.is_history, m.llm_provider, m.llm_model,
    m.llm_prompt_tokens, m.llm_completion_tokens, m.llm_total_tokens,
    m.llm_estimated_cost_usd::float8 AS llm_estimated_cost_usd, m.created_at, m.updated_at,
    q.id AS queue_id, q.error_code, q.last_error,
    d.label AS decision_label, d.action AS decision_action, d.reason AS decision_reason,
    d.decider AS decision_decider, d.model AS decision_model, d.confidence AS decision_confidence,
    d.reply_message_id AS decision_reply_message_id
"""
_MESSAGE_JOINS = """
    LEFT JOIN et_outbound_queue q ON q.message_id = m.id AND q.tenant_id = m.tenant_id
    LEFT JOIN et_decisions d ON d.message_id = m.id AND d.tenant_id = m.tenant_id
"""


async def read_message(conn: Conn, tenant_id: int, message_id: int) -> Record | None:
    return await conn.fetchrow(
        f"""
        SELECT {_MESSAGE}
        FROM et_messages m
        {_MESSAGE_JOINS}
        WHERE m.tenant_id = $1
          AND m.id = $2
        """,  # noqa: S608
        tenant_id,
        message_id,
    )


async def thread_messages(
    conn: Conn, tenant_id: int, thread_id: int, *, before: tuple[datetime | None, int | None], limit: int
) -> list[Record]:
    """From the newest, or from `before`, back in time."""
    return await conn.fetch(
        f"""
        SELECT {_MESSAGE}
        FROM et_messages m
        {_MESSAGE_JOINS}
        WHERE m.tenant_id = $1
          AND m.thread_id = $2
          AND ($3::timestamptz IS NULL OR (m.occurred_at, m.id) < ($3, $4::bigint))
        ORDER BY m.occurred_at DESC, m.id DESC
        LIMIT $5
        """,  # noqa: S608
        tenant_id,
        thread_id,
        *before,
        limit,
    )


async def timeline(
    conn: Conn,
    tenant_id: int,
    lead_id: int,
    *,
    start: tuple[datetime | None, int | None],
    newest_first: bool,
    limit: int,
) -> list[Record]:
    """Every message with one person on every channel, in one order."""
    comparison, order = ("<", "DESC") if newest_first else (">", "ASC")
    return await conn.fetch(
        f"""
        SELECT {_MESSAGE}
        FROM et_messages m
        {_MESSAGE_JOINS}
        WHERE m.tenant_id = $1
          AND m.lead_id = $2
          AND ($3::timestamptz IS NULL OR (m.occurred_at, m.id) {comparison} ($3, $4::bigint))
        ORDER BY m.occurred_at {order}, m.id {order}
        LIMIT $5
        """,  # noqa: S608
        tenant_id,
        lead_id,
        *start,
        limit,
    )


# ---- threads ----

_THREAD = """
    t.id, t.tenant_id, t.channel, t.channel_session_id, t.agent_id, t.status, t.handled_by, t.last_message_at,
    t.created_at, t.updated_at,
    l.id AS lead_id, l.external_id AS lead_external_id, l.name AS lead_name, l.kind AS lead_kind,
    l.tags AS lead_tags, l.opted_out_at AS lead_opted_out_at,
    i.label AS insight_label, i.next_step AS insight_next_step, i.next_followup_at AS insight_next_followup_at,
    i.summary AS insight_summary, i.analyzed_through_message_id AS insight_analyzed_through_message_id,
    i.updated_at AS insight_updated_at,
    last.id AS last_id, last.direction AS last_direction, last.message_type AS last_message_type,
    left(last.content, 300) AS last_content, last.occurred_at AS last_occurred_at,
    last.delivery_status AS last_delivery_status
"""
_THREAD_JOINS = """
    JOIN et_leads l ON l.tenant_id = t.tenant_id AND l.id = t.lead_id
    LEFT JOIN et_thread_insights i ON i.tenant_id = t.tenant_id AND i.thread_id = t.id
    LEFT JOIN LATERAL (
        SELECT m.id, m.direction, m.message_type, m.content, m.occurred_at, m.delivery_status
        FROM et_messages m
        WHERE m.tenant_id = t.tenant_id
          AND m.thread_id = t.id
        ORDER BY m.occurred_at DESC, m.id DESC
        LIMIT 1
    ) last ON true
"""
SEARCHED_MESSAGES = 200
"""How many of a thread's latest messages a search looks through."""


@dataclass(frozen=True, slots=True)
class ThreadFilter:
    status: str | None = None
    handled_by: str | None = None
    label: str | None = None
    due_before: datetime | None = None
    channel_session_id: int | None = None
    lead_id: int | None = None
    pattern: str | None = None


async def list_threads(
    conn: Conn,
    tenant_id: int,
    wanted: ThreadFilter,
    *,
    before: tuple[datetime | None, int | None],
    limit: int,
) -> list[Record]:
    """Latest conversation first. A search looks at the lead's name, its identities and the latest messages."""
    # recent_at is last_message_at in steps, and what the index is on (see schema/003_indexes.sql).
    return await conn.fetch(
        f"""
        SELECT {_THREAD}
        FROM et_threads t
        {_THREAD_JOINS}
        WHERE t.tenant_id = $1
          AND ($2::text IS NULL OR t.status = $2)
          AND ($3::text IS NULL OR t.handled_by = $3)
          AND ($4::text IS NULL OR i.label = $4)
          AND ($5::timestamptz IS NULL OR i.next_followup_at <= $5)
          AND ($6::bigint IS NULL OR t.channel_session_id = $6)
          AND ($7::bigint IS NULL OR t.lead_id = $7)
          AND ($8::text IS NULL
               OR l.name ILIKE $8
               OR l.external_id ILIKE $8
               OR EXISTS (
                   SELECT 1
                   FROM (
                       SELECT m.content
                       FROM et_messages m
                       WHERE m.tenant_id = t.tenant_id
                         AND m.thread_id = t.id
                       ORDER BY m.occurred_at DESC, m.id DESC
                       LIMIT {SEARCHED_MESSAGES}
                   ) latest
                   WHERE latest.content ILIKE $8
               ))
          AND t.recent_at > '-infinity'
          AND ($9::timestamptz IS NULL OR t.recent_at <= $9 AND (t.last_message_at, t.id) < ($9, $10::bigint))
        ORDER BY t.recent_at DESC, t.last_message_at DESC, t.id DESC
        LIMIT $11
        """,  # noqa: S608
        tenant_id,
        wanted.status,
        wanted.handled_by,
        wanted.label,
        wanted.due_before,
        wanted.channel_session_id,
        wanted.lead_id,
        wanted.pattern,
        *before,
        limit,
    )


async def read_thread(conn: Conn, tenant_id: int, thread_id: int) -> Record | None:
    return await conn.fetchrow(
        f"""
        SELECT {_THREAD}
        FROM et_threads t
        {_THREAD_JOINS}
        WHERE t.tenant_id = $1
          AND t.id = $2
        """,  # noqa: S608
        tenant_id,
        thread_id,
    )


async def hand_to_agent(conn: Conn, tenant_id: int, thread_id: int) -> bool:
    """True when that changed something. The other way is `core.store.threads.hand_to_person`."""
    done = await conn.execute(
        """
        UPDATE et_threads
        SET handled_by = 'agent',
            updated_at = now()
        WHERE tenant_id = $1
          AND id = $2
          AND handled_by <> 'agent'
        """,
        tenant_id,
        thread_id,
    )
    return done.endswith(" 1")


async def archive(conn: Conn, tenant_id: int, thread_id: int) -> bool:
    """True when it was active. The next message of this person opens a new thread."""
    done = await conn.execute(
        """
        UPDATE et_threads
        SET status = 'archived',
            updated_at = now()
        WHERE tenant_id = $1
          AND id = $2
          AND status = 'active'
        """,
        tenant_id,
        thread_id,
    )
    return done.endswith(" 1")


# ---- sessions ----


async def session_counters(conn: Conn, tenant_id: int, session_id: int) -> dict[str, int]:
    """How much of what the session has. Messages are not counted: there may be millions."""
    row = await conn.fetchrow(
        """
        SELECT (
                   SELECT count(*)
                   FROM et_threads
                   WHERE tenant_id = $1
                     AND channel_session_id = $2
               ) AS threads,
               count(*) FILTER (WHERE q.status = 'queued') AS queued,
               count(*) FILTER (WHERE q.status = 'dispatching') AS dispatching,
               count(*) FILTER (WHERE q.status = 'unknown') AS unknown,
               count(*) FILTER (WHERE q.status = 'failed') AS failed
        FROM et_outbound_queue q
        WHERE q.tenant_id = $1
          AND q.channel_session_id = $2
          AND q.status IN ('queued', 'dispatching', 'unknown', 'failed')
        """,
        tenant_id,
        session_id,
    )
    assert row is not None
    return dict(row)


# ---- audit ----


async def list_audit(
    conn: Conn, tenant_id: int, *, event: str | None, before: int | None, limit: int
) -> list[Record]:
    return await conn.fetch(
        """
        SELECT id, actor, event, subject_type, subject_id, detail, created_at
        FROM et_audit_log
        WHERE tenant_id = $1
          AND ($2::text IS NULL OR event = $2)
          AND ($3::bigint IS NULL OR id < $3)
        ORDER BY id DESC
        LIMIT $4
        """,
        tenant_id,
        event,
        before,
        limit,
    )
