"""An own message that came back as an echo before its send was marked: two rows become one.

Called inside the marker's transaction, with the queue row already moved.
"""

from __future__ import annotations

from core.store.audit import Conn


async def merge(conn: Conn, *, message_id: int, echo_id: int) -> None:
    """The queued message takes over the echo's id and how far its receipts had come; the echo's row goes."""
    echo = await conn.fetchrow(
        """
        DELETE FROM et_messages
        WHERE id = $1
        RETURNING channel_message_id, delivery_status, channel_timestamp
        """,
        echo_id,
    )
    if echo is None:
        return
    await conn.execute(
        """
        UPDATE et_messages
        SET channel_message_id = $2, channel_timestamp = coalesce($3, channel_timestamp)
        WHERE id = $1
        """,
        message_id,
        echo["channel_message_id"],
        echo["channel_timestamp"],
    )
    for status in {"delivered": ["delivered"], "read": ["delivered", "read"]}.get(
        echo["delivery_status"], []
    ):
        await conn.execute("UPDATE et_messages SET delivery_status = $2 WHERE id = $1", message_id, status)
