"""`gateway demo`: the main job on this machine alone, with the real WhatsApp client against the sandbox.

Tells the story step by step and reads every step back from the database, over a connection of its own. `--check`
ends after the story; without it the demo stays up, and what is typed is written as the customer. The only importer of
the sandbox outside the tests.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
import webbrowser
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from core import log, settings
from core.database import connect
from core.errors import GatewayError
from gateway.app import Gateway
from sandbox.whatsapp.admin import AdminServer
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox

PLATFORM_KEY = "cg_demo_platform_key_for_this_machine_only"
SHOP_NUMBER, CUSTOMER_NUMBER = "+60123456789", "+60111222333"
SPARE_NUMBER = "+60199999999"
STEP_SECONDS = 15.0
STORY_SECONDS = 110.0
SWITCHES = ("worker", "child", "receipts")

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


class Demo:
    """One run. `without` switches a part off, which the story must notice (see tests/e2e/test_demo.py)."""

    def __init__(self, *, without: Collection[str] = ()) -> None:
        self.without = frozenset(without)
        self._steps = 0
        self._began = time.monotonic()
        self._stack = AsyncExitStack()
        self.tenant = self.session = 0

    # --- life -------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Demo:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-demo-")))
        self.sandbox = await self._stack.enter_async_context(WhatsAppSandbox(folder / "whatsapp-sandbox"))
        self.admin = AdminServer(self.sandbox)
        await self.admin.start()
        self._stack.push_async_callback(self.admin.stop)
        os.environ.update(self.sandbox.launch_env())
        child = self.sandbox.client_command()
        if "child" in self.without:
            child = f"{sys.executable} -c pass"
        environ = {
            "DATA_DIR": str(folder / "data"),
            "PORT": os.environ.get("PORT", "0"),
            "ADMIN_API_KEY": PLATFORM_KEY,
            "WHATSAPP_CLIENT_COMMAND": child,
            "INBOUND_POLL_SECONDS": "5",
        }
        if url := os.environ.get("DATABASE_URL"):
            environ["DATABASE_URL"] = url
        self.gateway = await self._stack.enter_async_context(
            Gateway(settings.load(environ), without=self.without & {"worker"})
        )
        self.http = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                self.gateway.url,
                headers={"Authorization": f"Bearer {PLATFORM_KEY}"},
                timeout=aiohttp.ClientTimeout(total=45),
            )
        )
        self.db: asyncpg.Connection[Any] = await connect(self.gateway.database_url)
        self._stack.push_async_callback(self.db.close)

    # --- the story --------------------------------------------------------------------------------------------

    async def story(self) -> None:
        """Every step, each seen in the database. Raises StepFailed naming the first that was not."""
        version = await self.db.fetchval("SELECT current_setting('server_version')")
        self._tell("database", f"PostgreSQL {version}, schema migrated")
        await self._set_up()
        self.shop = self.sandbox.phone(SHOP_NUMBER, "Kedai Aina")
        self.customer = self.sandbox.person(
            CUSTOMER_NUMBER, "Mei", auto_receipts=None if "receipts" in self.without else "read"
        )
        await self._pair(self.session, self.shop, SHOP_NUMBER)
        await self._question_and_answer()
        await self._backend_enqueues()
        await self._redelivery()
        await self._asks_for_a_person()

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
        self.session = await self._new_session("Shop", workspace["id"])
        self._tell("tenant", f"tenant {self.tenant} with agent Aina and WhatsApp session {self.session}")

    async def _new_session(self, name: str, workspace: int) -> int:
        body = {"channel_type": "whatsapp", "name": name, "default_workspace_id": workspace}
        session = await self._post(f"/sessions/{self.tenant}", body)
        return int(session["session_id"])

    async def _pair(self, session: int, phone: Phone, number: str) -> None:
        async with self.http.get(
            f"/sessions/{self.tenant}/{session}/qr", headers={"Accept": "application/json"}
        ) as answer:
            body = await answer.json()
            if answer.status != 200:
                raise StepFailed(f"no QR: {body.get('detail', body)}")
        self._tell("qr", f"shown at /sessions/{self.tenant}/{session}/qr")
        await phone.scan(body["qr"])
        row = await self._see(
            "the session is active",
            """
            SELECT session_identifier, status
            FROM et_channel_sessions
            WHERE id = $1 AND status = 'active' AND session_identifier = $2
            """,
            session,
            number,
        )
        self._tell("paired", f"{row['session_identifier']} is {row['status']}")

    async def _question_and_answer(self) -> None:
        question = "Hi, how much is the sourdough?"
        asked = await self.customer.send_text(self.shop, question)
        row = await self._see(
            "the customer's message is stored with lead and thread",
            """
            SELECT m.id, m.thread_id, l.external_id, m.content,
                   round(extract(epoch FROM m.created_at - m.occurred_at) * 1000) AS age_ms
            FROM et_messages m
            JOIN et_leads l ON l.id = m.lead_id
            WHERE m.channel_session_id = $1 AND m.channel_message_id = $2 AND m.direction = 'inbound'
            """,
            self.session,
            asked,
        )
        self.thread = row["thread_id"]
        self._tell("received", f"“{row['content']}” from {row['external_id']}, thread {row['thread_id']}")
        decision = await self._see(
            "the worker decided",
            "SELECT action, label, reason, decider FROM et_decisions WHERE message_id = $1 AND action = 'auto_reply'",
            row["id"],
        )
        self._tell("decided", f"{decision['action']} ({decision['label']}) by {decision['decider']}")
        reply = await self._see(
            "the reply was handed to WhatsApp",
            """
            SELECT m.id, m.content, m.channel_message_id
            FROM et_decisions d
            JOIN et_messages m ON m.id = d.reply_message_id
            JOIN et_outbound_queue q ON q.message_id = m.id
            WHERE d.message_id = $1 AND q.status = 'sent'
            """,
            row["id"],
        )
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

    async def _backend_enqueues(self) -> None:
        row = await self.db.fetchrow(
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
        first = await self.customer.send_text(self.shop, text)
        await self._see(
            "the message is stored",
            "SELECT 1 FROM et_messages WHERE channel_session_id = $1 AND channel_message_id = $2",
            self.session,
            first,
        )
        await self.sandbox.wait_acked(first, timeout=STEP_SECONDS)
        await self.customer.send_text(self.shop, text, msg_id=first)
        last = await self.customer.send_text(self.shop, "See you!")
        await self._see(
            "what came after the redelivery is stored",
            "SELECT 1 FROM et_messages WHERE channel_session_id = $1 AND channel_message_id = $2",
            self.session,
            last,
        )
        count = await self.db.fetchval(
            "SELECT count(*) FROM et_messages WHERE channel_session_id = $1 AND channel_message_id = $2",
            self.session,
            first,
        )
        if count != 1:
            raise StepFailed(f"a message delivered twice is stored {count} times")
        self._tell("duplicate", "the same message delivered twice is stored once")

    async def _asks_for_a_person(self) -> None:
        asked = await self.customer.send_text(self.shop, "Can I talk to a human please?")
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

    # --- afterwards -------------------------------------------------------------------------------------------

    async def stay(self) -> None:
        """Stay up until Ctrl-C; lines typed are written as the customer, what the customer gets is printed."""
        await self.db.execute("UPDATE et_threads SET handled_by = 'agent' WHERE id = $1", self.thread)
        self.sandbox.phone(SPARE_NUMBER, "Second phone")
        spare = await self._new_session("Second number", await self._first_workspace())
        self._say_how(spare)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        tasks = [asyncio.create_task(self._show_received()), asyncio.create_task(ended.wait())]
        if sys.stdin.isatty():
            tasks.append(asyncio.create_task(self._type_as_customer()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _say_how(self, spare: int) -> None:
        url, admin, tenant = self.gateway.url, self.admin.url, self.tenant
        auth = f"-H 'Authorization: Bearer {PLATFORM_KEY}'"
        enqueue = (
            f"et_enqueue_outbound({tenant}, {self.session}, '{CUSTOMER_NUMBER}', 'Hello', 'text', NULL, NULL)"
        )
        console = f"{url}/?next=/console/{tenant}"
        customer = f"{admin}/#me={CUSTOMER_NUMBER[1:]}&with={SHOP_NUMBER[1:]}"
        spare_phone = f"{admin}/#me={SPARE_NUMBER[1:]}"
        lines = [
            "",
            f"The console: {console}",
            f"  Sign in with {PLATFORM_KEY}",
            f"The customer's phone: {customer}",
            "  1. Write “how much?” there (or type a line here and press Enter): see it under Latest, and the answer.",
            "  2. Under Conversations, answer as a person; give the conversation back to the agent.",
            f"  3. Pair the second number: Channels, Second number, “Link with a code”, {SPARE_NUMBER}. Its phone, to type",
            f"     the code into, under “This phone”: {spare_phone}",
            "",
            f"API: {url}, described at {url}/docs, the same key. By hand:",
            f'    curl -s {admin}/people/{CUSTOMER_NUMBER[1:]}/send -d \'{{"to": "{SHOP_NUMBER}", "text": "how much?"}}\'',
            f"    curl -s {url}/sessions/{tenant}/{spare}/qr {auth} -H 'Accept: text/plain'",
            f'    curl -s {admin}/people/{SPARE_NUMBER[1:]}/scan -d \'{{"qr": "…"}}\'   # code: Accept: application/json',
            "  As a backend:",
            f"    psql '{self.gateway.database_url}' -c \"SELECT {enqueue}\"",
            "The demo stays up; Ctrl-C ends it.",
            "",
        ]
        print("\n".join(lines), flush=True)
        if _has_screen():
            for page in (customer, console):
                webbrowser.open(page)

    async def _first_workspace(self) -> int:
        return int(
            await self.db.fetchval("SELECT min(id) FROM et_workspaces WHERE tenant_id = $1", self.tenant)
        )

    async def _show_received(self) -> None:
        shown = len(self.customer.received)
        while True:
            message = await self.customer.received.wait_for(start=shown, timeout=86_400)
            print(f"  Mei's phone ← {message.text}", flush=True)
            shown += 1

    async def _type_as_customer(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while line := (await reader.readline()).decode(errors="replace").strip():
            await self.customer.send_text(self.shop, line)
        await asyncio.Event().wait()

    # --- helpers ----------------------------------------------------------------------------------------------

    def _tell(self, name: str, text: str) -> None:
        self._steps += 1
        print(f"{self._steps:>2}. {name:<10} {text}  [{time.monotonic() - self._began:.1f} s]", flush=True)

    def _at_customer(self, message_id: str) -> bool:
        return any(received.id == message_id for received in self.customer.received)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.http.post(path, json=body) as answer:
            parsed: dict[str, Any] = await answer.json()
            if answer.status >= 300:
                raise StepFailed(f"POST {path}: {answer.status} {parsed.get('detail', parsed)}")
            return parsed

    async def _see(self, what: str, sql: str, *args: Any) -> asyncpg.Record:
        """The row that shows `what`, once it is there."""
        found: list[asyncpg.Record] = []

        async def look() -> bool:
            row = await self.db.fetchrow(sql, *args)
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


def _has_screen() -> bool:
    """Somebody sits in front of this machine: a browser that opens is seen, and none takes the terminal over."""
    graphical = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    return graphical and sys.stdout.isatty() and not os.environ.get("SSH_CONNECTION")


async def run(*, check: bool, without: Collection[str] = ()) -> int:
    """The exit code: 0 when every step was seen, else 1."""
    # The story is what this prints; the gateway's own log would bury it.
    log.configure(os.environ.get("LOG_LEVEL", "error").lower(), stream=sys.stderr)
    print("Starting the embedded database, the WhatsApp sandbox and the gateway …", flush=True)
    try:
        async with Demo(without=without) as demo:
            async with asyncio.timeout(STORY_SECONDS):
                await demo.story()
            if check:
                print("OK: every step was seen in the database.", flush=True)
            else:
                with suppress(asyncio.CancelledError):
                    await demo.stay()
    except StepFailed as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    except TimeoutError:
        print(f"FAILED: the story took longer than {STORY_SECONDS:.0f} s", flush=True)
        return 1
    except GatewayError as error:
        print(f"FAILED: {error.detail}", flush=True)
        return 1
    return 0
