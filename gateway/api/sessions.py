"""Channel sessions: made, listed, changed, started, stopped, ended. Wishes are written as rows; their owner acts on them."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, Field

from core import log_in, sending
from core.channel import ChannelKind, LogIn, SessionStatus
from core.errors import Invalid, InvalidField
from core.identity import address_of, external_id
from core.store import audit, credentials
from core.store import sessions as store
from gateway.api.models import (
    Body,
    ChannelName,
    Id,
    JsonObject,
    Name,
    NoBody,
    NoQuery,
)
from gateway.api.problems import invalid
from gateway.api.routing import Call, Reply, Routes
from gateway.api.session_views import SUBJECT, Session, SessionDetail, detail, read_session, view

routes = Routes("sessions")

DELETE_WAIT_SECONDS = 8.0


def _proxy(value: str) -> str:
    parts = urlsplit(value)
    try:
        usable = parts.scheme in ("http", "https", "socks5") and parts.hostname and parts.port
    except ValueError:
        usable = None
    if not usable:
        raise ValueError("must be http://, https:// or socks5:// with host and port")
    return value


Proxy = Annotated[str, Field(max_length=500), AfterValidator(_proxy)]


class NewSession(Body):
    channel_type: ChannelName
    name: Name | None = None
    default_workspace_id: Id | None = None
    expected_identifier: Annotated[str, Field(min_length=1, max_length=320)] | None = Field(
        None, description="Pairing any other number is undone."
    )
    proxy: Proxy | None = None
    settings: JsonObject = Field(default_factory=dict)
    credentials: JsonObject | None = Field(
        None,
        description="Encrypted at rest, never shown again. Channels that log in with them (email, Telegram) check them"
        " on the spot. WhatsApp by webhook: `app_secret`, `verify_token`.",
    )


class SessionChange(Body):
    name: Name | None = None
    default_workspace_id: Id | None = None
    proxy: Proxy | None = None
    settings: JsonObject | None = None
    credentials: JsonObject | None = Field(None, description="Replaces all that are stored.")


def split_proxy(proxy: str) -> tuple[str, str | None]:
    """What may be shown of a proxy, and the whole of it when it holds a password (that is a credential)."""
    parts = urlsplit(proxy)
    if "@" not in parts.netloc:
        return proxy, None
    shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return shown, proxy


@routes.add(
    "GET",
    "/sessions/{tenant_id}",
    access="path",
    scope=("read", "sessions"),
    returns={200: list[Session]},
)
async def listed(call: Call[NoQuery, NoBody]) -> list[Session]:
    """List the tenant's sessions, each with what a person must do now."""
    async with call.db.tenant(call.tenant_id) as conn:
        return [view(session) for session in await store.list_all(conn, call.tenant_id)]


@routes.add(
    "POST",
    "/sessions/{tenant_id}",
    access="path",
    scope="sessions",
    returns={201: SessionDetail},
    problems=(409,),
)
async def create(call: Call[NoQuery, NewSession]) -> Reply:
    """Make a session. Making does not start it: `connect`, `qr` or `pairing-code` does.

    A channel that logs in with credentials checks them first: 422 names the field and what the server said. An address that
    the tenant has already and that is not live goes on with the new credentials, with its conversations; a live one is 409.
    A WhatsApp session that is fed by the webhook alone is never started.
    """
    body = call.body
    kind = call.services.registry.get(body.channel_type)
    if kind is None:
        known = ", ".join(sorted(call.services.registry)) or "none"
        raise invalid(
            "channel_type", f"{body.channel_type!r} is not a channel of this gateway; it has: {known}"
        )
    if body.default_workspace_id is not None:
        await call.own("workspace", "et_workspaces", body.default_workspace_id)
    secrets = dict(body.credentials or {})
    settings = _settings(call, body.channel_type, body.settings)
    metadata: JsonObject = {"settings": settings} if settings else {}
    if body.default_workspace_id is not None:
        metadata["default_workspace_id"] = body.default_workspace_id
    if body.expected_identifier is not None:
        metadata["expected_identifier"] = _normal(kind, body.expected_identifier)
    proxy: str | None = None
    if body.proxy is not None:
        metadata["proxy"], proxy = split_proxy(body.proxy)
    found = await _log_in(kind, body.credentials, metadata, body.proxy)
    if found is not None:
        secrets = found.credentials
        expected = metadata.pop("expected_identifier", None)
        if expected is not None and expected.casefold() != found.identifier.casefold():
            raise invalid("credentials", f"they are those of {found.identifier}, and {expected} was expected")
    if proxy is not None:
        secrets = {**secrets, log_in.PROXY: proxy}
    ids = {"tenant_id": int(call.tenant_id)}
    # As worker, inside one transaction: the API's role cannot touch credentials. The tenant was checked before.
    async with call.db.worker() as conn, conn.transaction():
        if found is not None:
            found = LogIn(found.identifier, secrets, found.name)
            session = await log_in.create(
                conn, call.services.keys, **ids, kind=kind, found=found, name=body.name, metadata=metadata
            )
        else:
            session = await store.create(
                conn,
                call.tenant_id,
                body.channel_type,
                name=body.name,
                metadata=metadata,
                status=SessionStatus.PAIRING,
            )
            if secrets:
                await credentials.put(
                    conn, call.services.keys, **ids, session_id=session.id, credentials=secrets
                )
        await _audit(call, conn, "session_created", session.id)
    return Reply(201, await detail(call, session.id))


async def _log_in(
    kind: ChannelKind, given: JsonObject | None, metadata: JsonObject, proxy: str | None
) -> LogIn | None:
    """What the channel says to these credentials; None when it is not one that logs in with any."""
    if kind.check_credentials is None:
        return None
    if not given:
        fields = ", ".join(f"credentials.{log_in.name_of(field)}" for field in kind.form if field.required)
        raise InvalidField(
            "credentials",
            f"a {kind.name} session logs in with them" + (f"; it takes {fields}" if fields else ""),
        )
    return await log_in.check(kind, given, {**metadata, "proxy": proxy} if proxy is not None else metadata)


def _settings(call: Call[Any, Any], channel: str, settings: JsonObject) -> JsonObject:
    """As the channel takes them; one that names no settings of its own takes whatever it is given."""
    kind = call.services.registry.get(channel)
    own = {name: value for name, value in settings.items() if name != "sending"}
    if kind is not None and kind.settings is not None:
        own = kind.settings(own)
    return own | {"sending": sending.check(settings["sending"])} if "sending" in settings else own


def _normal(kind: ChannelKind, address: str) -> str:
    if kind.check_credentials is not None:
        return address.strip()  # the channel's own way of naming an account, which no customer has: @shop_bot
    try:
        return address_of(external_id(kind.name, address))
    except Invalid as error:
        raise invalid("expected_identifier", error.detail) from None


async def _audit(call: Call[Any, Any], conn: audit.Conn, event: audit.Event, session_id: int) -> None:
    await audit.write(
        conn,
        event,
        tenant_id=call.tenant_id,
        actor=call.caller.actor,
        subject_type="session",
        subject_id=session_id,
    )


@routes.add(
    "GET",
    "/sessions/{tenant_id}/{session_id}",
    access="path",
    subject=SUBJECT,
    scope=("read", "sessions"),
    returns={200: SessionDetail},
)
async def read(call: Call[NoQuery, NoBody]) -> SessionDetail:
    """Read a session, with counters."""
    return await detail(call, call.id("session_id"))


@routes.add(
    "PATCH",
    "/sessions/{tenant_id}/{session_id}",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: SessionDetail},
)
async def change(call: Call[NoQuery, SessionChange]) -> SessionDetail:
    """Change name, workspace, proxy, settings or credentials; null takes a workspace or proxy away.

    `settings` and `credentials` replace all that were there. New credentials are checked as when the session was made, and
    must be of the same account. A live session takes a new proxy or new credentials up when it is connected again; one that
    stands still because its old ones were refused tries them at once.
    """
    body = call.body
    session_id = call.id("session_id")
    given = body.model_fields_set
    if body.default_workspace_id is not None:
        await call.own("workspace", "et_workspaces", body.default_workspace_id)
    session = await read_session(call, session_id)
    metadata: JsonObject = {}
    if "default_workspace_id" in given:
        metadata["default_workspace_id"] = body.default_workspace_id
    if body.settings is not None:
        metadata["settings"] = _settings(call, session.channel_type, body.settings)
    whole: str | None = None
    if "proxy" in given:
        metadata["proxy"], whole = split_proxy(body.proxy) if body.proxy is not None else (None, None)
    replaced = body.credentials
    kind = call.services.registry.get(session.channel_type)
    if replaced is not None and kind is not None:
        found = await _log_in(kind, replaced, {**session.metadata, **metadata}, body.proxy)
        if found is not None:
            log_in.same_account(session, found)
            replaced = found.credentials
    async with call.db.worker() as conn, conn.transaction():
        await store.patch(conn, call.tenant_id, session_id, name=body.name, metadata=metadata)
        if replaced is not None or "proxy" in given:
            ids = {"tenant_id": int(call.tenant_id), "session_id": session_id}
            secrets = (
                await log_in.stored(conn, call.services.keys, session)
                if replaced is not None
                else await credentials.get(conn, call.services.keys, **ids, lock=True)
            )
            old_proxy = secrets.pop(log_in.PROXY, None)
            if replaced is not None:
                secrets = dict(replaced)
            proxy = whole if "proxy" in given else old_proxy
            if proxy is not None:
                secrets[log_in.PROXY] = proxy
            await credentials.put(conn, call.services.keys, **ids, credentials=secrets)
        if replaced is not None:
            await _audit(call, conn, "session_credentials_changed", session_id)
            if kind is not None and kind.check_credentials is not None:
                await log_in.try_again(conn, session)
    return await detail(call, session_id)


@routes.add(
    "POST",
    "/sessions/{tenant_id}/{session_id}/connect",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: Session},
)
async def connect(call: Call[NoQuery, NoBody]) -> Session:
    """Start the session and keep it alive. Again: no error."""
    return await _want(call, "connected")


@routes.add(
    "POST",
    "/sessions/{tenant_id}/{session_id}/disconnect",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: Session},
)
async def disconnect(call: Call[NoQuery, NoBody]) -> Session:
    """Stop the session; it stays paired. Again: no error."""
    return await _want(call, "disconnected")


@routes.add(
    "DELETE",
    "/sessions/{tenant_id}/{session_id}",
    access="path",
    subject=SUBJECT,
    scope="sessions",
    returns={200: Session, 202: Session},
)
async def remove(call: Call[NoQuery, NoBody]) -> Reply:
    """Log out on the channel, then forget keys and credentials. Messages stay.

    200: done. 202: the session's owner has not come to it yet; the session then becomes `logged_out`, reason `deleted`.
    """
    session_id = call.id("session_id")
    async with call.db.worker() as conn:
        await _audit(call, conn, "session_deleted", session_id)
    subscription = call.db.hub.subscribe("et_sessions")
    try:
        await _want(call, "deleted")
        deadline = time.monotonic() + DELETE_WAIT_SECONDS
        while True:
            async with call.db.tenant(call.tenant_id) as conn:
                session = await store.get(conn, call.tenant_id, session_id)
            if session.wanted != "deleted":
                return Reply(200, view(session))
            left = deadline - time.monotonic()
            if left <= 0:
                return Reply(202, view(session))
            await subscription.wait(min(left, 1.0))
    finally:
        subscription.close()


async def _want(call: Call[NoQuery, NoBody], wanted: store.Wanted) -> Session:
    session_id = call.id("session_id")
    async with call.db.tenant(call.tenant_id) as conn:
        session = await store.get(conn, call.tenant_id, session_id)
        # Said again it is left alone: a running pairing must not be started over.
        if session.wanted != wanted:
            await store.want(conn, session_id, wanted)
            session = await store.get(conn, call.tenant_id, session_id)
    return view(session)
