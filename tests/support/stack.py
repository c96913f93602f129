"""The whole product as its users meet it: the sandbox's WhatsApp, a gateway process, a paired tenant, a database."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg

from core.database import connect
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.support.gateway import GatewayProcess

SHOP = "+60123456789"
LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises when the server it talks to is killed."""


class Stack:
    """`async with Stack(tmp_path, migrated_url) as stack:`; without a URL the gateway runs its embedded server."""

    process = GatewayProcess
    tenant: int
    session: int

    def __init__(self, folder: Path, database_url: str | None, **environ: str) -> None:
        self.folder = folder
        self.environ = environ | ({"DATABASE_URL": database_url} if database_url else {})
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Stack:
        try:
            self.sandbox = await self._stack.enter_async_context(WhatsAppSandbox(self.folder / "sandbox"))
            self.gateway = self.process(
                self.folder / "data",
                WHATSAPP_CLIENT_COMMAND=self.client_command(),
                **self.sandbox.launch_env(),
                **self.environ,
            )
            await self._stack.enter_async_context(self.gateway)
            url = self.environ.get("DATABASE_URL") or (self.folder / "data/postgres/url").read_text()
            self.database_url = url
            self.db: asyncpg.Connection[Any] = await connect(url)
            self._stack.push_async_callback(self._close_db)
            self.shop = self.sandbox.phone(SHOP, "Shop")
            self.tenant = (await self.gateway.ok("POST", "/api/v1/tenants", {"name": "Shop"}))["id"]
            self.session = await self.new_session()
            self.device = await self.pair(self.session, self.shop)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    def client_command(self) -> str:
        return self.sandbox.client_command()

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _close_db(self) -> None:
        if not self.db.is_closed():
            self.db.terminate()

    async def reopen_db(self) -> None:
        """After the server was killed."""
        self.db.terminate()
        self.db = await connect(self.database_url)

    async def new_session(self, **fields: Any) -> int:
        body = {"channel_type": "whatsapp", "name": "Shop", **fields}
        return int((await self.gateway.ok("POST", f"/sessions/{self.tenant}", body))["session_id"])

    async def pair(self, session: int, phone: Phone) -> Any:
        answer = await self.gateway.ok(
            "GET", f"/sessions/{self.tenant}/{session}/qr", Accept="application/json"
        )
        device = await phone.scan(answer["qr"])
        await self.active(session)
        return device

    async def agent(self, **settings: Any) -> None:
        """Give every thread of the session an agent with these rules."""
        agent = await self.gateway.ok(
            "POST", "/api/v1/agents", {"tenant_id": self.tenant, "name": "Aina", "settings": settings}
        )
        workspace = await self.gateway.ok(
            "POST",
            "/api/v1/workspaces",
            {"tenant_id": self.tenant, "name": "Main", "timezone": "UTC", "agent_id": agent["id"]},
        )
        await self.gateway.ok(
            "PATCH",
            f"/sessions/{self.tenant}/{self.session}",
            {"default_workspace_id": workspace["id"]},
        )

    async def active(self, session: int | None = None, within: float = 30) -> None:
        await self.until(
            lambda: self.db.fetchval(
                "SELECT status = 'active' FROM et_channel_sessions WHERE id = $1", session or self.session
            ),
            f"session {session or self.session} is active",
            within,
        )

    async def until(self, look: Callable[[], Awaitable[Any]], what: str, within: float = 15) -> Any:
        """The first truthy answer; fails with the gateway's last lines."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            try:
                if answer := await look():
                    return answer
            except LOST:
                await self.reopen_soon()
            await asyncio.sleep(0.02)
        raise AssertionError(f"not within {within} s: {what}\n{self.gateway.story()}")

    async def reopen_soon(self) -> None:
        await asyncio.sleep(0.1)
        try:
            await self.reopen_db()
        except Exception:
            await asyncio.sleep(0.2)

    async def stored(self, ids: list[str], within: float = 20) -> None:
        """Wait until each of these ids is stored, and check that each is stored once."""

        async def all_there() -> bool:
            return len(ids) <= await self.db.fetchval(
                "SELECT count(DISTINCT channel_message_id) FROM et_messages WHERE channel_message_id = ANY($1)",
                ids,
            )

        await self.until(all_there, f"{len(ids)} messages are stored", within)
        doubled = await self.db.fetch(
            """
            SELECT channel_message_id, count(*)
            FROM et_messages
            WHERE channel_message_id = ANY($1)
            GROUP BY 1
            HAVING count(*) > 1
            """,
            ids,
        )
        assert not doubled, doubled

    async def child_pid(self) -> int:
        """The process id of this session's WhatsApp child, once there is one: a child process of the gateway that runs
        the client."""
        pid: int = await self.until(self._child_pid, "the gateway has a WhatsApp child")
        return pid

    async def _child_pid(self) -> int | None:
        assert self.gateway.process is not None
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == self.gateway.process.pid and b"gateway.whatsapp.client" in command:
                return int(entry.name)
        return None


def kill(pid: int) -> None:
    os.kill(pid, 9)
