"""The client library alone, used as the quick start in its README shows: a plain async handler, everything else as it comes.

Run through the sandbox's launcher by `bench.whatsapp`; it speaks the JSON lines of `tests/support/whatsapp_real.py`. It
keeps nothing, and while messages come or go it writes nothing: `seen` tells afterwards when its handler had each.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from neonize.aioze.client import NewAClient
from neonize.aioze.events import ConnectedEv, MessageEv
from neonize.utils.jid import build_jid

OUT = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever the library prints must not disturb the JSON lines

seen: dict[str, float] = {}
"""Message id → monotonic seconds."""


def out(kind: str, **fields: Any) -> None:
    OUT.write(json.dumps({"ev": kind, **fields}) + "\n")


def make(path: str) -> NewAClient:
    client = NewAClient(path)

    @client.event.qr
    async def on_qr(_: NewAClient, data: bytes) -> None:
        out("qr", qr=data.decode())

    @client.event(ConnectedEv)
    async def on_connected(_: NewAClient, __: ConnectedEv) -> None:
        out("ConnectedEv")

    @client.event(MessageEv)
    async def on_message(client: NewAClient, message: MessageEv) -> None:
        text = message.Message.conversation or message.Message.extendedTextMessage.text
        if text == "ping":
            await client.reply_message("pong", message)
        seen[message.Info.ID] = time.monotonic()

    return client


async def do(clients: list[NewAClient], command: dict[str, Any]) -> Any:
    match command["op"]:
        case "connect":
            clients.append(make(command["db"]))
            await clients[0].connect()
            return None
        case "send":
            await clients[0].send_message(build_jid(command["to"]), command["text"])
            return None
        case "seen":
            return seen
        case other:
            raise ValueError(f"unknown command {other!r}")


async def reply(clients: list[NewAClient], command: dict[str, Any]) -> None:
    try:
        out("reply", id=command["id"], result=await do(clients, command))
    except Exception as error:
        out("reply", id=command["id"], error=str(error) or repr(error))


async def main() -> None:
    clients: list[NewAClient] = []
    running: set[asyncio.Task[None]] = set()
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    out("loaded", pid=os.getpid())
    while line := await reader.readline():
        task = asyncio.create_task(reply(clients, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    os._exit(0)  # the library's threads never return


if __name__ == "__main__":
    asyncio.run(main())
