"""The HTTP side around real parts: PostgreSQL, ingest, journal, outbound worker; only the channel is scripted."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from core.audit_trail import AuditTrail
from core.channel import ChannelKind, SessionId
from core.database import Database
from core.ingest import Ingest
from core.journal import Journal
from core.metrics import Metrics
from core.outbound import OutboundWorker
from core.secrets import KeyRing
from core.settings import Settings
from core.store import keys as key_store
from gateway import console
from gateway.api import Limits, Runner, Services, WebhookSpool, make_app
from gateway.api.auth import SCOPES, new_key
from gateway.app import key_checker
from gateway.sessions import SessionManager
from gateway.whatsapp.convert import convert_webhook
from gateway.whatsapp.settings import check as settings_check
from tests.support.fake_channel import FakeDispatcher, FakePlatform
from tests.support.outbound import QUICK, Place, give_lease, make_place, value

OWNER = "gw-1"


@dataclass
class Answer:
    """A response, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The problem's code."""
        return str(self.json["code"])


@dataclass
class Owned:
    """Stands for the session manager: what this gateway owns, and channels with capabilities."""

    sessions: set[int] = field(default_factory=set)
    capabilities: dict[int, Any] = field(default_factory=dict)
    healthy: bool = True
    durable: bool = True

    def owned(self) -> frozenset[SessionId]:
        return frozenset(SessionId(one) for one in self.sessions)

    def capability(self, session_id: SessionId, kind: type[Any]) -> Any:
        found = self.capabilities.get(session_id)
        return found if isinstance(found, kind) else None


@dataclass
class Api:
    """A running server with a client, and the parts behind it."""

    url: str
    session: aiohttp.ClientSession
    db: Database
    services: Services
    platform: FakePlatform
    dispatcher: FakeDispatcher
    manager: Owned
    journal: Journal

    async def call(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        body: Any = None,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        if body is not None:
            raw = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        elif raw is not None:
            sent.setdefault("Content-Type", "application/json")
        async with asyncio.timeout(30):
            async with self.session.request(
                method,
                self.url + path,
                data=None if raw is None else io.BytesIO(raw),
                headers=sent,
                allow_redirects=False,
            ) as response:
                return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, key: str | None = None, **more: Any) -> Answer:
        return await self.call("GET", path, key=key, **more)

    async def post(self, path: str, body: Any = None, key: str | None = None, **more: Any) -> Answer:
        return await self.call("POST", path, key=key, body=body, **more)

    async def patch(self, path: str, body: Any, key: str | None = None) -> Answer:
        return await self.call("PATCH", path, key=key, body=body)

    async def delete(self, path: str, key: str | None = None) -> Answer:
        return await self.call("DELETE", path, key=key)

    async def make_key(self, tenant_id: int | None, *scopes: str) -> str:
        key, prefix, key_hash = new_key()
        async with self.db.worker() as conn:
            await key_store.create(
                conn,
                tenant_id=tenant_id,
                name="test",
                prefix=prefix,
                key_hash=key_hash,
                scopes=scopes or SCOPES,
            )
        return key

    async def tenant(self, name: str = "shop") -> Tenant:
        """A tenant with an active WhatsApp session that this gateway may send on."""
        place = await make_place(self.db, owner=OWNER, channel="whatsapp", name=name)
        self.dispatcher.add(place.session_id)
        self.manager.sessions.add(place.session_id)
        key = await self.make_key(place.tenant_id)
        return Tenant(self, place, key)

    async def another_session(self, tenant: Tenant, status: str) -> int:
        session_id: int = await value(
            self.db,
            "INSERT INTO et_channel_sessions (tenant_id, channel_type, status) VALUES ($1, 'whatsapp', $2) RETURNING id",
            tenant.id,
            status,
        )
        return session_id


@dataclass
class Tenant:
    api: Api
    place: Place
    key: str

    @property
    def id(self) -> int:
        return self.place.tenant_id

    @property
    def session_id(self) -> int:
        return self.place.session_id

    def send_body(self, text: str = "hello", **more: Any) -> dict[str, Any]:
        return {
            "tenant_id": self.id,
            "channel_session_id": self.session_id,
            "recipient": "+60111222333",
            "content": text,
            **more,
        }

    async def receive(self, text: str, *, sender: str = "60111222333", message_id: str = "M1") -> Answer:
        """A customer writes, through the webhook."""
        return await self.api.post(
            f"/webhook/{self.id}/{self.session_id}",
            baileys(text, sender=sender, message_id=message_id),
            self.key,
        )

    async def take_lease(self) -> None:
        await give_lease(self.api.db, self.place, OWNER)


def baileys(
    text: str | None, *, sender: str = "60111222333", message_id: str = "M1", at: Any = 1_760_000_000
) -> dict[str, Any]:
    return {
        "key": {"remoteJid": f"{sender}@s.whatsapp.net", "fromMe": False, "id": message_id},
        "message": {"conversation": text},
        "messageTimestamp": at,
        "pushName": "Ann",
    }


@asynccontextmanager
async def running_api(
    db: Database,
    folder: Path,
    *,
    settings: Settings | None = None,
    limits: Limits | None = None,
    real_sessions: bool = False,
    more_kinds: Mapping[str, ChannelKind] | None = None,
    with_console: bool = False,
) -> AsyncIterator[Api]:
    metrics = Metrics()
    platform = FakePlatform()
    dispatcher = FakeDispatcher(platform, [])
    manager = Owned()
    kind = dataclasses.replace(platform.kind("whatsapp"), webhook=convert_webhook, settings=settings_check)
    registry = {"whatsapp": kind, **(more_kinds or {})}
    settings = settings or Settings(data_dir=folder)
    async with AsyncExitStack() as stack:
        ingest = Ingest(db, metrics)
        await ingest.start()
        stack.push_async_callback(ingest.stop)
        keys = KeyRing.from_file(folder / "secret.keys")
        sessions = SessionManager(db, ingest, metrics, registry, settings, owner=OWNER, keys=keys)
        if real_sessions:
            await sessions.start()
            stack.push_async_callback(sessions.stop)
        outbound = OutboundWorker(
            db, metrics, sessions if real_sessions else dispatcher, owner=OWNER, timings=QUICK
        )
        await outbound.start()
        stack.push_async_callback(outbound.stop)
        journal = Journal(folder / "spool.db")
        stack.callback(journal.close)
        spool = WebhookSpool(journal, db, ingest, registry, metrics)
        await spool.start()
        stack.push_async_callback(spool.stop)
        kept = Journal(folder / "audit.db")
        stack.callback(kept.close)
        trail = AuditTrail(db, kept)
        await trail.start()
        stack.push_async_callback(trail.stop)
        services = Services(
            db=db,
            ingest=ingest,
            spool=spool,
            audit=trail,
            metrics=metrics,
            settings=settings,
            keys=keys,
            registry=registry,
            sessions=sessions if real_sessions else manager,
            outbound=outbound,
            limits=limits or Limits(rate=10_000, burst=10_000),
            owner=OWNER,
        )
        app = make_app(services)
        if with_console:
            console.install(app, db=db, authenticate=key_checker(app), kinds=registry, keys=keys)
        runner = Runner(app, access_log=None, shutdown_timeout=3)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client = await stack.enter_async_context(aiohttp.ClientSession())
        yield Api(url, client, db, services, platform, dispatcher, manager, journal)
