"""One gateway, one WhatsApp sandbox and one Chromium for all the tests here; every test makes a tenant of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from core.database import Database, connect
from core.settings import Settings
from core.store import credentials as sealed
from gateway.telegram import kind as telegram_kind
from sandbox.telegram import TelegramSandbox
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.support.api import Api, running_api
from tests.support.browser import Desk, chromium
from tests.support.gateway import GatewayProcess
from tests.support.log_in import Desk as Server
from tests.support.outbound import Place, make_place
from tests.support.postgres import PostgresServer

AGENT = {
    "name": "Aina",
    "instructions": "Answer customers of a bakery.",
    "decider": "rules",
    "settings": {
        "rules": [
            {"name": "price", "when": {"any": ["how much"]}, "reply": "A loaf is RM 18.", "label": "price"}
        ]
    },
}
_numbers = itertools.count(1)


@dataclass
class Shop:
    """A tenant with an agent, its key, and the phones of the shop and of a customer."""

    gateway: GatewayProcess
    wa: WhatsAppSandbox
    tenant: int
    workspace: int
    key: str
    phone: Phone
    mei: Phone

    @property
    def path(self) -> str:
        return f"/console/{self.tenant}"

    async def sql(self, query: str, *args: Any) -> Any:
        """One value, read or written past the gateway."""
        db = await connect(self.gateway.environ["DATABASE_URL"])
        try:
            return await db.fetchval(query, *args)
        finally:
            await db.close()

    async def until(self, query: str, *args: Any) -> Any:
        """The value, once there is one."""
        async with asyncio.timeout(30):
            while not (found := await self.sql(query, *args)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return found

    async def unlinked(self, phone: Phone) -> None:
        """Until the phone has no linked device left."""
        async with asyncio.timeout(30):
            while phone.devices:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def key_with(self, *scopes: str) -> str:
        made = await self.gateway.ok(
            "POST", "/api/v1/keys", {"tenant_id": self.tenant, "name": "test", "scopes": list(scopes)}
        )
        return str(made["key"])

    async def paired(self) -> int:
        """A session of the shop's phone, linked through the API; its id."""
        body = {"channel_type": "whatsapp", "name": "Shop", "default_workspace_id": self.workspace}
        session = (await self.gateway.ok("POST", f"/sessions/{self.tenant}", body))["session_id"]
        qr = await self.gateway.ok("GET", f"/sessions/{self.tenant}/{session}/qr", Accept="application/json")
        await self.wa.wait_online(await self.phone.scan(qr["qr"]))
        return int(session)


@pytest.fixture(scope="package")
def console_database(postgres_server: PostgresServer, migrated_template: str) -> Any:
    url = postgres_server.create_database(migrated_template)
    yield url
    postgres_server.drop_database(url)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def wa() -> AsyncIterator[WhatsAppSandbox]:
    async with WhatsAppSandbox() as sandbox:
        yield sandbox


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def gateway(
    console_database: str, wa: WhatsAppSandbox, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(
        tmp_path_factory.mktemp("console"),
        DATABASE_URL=console_database,
        WHATSAPP_CLIENT_COMMAND=wa.client_command(),
        INBOUND_POLL_SECONDS="5",
        **wa.launch_env(),
    )
    async with process:
        yield process
        assert process.not_json == []


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="package")
async def shop(gateway: GatewayProcess, wa: WhatsAppSandbox) -> Shop:
    n = next(_numbers)
    tenant = (await gateway.ok("POST", "/api/v1/tenants", {"name": f"Kedai {n}"}))["id"]
    agent = (await gateway.ok("POST", "/api/v1/agents", {"tenant_id": tenant, **AGENT}))["id"]
    body = {"tenant_id": tenant, "name": "Shop", "timezone": "Asia/Kuala_Lumpur", "agent_id": agent}
    workspace = (await gateway.ok("POST", "/api/v1/workspaces", body))["id"]
    made = Shop(
        gateway,
        wa,
        tenant,
        workspace,
        key="",
        phone=wa.phone(f"+6012345{n:04d}", "Kedai"),
        mei=wa.person(f"+6011122{n:04d}", "Mei", auto_receipts="read"),
    )
    made.key = await made.key_with("read", "sessions", "send")
    return made


@pytest_asyncio.fixture(loop_scope="package")
async def window(browser: Browser, gateway: GatewayProcess) -> AsyncIterator[Callable[..., Awaitable[Desk]]]:
    """Opens windows. Each is asked at the end whether it ever asked another host, or broke a rule."""
    opened: list[Desk] = []

    async def open_window(**options: Any) -> Desk:
        desk = await Desk.open(browser, gateway.url, **options)
        opened.append(desk)
        return desk

    yield open_window
    for desk in opened:
        await desk.close()


@pytest_asyncio.fixture(loop_scope="package")
async def desk(window: Callable[..., Awaitable[Desk]], shop: Shop) -> Desk:
    """A window of somebody signed in with the shop's key."""
    opened = await window()
    await opened.sign_in(shop.key)
    return opened


@dataclass
class Office:
    """A gateway with WhatsApp, the desk channel and Telegram against its sandbox, a tenant and its key."""

    api: Api
    server: Server
    telegram: TelegramSandbox
    place: Place
    """With a WhatsApp session that is said to be active and that nobody runs: what is queued there stays."""
    key: str

    @property
    def tenant(self) -> int:
        return self.place.tenant_id

    @property
    def path(self) -> str:
        return f"{self.api.url}/console/{self.tenant}"

    async def kept(self, session: int) -> dict[str, object]:
        async with self.api.db.worker() as conn:
            return await sealed.get(conn, self.api.services.keys, tenant_id=self.tenant, session_id=session)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def office(
    postgres_server: PostgresServer, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Office]:
    url = postgres_server.create_database(migrated_template)
    database = await Database.open(url)
    server = Server()
    folder: Path = tmp_path_factory.mktemp("office")
    try:
        async with (
            TelegramSandbox() as telegram,
            running_api(
                database,
                folder,
                real_sessions=True,
                more_kinds={
                    "desk": server.kind(),
                    "telegram": telegram_kind(Settings(data_dir=folder, telegram_base_url=telegram.url)),
                },
                with_console=True,
            ) as api,
        ):
            place = await make_place(database, channel="whatsapp", name="Office")
            yield Office(
                api, server, telegram, place, await api.make_key(place.tenant_id, "read", "sessions")
            )
    finally:
        await database.close()
        postgres_server.drop_database(url)


@pytest_asyncio.fixture(loop_scope="package")
async def at_office(browser: Browser, office: Office) -> AsyncIterator[Callable[..., Awaitable[Desk]]]:
    opened: list[Desk] = []

    async def open_window(key: str | None = None, **options: object) -> Desk:
        desk = await Desk.open(browser, office.api.url, **options)
        opened.append(desk)
        await desk.sign_in(key or office.key)
        return desk

    yield open_window
    for desk in opened:
        await desk.close()
