"""The story of `gateway demo`: one shop, customers on WhatsApp, by mail and on Telegram, each step seen in the database.

Drives the sandboxes and the HTTP API; reads over a connection of its own. Starts and stops nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import aiohttp
import asyncpg

from sandbox.mail import MailSandbox
from sandbox.telegram import TelegramSandbox
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox

SHOP_NUMBER, CUSTOMER_NUMBER = "+60123456789", "+60111222333"
SHOP_MAIL, CUSTOMER_MAIL = "hello@kedai-aina.example", "mei@example.com"
SHOP_BOT = "@kedai_aina_bot"
STEP_SECONDS = 15.0

AGENT = {
    "name": "Aina",
    "instructions": "Answer customers of Kedai Aina, a small bakery.",
    "decider": "rules",
    "settings": {
        "rules": [
            {
                "name": "price",
                "when": {"any": ["how much", "price", "berapa"]},
                "reply": "A loaf of sourdough is RM 18, {name}. We bake until 6 pm.",
                "label": "price",
            }
        ],
    },
}


class StepFailed(Exception):
    """A step of the story was not seen in time."""


class Story:
    """`await tell()`; raises StepFailed naming the first step that was not seen. Whoever is in it can be used afterwards."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        db: asyncpg.Connection[Any],
        whatsapp: WhatsAppSandbox,
        mail: MailSandbox,
        telegram: TelegramSandbox,
        *,
        without: Collection[str],
        began: float,
    ) -> None:
        self._http, self._db, self._whatsapp, self._began = http, db, whatsapp, began
        self._steps = 0
        self.tenant = self.session = self.thread = self.workspace = 0
        self.shop = whatsapp.phone(SHOP_NUMBER, "Kedai Aina")
        self.mei = whatsapp.person(
            CUSTOMER_NUMBER, "Mei", auto_receipts=None if "receipts" in without else "read"
        )
        self.mail = mail
        self.mei_by_mail = mail.person("Mei Lim", CUSTOMER_MAIL)
        self.bot = telegram.bot(SHOP_BOT, "Kedai Aina")
        self.arun = telegram.person("Arun Nair")

    async def tell(self) -> None:
        version = await self._db.fetchval("SELECT current_setting('server_version')")
        self._tell("database", f"PostgreSQL {version}, schema migrated")
        await self._set_up()
        by_mail, on_telegram = await self._log_in()
        await self._pair(self.session, self.shop, SHOP_NUMBER)
        lead = await self._question_and_answer()
        await self._backend_enqueues()
        await self._redelivery()
        await self._by_mail(by_mail, lead)
        await self._on_telegram(on_telegram)
        await self._asks_for_a_person()

    # --- the shop -----------------------------------------------------------------------------------------------

    async def _set_up(self) -> None:
        tenant = await self._post("/api/v1/tenants", {"name": "Kedai Aina"})
        self.tenant = tenant["id"]
        agent = await self._post("/api/v1/agents", {"tenant_id": self.tenant, **AGENT})
        workspace = await self._post(
            "/api/v1/workspaces",
            {
                "tenant_id": self.tenant,
                "name": "Shop",
                "timezone": "Asia/Kuala_Lumpur",
                "agent_id": agent["id"],
            },
        )
        self.workspace = workspace["id"]
        self.session = await self.new_session("whatsapp", "Shop")
        self._tell("tenant", f"tenant {self.tenant} with agent Aina and WhatsApp session {self.session}")

    async def new_session(self, channel: str, name: str, **more: Any) -> int:
        body = {"channel_type": channel, "name": name, "default_workspace_id": self.workspace, **more}
        return int((await self._post(f"/sessions/{self.tenant}", body))["session_id"])

    async def _pair(self, session: int, phone: Phone, number: str) -> None:
        async with self._http.get(
            f"/sessions/{self.tenant}/{session}/qr", headers={"Accept": "application/json"}
        ) as answer:
            body = await answer.json()
            if answer.status != 200:
                raise StepFailed(f"no QR: {body.get('detail', body)}")
        self._tell("qr", f"shown at /sessions/{self.tenant}/{session}/qr")
        await phone.scan(body["qr"])
        await self._active(session, number)
        self._tell("paired", f"{number} is active")

    async def _log_in(self) -> tuple[int, int]:
        """The two channels that log in with credentials; the API tries them before it keeps them."""
        by_mail = await self.new_session("email", "Mail", credentials=self.mail.credentials)
        on_telegram = await self.new_session("telegram", "Bot", credentials={"token": self.bot.token})
        for session, identifier in ((by_mail, SHOP_MAIL), (on_telegram, SHOP_BOT)):
            await self._post(f"/sessions/{self.tenant}/{session}/connect", {})
            await self._active(session, identifier)
        self._tell("logged in", f"{SHOP_MAIL} and {SHOP_BOT} are active")
        return by_mail, on_telegram

    async def _active(self, session: int, identifier: str) -> None:
        await self._see(
            f"{identifier} is active",
            """
            SELECT 1
            FROM et_channel_sessions
            WHERE id = $1 AND status = 'active' AND session_identifier = $2
            """,
            session,
            identifier,
        )

    # --- on WhatsApp --------------------------------------------------------------------------------------------

    async def _question_and_answer(self) -> int:
        asked = await self.mei.send_text(self.shop, "Hi, how much is the sourdough?")
        row = await self._received(self.session, asked)
        self.thread = row["thread_id"]
        self._tell("received", f"“{row['content']}” from {row['external_id']}, thread {row['thread_id']}")
        reply = await self._replied(row["id"])
        self._tell("decided", f"auto_reply ({reply['label']}) by {reply['decider']}")
        self._tell("replied", f"“{reply['content']}”")
        await self._until(
            "the reply reached the customer's phone",
            lambda: self._at_customer(reply["channel_message_id"]),
        )
        await self._see(
            "the customer's receipts came back",
            "SELECT 1 FROM et_messages WHERE id = $1 AND delivery_status = 'read'",
            reply["id"],
        )
        self._tell("read", "delivered and read receipts are on the row")
        return int(row["lead_id"])

    async def _received(self, session: int, message_id: str) -> asyncpg.Record:
        return await self._see(
            "the customer's message is stored with lead and thread",
            """
            SELECT m.id, m.thread_id, m.lead_id, l.external_id, m.content
            FROM et_messages m
            JOIN et_leads l ON l.id = m.lead_id
            WHERE m.channel_session_id = $1 AND m.channel_message_id = $2 AND m.direction = 'inbound'
            """,
            session,
            message_id,
        )

    async def _replied(self, message_id: int) -> asyncpg.Record:
        await self._see(
            "the worker decided",
            "SELECT 1 FROM et_decisions WHERE message_id = $1 AND action = 'auto_reply'",
            message_id,
        )
        return await self._see(
            "the reply was handed to the channel",
            """
            SELECT m.id, m.content, m.channel_message_id, d.label, d.decider
            FROM et_decisions d
            JOIN et_messages m ON m.id = d.reply_message_id
            JOIN et_outbound_queue q ON q.message_id = m.id
            WHERE d.message_id = $1 AND q.status = 'sent'
            """,
            message_id,
        )

    async def _backend_enqueues(self) -> None:
        row = await self._db.fetchrow(
            "SELECT * FROM et_enqueue_outbound($1, $2, $3, $4, 'text', NULL, $5)",
            self.tenant,
            self.session,
            CUSTOMER_NUMBER,
            "Your order has left the oven.",
            "order-1-ready",
        )
        assert row is not None
        sent = await self._see(
            "the row a backend inserted was sent",
            """
            SELECT m.channel_message_id
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            WHERE q.id = $1 AND q.status = 'sent'
            """,
            row["queue_id"],
        )
        await self._until(
            "the backend's message reached the phone", lambda: self._at_customer(sent["channel_message_id"])
        )
        self._tell("backend", "a row inserted by SQL went out")

    async def _redelivery(self) -> None:
        text = "One loaf for tomorrow, thanks"
        first = await self.mei.send_text(self.shop, text)
        await self._received(self.session, first)
        await self._whatsapp.wait_acked(first, timeout=STEP_SECONDS)
        await self.mei.send_text(self.shop, text, msg_id=first)
        await self._received(self.session, await self.mei.send_text(self.shop, "See you!"))
        count = await self._db.fetchval(
            "SELECT count(*) FROM et_messages WHERE channel_session_id = $1 AND channel_message_id = $2",
            self.session,
            first,
        )
        if count != 1:
            raise StepFailed(f"a message delivered twice is stored {count} times")
        self._tell("duplicate", "the same message delivered twice is stored once")

    async def _asks_for_a_person(self) -> None:
        asked = await self.mei.send_text(self.shop, "Can I talk to a human please?")
        await self._see(
            "a person takes over",
            """
            SELECT 1
            FROM et_messages m
            JOIN et_decisions d ON d.message_id = m.id
            JOIN et_threads t ON t.id = m.thread_id
            WHERE m.channel_session_id = $1 AND m.channel_message_id = $2
              AND d.action = 'human_takeover' AND t.handled_by = 'human'
            """,
            self.session,
            asked,
        )
        self._tell("takeover", "the thread is handed to a person, nothing is answered automatically any more")

    # --- by mail and on Telegram --------------------------------------------------------------------------------

    async def _by_mail(self, session: int, lead: int) -> None:
        self.mei_by_mail.write("How much is a wedding cake?", subject="A cake")
        row = await self._see(
            "the customer's mail is stored with lead and thread",
            """
            SELECT m.id, m.lead_id, l.external_id, m.content
            FROM et_messages m
            JOIN et_leads l ON l.id = m.lead_id
            WHERE m.channel_session_id = $1 AND m.direction = 'inbound'
            """,
            session,
        )
        reply = await self._replied(row["id"])
        await self._until(
            "the answer is in the customer's mailbox",
            lambda: any(reply["content"] in letter.text for letter in self.mei_by_mail.letters),
        )
        self._tell("mail", f"“{row['content']}” from {row['external_id']} is answered by mail")
        await self._post(f"/api/v1/messaging/leads/{row['lead_id']}/merge", {"into": lead})
        merged = await self._see(
            "one lead with both addresses",
            """
            SELECT array_agg(i.external_id) AS addresses,
                   (SELECT array_agg(DISTINCT m.channel) FROM et_messages m WHERE m.lead_id = $1) AS channels
            FROM et_lead_identities i
            WHERE i.lead_id = $1
            HAVING count(*) > 1
            """,
            min(lead, row["lead_id"]),
        )
        if set(merged["channels"]) != {"email", "whatsapp"}:
            raise StepFailed(f"the merged lead has messages on {merged['channels']}")
        known = sorted(a for a in merged["addresses"] if not a.startswith("whatsapp-lid:"))
        self._tell("merged", f"{' and '.join(known)} are one person with one timeline")

    async def _on_telegram(self, session: int) -> None:
        asked = await self.arun.say(self.bot, "Price of a baguette?")
        row = await self._received(session, asked)
        reply = await self._replied(row["id"])
        await self._until("the answer is in the customer's chat", lambda: reply["content"] in self.arun.texts)
        self._tell("telegram", f"“{row['content']}” from {row['external_id']} is answered on Telegram")

    # --- helpers ------------------------------------------------------------------------------------------------

    def _tell(self, name: str, text: str) -> None:
        self._steps += 1
        print(f"{self._steps:>2}. {name:<10} {text}  [{time.monotonic() - self._began:.1f} s]", flush=True)

    def _at_customer(self, message_id: str) -> bool:
        return any(received.id == message_id for received in self.mei.received)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._http.post(path, json=body) as answer:
            parsed: dict[str, Any] = await answer.json()
            if answer.status >= 300:
                raise StepFailed(f"POST {path}: {answer.status} {parsed.get('detail', parsed)}")
            return parsed

    async def _see(self, what: str, sql: str, *args: Any) -> asyncpg.Record:
        """The row that shows `what`, once it is there."""
        found: list[asyncpg.Record] = []

        async def look() -> bool:
            row = await self._db.fetchrow(sql, *args)
            if row is not None:
                found.append(row)
            return bool(found)

        await self._until(what, look)
        return found[0]

    async def _until(self, what: str, condition: Callable[[], bool | Awaitable[bool]]) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while time.monotonic() < deadline:
            result = condition()
            if await result if isinstance(result, Awaitable) else result:
                return
            await asyncio.sleep(0.02)
        raise StepFailed(f"not seen within {STEP_SECONDS:.0f} s: {what}")
