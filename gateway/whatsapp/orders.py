"""What the gateway has the WhatsApp child do: a coroutine for each command of `client.py`'s list, and the send itself.

One of the child's three parts that import neonize. It keeps nothing, and knows neither the journal nor the gate.
"""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64decode
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from neonize._binder import gocode
from neonize.aioze.client import NewAClient
from neonize.exc import SendMessageError, SendPresenceError
from neonize.proto import Neonize_pb2 as pb
from neonize.proto.waE2E.WAWebProtobufsE2E_pb2 import Message as E2EMessage
from neonize.utils.enum import (
    ChatPresence,
    ChatPresenceMedia,
    MediaType,
    MediaTypeToMMS,
    Presence,
    ReceiptType,
)

from core import faults
from gateway.whatsapp import uploads
from gateway.whatsapp.downloads import Remote
from gateway.whatsapp.fetching import Fetching, refusal_of


class Orders:
    """`do_NAME(command)` for every command that needs no more than the library."""

    def __init__(self) -> None:
        self.client: NewAClient | None = None
        self.fetching: Fetching | None = None

    @property
    def live(self) -> NewAClient:
        if self.client is None:
            raise ConnectionError("websocket not connected")
        return self.client

    def send(self, command: dict[str, Any]) -> dict[str, Any]:
        """On a thread of `Senders`: straight into the library, without a turn of the loop before and after it."""
        live = self.live
        to, message = (
            jid_of(command["to"]).SerializeToString(),
            message_of(command["message"]).SerializeToString(),
        )
        faults.point("whatsapp.send.before")
        raw = gocode.SendMessage(live.uuid, to, len(to), message, len(message))
        answer = pb.SendMessageReturnFunction.FromString(raw)
        if answer.Error:
            raise SendMessageError(answer.Error)
        faults.point("whatsapp.send.after")
        response = answer.SendResponse
        return {
            "message_id": response.ID,
            "timestamp": int(response.Timestamp),
            "chat": text_of(response.Chat) or command["to"],
        }

    async def do_download(self, command: dict[str, Any]) -> dict[str, Any]:
        if self.fetching is None:
            raise ConnectionError("websocket not connected")
        return await self.fetching.download(command)

    async def do_download_stop(self, command: dict[str, Any]) -> None:
        if self.fetching is not None:
            self.fetching.stop_download(command["to"])

    async def by_library(self, remote: Remote) -> bytes:
        kind = next(member for member in MediaTypeToMMS if member.value == remote.kind)
        try:
            found: bytes = await self.live.download_media_with_path(
                remote.path,
                remote.enc_sha256 or b"",
                remote.sha256 or b"",
                remote.key,
                0,
                MediaType[kind.name],
                kind,
            )
        except Exception as error:
            raise refusal_of(error) from error
        return found

    async def do_reject_call(self, command: dict[str, Any]) -> None:
        await self.live.reject_call(jid_of(command["from"]), command["id"])

    async def do_pair_code(self, command: dict[str, Any]) -> dict[str, Any]:
        return {"code": await self.live.PairPhone(command["phone"], True)}

    async def do_check(self, command: dict[str, Any]) -> dict[str, bool]:
        answers = await self.live.is_on_whatsapp(*[f"+{phone}" for phone in command["phones"]])
        return {answer.Query.lstrip("+"): bool(answer.IsIn) for answer in answers}

    async def do_upload(self, command: dict[str, Any]) -> dict[str, Any]:
        live = self.live
        data, found = await asyncio.to_thread(uploads.prepare, command)
        response = await live.upload(data, MediaType[f"Media{command['kind'].capitalize()}"])
        return found | uploads.placed(response)

    async def do_typing(self, command: dict[str, Any]) -> None:
        """Shown only of somebody who is online; while we are, the phone rings no bell, so `leave` as soon as it is over."""
        if command["on"]:
            await self._presence(Presence.AVAILABLE)
        state = ChatPresence.CHAT_PRESENCE_COMPOSING if command["on"] else ChatPresence.CHAT_PRESENCE_PAUSED
        await self.live.send_chat_presence(
            jid_of(command["to"]), state, ChatPresenceMedia.CHAT_PRESENCE_MEDIA_TEXT
        )
        if command.get("leave"):
            await self._presence(Presence.UNAVAILABLE)

    async def _presence(self, presence: Presence) -> None:
        """Best effort: whatsmeow cannot say it before the phone has told it the account's name."""
        with contextlib.suppress(SendPresenceError):
            await self.live.send_presence(presence)

    async def do_name(self, command: dict[str, Any]) -> None:
        await self.live.set_profile_name(command["name"])

    async def do_read(self, command: dict[str, Any]) -> None:
        await self.live.mark_read(
            *command["ids"],
            chat=jid_of(command["chat"]),
            sender=jid_of(command["sender"]),
            receipt=ReceiptType.READ,
        )

    async def do_logout(self, _command: dict[str, Any]) -> None:
        await self.live.logout()


def message_of(body: dict[str, Any]) -> E2EMessage:
    """WhatsApp's protobuf of its JSON. Raises ValueError. Plain text, by far the most, goes past the general parser."""
    text, context = body.get("extendedTextMessage"), body.get("messageContextInfo")
    if (
        len(body) == 2
        and text
        and context
        and text.keys() == {"text"}
        and context.keys() == {"messageSecret"}
    ):
        message = E2EMessage()
        message.extendedTextMessage.text = text["text"]
        message.messageContextInfo.messageSecret = b64decode(context["messageSecret"])
        return message
    try:
        return ParseDict(body, E2EMessage(), ignore_unknown_fields=True)
    except ParseError as error:
        raise ValueError(f"invalid message: {error}") from None


def jid_of(text: str) -> Any:
    user, _, server = text.partition("@")
    return pb.JID(User=user, Server=server, Device=0, RawAgent=0, Integrator=0, IsEmpty=False)


def text_of(jid: Any) -> str:
    return "" if jid.IsEmpty or not jid.User else f"{jid.User}@{jid.Server}"
