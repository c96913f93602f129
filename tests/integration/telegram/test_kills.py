"""A gateway process killed between the steps of an update and of a send: each update stored once, nothing sent twice.

The whole product: a real process, a real database, the Bot API of the sandbox. The steps run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from core.database import connect
from sandbox.telegram import TelegramSandbox
from tests.support.gateway import GatewayProcess
from tests.support.outbound import eventually
from tests.support.postgres import PostgresServer

PATIENCE = 60.0
# Where the first gateway is killed (by an update), where the second one is (by a send), and what the send must become.
STEPS = (
    (
        "ingest.after_commit",
        "outbound.call.before",
        "sent",
    ),  # stored, the offset not moved; claimed, never called
    ("ingest.before_commit", "telegram.send.replied", "unknown"),  # nothing stored; sent, nobody told
)


class Story:
    """One shop: its database, its bot, and the gateways that run it one after the other."""

    def __init__(self, folder: Path, database_url: str, tg: TelegramSandbox, number: int) -> None:
        self.folder, self.url, self.tg = folder, database_url, tg
        self.bot = tg.bot(f"@shop{number}_bot")
        self.mei = tg.person("Mei Lim")
        self.gateway: GatewayProcess | None = None

    async def begin(self, faults: str = "") -> GatewayProcess:
        self.gateway = GatewayProcess(
            self.folder, DATABASE_URL=self.url, TELEGRAM_BASE_URL=self.tg.url, FAULTS=faults
        )
        await self.gateway.start(within=PATIENCE)
        return self.gateway

    async def died(self) -> None:
        assert self.gateway is not None
        assert self.gateway.process is not None
        async with asyncio.timeout(PATIENCE):
            await self.gateway.process.wait()
        await self.gateway.kill()

    async def play(self, update_point: str, send_point: str, outcome: str) -> None:
        db: asyncpg.Connection[Any] = await connect(self.url)
        try:
            # Said before anybody asks, so that the first answer carries all of it.
            said = [await self.mei.say(self.bot, f"line {n}") for n in range(5)]
            gateway = await self.begin(f"{update_point}=kill")
            tenant = (await gateway.ok("POST", "/api/v1/tenants", {"name": "Shop"}))["id"]
            body = {"channel_type": "telegram", "credentials": {"token": self.bot.token}}
            session = (await gateway.ok("POST", f"/sessions/{tenant}", body))["session_id"]
            with contextlib.suppress(aiohttp.ClientError):  # it may die before it answers
                await gateway.api("POST", f"/sessions/{tenant}/{session}/connect")
            await self.died()

            gateway = await self.begin(f"{send_point}=kill")
            await self._stored(db, said)
            queue_id = await db.fetchval(
                "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, 'only once', 'text', NULL, NULL)",
                tenant,
                session,
                self.mei.address,
            )
            await self.died()
            said.append(await self.mei.say(self.bot, "line 5"))

            gateway = await self.begin()
            await self._stored(db, said)
            row = await eventually(lambda: self._settled(db, queue_id), seconds=PATIENCE, what=send_point)
            assert row["status"] == outcome, (send_point, row["status"], row["last_error"])
            await self._goes_on(db, tenant, session)
            said += await self._by_webhook(db, gateway, f"{tenant}/{session}")
            assert len(self.tg_sent("only once")) == 1
            rows = await db.fetch(
                "SELECT content FROM et_messages WHERE direction = 'inbound' ORDER BY occurred_at, id"
            )
            assert [row["content"] for row in rows] == [
                *(f"line {n}" for n in range(6)),
                "by webhook",
                "asked again",
            ]
            offset = await db.fetchval(
                "SELECT value->>'offset' FROM et_session_cursors WHERE name = 'updates'"
            )
            assert int(offset) == self.bot.next_update
            for line in gateway.lines:
                assert self.bot.token not in line
        finally:
            if self.gateway is not None:
                await self.gateway.kill()
            db.terminate()

    async def _by_webhook(self, db: asyncpg.Connection[Any], gateway: GatewayProcess, at: str) -> list[str]:
        """Telegram delivers to the gateway's own route and proves itself; and is asked again when the setting goes."""
        await gateway.ok("PATCH", f"/sessions/{at}", {"settings": {"webhook_url": gateway.url}})

        async def webhook_is(there: bool) -> bool:
            return (self.bot.webhook is not None) is there

        await eventually(lambda: webhook_is(True), seconds=PATIENCE, what="the webhook set")
        by_webhook = await self.mei.say(self.bot, "by webhook")
        await self._stored(db, [by_webhook])
        forged = {
            "update_id": 1,
            "message": {"message_id": 99, "chat": {"id": self.mei.id}, "text": "forged"},
        }
        header = {"X_Telegram_Bot_Api_Secret_Token": "guessed"}
        status, _ = await gateway.api("POST", f"/webhook/{at}", forged, key=None, **header)
        assert status == 401
        await gateway.ok("PATCH", f"/sessions/{at}", {"settings": {}})
        await eventually(lambda: webhook_is(False), seconds=PATIENCE, what="the webhook taken away")
        asked = await self.mei.say(self.bot, "asked again")
        await self._stored(db, [asked])
        return [by_webhook, asked]

    def tg_sent(self, text: str) -> list[Any]:
        return [one for one in self.tg.sent(text) if one.bot is self.bot]

    async def _stored(self, db: asyncpg.Connection[Any], said: list[str]) -> None:
        async def look() -> bool:
            found = await db.fetch(
                "SELECT channel_message_id FROM et_messages WHERE channel_message_id = ANY ($1)", said
            )
            return len(found) >= len(said)

        await eventually(look, seconds=PATIENCE, what=f"{len(said)} messages stored")

    @staticmethod
    async def _settled(db: asyncpg.Connection[Any], queue_id: int) -> Any:
        row = await db.fetchrow("SELECT status, last_error FROM et_outbound_queue WHERE id = $1", queue_id)
        return row if row and row["status"] in ("sent", "unknown", "failed") else None

    async def _goes_on(self, db: asyncpg.Connection[Any], tenant: int, session: int) -> None:
        """Another message goes out, so whatever would be sent again has had its time."""
        queue_id = await db.fetchval(
            "SELECT queue_id FROM et_enqueue_outbound($1, $2, $3, 'after it', 'text', NULL, NULL)",
            tenant,
            session,
            self.mei.address,
        )
        row = await eventually(lambda: self._settled(db, queue_id), seconds=PATIENCE, what="after it")
        assert row["status"] == "sent"
        await self.mei.wait_for_text("after it", timeout=PATIENCE)


@pytest.mark.timeout(300)
async def test_a_kill_at_any_step_stores_each_update_once_and_sends_nothing_twice(
    postgres_server: PostgresServer, migrated_template: str, tmp_path: Path
) -> None:
    urls = [postgres_server.create_database(migrated_template) for _ in STEPS]
    try:
        async with TelegramSandbox() as tg:
            stories = [Story(tmp_path / f"{n}", url, tg, n) for n, url in enumerate(urls)]
            await asyncio.gather(*(story.play(*step) for story, step in zip(stories, STEPS, strict=True)))
    finally:
        for url in urls:
            postgres_server.drop_database(url)
