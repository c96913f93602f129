"""What did not go out, or may not have: each item with what happened, what would prove it, and what an operator can do.

Nothing here is sent again by itself. A send whose outcome is unknown takes a person who has looked, and says so.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web
from asyncpg import Record

from core import log as logs
from core.errors import NotFound
from core.store import audit, requests
from core.store.requests import GIVEN_UP
from core.store.sessions import PENDING
from gateway.console import kinds, timeline, words
from gateway.console.live import LiveView, Part
from gateway.console.page import Page, PageError

log = logs.get(part="console")

SHOWN = 100
STATUS = {
    "queued": ("Waiting to be sent", "busy"),
    "dispatching": ("Being sent", "busy"),
    "sent": ("Sent", "good"),
    "failed": ("Not sent", "bad"),
    "unknown": ("May or may not have arrived", "busy"),
    "cancelled": ("Withdrawn", "calm"),
}


def _line(page: Page, row: Record) -> dict[str, Any]:
    spoken = kinds.of(row["channel"])
    session = row["session_name"] or row["session_identifier"]
    label, tone = STATUS[row["status"]]
    at = row["claimed_at"] or row["updated_at"]
    return {
        "id": row["queue_id"],
        "status": row["status"],
        "label": label,
        "tone": tone,
        "who": words.person(row["lead_name"], row["lead_external_id"]),
        "address": words.address(row["lead_external_id"]),
        "thread_id": row["thread_id"],
        "message_id": row["message_id"],
        "via": f"a new {spoken.thing}" if session.startswith(PENDING) else session,
        "channel": spoken.label,
        "icon": spoken.icon,
        "text": timeline.snippet(row["content"], words.kind(row["message_type"])),
        "why": words.sentence(row["last_error"]) if row["last_error"] else None,
        "code": row["error_code"],
        "proof": spoken.proof,
        "tries": row["retry_count"],
        "written": f"{words.day(row['created_at'], page.zone)}, {words.clock(row['created_at'], page.zone)}",
        "tried": f"{words.day(at, page.zone)}, {words.clock(at, page.zone)}",
        "time": words.when(at, page.zone),
        # It may be in the person's chat already: sending again takes a look first.
        "doubtful": row["status"] == "unknown" or row["error_code"] == GIVEN_UP,
    }


async def _load_list(page: Page) -> dict[str, Any]:
    async with page.db.tenant(page.tenant_id) as conn:
        unknown = await requests.trouble(conn, page.tenant_id, "unknown", limit=SHOWN)
        failed = await requests.trouble(conn, page.tenant_id, "failed", limit=SHOWN)
    return {
        "unknown": [_line(page, row) for row in unknown],
        "failed": [_line(page, row) for row in failed],
        "most": SHOWN,
        "section": "outbox",
    }


listing = LiveView("outbox.html", (Part("trouble", "_outbox.html"),), _load_list, "et_events")


async def _load_one(page: Page) -> dict[str, Any]:
    async with page.db.tenant(page.tenant_id) as conn:
        row = await requests.with_person(conn, page.tenant_id, page.id("item"))
    if row is None:
        raise NotFound(f"message {page.id('item')} of the outbox does not exist")
    return {"item": _line(page, row), "section": "outbox"}


one = LiveView("outbox_item.html", (Part("item", "_outbox_item.html"),), _load_one, "et_events")


async def send_again(page: Page) -> web.StreamResponse:
    """Into the queue once more. What may have arrived takes a tick that somebody has looked."""
    item = (await _load_one(page))["item"]
    if item["doubtful"] and page.form.get("looked") != "yes":
        raise PageError(
            422,
            "Look first",
            "It may have arrived, and this person would get it twice. Go back, look, and tick the box.",
        )
    async with page.db.tenant(page.tenant_id) as conn:
        await requests.retry(conn, item["id"])
        await _note(page, conn, "outbound_retried", item["id"])
    return _back(page, "It is in the queue again.")


async def arrived(page: Page) -> web.StreamResponse:
    return await _settle(page, arrived=True)


async def give_up(page: Page) -> web.StreamResponse:
    return await _settle(page, arrived=False)


async def _settle(page: Page, *, arrived: bool) -> web.StreamResponse:
    item = (await _load_one(page))["item"]
    async with page.db.tenant(page.tenant_id) as conn:
        done = await requests.settle(conn, page.tenant_id, item["id"], arrived=arrived)
        if done:
            outcome = "arrived" if arrived else GIVEN_UP
            await _note(page, conn, "outbound_settled", item["id"], outcome=outcome)
    if not done:
        raise PageError(
            409,
            "It is settled already",
            f"It is not in doubt any more: {item['label'].lower()}. Go back and reload the page.",
        )
    return _back(page, "Noted: it arrived." if arrived else "Noted: it is given up, and stays unsent.")


def _back(page: Page, notice: str) -> web.Response:
    return page.go(f"{page.base}/outbox/{page.id('item')}", notice)


async def _note(page: Page, conn: audit.Conn, event: audit.Event, queue_id: int, **detail: str) -> None:
    log.info(
        "console.outbox",
        action=event,
        tenant_id=page.tenant_id,
        queue_id=queue_id,
        key_id=page.visitor.key_id,
        **detail,
    )
    await audit.write(
        conn,
        event,
        tenant_id=page.tenant_id,
        actor=page.visitor.actor,
        subject_type="outbound",
        subject_id=queue_id,
        detail=detail,
    )
