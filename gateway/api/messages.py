"""One message, as every reader of the API sees it: never the raw original."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from asyncpg import Record
from pydantic import Field

from core.store import crm as store
from gateway.api.models import Direction, JsonObject, NoBody, NoQuery, View
from gateway.api.problems import not_found
from gateway.api.routing import Call, Routes, Subject

routes = Routes("messages")
SUBJECT = Subject("message", "message_id", "et_messages")


class Decision(View):
    action: str
    label: str | None
    reason: str | None
    decider: str
    model: str | None
    confidence: float | None
    reply_message_id: int | None


class Usage(View):
    provider: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    estimated_cost_usd: float | None


class Message(View):
    id: int
    lead_id: int
    thread_id: int
    channel_session_id: int
    channel: str
    channel_message_id: str
    channel_timestamp: int | None = Field(description="Unix epoch, milliseconds, as the channel says.")
    occurred_at: datetime
    direction: Direction
    role: str
    origin: str | None = Field(description="Who wrote an outbound message: `agent`, `api`, `phone`, …")
    sender_identifier: str | None
    chat_identifier: str | None
    message_type: str
    content: str | None
    payload: JsonObject | None = Field(description="What a location, contact, poll or mail adds to the text.")
    reply_to_message_id: str | None
    media_url: str | None
    media_metadata: JsonObject | None
    delivery_status: str
    is_history: bool
    queue_id: int | None
    error_code: str | None
    last_error: str | None
    decision: Decision | None
    llm: Usage | None
    created_at: datetime
    updated_at: datetime


def view(row: Record) -> Message:
    values: dict[str, Any] = dict(row)
    decision = {name: values.pop(f"decision_{name}") for name in Decision.model_fields}
    usage = {name: values.pop(f"llm_{name}") for name in Usage.model_fields}
    values.pop("tenant_id")
    payload = values.pop("payload")
    return Message(
        **values,
        payload=payload if isinstance(payload, dict) else None,
        decision=Decision(**decision) if decision["action"] is not None else None,
        llm=Usage(**usage) if usage["provider"] is not None or usage["model"] is not None else None,
    )


@routes.add(
    "GET",
    "/api/v1/messaging/messages/{message_id}",
    access="subject",
    subject=SUBJECT,
    scope="read",
    returns={200: Message},
)
async def read(call: Call[NoQuery, NoBody]) -> Message:
    """Read a message, with its decision and what became of it."""
    async with call.db.tenant(call.tenant_id) as conn:
        row = await store.read_message(conn, call.tenant_id, call.id("message_id"))
    if row is None:
        raise not_found("message")
    return view(row)
