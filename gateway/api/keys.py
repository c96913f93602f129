"""API keys: made, listed, changed and revoked. The key itself is shown once, in the answer that makes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from asyncpg import Record
from pydantic import AfterValidator, Field

from core.store import audit
from core.store import keys as store
from gateway.api.auth import Scope, new_key
from gateway.api.models import Body, Id, Moment, Name, NoBody, NoQuery, Page, PageQuery, View
from gateway.api.paging import decode_id, page
from gateway.api.problems import invalid, not_found
from gateway.api.routing import KEYS, Call, Reply, Routes, Subject

routes = Routes("keys")
SUBJECT = Subject("key", "key_id", "et_api_keys")


def _in_future(value: datetime) -> datetime:
    if value <= datetime.now(UTC):
        raise ValueError("lies in the past; such a key could never be used")
    return value


Expiry = Annotated[Moment, AfterValidator(_in_future)]
Scopes = Annotated[list[Scope], Field(min_length=1, max_length=4)]


class Key(View):
    id: int
    tenant_id: int | None = Field(description="Null: a platform key.")
    name: str
    prefix: str = Field(description="What to recognise the key by: `cg_<prefix>_…`.")
    scopes: list[str]
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    created_at: datetime


class CreatedKey(Key):
    key: str = Field(description="Shown this once: only its hash is stored.")


class NewKey(Body):
    tenant_id: Id | None = Field(None, description="Null with a platform key: a platform key.")
    name: Name
    scopes: Scopes
    expires_at: Expiry | None = None


class KeyChange(Body):
    name: Name | None = None
    scopes: Scopes | None = None
    expires_at: Moment | None = Field(None, description="A moment in the past ends the key at once.")


def _view(row: Record) -> Key:
    return Key(**dict(row))


@routes.add(
    "POST", "/api/v1/keys", access="body", tenant_optional=True, scope="admin", returns={201: CreatedKey}
)
async def create(call: Call[NoQuery, NewKey]) -> CreatedKey:
    """Make a key. The answer is the only place where it is ever shown.

    Without `tenant_id` a tenant's key makes one of its own tenant, a platform key makes a platform key.
    """
    body = call.body
    key, prefix, key_hash = new_key()
    # As worker: the insert is bound to the tenant that was checked, and the audit row may be the platform's.
    async with call.db.worker() as conn, conn.transaction():
        row = await store.create(
            conn,
            tenant_id=call.tenant,
            name=body.name,
            prefix=prefix,
            key_hash=key_hash,
            scopes=body.scopes,
            expires_at=body.expires_at,
        )
        await audit.write(
            conn,
            "key_created",
            tenant_id=call.tenant,
            actor=call.caller.actor,
            subject_type="key",
            subject_id=row["id"],
            detail={"name": body.name, "scopes": sorted(set(body.scopes))},
        )
    return CreatedKey(**dict(row), key=key)


@routes.add(
    "GET",
    "/api/v1/keys",
    access="query",
    tenant_optional=True,
    scope=("admin", "read"),
    returns={200: Page[Key]},
)
async def listed(call: Call[PageQuery, NoBody]) -> Page[Key]:
    """List keys, revoked ones too. With a platform key and no `tenant_id`: the platform's own."""
    query = call.query
    after = decode_id(query.cursor)
    async with call.db.worker() as conn:
        rows = await store.listed(
            conn, tenant_id=call.tenant, after=after, limit=query.limit + 1, platform=call.tenant is None
        )
    return page(rows, query.limit, _view, lambda row: (row["id"],))


@routes.add(
    "GET",
    "/api/v1/keys/{key_id}",
    access="subject",
    subject=SUBJECT,
    scope=("admin", "read"),
    returns={200: Key},
)
async def read(call: Call[NoQuery, NoBody]) -> Key:
    """Read what is known of a key; the key itself is not."""
    async with call.db.worker() as conn:
        row = await store.read(conn, call.id("key_id"))
    if row is None:
        raise not_found("key")
    return _view(row)


@routes.add(
    "PATCH", "/api/v1/keys/{key_id}", access="subject", subject=SUBJECT, scope="admin", returns={200: Key}
)
async def change(call: Call[NoQuery, KeyChange]) -> Key:
    """Change a key's name, scopes or end."""
    body = call.body
    if not body.model_fields_set:
        raise invalid("", "nothing to change: give name, scopes or expires_at")
    async with call.db.worker() as conn:
        row = await store.update(
            conn, call.id("key_id"), name=body.name, scopes=body.scopes, expires_at=body.expires_at
        )
    if row is None:
        raise not_found("key")
    call.request.app[KEYS].forget()
    return _view(row)


@routes.add(
    "DELETE", "/api/v1/keys/{key_id}", access="subject", subject=SUBJECT, scope="admin", returns={204: None}
)
async def revoke(call: Call[NoQuery, NoBody]) -> Reply:
    """Revoke a key: dead within a second on every gateway, for good."""
    async with call.db.worker() as conn, conn.transaction():
        row = await store.revoke(conn, call.id("key_id"))
        if row is None:
            raise not_found("key")
        await audit.write(
            conn,
            "key_revoked",
            tenant_id=row["tenant_id"],
            actor=call.caller.actor,
            subject_type="key",
            subject_id=row["id"],
            detail={"name": row["name"]},
        )
    call.request.app[KEYS].forget()
    return Reply(204)
