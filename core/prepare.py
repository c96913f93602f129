"""An inbound message as the row and the person it will be: checked before it is queued, so that a batch rarely holds
a bad row. Pure: no IO. Raises Invalid for what can never be stored."""

from __future__ import annotations

from typing import Any, NamedTuple

from core.channel import Cursor, InboundMessage, MessageType
from core.database_json import clean_text, encode
from core.errors import Invalid
from core.leads import Wanted
from core.store.messages import Echo, Row

LAST_MILLISECOND = 253_402_300_799_999
"""The end of the year 9999."""
LONGEST_ID = 2000
"""Bytes: the dedupe key must fit into an index entry."""


class Prepared(NamedTuple):
    message: InboundMessage
    row: Row
    wanted: Wanted

    @property
    def cursor(self) -> Cursor | None:
        return self.message.cursor

    @property
    def seen_outbound(self) -> bool:
        """It went out from this account: perhaps by us, perhaps typed on the phone."""
        return self.row.direction == "outbound"

    @property
    def typed_on_phone(self) -> bool:
        return (
            self.seen_outbound
            and not self.row.is_history
            and self.message.raw_payload.get("origin") == "phone"
        )

    @property
    def echo(self) -> Echo:
        ref = self.message.raw_payload.get("queue_ref")
        queue_id, epoch = (
            (ref.get("queue_id"), ref.get("claim_epoch")) if isinstance(ref, dict) else (None, None)
        )
        return Echo(
            self.row.tenant_id,
            self.row.session_id,
            self.row.channel_message_id,
            queue_id if _is_id(queue_id) else None,
            epoch if _is_id(epoch) else None,
        )


def prepare(message: InboundMessage) -> Prepared:
    """Raises Invalid, naming the field."""
    if not _is_id(message.tenant_id) or not _is_id(message.session_id):
        raise Invalid(f"tenant {message.tenant_id!r} or session {message.session_id!r} is no id")
    if not message.channel_message_id or _bytes(message.channel_message_id) > LONGEST_ID:
        raise Invalid(f"channel_message_id must have 1 to {LONGEST_ID} bytes")
    person = message.person
    if not person.external_id or max(map(len, (person.external_id, *person.aliases))) > LONGEST_ID:
        raise Invalid("the message names nobody it is from")
    # In the order of its fields: by name it takes twice as long, for every message.
    row = Row(
        message.tenant_id,
        message.session_id,
        message.channel,
        clean_text(message.channel_message_id),
        _milliseconds(message.channel_timestamp),
        _occurred(message),
        message.direction,
        message.role,
        _text(message.sender_identifier),
        _text(message.chat_identifier),
        str(MessageType.UNSUPPORTED if message.placeholder else message.message_type),
        _text(message.content),
        _text(message.reply_to_message_id),
        None if message.media_metadata is None else _json("media_metadata", message.media_metadata),
        _json("raw_payload", message.raw_payload),
        message.is_history,
        message.placeholder,
    )
    ids = dict.fromkeys(clean_text(x) for x in (person.external_id, *person.aliases) if x)
    # An own echo carries the sender's name, which is ours.
    name = _text(person.name) if message.direction == "inbound" or person.kind == "group" else None
    # A clock that runs ahead must not carry a message over its person's erasure; a replay still knows when it arrived.
    said_at = min(row.occurred_at, message.arrived_at)
    wanted = Wanted(
        row.tenant_id, row.session_id, tuple(ids), person.kind, (name or "").strip() or None, said_at
    )
    return Prepared(message, row, wanted)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _text(value: str | None) -> str | None:
    return clean_text(value) if value else value


def _json(field: str, value: dict[str, Any]) -> str:
    try:
        return encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"{field} cannot be written as JSON ({type(error).__name__})") from error


def _milliseconds(value: int | None) -> int | None:
    """What the channel says, unless no clock could say it."""
    return value if value is not None and 0 < value <= LAST_MILLISECOND else None


def _occurred(message: InboundMessage) -> float:
    stamp = _milliseconds(message.channel_timestamp)
    return message.arrived_at if stamp is None else stamp / 1000
