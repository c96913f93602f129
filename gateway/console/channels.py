"""The sessions of a tenant, one of each channel or many: listed, linked by QR or code, connected, disconnected, logged out.

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
from core.store import audit, leases, requests, session_moves
from core.store import sessions as store
from core.store.sessions import SessionRow
from gateway.console import kinds, qr, words
from gateway.console.live import LiveView, Part
from gateway.console.page import Page, PageError

log = logs.get(part="console")


def card(page: Page, session: SessionRow, owner: str | None = None) -> dict[str, Any]:
    told = page.console.standing(session)
    spoken = kinds.of(session.channel_type)
    return {
        "id": session.id,
        "title": words.title(session),
        "address": words.own_address(session),
        "channel": spoken.label,
        "thing": spoken.thing,
        "icon": spoken.icon,
        "status": session.status.value,
        "last_connected_at": session.last_connected_at,
        "owner": owner,
        "by_form": _by_form(page, session),
        "label": told.label,
        "tone": told.tone,
        "reason": told.reason,
        "action": told.action,
        "step": told.step,
    }


def _by_form(page: Page, session: SessionRow) -> bool:
    kind = page.console.kinds.get(session.channel_type)
    return kind is not None and kind.check_credentials is not None


async def _load_list(page: Page) -> dict[str, Any]:
    async with page.db.tenant(page.tenant_id) as conn:
        sessions = await store.list_all(conn, page.tenant_id)
        owners = await leases.holders(conn, page.tenant_id)
        unknown = await requests.count(conn, page.tenant_id, "unknown")
    return {
        "sessions": [card(page, session, owners.get(session.id)) for session in sessions],
        "several": len(set(owners.values())) > 1,
        "unknown": unknown,
        "section": "channels",
    }


listing = LiveView("channels.html", (Part("sessions", "_channels.html"),), _load_list, "et_sessions")


async def _get(page: Page) -> SessionRow:
    async with page.db.tenant(page.tenant_id) as conn:
        return await store.get(conn, page.tenant_id, page.id("session"))


async def _load_one(page: Page) -> dict[str, Any]:
    try:
        session = await _get(page)
    except NotFound:
        # Its number had an entry already: that one goes on with the new link.
        async with page.db.tenant(page.tenant_id) as conn:
            survivor = await session_moves.survivor(conn, page.tenant_id, page.id("session"))
            if survivor is None:
                raise
            session = await store.get(conn, page.tenant_id, survivor)
        shown = card(page, session)
        return {"session": shown, "survivor": shown, "state": "moved", "section": "channels"}
    async with page.db.tenant(page.tenant_id) as conn:
        owner = await leases.holder(conn, session.id)
    shown = card(page, session, owner)
    return {
        "session": shown,
        "survivor": None,
        "section": "channels",
        "expected": session.metadata.get("expected_identifier"),
        **_state(session, by_form=shown["by_form"], pairs=page.console.pairs(session.channel_type)),
    }


def _state(session: SessionRow, *, by_form: bool, pairs: bool) -> dict[str, Any]:
    """Which of the page's states it is: paired, qr, code, busy, ended, idle, connect, credentials."""
    now = datetime.now(UTC)
    shown: dict[str, Any] = {"qr": None, "code": None}
    if session.status == SessionStatus.ACTIVE:
        return {**shown, "state": "paired"}
    if session.wanted == "deleted":
        return {**shown, "state": "busy"}
    if by_form and words.needs_credentials(session):
        return {**shown, "state": "credentials"}
    if pairs and words.pairable(session):
        if words.linking(session):
            fresh = session.qr_expires_at is None or session.qr_expires_at > now
            if session.login_method == "code":
                return {**shown, "state": "code", "code": session.pairing_code, "phone": session.login_phone}
            return {**shown, "state": "qr", "qr": qr.svg(session.qr) if session.qr and fresh else None}
        return {**shown, "state": "ended" if session.status_reason or session.pairing_reason else "idle"}
    if session.status == SessionStatus.DISCONNECTED and not (by_form and session.wanted == "connected"):
        return {**shown, "state": "connect"}
    return {**shown, "state": "busy"}


one = LiveView(
    "channel.html",
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
        return page.go(f"{page.base}/channels/{context['survivor']['id']}")
    return await one.show(page)


async def note(page: Page, conn: audit.Conn, event: audit.Event, session_id: int) -> None:
    """To the log and the audit log."""
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
    return page.go(f"{page.base}/channels/{session.id}")


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
    return page.go(f"{page.base}/channels/{session.id}")


async def _pairable(page: Page) -> SessionRow:
    session = await _get(page)
    if not (page.console.pairs(session.channel_type) and words.pairable(session)):
        told = page.console.standing(session)
        raise PageError(
            409,
            f"This {kinds.of(session.channel_type).thing} cannot be linked now",
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
        return page.go(f"{page.base}/channels/{session.id}")
    return await _want(page, session, "disconnected")


async def _want(page: Page, session: SessionRow, wanted: store.Wanted) -> web.StreamResponse:
    # Said again it is left alone: a running pairing must not be started over.
    if session.wanted != wanted or session.status == SessionStatus.DISCONNECTED:
        async with page.db.tenant(page.tenant_id) as conn:
            await store.want(conn, session.id, wanted)
    return page.go(f"{page.base}/channels/{session.id}")


async def confirm_logout(page: Page) -> web.StreamResponse:
    return page.show("channel_logout.html", section="channels", session=card(page, await _get(page)))


async def logout(page: Page) -> web.StreamResponse:
    """Log out on the channel, then forget keys and credentials. Messages stay."""
    session = await _get(page)
    async with page.db.tenant(page.tenant_id) as conn:
        if session.wanted != "deleted":
            await note(page, conn, "session_deleted", session.id)
            await store.want(conn, session.id, "deleted")
    return page.go(
        f"{page.base}/channels/{session.id}", "It is being logged out. Its conversations are kept."
    )
