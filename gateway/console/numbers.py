"""The numbers of a tenant: listed, added, linked by QR or code, connected, disconnected, logged out.

Everything is a wish in a row; the gateway that owns the session acts on it, and the pages show what it says.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from core import log as logs
from core.channel import SessionStatus
from core.errors import Invalid, NotFound
from core.identity import phone_e164
from core.store import audit, tenants
from core.store import sessions as store
from core.store.sessions import SessionRow
from gateway.console import qr, words
from gateway.console.live import LiveView, Part
from gateway.console.page import Page, PageError

log = logs.get(part="console")


def card(session: SessionRow) -> dict[str, Any]:
    return {
        "id": session.id,
        "title": words.title(session),
        "number": words.number(session),
        "channel": words.CHANNELS.get(session.channel_type, session.channel_type),
        "status": session.status.value,
        "last_connected_at": session.last_connected_at,
        **_standing(session),
    }


def _standing(session: SessionRow) -> dict[str, Any]:
    told = words.standing(session)
    return {
        "label": told.label,
        "tone": told.tone,
        "reason": told.reason,
        "action": told.action,
        "step": told.step,
    }


async def _load_list(page: Page) -> dict[str, Any]:
    async with page.db.tenant(page.tenant_id) as conn:
        sessions = await store.list_all(conn, page.tenant_id)
    return {"numbers": [card(session) for session in sessions], "section": "numbers"}


listing = LiveView("numbers.html", (Part("numbers", "_numbers.html"),), _load_list, "et_sessions")


async def _get(page: Page) -> SessionRow:
    async with page.db.tenant(page.tenant_id) as conn:
        return await store.get(conn, page.tenant_id, page.id("session"))


async def _load_one(page: Page) -> dict[str, Any]:
    try:
        session = await _get(page)
    except NotFound:
        # Its number had an entry already: that one goes on with the new link.
        async with page.db.tenant(page.tenant_id) as conn:
            survivor = await store.survivor(conn, page.tenant_id, page.id("session"))
            if survivor is None:
                raise
            session = await store.get(conn, page.tenant_id, survivor)
        return {"number": card(session), "survivor": card(session), "state": "moved", "section": "numbers"}
    return {
        "number": card(session),
        "survivor": None,
        "section": "numbers",
        "expected": session.metadata.get("expected_identifier"),
        **_pairing(session),
    }


def _pairing(session: SessionRow) -> dict[str, Any]:
    """Which of the page's states it is: paired, qr, code, busy, ended, idle, connect."""
    now = datetime.now(UTC)
    shown: dict[str, Any] = {"qr": None, "code": None}
    if session.status == SessionStatus.ACTIVE:
        return {**shown, "state": "paired"}
    if session.wanted == "deleted":
        return {**shown, "state": "busy"}
    if words.pairable(session):
        if words.linking(session):
            fresh = session.qr_expires_at is None or session.qr_expires_at > now
            if session.login_method == "code":
                return {**shown, "state": "code", "code": session.pairing_code, "phone": session.login_phone}
            return {**shown, "state": "qr", "qr": qr.svg(session.qr) if session.qr and fresh else None}
        return {**shown, "state": "ended" if session.status_reason or session.pairing_reason else "idle"}
    if session.status == SessionStatus.DISCONNECTED:
        return {**shown, "state": "connect"}
    return {**shown, "state": "busy"}


one = LiveView(
    "number.html",
    (
        Part("standing", "_standing.html"),
        Part("linking", "_linking.html"),
        Part("controls", "_controls.html"),
    ),
    _load_one,
    "et_sessions",
)


async def show_one(page: Page) -> web.StreamResponse:
    context = await _load_one(page)
    if context["survivor"] is not None:
        return page.go(f"{page.base}/numbers/{context['survivor']['id']}")
    return await one.show(page)


async def new(page: Page) -> web.StreamResponse:
    return await _new_form(page)


async def _new_form(page: Page, **more: Any) -> web.Response:
    async with page.db.tenant(page.tenant_id) as conn:
        workspaces = await tenants.list_workspaces(conn, page.tenant_id, None, 200)
        agents = {
            row["id"]: row["name"] for row in await tenants.list_agents(conn, page.tenant_id, None, 200)
        }
    given = page.form or {"workspace": str(workspaces[0]["id"]) if len(workspaces) == 1 else ""}
    return page.show(
        "number_new.html",
        status=422 if more else 200,
        section="numbers",
        workspaces=workspaces,
        agents=agents,
        given=given,
        errors=more,
    )


async def create(page: Page) -> web.StreamResponse:
    """Add a number and start linking it."""
    if "whatsapp" not in page.console.channels:
        raise PageError(409, "No number can be added here", "This gateway runs without the WhatsApp channel.")
    name = page.form.get("name", "").strip()
    expected = page.form.get("expected", "").strip()
    if len(name) > 200:
        return await _new_form(page, name="Use at most 200 characters.")
    metadata: dict[str, Any] = {}
    if expected:
        try:
            metadata["expected_identifier"] = phone_e164(expected)
        except Invalid:
            return await _new_form(page, expected="Write it with its country code, like +60 12-345 6789.")
    workspace = page.form.get("workspace", "")
    async with page.db.tenant(page.tenant_id) as conn:
        if workspace.isascii() and workspace.isdigit() and len(workspace) < 19:
            if await tenants.read_workspace(conn, page.tenant_id, int(workspace)) is None:
                raise NotFound(f"workspace {workspace} does not exist")
            metadata["default_workspace_id"] = int(workspace)
        session = await store.create(
            conn,
            page.tenant_id,
            "whatsapp",
            name=name or None,
            metadata=metadata,
            status=SessionStatus.PAIRING,
        )
        await store.want(conn, session.id, "connected", login_method="qr")
        await _audit(page, conn, "session_created", session.id)
    return page.go(f"{page.base}/numbers/{session.id}")


async def _audit(page: Page, conn: audit.Conn, event: audit.Event, session_id: int) -> None:
    log.info(
        "console.session",
        action=event,
        tenant_id=page.tenant_id,
        session_id=session_id,
        key_id=page.visitor.key_id,
    )
    await audit.write(
        conn,
        event,
        tenant_id=page.tenant_id,
        actor=page.visitor.actor,
        subject_type="session",
        subject_id=session_id,
    )


async def pair(page: Page) -> web.StreamResponse:
    """Show a QR code; a running one is left alone."""
    session = await _pairable(page)
    if not (words.linking(session) and session.login_method == "qr"):
        async with page.db.tenant(page.tenant_id) as conn:
            await store.want(conn, session.id, "connected", login_method="qr")
    return page.go(f"{page.base}/numbers/{session.id}")


async def pair_by_code(page: Page) -> web.StreamResponse:
    """Ask for a code that is typed into the phone."""
    session = await _pairable(page)
    try:
        phone = phone_e164(page.form.get("phone", ""))
    except Invalid:
        raise PageError(
            422,
            "That is not a phone number",
            "Write it with its country code, like +60 12-345 6789. Go back and try again.",
        ) from None
    async with page.db.tenant(page.tenant_id) as conn:
        await store.want(conn, session.id, "connected", login_method="code", phone=phone)
    return page.go(f"{page.base}/numbers/{session.id}")


async def _pairable(page: Page) -> SessionRow:
    session = await _get(page)
    if not words.pairable(session):
        told = words.standing(session)
        raise PageError(
            409,
            "This number cannot be linked now",
            f"It is {told.label.lower()}. {told.action or 'To link another one, log this one out first.'}",
        )
    return session


async def connect(page: Page) -> web.StreamResponse:
    session = await _get(page)
    if session.wanted == "deleted":
        raise PageError(409, "It is being logged out", "Wait a few seconds, then link it again.")
    return await _want(page, session, "connected")


async def disconnect(page: Page) -> web.StreamResponse:
    """Also how a pairing is given up."""
    session = await _get(page)
    if session.wanted == "deleted":
        return page.go(f"{page.base}/numbers/{session.id}")
    return await _want(page, session, "disconnected")


async def _want(page: Page, session: SessionRow, wanted: store.Wanted) -> web.StreamResponse:
    # Said again it is left alone: a running pairing must not be started over.
    if session.wanted != wanted or session.status == SessionStatus.DISCONNECTED:
        async with page.db.tenant(page.tenant_id) as conn:
            await store.want(conn, session.id, wanted)
    return page.go(f"{page.base}/numbers/{session.id}")


async def confirm_logout(page: Page) -> web.StreamResponse:
    return page.show("number_logout.html", section="numbers", number=card(await _get(page)))


async def logout(page: Page) -> web.StreamResponse:
    """Log out on the channel, then forget keys and credentials. Messages stay."""
    session = await _get(page)
    async with page.db.tenant(page.tenant_id) as conn:
        if session.wanted != "deleted":
            await _audit(page, conn, "session_deleted", session.id)
            await store.want(conn, session.id, "deleted")
    return page.go(f"{page.base}/numbers/{session.id}", "It is being logged out. Its conversations are kept.")
