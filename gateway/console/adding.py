"""Adding a session, and entering its credentials anew: the fields are the channel's own, checked on the spot.

What was typed as a secret is never in a page again, not even in the form that comes back with an error.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from core import log_in
from core.channel import ChannelKind, CredentialField, Json, SessionStatus
from core.errors import Conflict, Invalid, InvalidField, NotFound, ThrottledError
from core.identity import phone_e164
from core.store import sessions as store
from core.store import tenants
from core.store.sessions import SessionRow
from gateway.console import kinds, words
from gateway.console.channels import card, note
from gateway.console.page import Page, PageError

PREFIX = "credentials."
"""Before a field's name in the form, as the API's problems have it."""


async def new(page: Page) -> web.StreamResponse:
    """The form of the channel that `?channel=` names; without it, which channel (when there is a choice)."""
    wanted = page.request.query.get("channel")
    if wanted is None and len(page.console.kinds) != 1:
        offered = [{"name": name, "words": kinds.of(name)} for name in page.console.kinds]
        return page.show("channel_choose.html", section="channels", offered=offered)
    return await _form(page, _kind(page, wanted or next(iter(page.console.kinds))))


def _kind(page: Page, name: str) -> ChannelKind:
    kind = page.console.kinds.get(name)
    if kind is None:
        raise PageError(
            404, "There is no such channel here", "This gateway runs without it. Choose another one."
        )
    return kind


async def _form(page: Page, kind: ChannelKind, errors: dict[str, str] | None = None) -> web.Response:
    async with page.db.tenant(page.tenant_id) as conn:
        workspaces = await tenants.list_workspaces(conn, page.tenant_id, None, 200)
        agents = {
            row["id"]: row["name"] for row in await tenants.list_agents(conn, page.tenant_id, None, 200)
        }
    given = page.form or {"workspace": str(workspaces[0]["id"]) if len(workspaces) == 1 else ""}
    return page.show(
        "channel_new.html",
        status=422 if errors else 200,
        section="channels",
        kind=kind.name,
        spoken=kinds.of(kind.name),
        by_form=kind.check_credentials is not None,
        rows=_rows(kind, given, errors or {}, fresh=True),
        workspaces=workspaces,
        agents=agents,
        given=given,
        errors=errors or {},
        several=len(page.console.kinds) > 1,
    )


def _rows(
    kind: ChannelKind, given: dict[str, str], errors: dict[str, str], *, fresh: bool
) -> list[list[dict[str, Any]]]:
    """The channel's fields for the page; those of one server (`imap.host`, `imap.port`) stand in one row."""
    rows: list[list[dict[str, Any]]] = []
    place: tuple[str, ...] | None = None
    for field in kind.form:
        if len(field.path) == 1 or field.path[:-1] != place:
            rows.append([])
        place = field.path[:-1]
        rows[-1].append(_shown(field, given, errors, fresh=fresh))
    return rows


def _shown(
    field: CredentialField, given: dict[str, str], errors: dict[str, str], *, fresh: bool
) -> dict[str, Any]:
    name = PREFIX + log_in.name_of(field)
    value = given.get(name, (field.default or "") if fresh else "")
    return {
        "name": name,
        "id": name.replace(".", "-"),
        "label": field.label,
        "kind": field.kind,
        "required": field.required and fresh,
        "choices": field.choices,
        "help": field.help,
        "value": "" if field.kind == "secret" else value,
        "error": errors.get(name),
    }


async def create(page: Page) -> web.StreamResponse:
    """Add a session and start it: the link with a phone, or the connection."""
    kind = _kind(page, page.form.get("channel", ""))
    name = page.form.get("name", "").strip()
    if len(name) > 200:
        return await _form(page, kind, {"name": "Use at most 200 characters."})
    metadata: dict[str, Any] = {}
    workspace = page.form.get("workspace", "")
    if workspace.isascii() and workspace.isdigit() and len(workspace) < 19:
        async with page.db.tenant(page.tenant_id) as conn:
            if await tenants.read_workspace(conn, page.tenant_id, int(workspace)) is None:
                raise NotFound(f"workspace {workspace} does not exist")
        metadata["default_workspace_id"] = int(workspace)
    if kind.check_credentials is None:
        return await _create_pairing(page, kind, name, metadata)
    given, wrong = log_in.from_form(kind, _values(page))
    if wrong:
        return await _form(page, kind, {PREFIX + field: text for field, text in wrong.items()})
    try:
        found = await log_in.check(kind, given, metadata)
        # As worker: the console's role cannot touch credentials. The tenant was checked before.
        async with page.db.worker() as conn, conn.transaction():
            session = await log_in.create(
                conn,
                page.console.keys,
                tenant_id=page.tenant_id,
                kind=kind,
                found=found,
                name=name or None,
                metadata=metadata,
            )
            await store.want(conn, session.id, "connected")
            await note(page, conn, "session_created", session.id)
    except (InvalidField, ThrottledError, Conflict) as error:
        return await _form(page, kind, _errors(kind, error))
    return page.go(
        f"{page.base}/channels/{session.id}", f"{words.sentence(found.identifier + ' was accepted')}"
    )


async def _create_pairing(
    page: Page, kind: ChannelKind, name: str, metadata: dict[str, Any]
) -> web.StreamResponse:
    expected = page.form.get("expected", "").strip()
    if expected:
        try:
            metadata["expected_identifier"] = phone_e164(expected)
        except Invalid:
            wrong = {"expected": "Write it with its country code, like +60 12-345 6789."}
            return await _form(page, kind, wrong)
    async with page.db.tenant(page.tenant_id) as conn:
        session = await store.create(
            conn,
            page.tenant_id,
            kind.name,
            name=name or None,
            metadata=metadata,
            status=SessionStatus.PAIRING,
        )
        await store.want(conn, session.id, "connected", login_method="qr")
        await note(page, conn, "session_created", session.id)
    return page.go(f"{page.base}/channels/{session.id}")


def _values(page: Page) -> dict[str, str]:
    return {name.removeprefix(PREFIX): value for name, value in page.form.items() if name.startswith(PREFIX)}


def _errors(kind: ChannelKind, error: InvalidField | ThrottledError | Conflict) -> dict[str, str]:
    """By the form's field, or `form` when it is about none of them."""
    if not isinstance(error, InvalidField):
        text = words.sentence(error.detail)
        return {"form": f"{text} {words.sentence(error.action)}" if error.action else text}
    known = {PREFIX + log_in.name_of(field) for field in kind.form}
    return {error.field if error.field in known else "form": words.sentence(error.reason)}


# ---- new credentials for a session


async def credentials_form(page: Page) -> web.StreamResponse:
    session, kind, stored = await _session(page)
    return _anew(page, session, kind, stored)


async def _session(page: Page) -> tuple[SessionRow, ChannelKind, Json]:
    """The session of the path, its channel, and what is kept for it: for the channel's check, never for a page."""
    async with page.db.tenant(page.tenant_id) as conn:
        session = await store.get(conn, page.tenant_id, page.id("session"))
    kind = page.console.kinds.get(session.channel_type)
    if kind is None or kind.check_credentials is None:
        raise PageError(
            409,
            "It has no credentials",
            "Sessions of this channel do not log in with any, or not through this gateway.",
        )
    async with page.db.worker() as conn:
        return session, kind, await log_in.stored(conn, page.console.keys, session)


def _anew(
    page: Page, session: SessionRow, kind: ChannelKind, stored: Json, errors: dict[str, str] | None = None
) -> web.Response:
    return page.show(
        "channel_credentials.html",
        status=422 if errors else 200,
        section="channels",
        session=card(page, session),
        rows=_rows(kind, page.form, errors or {}, fresh=not stored),
        kept=bool(stored),
        errors=errors or {},
    )


async def change_credentials(page: Page) -> web.StreamResponse:
    """Check and keep new credentials, and connect. A field that is left empty stays as it is."""
    session, kind, stored = await _session(page)
    proxy = stored.pop(log_in.PROXY, session.metadata.get("proxy"))
    given, wrong = log_in.from_form(kind, _values(page), stored=stored or None)
    if wrong:
        errors = {PREFIX + field: text for field, text in wrong.items()}
        return _anew(page, session, kind, stored, errors)
    try:
        found = await log_in.check(
            kind, given, {**session.metadata, "proxy": proxy} if proxy else session.metadata
        )
        async with page.db.worker() as conn, conn.transaction():
            await log_in.renew(conn, page.console.keys, session, found)
            await store.want(conn, session.id, "connected")
            await note(page, conn, "session_credentials_changed", session.id)
    except (InvalidField, ThrottledError) as error:
        return _anew(page, session, kind, stored, _errors(kind, error))
    return page.go(f"{page.base}/channels/{session.id}", "The new credentials were accepted.")
