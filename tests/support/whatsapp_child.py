"""A minimal real client for the sandbox's own tests: commands and events as JSON lines.

Run through the sandbox's launcher. It is not the gateway's client and knows no journal.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import neonize.events as plain_events
from google.protobuf.json_format import MessageToDict
from neonize.aioze import events
from neonize.aioze.client import NewAClient
from neonize.utils.enum import ReceiptType
from neonize.utils.jid import build_jid

OUT = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever the library prints must not disturb the JSON lines

EVENTS = (
    "ConnectedEv",
    "DisconnectedEv",
    "LoggedOutEv",
    "PairStatusEv",
    "ReceiptEv",
    "MessageEv",
    "StreamReplacedEv",
    "StreamErrorEv",
    "ConnectFailureEv",
    "UndecryptableMessageEv",
    "TemporaryBanEv",
    "ClientOutdatedEv",
    "OfflineSyncCompletedEv",
    "ChatPresenceEv",
)


def out(kind: str, **fields: Any) -> None:
    OUT.write(json.dumps({"ev": kind, "t": time.time(), **fields}, default=str) + "\n")


class Client(NewAClient):
    def _NewAClient__onLoginStatus(self, uuid: int, status: int) -> None:
        import ctypes

        out("login_status", status=(ctypes.string_at(status) or b"").decode())


class Child:
    def __init__(self) -> None:
        self.client: Client
        self.last: Any = None

    def make(self, path: str) -> None:
        self.client = Client(path, uuid="session")

        async def qr(_: Any, data: bytes) -> None:
            out("qr", qr=data.decode())

        self.client.event.qr(qr)
        for name in EVENTS:
            self.register(name)

    def register(self, name: str) -> None:
        async def handler(_: Any, message: Any) -> None:
            if name == "MessageEv":
                self.last = message
                body = message.Message
                text = body.conversation or body.extendedTextMessage.text or body.imageMessage.caption
                quoted = body.extendedTextMessage.contextInfo.stanzaID
                out(name, id=message.Info.ID, text=text, quoted=quoted, info=MessageToDict(message.Info))
            else:
                out(name, data=MessageToDict(message))

        self.client.event(getattr(events, name, None) or getattr(plain_events, name))(handler)

    async def do(self, command: dict[str, Any]) -> Any:
        operation = command["op"]
        if operation == "connect":
            self.make(command["db"])
            await self.client.connect(None)
            return None
        client = self.client
        if operation == "send":
            to = build_jid(command["to"], command.get("server", "s.whatsapp.net"))
            return MessageToDict(await client.send_message(to, command["text"]))
        if operation == "image":
            data = bytes.fromhex(command["data"])
            return MessageToDict(
                await client.send_image(build_jid(command["to"]), data, caption=command["caption"])
            )
        if operation == "download":
            return bytes(await client.download_any(self.last.Message)).hex()
        if operation == "read":
            source = self.last.Info.MessageSource
            await client.mark_read(
                self.last.Info.ID, chat=source.Chat, sender=source.Sender, receipt=ReceiptType.READ
            )
            return None
        if operation == "pair_phone":
            return await client.PairPhone(command["phone"], True)
        if operation == "check":
            return [MessageToDict(found) for found in await client.is_on_whatsapp(*command["numbers"])]
        if operation == "group":
            return MessageToDict(await client.get_group_info(build_jid(command["group"], "g.us")))
        if operation == "logout":
            return await client.logout()
        raise ValueError(operation)

    async def reply(self, command: dict[str, Any]) -> None:
        try:
            out("reply", id=command["id"], result=await self.do(command))
        except Exception as error:
            out("reply", id=command["id"], error=str(error) or repr(error))


async def main() -> None:
    child, running = Child(), set()
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    out("loaded", pid=os.getpid())
    while line := await reader.readline():
        task = asyncio.create_task(child.reply(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    os._exit(0)  # the library's threads never return


if __name__ == "__main__":
    asyncio.run(main())
