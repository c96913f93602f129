"""What is said: the latest messages of the tenant, the list of conversations, and one conversation to answer in.

An answer written here goes the way of every message, through the queue; the agent is silent from then on.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import asyncpg
from aiohttp import web
from asyncpg import Record

from core import log as logs
from core.channel import SessionStatus
from core.errors import NotFound
from core.store import audit, crm, recent, requests
from core.store import sessions as session_store
from core.store.threads import hand_to_person
from gateway.console import timeline, words
from gateway.console.live import LiveView, Part
from gateway.console.page import Page, PageError

log = logs.get(part="console")

RECENT = 50
LISTED = 50
SHOWN = 60
MOST_SHOWN = 500
SEARCH_SECONDS = 2.0
TEXT_LIMIT = 4096
FILTERS = {"all": None, "human": "human", "agent": "agent"}


# ---- the latest messages


@dataclass(frozen=True, slots=True)
class Line:
    id: int
    thread_id: int
    inbound: bool
    who: str
    via: str
    text: str
    time: str
    origin: str | None
    tick: words.Tick | None
    decision: str | None


async def _load_recent(page: Page) -> dict[str, Any]:
    async with page.db.tenant(page.tenant_id) as conn:
        rows = await recent.messages(conn, page.tenant_id, limit=RECENT)
    return {"lines": [_line(page, row) for row in rows], "section": "messages"}


def _line(page: Page, row: Record) -> Line:
    session = row["session_name"] or row["session_identifier"]
    return Line(
        id=row["id"],
        thread_id=row["thread_id"],
        inbound=row["direction"] == "inbound",
        who=words.person(row["lead_name"], row["lead_external_id"]),
        via="a new entry" if session.startswith(session_store.PENDING) else session,
        text=timeline.snippet(row["content"], words.kind(row["message_type"])),
        time=words.when(row["occurred_at"], page.zone),
        origin=words.origin(row),
        tick=words.tick(row),
        decision=words.decision(row) if row["direction"] == "inbound" else None,
    )


messages = LiveView("messages.html", (Part("lines", "_messages.html"),), _load_recent, "et_events")


# ---- the list


async def _list(page: Page) -> dict[str, Any]:
    query = page.request.query
    chosen = query.get("show", "all")
    if chosen not in FILTERS:
        chosen = "all"
    sought = query.get("q", "").strip()[:200].replace("\x00", "")
    wanted = crm.ThreadFilter(
        status=None if sought else "active",
        handled_by=FILTERS[chosen],
        pattern=crm.like(sought) if sought else None,
    )
    try:
        async with page.db.tenant(page.tenant_id) as conn:
            if sought:
                await crm.bound_search(conn, SEARCH_SECONDS)
            rows = await crm.list_threads(conn, page.tenant_id, wanted, before=(None, None), limit=LISTED)
    except asyncpg.QueryCanceledError:
        raise PageError(
            409, "That search takes too long", "Search for more letters, or for the whole address."
        ) from None
    kept = {name: value for name, value in (("show", chosen), ("q", sought)) if value and value != "all"}
    return {
        "threads": [_entry(page, row) for row in rows],
        "chosen": chosen,
        "sought": sought,
        "kept": f"?{urlencode(kept)}" if kept else "",
        "more": len(rows) == LISTED,
    }


def _entry(page: Page, row: Record) -> dict[str, Any]:
    who = words.person(row["lead_name"], row["lead_external_id"])
    last = None
    if row["last_id"] is not None:
        last = {
            "text": timeline.snippet(row["last_content"], words.kind(row["last_message_type"])),
            "ours": row["last_direction"] == "outbound",
        }
    return {
        "id": row["id"],
        "who": who,
        "initials": words.initials(who),
        "group": row["lead_kind"] == "group",
        "human": row["handled_by"] == "human",
        "archived": row["status"] != "active",
        "label": row["insight_label"],
        "time": words.when(row["last_message_at"], page.zone),
        "last": last,
    }


async def _load_threads(page: Page) -> dict[str, Any]:
    return {**await _list(page), "section": "threads", "open": None}


threads = LiveView("threads.html", (Part("threads", "_threads.html"),), _load_threads, "et_events")


# ---- one conversation


async def _load_thread(page: Page) -> dict[str, Any]:
    thread_id = page.id("thread")
    shown = _shown(page)
    listed = await _list(page)
    async with page.db.tenant(page.tenant_id) as conn:
        thread = await crm.read_thread(conn, page.tenant_id, thread_id)
        if thread is None:
            raise NotFound(f"conversation {thread_id} does not exist")
        rows = await crm.thread_messages(
            conn, page.tenant_id, thread_id, before=(None, None), limit=shown + 1
        )
        session = await session_store.get(conn, page.tenant_id, thread["channel_session_id"])
    older = len(rows) > shown
    query = {name: value for name, value in page.request.query.items() if name != "last"}
    group = thread["lead_kind"] == "group"
    return {
        **listed,
        "section": "threads",
        "open": thread_id,
        "thread": thread,
        "who": words.person(thread["lead_name"], thread["lead_external_id"]),
        "address": words.address(thread["lead_external_id"]),
        "group": group,
        "human": thread["handled_by"] == "human",
        "via": words.title(session),
        "standing": page.console.standing(session),
        "session_id": session.id,
        "closed": _closed(session),
        "waits": session.status in (SessionStatus.CONNECTING, SessionStatus.DISCONNECTED),
        "days": timeline.fold(rows[:shown][::-1], page.zone, group=group),
        "older": f"?{urlencode({**query, 'last': min(shown * 3, MOST_SHOWN)})}"
        if older and shown < MOST_SHOWN
        else None,
    }


def _shown(page: Page) -> int:
    given = page.request.query.get("last", "")
    return (
        min(max(int(given), SHOWN), MOST_SHOWN)
        if given.isascii() and given.isdigit() and len(given) < 5
        else SHOWN
    )


def _closed(session: session_store.SessionRow) -> bool:
    """Nothing can go out until a person does something."""
    return session.status in (SessionStatus.PAIRING, SessionStatus.LOGGED_OUT, SessionStatus.SUSPENDED)


_thread = LiveView(
    "thread.html",
    (
        Part("threads", "_threads.html"),
        Part("thread-state", "_thread_state.html"),
        Part("timeline", "_timeline.html"),
        Part("delivery", "_delivery.html"),
    ),
    _load_thread,
    "et_events",
)
thread_stream = _thread.stream


async def thread(page: Page) -> web.StreamResponse:
    query = page.request.query_string
    return page.show(
        "thread.html",
        stream=f"{page.request.path}/stream" + (f"?{query}" if query else ""),
        once=secrets.token_hex(12),
        draft="",
        problem=None,
        **await _load_thread(page),
    )


async def reply(page: Page) -> web.StreamResponse:
    """A person answers: the conversation is theirs from now on, and the text goes into the queue."""
    thread_id = page.id("thread")
    text = page.form.get("text", "").replace("\r\n", "\n").strip()
    if not text:
        return await _again(page, text, "Write something first.")
    if len(text) > TEXT_LIMIT:
        return await _again(
            page, text, f"This is too long: at most {TEXT_LIMIT} characters go into one message."
        )
    if "\x00" in text:
        return await _again(
            page, text.replace("\x00", ""), "There was a character in it that cannot be sent."
        )
    once = page.form.get("once", "")
    async with page.db.tenant(page.tenant_id) as conn:
        row = await crm.read_thread(conn, page.tenant_id, thread_id)
        if row is None:
            raise NotFound(f"conversation {thread_id} does not exist")
        session = await session_store.get(conn, page.tenant_id, row["channel_session_id"])
        if not _closed(session):
            await _take_over(page, conn, row)
            outgoing = requests.Outgoing(
                session_id=session.id,
                message_type="text",
                lead_id=row["lead_id"],
                content=text,
                # The same form sent twice is one message.
                dedupe_key=f"console:{page.visitor.key_id}:{once}"
                if once.isalnum() and len(once) <= 64
                else None,
                raw_payload={"origin": "console", "actor": page.visitor.actor},
            )
            queued = await requests.enqueue(conn, page.tenant_id, outgoing)
            # An archived conversation goes on in a new one, which is the person's as well.
            if queued["thread_id"] != thread_id:
                await hand_to_person(conn, [queued["thread_id"]])
    if _closed(session):
        told = page.console.standing(session)
        return await _again(
            page, text, f"{words.title(session)} cannot send now: {told.action or told.label}"
        )
    log.info(
        "console.replied",
        tenant_id=page.tenant_id,
        message_id=queued["message_id"],
        key_id=page.visitor.key_id,
    )
    url = f"{page.base}/threads/{queued['thread_id']}"
    if page.htmx and queued["thread_id"] == thread_id:
        return await _again(page, "", None)
    return page.go(url)


async def _again(page: Page, draft: str, problem: str | None) -> web.Response:
    """The box anew: empty after an answer, with the text still in it after a problem."""
    once = secrets.token_hex(12)
    if page.htmx:
        context = {
            "open": page.id("thread"),
            "once": once,
            "draft": draft,
            "problem": problem,
            "closed": False,
        }
        return web.Response(text=page.text("_reply.html", focus=True, **context), content_type="text/html")
    loaded = await _load_thread(page)
    return page.show(
        "thread.html",
        status=422,
        stream=f"{page.base}/threads/{page.id('thread')}/stream",
        once=once,
        draft=draft,
        problem=problem,
        **loaded,
    )


async def take_over(page: Page) -> web.StreamResponse:
    async with page.db.tenant(page.tenant_id) as conn:
        await _take_over(page, conn, await _row(page, conn))
    return page.go(f"{page.base}/threads/{page.id('thread')}", "It is yours. The agent is silent here.")


async def _take_over(page: Page, conn: audit.Conn, row: Record) -> None:
    """Automatic replies that still wait are withdrawn in the same transaction."""
    await hand_to_person(conn, [row["id"]])
    if row["handled_by"] != "human":
        await _audit(page, conn, "thread_taken_over", row["id"])


async def give_back(page: Page) -> web.StreamResponse:
    async with page.db.tenant(page.tenant_id) as conn:
        row = await _row(page, conn)
        if await crm.hand_to_agent(conn, page.tenant_id, row["id"]):
            await _audit(page, conn, "thread_released", row["id"])
    return page.go(
        f"{page.base}/threads/{page.id('thread')}", "The agent answers again, from the next message on."
    )


async def _row(page: Page, conn: audit.Conn) -> Record:
    row = await crm.read_thread(conn, page.tenant_id, page.id("thread"))
    if row is None:
        raise NotFound(f"conversation {page.id('thread')} does not exist")
    return row


async def _audit(page: Page, conn: audit.Conn, event: audit.Event, thread_id: int) -> None:
    await audit.write(
        conn,
        event,
        tenant_id=page.tenant_id,
        actor=page.visitor.actor,
        subject_type="thread",
        subject_id=thread_id,
    )
