"""`python -m sandbox`: WhatsApp and Telegram on loopback, with people to be, until Ctrl-C. Talks to no other machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import signal
import sys
from pathlib import Path

import click

from sandbox.telegram import TelegramSandbox
from sandbox.telegram.people import Person
from sandbox.telegram.world import Bot
from sandbox.whatsapp.admin import AdminServer
from sandbox.whatsapp.sandbox import WhatsAppSandbox

_SHOP, _CUSTOMER = "+60123456789", "+60111222333"


def _welcome_telegram(tg: TelegramSandbox, bot: Bot, person: Person) -> str:
    hello = json.dumps({"text": "Hi, how much is it?"})
    return f"""
Telegram: start the gateway with TELEGRAM_BASE_URL={tg.url} as well, and add the bot {bot.address}
  echo '{{"token": "{bot.token}"}}' | python -m gateway session add 1 telegram --connect --credentials -
Be the customer {person.name}
  curl -d '{hello}' {tg.url}/people/{person.id}/say
  curl '{tg.url}/people/{person.id}/messages?after=0&wait=20'
"""


def _welcome(wa: WhatsAppSandbox, url: str) -> str:
    shop, customer = _SHOP.removeprefix("+"), _CUSTOMER.removeprefix("+")
    hello = json.dumps({"to": _SHOP, "text": "Hi, how much is it?"})
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in wa.launch_env().items())
    return f"""WhatsApp sandbox is running. Admin API: {url}
The same address in a browser is the customer's phone: {url}/#me={customer}&with={shop}

Start the gateway against it with
  {environment} \\
  WHATSAPP_CLIENT_COMMAND={shlex.quote(wa.client_command())} python -m gateway

Link it: ask the gateway for the QR code (as JSON) and let the shop's phone {_SHOP} scan its text
  curl -d '{{"qr": "..."}}' {url}/people/{shop}/scan
or type the code it shows
  curl -d '{{"code": "ABCD-EFGH"}}' {url}/people/{shop}/code

Be the customer {_CUSTOMER}
  curl -d '{hello}' {url}/people/{customer}/send
  curl '{url}/people/{customer}/messages?after=0&wait=20'

Everything else: curl {url}/
"""


async def _serve(folder: Path | None, port: int, telegram_port: int) -> None:
    try:
        wa = WhatsAppSandbox(folder, autosave=folder is not None)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stopped.set)
    admin = AdminServer(wa)
    tg = TelegramSandbox()
    try:
        await tg.start(telegram_port)
        async with wa:
            wa.phone(_SHOP, "Shop")
            wa.person(_CUSTOMER, "Mei", auto_receipts="read")
            url = await admin.start(port)
            click.echo(_welcome(wa, url))
            click.echo(_welcome_telegram(tg, tg.bot(), tg.person("Mei Lim")))
            sys.stdout.flush()
            await stopped.wait()
            await admin.stop()
    except OSError as error:
        raise click.ClickException(
            f"cannot listen ({error.strerror or error}): another sandbox with this --state or --port is running"
        ) from None
    finally:
        await admin.stop()
        await tg.stop()


@click.command(help="WhatsApp and Telegram on loopback, with phones and people to talk to.")
@click.option(
    "--state", type=click.Path(path_type=Path, file_okay=False), help="Keep everything in this folder."
)
@click.option("--port", default=3900, show_default=True, help="Port of the admin API; 0 takes a free one.")
@click.option("--telegram-port", type=int, help="Port of the Bot API; unset: the one after --port.")
@click.option("--debug", is_flag=True, help="Log every stanza.")
def main(state: Path | None, port: int, telegram_port: int | None, debug: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    if debug:
        logging.getLogger("sandbox.whatsapp").setLevel(logging.DEBUG)
    if telegram_port is None:
        telegram_port = port + 1 if port else 0
    asyncio.run(_serve(state, port, telegram_port))


if __name__ == "__main__":
    main()
