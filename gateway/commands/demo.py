"""`gateway demo`: the main job on this machine alone, the real gateway against the sandboxes of all three channels.

Starts everything, has the story told (`demo_story`) and stops everything. `--check` ends after the story; without it the
demo stays up, and what is typed is written as a customer. With `demo_story` the only importer of the sandbox outside tests.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from core import log, settings
from core.database import connect
from core.errors import GatewayError
from gateway.app import Gateway
from gateway.commands.demo_story import CUSTOMER_NUMBER, SHOP_MAIL, SHOP_NUMBER, StepFailed, Story
from sandbox.mail import MailSandbox, Person
from sandbox.telegram import TelegramSandbox
from sandbox.whatsapp.admin import AdminServer
from sandbox.whatsapp.sandbox import WhatsAppSandbox

PLATFORM_KEY = "cg_demo_platform_key_for_this_machine_only"
SPARE_NUMBER = "+60199999999"
STORY_SECONDS = 110.0


class Demo:
    """One run. `without` switches a part off, which the story must notice (see tests/e2e/test_demo.py)."""

    def __init__(self, *, without: Collection[str] = ()) -> None:
        self.without = frozenset(without)
        self._began = time.monotonic()
        self._stack = AsyncExitStack()

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
        mail = await self._stack.enter_async_context(MailSandbox(SHOP_MAIL))
        self.telegram = telegram = await self._stack.enter_async_context(TelegramSandbox())
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
            "TELEGRAM_BASE_URL": telegram.url,
            "INBOUND_POLL_SECONDS": "5",
            **mail.launch_env(),
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
        self.story = Story(
            self.http, self.db, self.sandbox, mail, telegram, without=self.without, began=self._began
        )
        if "mail" in self.without:
            await mail.stop()
        if "telegram" in self.without:
            await telegram.stop()

    # --- afterwards -------------------------------------------------------------------------------------------

    async def stay(self) -> None:
        """Stay up until Ctrl-C; lines typed are written as the customer, what the customer gets is printed."""
        await self.db.execute("UPDATE et_threads SET handled_by = 'agent' WHERE id = $1", self.story.thread)
        self.sandbox.phone(SPARE_NUMBER, "Second phone")
        spare = await self.story.new_session("whatsapp", "Second number")
        self._say_how(spare, self.telegram.bot("@second_bot", "Second bot").token)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in self._show_received()]
        tasks.append(asyncio.create_task(ended.wait()))
        if sys.stdin.isatty():
            tasks.append(asyncio.create_task(self._type_as_customer()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _say_how(self, spare: int, token: str) -> None:
        url, admin, tenant = self.gateway.url, self.admin.url, self.story.tenant
        auth = f"-H 'Authorization: Bearer {PLATFORM_KEY}'"
        enqueue = f"et_enqueue_outbound({tenant}, {self.story.session}, '{CUSTOMER_NUMBER}', 'Hello', 'text', NULL, NULL)"
        lines = [
            "",
            f"The console: {url}/",
            f"  Sign in with {PLATFORM_KEY}: pair a number, watch messages arrive, answer as a person.",
            f"The demo stays up; Ctrl-C ends it. API: {url}, described at {url}/docs, the same key.",
            "The customer's phone, to write, send pictures, react and read by hand:",
            f"  {admin}/#me={CUSTOMER_NUMBER[1:]}&with={SHOP_NUMBER[1:]}",
            "  or type a line here and press Enter (`mail: …` as Mei by mail, `telegram: …` as Arun on Telegram), or",
            f'    curl -s {admin}/people/{CUSTOMER_NUMBER[1:]}/send -d \'{{"to": "{SHOP_NUMBER}", "text": "how much?"}}\'',
            "  A second number to pair: its QR, and a phone of the sandbox that scans it",
            f"    curl -s {url}/sessions/{tenant}/{spare}/qr {auth} -H 'Accept: text/plain'",
            f'    curl -s {admin}/people/{SPARE_NUMBER[1:]}/scan -d \'{{"qr": "…"}}\'   # code: Accept: application/json',
            f"  A second Telegram bot to add in the console or over the API: its token is {token}",
            "  Send as a backend:",
            f"    psql '{self.gateway.database_url}' -c \"SELECT {enqueue}\"",
            "",
        ]
        print("\n".join(lines), flush=True)

    def _show_received(self) -> list[Coroutine[Any, Any, None]]:
        """What reaches the customers from now on."""
        story = self.story
        return [
            _show("Mei's phone", story.mei.received),
            _show_letters("Mei's mailbox", story.mei_by_mail),
            _show("Arun's Telegram", story.arun.received),
        ]

    async def _type_as_customer(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        story = self.story
        while line := (await reader.readline()).decode(errors="replace").strip():
            channel, colon, text = line.partition(":")
            match channel.strip().lower() if colon else "":
                case "mail":
                    story.mei_by_mail.write(text.strip(), subject="From the demo")
                case "telegram":
                    await story.arun.say(story.bot, text.strip())
                case _:
                    await story.mei.send_text(story.shop, line)
        await asyncio.Event().wait()


async def _show(whose: str, received: Any) -> None:
    shown = len(received)
    while True:
        message = await received.wait_for(lambda _: True, start=shown, timeout=86_400)
        print(f"  {whose} ← {message.text}", flush=True)
        shown += 1


async def _show_letters(whose: str, person: Person) -> None:
    shown = len(person.letters)
    while True:
        shown += 1
        letter = await person.letter(shown, seconds=86_400)
        print(f"  {whose} ← {letter.text}", flush=True)


async def run(*, check: bool, without: Collection[str] = ()) -> int:
    """The exit code: 0 when every step was seen, else 1."""
    # The story is what this prints; the gateway's own log would bury it.
    log.configure(os.environ.get("LOG_LEVEL", "error").lower(), stream=sys.stderr)
    print("Starting the embedded database, the sandboxes and the gateway …", flush=True)
    try:
        async with Demo(without=without) as demo:
            async with asyncio.timeout(STORY_SECONDS):
                await demo.story.tell()
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
