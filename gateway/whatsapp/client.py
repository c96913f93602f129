"""The WhatsApp child: one session, one process. Started by `channel.py`; nothing else imports neonize.

    python -m gateway.whatsapp.client --folder DIR [--parent PID]

It speaks JSON lines: commands on stdin, reports on stdout (Go's own prints go to stderr). It journals every message
inside the event callback and lets no acknowledgement leave before (`gate.py`). It never writes a line of whatsmeow's
DEBUG log, never touches the database server, and does not outlive its parent. Here is its life: `arrivals.py` keeps what
comes, `orders.py` does what it is told.

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
import ctypes
import functools
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import neonize.aioze.client as neonize_client
from neonize._binder import ProxySettings
from neonize.aioze.client import NewAClient
from neonize.events import EVENT_TO_INT, INT_TO_EVENT
from neonize.proto import Neonize_pb2 as pb
from neonize.proto.waCompanionReg.WAWebProtobufsCompanionReg_pb2 import DeviceProps
from neonize.utils.log import log as neonize_log

from core import faults
from core.errors import JournalError
from core.journal import Journal
from gateway.whatsapp import store
from gateway.whatsapp.arrivals import JOURNALED, Arrivals, shown
from gateway.whatsapp.fetching import Fetching
from gateway.whatsapp.folder import FolderTaken, take
from gateway.whatsapp.gate import Gate, GateTimings
from gateway.whatsapp.holds import Holds
from gateway.whatsapp.orders import Orders
from gateway.whatsapp.protocol import (
    LINE_LIMIT,
    LOST,
    MESSAGE,
    Exit,
    decode,
    journal_path,
    store_path,
)
from gateway.whatsapp.protodict import as_dict
from gateway.whatsapp.senders import Senders
from gateway.whatsapp.wire import Wire

THREADS = 32
"""Neonize keeps one for ever, a send that hangs keeps another; the default pool is too small on a small machine."""
LOOK_SECONDS = 0.2
RECONNECT_SECONDS = 1.0
"""A link that stands again after this long is a new one."""
LOCK_SECONDS = 4.0
PR_SET_PDEATHSIG = 1

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
        self.holds = Holds()
        self.orders = Orders()
        self.arrivals = Arrivals(self.journal, self.holds, wire, report=self._on_report, end=self.end)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connected = False

    @property
    def gate(self) -> Gate:
        return self.arrivals.gate

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
        senders = Senders(self.orders.send, functools.partial(self.wire.say, "reply"))
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
        action = getattr(self, f"_do_{op}", None) or getattr(self.orders, f"do_{op}", None)
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

    async def _do_open(self, command: dict[str, Any]) -> dict[str, Any]:
        if self.orders.client is not None:
            raise ValueError("open comes once; start another child")
        path = store_path(self.folder)
        heal = [(s["sender"], s["chat"], s["reason"]) for s in command.get("heal") or ()]
        dropped = store.drop_sessions(path, heal) if heal and path.exists() else 0
        known = await asyncio.to_thread(lambda: self.journal.keys(MESSAGE) | self.journal.keys(LOST))
        timings = GateTimings(**command.get("gate", {}))
        self.arrivals.gate = Gate(known, give_up=command.get("give_up") or (), timings=timings)
        neonize_client.log_whatsmeow = self.arrivals.on_log
        neonize_log.setLevel(
            logging.DEBUG
        )  # tells whatsmeow its level; Python's own logging is off altogether
        fetching = Fetching(
            self.folder,
            self.holds,
            self.wire.say,
            proxy=command.get("proxy"),
            library=self.orders.by_library,
        )
        self.arrivals.fetching = self.orders.fetching = fetching
        self._spawn(fetching.run())
        client = _Client(store.opened_as(path), self._on_login)
        client.event.execute = self.arrivals.on_event
        client.event.list_func = dict.fromkeys([*JOURNALED, *_REPORTED], _unused)
        client.event.qr(self._on_qr)
        self.orders.client = client
        proxy = command.get("proxy")
        task = await client.connect(ProxySettings(proxy) if proxy else None)
        task.add_done_callback(self._on_client_end)
        return {"dropped": dropped}

    async def _do_probe(self, _command: dict[str, Any]) -> dict[str, Any]:
        """A question that only WhatsApp can answer: a link that is up and dead does not."""
        identifier = (await self._who_we_are()).get("identifier")
        if identifier is None or not self._connected:
            raise ConnectionError("websocket not connected")
        await self.orders.live.is_on_whatsapp(identifier)
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

    async def _do_stop(self, _command: dict[str, Any]) -> None:
        """Close the socket; the parent ends us by closing stdin. Not in the QR phase: Go's thread would never return."""
        if self.orders.client is not None and self._connected:
            await asyncio.wait_for(self.orders.client.disconnect(), 3)

    # ---- what neonize calls, on its own threads ----

    def _on_report(self, code: int, raw: bytes) -> None:
        if code in _REPORTED:
            self._loop.call_soon_threadsafe(self._report, code, raw)

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
        me = await self.orders.live.get_me()
        if not me.JID.User:
            return {}
        lid = f"{me.LID.User}@{me.LID.Server}" if me.LID.User else ""
        return {"identifier": "+" + me.JID.User, "lid": lid, "name": me.PushName}

    async def _tell_disconnected(self) -> None:
        """The library tells of a lost link and of the next one from two threads: the old news may come last."""
        for _ in range(2):
            if not await self.orders.live.is_connected:
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
            self.arrivals.tell()
            found = self.gate.look()
            if found.unconfirmed:
                self.wire.say("gate_alarm", count=found.unconfirmed)
            for suspect in found.lost:
                await asyncio.to_thread(self.arrivals.note_lost, suspect)
            if found.heal:
                self.wire.say("heal", suspects=[shown(s) for s in found.heal])
                self.end(Exit.HEAL)


async def _unused(*_: object) -> None:
    """Never called: `execute` is ours. Its place in the list tells neonize which events to deliver."""


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
