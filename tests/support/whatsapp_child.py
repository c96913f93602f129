"""A minimal real client for the sandbox's own tests: commands and events as JSON lines.

Run through the sandbox's launcher. It is not the gateway's client and knows no journal.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from typing import Any

import neonize.events as plain_events
from google.protobuf.json_format import MessageToDict, ParseDict
from neonize._binder import gocode
from neonize.aioze import events
from neonize.aioze.client import NewAClient
from neonize.proto.Neonize_pb2 import ReturnFunctionWithError
from neonize.proto.waE2E.WAWebProtobufsE2E_pb2 import Message
from neonize.utils.enum import (
    ChatPresence,
    ChatPresenceMedia,
    MediaType,
    Presence,
    ReceiptType,
    VoteType,
)
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
    "PresenceEv",
    "HistorySyncEv",
    "GroupInfoEv",
    "JoinedGroupEv",
    "CallOfferEv",
    "CallTerminateEv",
)


def out(kind: str, /, **fields: Any) -> None:
    OUT.write(json.dumps({"ev": kind, "t": time.time(), **fields}, default=str) + "\n")


class Client(NewAClient):
    def _NewAClient__onLoginStatus(self, uuid: int, status: int) -> None:
        import ctypes

        out("login_status", status=(ctypes.string_at(status) or b"").decode())


class Child:
    def __init__(self) -> None:
        self.client: Client
        self.last: Any = None
        self.seen: dict[str, Any] = {}

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
                out(
                    name,
                    id=message.Info.ID,
                    text=text,
                    quoted=quoted,
                    info=MessageToDict(message.Info),
                    message=MessageToDict(body),
                    once=message.IsViewOnce,
                    ephemeral=message.IsEphemeral,
                    edit=message.IsEdit,
                )
                self.seen[message.Info.ID] = message
            elif name == "HistorySyncEv":
                sync = message.Data
                infos = [item.message for chat in sync.conversations for item in chat.messages]
                out(
                    name,
                    kind=sync.syncType,
                    order=sync.chunkOrder,
                    progress=sync.progress,
                    ids=[info.key.ID for info in infos],
                    texts=[info.message.conversation for info in infos[:5]],
                    chats=[chat.ID for chat in sync.conversations],
                    names=[item.pushname for item in sync.pushnames],
                )
            else:
                out(name, data=MessageToDict(message))

        async def reported(client: Any, message: Any) -> None:
            try:
                await handler(client, message)
            except Exception as error:  # neonize would drop it
                out("handler_failed", event=name, error=repr(error))

        self.client.event(getattr(events, name, None) or getattr(plain_events, name))(reported)

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
        if operation == "message":
            to = build_jid(command["to"], command.get("server", "s.whatsapp.net"))
            body = ParseDict(command["message"], Message())
            return MessageToDict(await client.send_message(to, body))
        if operation == "upload":
            kind = MediaType[f"Media{command['kind']}"]
            return MessageToDict(await client.upload(bytes.fromhex(command["data"]), kind))
        if operation == "download":
            found = self.seen[command["of"]] if "of" in command else self.last
            data = bytes(await client.download_any(found.Message))
            return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if operation == "edit":
            body = Message(conversation=command["text"])
            return MessageToDict(await client.edit_message(build_jid(command["to"]), command["of"], body))
        if operation == "revoke":
            me = (await client.get_me()).JID
            return MessageToDict(await client.revoke_message(build_jid(command["to"]), me, command["of"]))
        if operation == "poll":
            body = await client.build_poll_vote_creation(
                command["question"], command["options"], VoteType.SINGLE
            )
            return MessageToDict(await client.send_message(build_jid(command["to"]), body))
        if operation == "vote":
            poll = self.seen[command["of"]].Info
            body = await client.build_poll_vote(poll, command["options"])
            return MessageToDict(await client.send_message(poll.MessageSource.Chat, body))
        if operation == "votes":
            raw = self.seen[command["of"]].SerializeToString()
            # neonize 0.5.2's own `decrypt_poll_vote` forgets to read the answer's bytes.
            answer = await asyncio.to_thread(gocode.DecryptPollVote, b"session", raw, len(raw))
            found = ReturnFunctionWithError.FromString(answer.contents.get_bytes())
            if found.Error:
                raise ValueError(found.Error)
            return [bytes(option).hex() for option in found.PollVoteMessage.selectedOptions]
        if operation == "typing":
            return await client.send_chat_presence(
                build_jid(command["to"]),
                ChatPresence.CHAT_PRESENCE_COMPOSING,
                ChatPresenceMedia.CHAT_PRESENCE_MEDIA_AUDIO,
            )
        if operation == "ask_history":
            body = ParseDict(
                {
                    "protocolMessage": {
                        "type": "PEER_DATA_OPERATION_REQUEST_MESSAGE",
                        "peerDataOperationRequestMessage": {
                            "peerDataOperationRequestType": "HISTORY_SYNC_ON_DEMAND",
                            "historySyncOnDemandRequest": command["request"],
                        },
                    }
                },
                Message(),
            )
            me = (await client.get_me()).JID
            return MessageToDict(await client.send_message(build_jid(me.User), body))
        if operation == "available":
            return await client.send_presence(Presence.AVAILABLE)
        if operation == "reject":
            await client.reject_call(build_jid(command["to"], command["server"]), command["call"])
            return None
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
        if operation == "picture":
            return MessageToDict(await client.get_profile_picture(build_jid(command["of"])))
        if operation == "info":
            found = await client.get_user_info(build_jid(command["of"]))
            return [MessageToDict(item) for item in found]
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
