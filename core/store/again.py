"""Which of the things that were stored in an earlier life are not in the database now. Reads only.

Whatever is named here still goes through ingest, whose dedupe key has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.channel import InboundMessage, StatusUpdate
from core.database_json import clean_text
from core.store.audit import Conn


async def missing(
    conn: Conn, tenant_id: int, session_id: int, messages: Sequence[InboundMessage]
) -> list[InboundMessage]:
    """Those of one session's messages that are not stored, or only as a placeholder that they could fill."""
    # By the dedupe key, whose index begins with tenant, session and lead: a person's message is found through any of the
    # forms it names.
    rows = await conn.fetch(
        """
        SELECT DISTINCT k.n
        FROM unnest($3::integer[], $4::text[], $5::text[], $6::boolean[])
            AS k (n, external_id, channel_message_id, placeholder)
        JOIN et_lead_identities i ON i.tenant_id = $1 AND i.external_id = k.external_id
        JOIN et_messages m
            ON m.tenant_id = $1 AND m.channel_session_id = $2 AND m.lead_id = i.lead_id
           AND m.channel_message_id = k.channel_message_id
        WHERE k.placeholder OR NOT m.placeholder
        """,
        tenant_id,
        session_id,
        *_columns(messages),
    )
    found = {row["n"] for row in rows}
    return [message for n, message in enumerate(messages) if n not in found]


def _columns(messages: Sequence[InboundMessage]) -> tuple[list[int], list[str], list[str], list[bool]]:
    named = [
        (n, clean_text(external_id), clean_text(message.channel_message_id), message.placeholder)
        for n, message in enumerate(messages)
        for external_id in (message.person.external_id, *message.person.aliases)
        if external_id
    ]
    return [x[0] for x in named], [x[1] for x in named], [x[2] for x in named], [x[3] for x in named]


async def behind(
    conn: Conn, tenant_id: int, session_id: int, updates: Sequence[StatusUpdate]
) -> list[StatusUpdate]:
    """Those receipts of one session that would move a message on. `failed` is not asked about: what failed then may have
    been sent again since."""
    wanted = [
        (n, clean_text(message_id), update.status)
        for n, update in enumerate(updates)
        if update.status != "failed"
        for message_id in update.message_ids
        if message_id
    ]
    rows = await conn.fetch(
        """
        SELECT DISTINCT k.n
        FROM unnest($3::integer[], $4::text[], $5::text[]) AS k (n, channel_message_id, status)
        JOIN et_messages m
            ON m.channel_session_id = $2 AND m.channel_message_id = k.channel_message_id
           AND m.tenant_id = $1 AND m.direction = 'outbound'
        WHERE m.delivery_status IN ('dispatching', 'unknown')
           OR m.delivery_status = 'sent' AND k.status IN ('delivered', 'read')
           OR m.delivery_status = 'delivered' AND k.status = 'read'
        """,
        tenant_id,
        session_id,
        [x[0] for x in wanted],
        [x[1] for x in wanted],
        [x[2] for x in wanted],
    )
    found = {row["n"] for row in rows}
    return [update for n, update in enumerate(updates) if n in found]
