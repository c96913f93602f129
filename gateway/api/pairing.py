"""Pairing a session: the current QR in five forms, and phone codes.

Everything goes through rows: the gateway that runs the session shows its codes there, any gateway serves them.
"""

from __future__ import annotations

import io
import time
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Literal

import segno
from aiohttp import web
from pydantic import Field

from core.channel import SessionStatus
from core.database import Subscription, is_unavailable
from core.errors import Invalid, NotFound
from core.identity import phone_e164
from core.store import session_moves
from core.store import sessions as store
from core.store.sessions import SessionRow
from gateway.api.feed import FEED
from gateway.api.models import Body, NoBody, NoQuery, View
from gateway.api.problems import Problem, invalid
from gateway.api.routing import Call, Routes
from gateway.api.session_views import SUBJECT, action_of
from gateway.api.sse import HEARTBEAT_SECONDS, Stream

routes = Routes("sessions")

QR_WAIT_SECONDS = 30.0
CODE_WAIT_SECONDS = 30.0
STREAM_SECONDS = 600.0
POLL_SECONDS = 1.0
"""Notifications are hints; this is how long a lost one delays."""
FORMS = ("application/json", "image/png", "image/svg+xml", "text/plain", "text/event-stream")


class Qr(View):
    also: ClassVar[dict[str, str]] = {
        "image/png": "The picture.",
        "image/svg+xml": "The picture.",
        "text/plain": "Blocks for a terminal.",
        "text/event-stream": "`qr` for every new code, then `paired` (with the surviving `session_id`) or `timeout`.",
    }

    status: Literal["pairing"]
    qr: str = Field(description="What the picture says.")
    image: str = Field(description="The picture as a data URI (PNG).")
    expires_at: datetime | None


class Phone(Body):
    phone: Annotated[str, Field(min_length=5, max_length=32)]


class PairingCode(View):
    code: str
    expires_at: datetime | None


class Watch:
    """Follows one session's rows: woken by the hub, polling for what a lost notification would have said."""

    def __init__(self, call: Call[NoQuery, NoBody] | Call[NoQuery, Phone]) -> None:
        self._call = call
        self.session_id = call.id("session_id")
        self._subscription: Subscription = call.db.hub.subscribe("et_sessions")

    async def look(self) -> SessionRow | None:
        """The session now; None when it is gone (its number had another session, which took it over)."""
        call = self._call
        try:
            async with call.db.tenant(call.tenant_id) as conn:
                return await store.get(conn, call.tenant_id, self.session_id)
        except NotFound:
            return None

    async def survivor(self) -> int | None:
        call = self._call
        async with call.db.worker() as conn:
            return await session_moves.survivor(conn, call.tenant_id, self.session_id)

    async def want(self, method: Literal["qr", "code"], phone: str | None = None) -> None:
        call = self._call
        async with call.db.tenant(call.tenant_id) as conn:
            await store.want(conn, self.session_id, "connected", login_method=method, phone=phone)

    async def wait(self, seconds: float) -> None:
        await self._subscription.wait(min(seconds, POLL_SECONDS))

    def close(self) -> None:
        self._subscription.close()


@routes.add(
    "GET",
    "/sessions/{tenant_id}/{session_id}/qr",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: Qr},
    problems=(406, 409),
    headers=(("Accept", "Which form of the QR: " + ", ".join(FORMS) + "."),),
)
async def qr(call: Call[NoQuery, NoBody]) -> web.StreamResponse | Qr:
    """The current QR, starting the pairing when needed.

    The form is chosen by `Accept`. 409 when the session is already paired.
    """
    form = _form(call.request)
    watch = Watch(call)
    try:
        session = await watch.look()
        if session is None:
            raise NotFound(f"session {watch.session_id} does not exist")
        _pairable(call, session)
        if not _running(session, "qr"):
            await watch.want("qr")
        if form == "text/event-stream":
            return await _stream(call, watch)
        session = await _first_qr(watch)
    finally:
        watch.close()
    assert session.qr is not None
    code = segno.make_qr(session.qr, error="L")
    if form == "application/json":
        return _json(session)
    return _drawn(code, form)


def _form(request: web.Request) -> str:
    """The first of the forms the caller names; what it does not name is JSON."""
    accepted = request.headers.get("Accept", "")
    wanted = [part.partition(";")[0].strip().lower() for part in accepted.split(",")]
    for media in wanted:
        if media in FORMS:
            return media
        if media in ("", "*/*", "application/*"):
            return "application/json"
        if media == "image/*":
            return "image/png"
        if media == "text/*":
            return "text/plain"
    raise Problem(406, "not_acceptable", f"a QR comes as {', '.join(FORMS)}")


def _pairable(call: Call[NoQuery, NoBody] | Call[NoQuery, Phone], session: SessionRow) -> None:
    kind = call.services.registry.get(session.channel_type)
    if session.status == SessionStatus.ACTIVE or (
        session.status == SessionStatus.CONNECTING and not session.pending and session.login_method is None
    ):
        raise Problem(
            409,
            "already_paired",
            f"session {session.id} is paired with {session.identifier}; delete it to pair another number",
        )
    unpaired = session.pending or session.pairing_state in ("timeout", "failed")
    if session.status == SessionStatus.DISCONNECTED and not unpaired:
        raise Problem(
            409,
            "already_paired",
            f"session {session.id} is paired with {session.identifier}; connect it instead",
            action="connect",
        )
    if session.status == SessionStatus.SUSPENDED:
        raise Problem(
            409,
            "session_suspended",
            f"session {session.id} is suspended: {action_of(session)}",
            action=action_of(session),
        )
    if session.channel_type != "whatsapp" and (kind is None or kind.factory is None):
        raise Problem(409, "not_pairable", f"a {session.channel_type} session is not paired by QR or code")
    if session.wanted == "deleted":
        raise Problem(409, "being_deleted", f"session {session.id} is being deleted; try again in a moment")


def _running(session: SessionRow, method: Literal["qr", "code"]) -> bool:
    """A pairing of this kind is under way: asking for its code must not start it over."""
    return (
        session.wanted == "connected"
        and session.login_method == method
        and session.pairing_state not in ("timeout", "failed", "paired")
    )


def _fresh(session: SessionRow) -> bool:
    return session.qr is not None and (
        session.qr_expires_at is None or session.qr_expires_at > datetime.now(UTC)
    )


async def _first_qr(watch: Watch) -> SessionRow:
    deadline = time.monotonic() + QR_WAIT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        session = await watch.look()
        if session is None:
            raise Problem(409, "already_paired", "the session was paired meanwhile")
        if _fresh(session):
            return session
        _ended(session)
        await watch.wait(left)
    raise Problem(
        503,
        "no_qr",
        "no QR appeared: no gateway that may run this session took it up, or the channel cannot be reached;"
        " look at /health, then try again",
        headers={"Retry-After": "5"},
    )


def _ended(session: SessionRow) -> None:
    if session.status == SessionStatus.ACTIVE or session.pairing_state == "paired":
        raise Problem(409, "already_paired", f"session {session.id} is paired with {session.identifier}")
    if session.pairing_state in ("failed", "timeout") and session.wanted != "connected":
        raise Problem(
            409,
            session.pairing_reason or f"pairing_{session.pairing_state}",
            f"the pairing ended: {session.pairing_reason or session.pairing_state}",
            action=action_of(session),
        )


def _json(session: SessionRow) -> Qr:
    assert session.qr is not None
    image = segno.make_qr(session.qr, error="L").png_data_uri(scale=6, border=4)
    return Qr(status="pairing", qr=session.qr, image=image, expires_at=session.qr_expires_at)


def _drawn(code: segno.QRCode, form: str) -> web.Response:
    if form == "text/plain":
        text = io.StringIO()
        code.terminal(text, compact=True, border=2)
        body, kind = text.getvalue().encode(), "text/plain"
    else:
        out = io.BytesIO()
        if form == "image/png":
            code.save(out, kind="png", scale=6, border=4)
        else:
            code.save(out, kind="svg", scale=6, border=4, light="white")
        body, kind = out.getvalue(), form
    charset = "utf-8" if kind == "text/plain" else None
    return web.Response(
        body=body, content_type=kind, charset=charset, headers={"Cache-Control": "no-store", "Vary": "Accept"}
    )


async def _stream(call: Call[NoQuery, NoBody], watch: Watch) -> web.StreamResponse:
    """`qr` for every new code until the pairing ends, one way or the other."""
    stream = await Stream.open(call.request)
    closing = call.request.app[FEED].closing
    shown: str | None = None
    deadline = time.monotonic() + STREAM_SECONDS
    beat = time.monotonic() + HEARTBEAT_SECONDS
    while not closing.is_set():
        try:
            session = await watch.look()
            end = await _end_of(watch, session)
        except Exception as error:
            if not is_unavailable(error):
                raise
            await watch.wait(POLL_SECONDS)  # the database is away: the code on the screen may still work
            await stream.heartbeat()
            continue
        if end is not None:
            await stream.send(*end)
            break
        assert session is not None
        if session.qr is not None and session.qr != shown and _fresh(session):
            shown = session.qr
            await stream.send("qr", _json(session).model_dump(mode="json"))
        now = time.monotonic()
        if now > deadline:
            await stream.send("timeout", {"reason": "stream_timeout", "session_id": watch.session_id})
            break
        if now > beat:
            beat = now + HEARTBEAT_SECONDS
            await stream.heartbeat()
        await watch.wait(POLL_SECONDS)
    return stream.response


async def _end_of(watch: Watch, session: SessionRow | None) -> tuple[str, dict[str, object]] | None:
    if session is None:
        survivor = await watch.survivor()
        if survivor is None:
            return "timeout", {"reason": "deleted", "session_id": watch.session_id}
        return "paired", {"session_id": survivor}
    if session.status == SessionStatus.ACTIVE or session.pairing_state == "paired":
        return "paired", {"session_id": session.id, "identifier": session.identifier}
    if session.pairing_state in ("timeout", "failed") and session.wanted != "connected":
        reason = session.pairing_reason or session.pairing_state
        return "timeout", {"reason": reason, "session_id": session.id, "action": action_of(session)}
    return None


@routes.add(
    "POST",
    "/sessions/{tenant_id}/{session_id}/pairing-code",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: PairingCode},
    problems=(409, 502),
)
async def pairing_code(call: Call[NoQuery, Phone]) -> PairingCode:
    """A code to type into the phone (Linked devices → Link with phone number)."""
    try:
        phone = phone_e164(call.body.phone)
    except Invalid as error:
        raise invalid("phone", error.detail) from None
    watch = Watch(call)
    try:
        session = await watch.look()
        if session is None:
            raise NotFound(f"session {watch.session_id} does not exist")
        _pairable(call, session)
        await watch.want("code", phone)
        generation = session.generation
        deadline = time.monotonic() + CODE_WAIT_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            session = await watch.look()
            if session is None:
                raise Problem(409, "already_paired", "the session was paired meanwhile")
            if session.generation > generation and session.pairing_code is not None:
                return PairingCode(code=session.pairing_code, expires_at=session.pairing_code_expires_at)
            _ended(session)
            await watch.wait(left)
    finally:
        watch.close()
    raise Problem(
        503,
        "no_code",
        "no code appeared: no gateway that may run this session took it up, or the channel cannot be reached;"
        " look at /health, then try again",
        headers={"Retry-After": "5"},
    )
