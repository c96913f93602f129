"""The WhatsApp child: one session, one process, the only place that imports neonize. Started by `channel.py`.

    python -m gateway.whatsapp.client --folder DIR [--parent PID]

It speaks JSON lines: commands on stdin, reports on stdout (Go's own prints go to stderr). It journals every message
inside the event callback and lets no acknowledgement leave before (`gate.py`). It never writes a line of whatsmeow's
DEBUG log, never touches the database server, and does not outlive its parent.

Commands `{"id", "op", …}`, each answered by `{"ev": "reply", "id", "result"}` or `{"ev": "reply", "id", "error"}`:
  open {proxy, heal, give_up}   once: drop the sessions to heal, then connect      pair_code {phone}
  send {to, message}            `message` is the JSON of WhatsApp's own protobuf   check {phones}
  upload {path, kind, preview, sticker, duration}   answers the message's parts that say where the file is
  download {to, kind, path, key, …} into the file `to` · download_stop {to} · reject_call {id, from}
  typing {to, on, leave} · read {chat, sender, ids} · name {name} · probe · ping · logout · stop
Reports: ready · qr · paired · pair_error · login · connected · disconnected · keepalive_timeout · logged_out ·
  stream_replaced · temporary_ban · client_outdated · connect_failure · stream_error · journaled · heal · lost · gate_alarm ·
  journal_failed · call · history · history_waits · history_failed
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import signal
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import neonize.aioze.client as neonize_client
import orjson
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import DecodeError
from neonize._binder import ProxySettings, gocode
from neonize.aioze.client import NewAClient
from neonize.events import EVENT_TO_INT, INT_TO_EVENT
from neonize.exc import SendMessageError, SendPresenceError
from neonize.proto import Neonize_pb2 as pb
from neonize.proto.waCompanionReg.WAWebProtobufsCompanionReg_pb2 import DeviceProps
from neonize.proto.waE2E.WAWebProtobufsE2E_pb2 import Message as E2EMessage
from neonize.utils.enum import (
    ChatPresence,
    ChatPresenceMedia,
    MediaType,
    MediaTypeToMMS,
    Presence,
    ReceiptType,
)
from neonize.utils.log import log as neonize_log

from core import faults
from core.errors import JournalError
from core.journal import Journal
from gateway.whatsapp import store, uploads
from gateway.whatsapp.downloads import Remote
from gateway.whatsapp.fetching import Fetching, refusal_of
from gateway.whatsapp.folder import FolderTaken, take
from gateway.whatsapp.gate import Gate, GateTimings, Suspect, key_of
from gateway.whatsapp.holds import Holds
from gateway.whatsapp.protocol import (
    CALL,
    GROUP_NOTICE,
    LINE_LIMIT,
    LOST,
    MESSAGE,
    RECEIPT,
    UNDECRYPTABLE,
    Exit,
    decode,
    encode,
    journal_path,
    store_path,
)
from gateway.whatsapp.protodict import as_dict
from gateway.whatsapp.senders import Senders

THREADS = 32
"""Neonize keeps one for ever, a send that hangs keeps another; the default pool is too small on a small machine."""
LOOK_SECONDS = 0.2
RECONNECT_SECONDS = 1.0
"""A link that stands again after this long is a new one."""
LOCK_SECONDS = 4.0
CALLS_KEPT = 1000
"""Whose beginning said whether they are video calls."""
PR_SET_PDEATHSIG = 1

_JOURNALED = {
    EVENT_TO_INT[pb.Message]: MESSAGE,
    EVENT_TO_INT[pb.UndecryptableMessage]: UNDECRYPTABLE,
    EVENT_TO_INT[pb.Receipt]: RECEIPT,
    EVENT_TO_INT[pb.CallOffer]: CALL,
    EVENT_TO_INT[pb.CallOfferNotice]: CALL,
    EVENT_TO_INT[pb.CallAccept]: CALL,
    EVENT_TO_INT[pb.CallTerminate]: CALL,
    EVENT_TO_INT[pb.GroupInfoEvent]: GROUP_NOTICE,
    EVENT_TO_INT[pb.JoinedGroup]: GROUP_NOTICE,
}
_CALL_PARTS = {
    EVENT_TO_INT[pb.CallOffer]: "offer",
    EVENT_TO_INT[pb.CallOfferNotice]: "offer_notice",
    EVENT_TO_INT[pb.CallAccept]: "accept",
    EVENT_TO_INT[pb.CallTerminate]: "terminate",
}
_REPORTED = {
    EVENT_TO_INT[event]: name
    for event, name in (
        (pb.PairStatus, "paired"),
        (pb.Connected, "connected"),
        (pb.Disconnected, "disconnected"),
        (pb.KeepAliveTimeout, "keepalive_timeout"),
        (pb.KeepAliveRestored, "keepalive_restored"),
        (pb.LoggedOut, "logged_out"),
        (pb.StreamReplaced, "stream_replaced"),
        (pb.StreamError, "stream_error"),
        (pb.TemporaryBan, "temporary_ban"),
        (pb.ConnectFailure, "connect_failure"),
        (pb.ClientOutdated, "client_outdated"),
        (pb.OfflineSyncCompleted, "offline_sync_completed"),
    )
}


class Wire:
    """Lines to the parent, whole ones only, from any thread."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)  # the Go library prints to stdout
        self._lock = threading.Lock()

    def say(self, event: str, **fields: Any) -> None:
        line = memoryview(encode({"ev": event, **fields}))
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]


class _Client(NewAClient):  # type: ignore[misc]
    """neonize's client with its one callback that cannot be registered: how a login ended (`success`, `timeout`, …)."""

    def __init__(self, name: str, on_login: Callable[[str], None]) -> None:
        super().__init__(
            name, uuid="session", props=DeviceProps(os="Channel Gateway", platformType=DeviceProps.CHROME)
        )
        self._on_login = on_login

    def _NewAClient__onLoginStatus(self, _uuid: int, status: int) -> None:
        self._on_login(ctypes.string_at(status).decode(errors="replace"))


class Child:
    def __init__(self, folder: Path, wire: Wire) -> None:
        self.folder = folder
        self.wire = wire
        self.journal = Journal(journal_path(folder))
        self.gate = Gate()
        self.holds = Holds()
        self.fetching: Fetching | None = None
        self.client: _Client | None = None
        self._video: dict[str, bool] = {}
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connected = False
        self._untold = False
        """Receipts were journaled since the parent was last told."""

    # ---- starting and ending ----

    async def run(self) -> NoReturn:
        self._loop.set_default_executor(ThreadPoolExecutor(THREADS))
        # Python's logging is off here: what a callback of the loop raises would vanish.
        self._loop.set_exception_handler(
            lambda _, context: self.wire.say("error", error=str(context.get("exception")))
        )
        reader = asyncio.StreamReader(limit=LINE_LIMIT)
        await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        self._spawn(self._watch_gate())
        self.wire.say("ready", pid=os.getpid(), paired=store.device(store_path(self.folder)) is not None)
        senders = Senders(self._send, functools.partial(self.wire.say, "reply"))
        while line := await reader.readline():
            command = decode(line)
            if command.get("op") == "send":
                senders.put(command)
            else:
                self._spawn(self._obey(command))
        # The parent is gone, or wants us gone. Whatever hangs in Go is no reason to stay.
        self.end(Exit.STOPPED)

    def end(self, code: Exit) -> NoReturn:
        """Neonize's threads may never return: leave without waiting for any of them."""
        os._exit(code)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self.wire.say("error", error=f"{type(error).__name__}: {error}")

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- commands ----

    async def _obey(self, command: dict[str, Any]) -> None:
        number, op = command.get("id"), command.get("op", "")
        action = getattr(self, f"_do_{op}", None)
        try:
            if action is None:
                raise ValueError(f"unknown command {op!r}")
            result = await action(command)
        except Exception as error:
            self.wire.say(
                "reply", id=number, error=str(error) or type(error).__name__, kind=type(error).__name__
            )
        else:
            self.wire.say("reply", id=number, result=result)

    @property
    def _live(self) -> _Client:
        if self.client is None:
            raise ConnectionError("websocket not connected")
        return self.client

    async def _do_open(self, command: dict[str, Any]) -> dict[str, Any]:
        if self.client is not None:
            raise ValueError("open comes once; start another child")
        path = store_path(self.folder)
        heal = [(s["sender"], s["chat"], s["reason"]) for s in command.get("heal") or ()]
        dropped = store.drop_sessions(path, heal) if heal and path.exists() else 0
        known = await asyncio.to_thread(lambda: self.journal.keys(MESSAGE) | self.journal.keys(LOST))
        timings = GateTimings(**command.get("gate", {}))
        self.gate = Gate(known, give_up=command.get("give_up") or (), timings=timings)
        neonize_client.log_whatsmeow = self._on_log
        neonize_log.setLevel(
            logging.DEBUG
        )  # tells whatsmeow its level; Python's own logging is off altogether
        self.fetching = Fetching(
            self.folder, self.holds, self.wire.say, proxy=command.get("proxy"), library=self._by_library
        )
        self._spawn(self.fetching.run())
        client = _Client(store.opened_as(path), self._on_login)
        client.event.execute = self._on_event
        client.event.list_func = dict.fromkeys([*_JOURNALED, *_REPORTED], _unused)
        client.event.qr(self._on_qr)
        self.client = client
        proxy = command.get("proxy")
        task = await client.connect(ProxySettings(proxy) if proxy else None)
        task.add_done_callback(self._on_client_end)
        return {"dropped": dropped}

    def _send(self, command: dict[str, Any]) -> dict[str, Any]:
        """On a thread of `Senders`: straight into the library, without a turn of the loop before and after it."""
        if self.client is None:
            raise ConnectionError("websocket not connected")
        to, message = (
            _jid(command["to"]).SerializeToString(),
            _message(command["message"]).SerializeToString(),
        )
        faults.point("whatsapp.send.before")
        raw = gocode.SendMessage(self.client.uuid, to, len(to), message, len(message))
        answer = pb.SendMessageReturnFunction.FromString(raw)
        if answer.Error:
            raise SendMessageError(answer.Error)
        faults.point("whatsapp.send.after")
        response = answer.SendResponse
        return {
            "message_id": response.ID,
            "timestamp": int(response.Timestamp),
            "chat": _text(response.Chat) or command["to"],
        }

    async def _do_download(self, command: dict[str, Any]) -> dict[str, Any]:
        if self.fetching is None:
            raise ConnectionError("websocket not connected")
        return await self.fetching.download(command)

    async def _do_download_stop(self, command: dict[str, Any]) -> None:
        if self.fetching is not None:
            self.fetching.stop_download(command["to"])

    async def _by_library(self, remote: Remote) -> bytes:
        kind = next(member for member in MediaTypeToMMS if member.value == remote.kind)
        try:
            found: bytes = await self._live.download_media_with_path(
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

    async def _do_reject_call(self, command: dict[str, Any]) -> None:
        await self._live.reject_call(_jid(command["from"]), command["id"])

    async def _do_pair_code(self, command: dict[str, Any]) -> dict[str, Any]:
        return {"code": await self._live.PairPhone(command["phone"], True)}

    async def _do_check(self, command: dict[str, Any]) -> dict[str, bool]:
        answers = await self._live.is_on_whatsapp(*[f"+{phone}" for phone in command["phones"]])
        return {answer.Query.lstrip("+"): bool(answer.IsIn) for answer in answers}

    async def _do_upload(self, command: dict[str, Any]) -> dict[str, Any]:
        live = self._live
        data, found = await asyncio.to_thread(uploads.prepare, command)
        response = await live.upload(data, MediaType[f"Media{command['kind'].capitalize()}"])
        return found | uploads.placed(response)

    async def _do_typing(self, command: dict[str, Any]) -> None:
        """Shown only of somebody who is online; while we are, the phone rings no bell, so `leave` as soon as it is over."""
        if command["on"]:
            await self._presence(Presence.AVAILABLE)
        state = ChatPresence.CHAT_PRESENCE_COMPOSING if command["on"] else ChatPresence.CHAT_PRESENCE_PAUSED
        await self._live.send_chat_presence(
            _jid(command["to"]), state, ChatPresenceMedia.CHAT_PRESENCE_MEDIA_TEXT
        )
        if command.get("leave"):
            await self._presence(Presence.UNAVAILABLE)

    async def _presence(self, presence: Presence) -> None:
        """Best effort: whatsmeow cannot say it before the phone has told it the account's name."""
        with contextlib.suppress(SendPresenceError):
            await self._live.send_presence(presence)

    async def _do_name(self, command: dict[str, Any]) -> None:
        await self._live.set_profile_name(command["name"])

    async def _do_read(self, command: dict[str, Any]) -> None:
        await self._live.mark_read(
            *command["ids"],
            chat=_jid(command["chat"]),
            sender=_jid(command["sender"]),
            receipt=ReceiptType.READ,
        )

    async def _do_probe(self, _command: dict[str, Any]) -> dict[str, Any]:
        """A question that only WhatsApp can answer: a link that is up and dead does not."""
        identifier = (await self._who_we_are()).get("identifier")
        if identifier is None or not self._connected:
            raise ConnectionError("websocket not connected")
        await self._live.is_on_whatsapp(identifier)
        return {"silent_for": self.gate.silent_for}

    async def _do_ping(self, _command: dict[str, Any]) -> dict[str, Any]:
        statistics = self.gate.statistics
        return {
            "connected": self._connected,
            "silent_for": round(self.gate.silent_for, 3),
            "callbacks": self.gate.running,
            "gated": statistics.gated,
            "held": statistics.held_now,
            "held_peak": statistics.held_peak,
            "gate_worst": round(statistics.worst, 4),
        }

    async def _do_logout(self, _command: dict[str, Any]) -> None:
        await self._live.logout()

    async def _do_stop(self, _command: dict[str, Any]) -> None:
        """Close the socket; the parent ends us by closing stdin. Not in the QR phase: Go's thread would never return."""
        if self.client is not None and self._connected:
            await asyncio.wait_for(self.client.disconnect(), 3)

    # ---- what neonize calls, on its own threads ----

    def _on_log(self, binary: int, size: int) -> None:
        if not binary or size <= 0:
            return
        _stay()
        entry = pb.LogEntry.FromString(ctypes.string_at(binary, size))
        self.holds.on_log(entry.Name, entry.Message)
        self.gate.on_log(entry.Name, entry.Message)

    def _on_event(self, _uuid: int, binary: int, size: int, code: int) -> None:
        _stay()
        raw = ctypes.string_at(binary, size)
        kind = _JOURNALED.get(code)
        if kind is None:
            if code in _REPORTED:
                self._loop.call_soon_threadsafe(self._report, code, raw)
            return
        try:
            with self.gate.callback():
                faults.point("whatsapp.callback")
                self._store(kind, code, raw)
        except BaseException as error:
            self._broken(error)

    def _store(self, kind: str, code: int, raw: bytes) -> None:
        """Make one event durable, then let its acknowledgement go. Raises JournalError."""
        at = time.time()
        try:
            event = INT_TO_EVENT[code].FromString(raw)
        except DecodeError as error:
            # Its id is unknown, so its receipt stays held until the gate calls it lost; its bytes are safe.
            self._append(
                kind, "", orjson.dumps({"event": kind, "at": at, "data": {}, **_undecoded(raw, error)})
            )
            return
        if kind == RECEIPT:
            key = " ".join(event.MessageIDs)[:200]
            self._append(kind, key, orjson.dumps({"event": kind, "at": at, "data": as_dict(event)}))
            return
        if kind == CALL:
            self._store_call(_CALL_PARTS[code], event, at)
            return
        if kind == GROUP_NOTICE:
            self._append(
                kind, event.JID.User if code == EVENT_TO_INT[pb.GroupInfoEvent] else "",
                orjson.dumps({"event": kind, "at": at, "data": as_dict(event)}),
            )  # fmt: skip
            return
        source = event.Info.MessageSource
        if kind == MESSAGE:
            change = event.Message.protocolMessage
            if source.IsFromMe and change.HasField("historySyncNotification") and self.fetching is not None:
                self.fetching.announce(event.Info.ID, change.historySyncNotification)
        senders = [jid for jid in (_text(source.Sender), _text(source.SenderAlt)) if jid]
        if kind == MESSAGE and _only_key_distribution(event.Message):
            self.gate.key_distribution(event.Info.ID, senders)
            return
        try:
            if kind == MESSAGE and event.Raw == event.Message:
                event.ClearField("Raw")  # the message before unwrapping: mostly the same again
            entry = {"event": kind, "at": at, "data": as_dict(event)}
            if kind == MESSAGE and _is_empty(event.Message):
                entry["raw"] = b64encode(raw).decode()
            payload = orjson.dumps(entry)
        except Exception as error:  # a message that cannot be shown is still a message: keep its bytes
            data = {
                "Info": {
                    "ID": event.Info.ID,
                    "MessageSource": as_dict(source),
                    "Timestamp": event.Info.Timestamp,
                }
            }
            payload = orjson.dumps({"event": kind, "at": at, "data": data, **_undecoded(raw, error)})
        self._append(kind, key_of(event.Info.ID, senders[0] if senders else ""), payload)
        if kind == MESSAGE:
            newsletter = source.Chat.Server == "newsletter"
            self.gate.stored(event.Info.ID, senders, confirmed_later=not newsletter)
            faults.point("whatsapp.gate.opened")
        else:
            self.gate.noted(event.Info.ID, senders)

    def _store_call(self, part: str, event: Any, at: float) -> None:
        meta = event.basicCallMeta
        if part in ("offer", "offer_notice"):
            video = getattr(event, "media", "") == "video" or any(n.Tag == "video" for n in event.data.Nodes)
            self._video[meta.callID] = video
            while len(self._video) > CALLS_KEPT:
                del self._video[next(iter(self._video))]
        fields = {"event": CALL, "at": at, "part": part, "video": self._video.get(meta.callID)}
        self._append(CALL, meta.callID, orjson.dumps({**fields, "data": as_dict(event)}))
        self.holds.call_stored(part, meta.callID)
        if part == "offer":
            creator = _text(meta.callCreator) or _text(getattr(meta, "from"))
            self.wire.say("call", call=meta.callID, creator=creator, at=int(meta.timestamp))

    def _append(self, kind: str, key: str, payload: bytes) -> None:
        faults.point("whatsapp.journal.before")
        number = self.journal.append(kind, key, payload)
        faults.point("whatsapp.journal.after")
        if kind == RECEIPT:
            self._untold = True  # nobody waits for one, and those of a moment are stored together
        else:
            self.wire.say("journaled", n=number)

    def _broken(self, error: BaseException) -> NoReturn:
        """Nothing is durable any more: nothing is acknowledged, the link goes, the parent is told. Never returns to Go."""
        self.gate.fail()
        detail = error.detail if isinstance(error, JournalError) else f"{type(error).__name__}: {error}"
        self.wire.say("journal_failed", error=detail)
        # Disconnect from another thread: Go waits for this one.
        threading.Thread(target=gocode.Disconnect, args=(b"session",), daemon=True).start()
        time.sleep(0.2)
        self.end(Exit.JOURNAL)

    def _on_login(self, status: str) -> None:
        self._loop.call_soon_threadsafe(self._report_login, status)

    async def _on_qr(self, _client: object, code: bytes) -> None:
        self.wire.say("qr", qr=code.decode())

    # ---- back on the loop ----

    def _report_login(self, status: str) -> None:
        self.wire.say("login", status=status)
        if status != "success":
            # The client's thread never returns from here; only ending the process frees it.
            self.end(Exit.PAIRING)

    def _report(self, code: int, raw: bytes) -> None:
        name = _REPORTED[code]
        event = INT_TO_EVENT[code].FromString(raw)
        fields = as_dict(event)
        if name == "connected":
            self._connected = True
            self._spawn(self._tell_connected())
            return
        if name == "disconnected":
            self.gate.disconnected()
            self._spawn(self._tell_disconnected())
            return
        if name == "paired":
            name = "paired" if fields.get("Status") == "SUCCESS" else "pair_error"
            fields = {"identifier": "+" + event.ID.User, "error": event.Error or None}
        self.wire.say(name, **{k: v for k, v in fields.items() if k not in ("ev", "Raw")})

    async def _tell_connected(self) -> None:
        known = await self._who_we_are()
        if self._connected:
            self.wire.say("connected", **known)

    async def _who_we_are(self) -> dict[str, str]:
        """Asked of whatsmeow, never read from its file: closing the file here would drop the locks that whatsmeow's own
        SQLite holds in this process, and the next reader would roll its running transaction back."""
        me = await self._live.get_me()
        if not me.JID.User:
            return {}
        lid = f"{me.LID.User}@{me.LID.Server}" if me.LID.User else ""
        return {"identifier": "+" + me.JID.User, "lid": lid, "name": me.PushName}

    async def _tell_disconnected(self) -> None:
        """The library tells of a lost link and of the next one from two threads: the old news may come last."""
        for _ in range(2):
            if not await self._live.is_connected:
                self._connected = False
                self.wire.say("disconnected")
                return
            await asyncio.sleep(RECONNECT_SECONDS)

    def _on_client_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        self.wire.say("ended", error=str(error) if error else None)
        self.end(Exit.CONNECT if error else Exit.STOPPED)

    async def _watch_gate(self) -> None:
        """Once every fraction of a second: what must be healed, what is lost, whether the log still reads as it did."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._untold:
                self._untold = False
                self.wire.say("journaled")
            found = self.gate.look()
            if found.unconfirmed:
                self.wire.say("gate_alarm", count=found.unconfirmed)
            for suspect in found.lost:
                await asyncio.to_thread(self._note_lost, suspect)
            if found.heal:
                self.wire.say("heal", suspects=[_suspect(s) for s in found.heal])
                self.end(Exit.HEAL)

    def _note_lost(self, suspect: Suspect) -> None:
        payload = orjson.dumps({"event": LOST, "at": time.time(), "data": _suspect(suspect)})
        try:
            self._append(LOST, suspect.key, payload)
        except JournalError as error:
            self._broken(error)
        self.gate.stored(suspect.message_id, [suspect.sender], confirmed_later=False)
        self.wire.say("lost", reason=suspect.reason)


_here = threading.local()


def _stay() -> None:
    """Let Python keep what it knows of this thread of Go's. It would make it anew for each of the five calls a message
    brings, with two mappings of memory each. Go keeps its threads, so it is no leak."""
    if not hasattr(_here, "kept"):
        _here.kept = True
        ctypes.pythonapi.PyGILState_Ensure()


async def _unused(*_: object) -> None:
    """Never called: `execute` is ours. Its place in the list tells neonize which events to deliver."""


def _message(body: dict[str, Any]) -> E2EMessage:
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


def _jid(text: str) -> Any:
    user, _, server = text.partition("@")
    return pb.JID(User=user, Server=server, Device=0, RawAgent=0, Integrator=0, IsEmpty=False)


def _text(jid: Any) -> str:
    return "" if jid.IsEmpty or not jid.User else f"{jid.User}@{jid.Server}"


def _suspect(suspect: Suspect) -> dict[str, str]:
    return {
        "key": suspect.key,
        "id": suspect.message_id,
        "sender": suspect.sender,
        "chat": suspect.chat,
        "reason": suspect.reason,
    }


def _undecoded(raw: bytes, error: Exception) -> dict[str, str]:
    return {"raw": b64encode(raw).decode(), "problem": f"{type(error).__name__}: {error}"}


def _only_key_distribution(message: Any) -> bool:
    """The first group message of a sender brings an extra event that only hands over the group key."""
    names = {field.name for field, _ in message.ListFields()}
    return "senderKeyDistributionMessage" in names and names <= {
        "senderKeyDistributionMessage",
        "messageContextInfo",
    }


def _is_empty(message: Any) -> bool:
    """Nothing this version knows: a kind of message newer than the library, kept as bytes."""
    return not {field.name for field, _ in message.ListFields()} - {"messageContextInfo"}


def die_with_parent(parent: int | None) -> None:
    """SIGKILL when the thread that started us ends; and at once when it ended before we could ask for that."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(Exit.PARENT)


def main(argv: list[str] | None = None) -> int:
    """The child's whole life. Returns only when it could not start; the code is one of `protocol.Exit`."""
    parser = argparse.ArgumentParser(prog="gateway.whatsapp.client")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    # whatsmeow's lines carry phone numbers and ciphertext; Python's logging must never print one.
    logging.disable(logging.CRITICAL)
    faults.arm_from_environment()
    wire = Wire()
    try:
        lock = take(options.folder, seconds=LOCK_SECONDS)
    except FolderTaken as taken:
        wire.say("locked", error=str(taken), pid=taken.pid)
        return Exit.LOCKED

    async def live() -> None:
        try:
            child = Child(options.folder, wire)
        except JournalError as error:
            wire.say("journal_failed", error=error.detail)
            os._exit(Exit.JOURNAL)
        await child.run()

    with lock:
        asyncio.run(live())
    return Exit.STOPPED


if __name__ == "__main__":
    sys.exit(main())
