"""The sandbox as tests, the demo and the admin API use it: start it, put people into it, break things, look.

async with WhatsAppSandbox(folder) as wa:
    shop, mei = wa.phone("+60123456789", "Shop"), wa.person("+60111222333", "Mei")
    device = await shop.scan(qr_text)
    await mei.send_text(shop, "hi")
    answer = await mei.next_message()
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from sandbox.whatsapp import reading
from sandbox.whatsapp.connection import Connection, stream_error
from sandbox.whatsapp.faults import MediaAction, MediaFault, Refusal, SendAction, SendFault, Silence
from sandbox.whatsapp.hub import Call, Event, Hub, PairingTerms, Ring, Transfer
from sandbox.whatsapp.ledger import Ledger
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.pairing import PairingDesk
from sandbox.whatsapp.phone import AutoReceipts, Phone
from sandbox.whatsapp.post import Ack, Written
from sandbox.whatsapp.server import Server
from sandbox.whatsapp.world import Device, Group, World, digits, load, save

_ROOT = Path(__file__).resolve().parents[2]
_SAVE_EVERY = 0.5  # seconds between saves at least; more when saving takes long


class WhatsAppSandbox:
    """`folder` keeps the state; without one it is a temporary folder that goes with the sandbox.

    `autosave` writes the state while running, so that even a killed sandbox comes back; without it the state is
    written by `stop` alone.
    """

    def __init__(self, folder: Path | str | None = None, *, autosave: bool = False) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="wa-sandbox-") if folder is None else None
        self.folder = Path(folder if folder is not None else self._temporary.name)  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state = self.folder / "state.pickle"
        self._autosave = autosave
        self._dirty = asyncio.Event()
        self._saver: asyncio.Task[None] | None = None
        self._hub = Hub(load(self._state) or World.create(), self.folder, self._dirty.set)
        self._hub.desk = PairingDesk(self._hub)
        self._server = Server(self._hub)
        for account in self._hub.world.accounts.values():
            self._hub.phones[account.lid.user] = Phone(account, self._hub)

    # --- life ---

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()

    async def start(self) -> None:
        """Listen; raises OSError when a port of an earlier run is taken by somebody else."""
        await self._server.start()
        self.launch_file.write_text(json.dumps(self._launch_facts()))
        if self._autosave:
            save(self._hub.world, self._state, clean=False)
            self._saver = asyncio.create_task(self._save_changes())

    async def stop(self) -> None:
        """Cut every connection, stop listening, save the state."""
        if self._saver is not None:
            self._saver.cancel()
            await asyncio.gather(self._saver, return_exceptions=True)
            self._saver = None
        await self._server.stop()
        await self._hub.stop_tasks()
        if self._temporary is None:
            save(self._hub.world, self._state, clean=True)

    async def restart(self, down_for: float = 0.0) -> None:
        """The server goes away and comes back on the same ports with everything it knew."""
        await self._server.stop()
        await asyncio.sleep(down_for)
        await self._server.start()

    async def go_down(self) -> None:
        """Stop listening until `come_back`; people can go on writing meanwhile."""
        await self._server.stop()

    async def come_back(self) -> None:
        await self._server.start()

    async def _save_changes(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            started = time.monotonic()
            save(self._hub.world, self._state, clean=False)
            await asyncio.sleep(max(_SAVE_EVERY, 20 * (time.monotonic() - started)))

    # --- the client ---

    @property
    def launch_file(self) -> Path:
        """The file that tells the launcher where this sandbox is."""
        return self.folder / "launch.json"

    def _launch_facts(self) -> dict[str, str]:
        return {
            "proxy": self._server.proxy_url,
            "ca": str(self.folder.resolve() / "ca.pem"),
            "root_key": self._hub.world.root.public.hex(),
        }

    def launch_env(self) -> dict[str, str]:
        """What to add to the environment of a process started through the launcher."""
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        return {"SANDBOX_WHATSAPP": str(self.launch_file.resolve()), "PYTHONPATH": path}

    def child_command(self, module: str = "gateway.whatsapp.client") -> tuple[list[str], dict[str, str]]:
        """(argv, environment) that run a client module, or a script by its path, against this sandbox."""
        env = {name: value for name, value in os.environ.items() if name != "SPHINX"}
        return [sys.executable, "-m", "sandbox.whatsapp.launcher", module], env | self.launch_env()

    def client_command(self, module: str = "gateway.whatsapp.client") -> str:
        """The same as one command line, for the gateway's `WHATSAPP_CLIENT_COMMAND`."""
        return shlex.join(self.child_command(module)[0])

    # --- people ---

    def person(self, number: str, name: str = "", *, auto_receipts: AutoReceipts = "delivered") -> Phone:
        """The phone with this number, made when it is new: an account with a phone and a LID address."""
        account = self._hub.world.account(digits(number))
        if account is not None:
            return self._hub.phone_of(account)
        account = self._hub.world.add_account(number, name or number)
        account.auto_receipts = auto_receipts
        phone = self._hub.phones[account.lid.user] = Phone(account, self._hub)
        self._hub.changed()
        self._hub.pulse.touch()
        return phone

    def phone(self, number: str, name: str = "", *, auto_receipts: AutoReceipts = "delivered") -> Phone:
        """The same; reads better for the business's own phone."""
        return self.person(number, name, auto_receipts=auto_receipts)

    @property
    def people(self) -> list[Phone]:
        return list(self._hub.phones.values())

    def group(self, members: list[Phone], name: str = "Group") -> Group:
        """A new group; the first member owns it."""
        group_id = str(120363000000000000 + len(self._hub.world.groups) + 1)
        group = Group(group_id, name, [member.account.lid.user for member in members])
        self._hub.world.groups[group_id] = group
        self._hub.changed()
        self._hub.pulse.touch()
        return group

    @property
    def groups(self) -> list[Group]:
        return list(self._hub.world.groups.values())

    def drop_media(self, message_id: str, status: int = 410) -> None:
        """The media server forgets what this message carries: 404 or 410 from now on. Its phone still has it."""
        self._hub.media.drop(self._media_path(message_id), status)

    def _media_path(self, message_id: str) -> str:
        for phone in self._hub.phones.values():
            for message in (*phone.written.items, *phone.received.items):
                found = reading.media_of(message.message) if message.id == message_id else None
                if found is not None:
                    return str(found[1].directPath)
        raise ValueError(f"nobody has sent media with the message id {message_id}")

    # --- what happened ---

    @property
    def calls(self) -> Ledger[Call]:
        """Every message stanza that a client sent, refused and repeated ones included."""
        return self._hub.calls

    @property
    def rings(self) -> Ledger[Ring]:
        """What happened to phone calls: offers and ends by people, rejections by clients."""
        return self._hub.rings

    @property
    def transfers(self) -> Ledger[Transfer]:
        """Every upload and download of media."""
        return self._hub.transfers

    @property
    def acks(self) -> Ledger[Ack]:
        """Every message that a client has acknowledged, in order."""
        return self._hub.post.acks

    @property
    def retries(self) -> Ledger[Ack]:
        """Every retry receipt."""
        return self._hub.post.retries

    @property
    def logins(self) -> Ledger[JID]:
        return self._hub.post.logins

    @property
    def events(self) -> Ledger[Event]:
        """Typing, presence, undecryptable messages, refused hosts, failures of the sandbox itself."""
        return self._hub.events

    def acked(self, msg_id: str, device: Device | None = None) -> Ack | None:
        """When and how a client took responsibility for a message, or None."""
        return self._hub.post.acked(msg_id, device.jid if device else None)

    def unacked(self, device: Device) -> list[str]:
        """Ids of the messages that still wait for this device, in order."""
        return [item.id for item in device.mailbox.waiting.values() if item.kind == "message"]

    def written(self, msg_id: str) -> list[Written]:
        """Each time this message was put on the wire, redeliveries included."""
        return self._hub.post.written.get(msg_id, [])

    async def wait_acked(self, msg_id: str, timeout: float = 10) -> Ack:
        return await self.acks.wait_for(lambda ack: ack.id == msg_id, timeout=timeout)

    def is_online(self, device: Device) -> bool:
        """Logged in and asking for messages."""
        connection = self._hub.post.online.get(device.jid)
        return connection is not None and connection.active

    async def wait_online(self, device: Device, timeout: float = 15) -> None:
        await self._until(lambda: self.is_online(device), timeout)

    async def wait_offline(self, device: Device, timeout: float = 15) -> None:
        await self._until(lambda: device.jid not in self._hub.post.online, timeout)

    async def wait_drained(self, device: Device, timeout: float = 15) -> None:
        """Until the device has acknowledged everything."""
        await self._until(lambda: not device.mailbox.waiting, timeout)

    async def _until(self, condition: Callable[[], bool], timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.01)

    async def changed_since(self, seen: int, timeout: float) -> int:
        """A number that grows whenever something on a phone's screen changes; waits while it is still `seen`."""
        return await self._hub.pulse.wait(seen, timeout)

    # --- pairing ---

    @property
    def pairing(self) -> PairingTerms:
        """How many QR codes a client gets, and how long the server waits for one to be scanned."""
        return self._hub.terms

    # --- faults ---

    async def drop(self, device: Device, *, abort: bool = False) -> None:
        """Close the device's connection, cleanly or by cutting the wire."""
        connection = self._connection(device)
        if abort:
            connection.abort()
        else:
            await connection.close()

    async def kick(self, device: Device, why: str = "replaced") -> None:
        """`replaced`: another client took the session over. `removed`: the phone logged the device out."""
        if why == "removed":
            account = self._hub.world.account(device.jid.user)
            if account is not None:
                await self._hub.phone_of(account).unlink(device)
        elif why == "replaced":
            await self._connection(device).last_words(stream_error(None, "replaced"))
        else:
            raise ValueError("kick: replaced or removed")

    async def stream_error(self, device: Device, code: int) -> None:
        """End the stream with a code: 503 is a restart of the server, 516 and others are not documented."""
        await self._connection(device).last_words(stream_error(str(code)))

    def forget_device(self, device: Device) -> None:
        """Remove a device without telling it: its next login is refused with 401."""
        account = self._hub.world.account(device.jid.user)
        if account is not None:
            self._hub.desk.forget(account, device)

    def silence(self, device: Device, how: str = "dead") -> None:
        """`deaf`: keepalives are answered but nothing arrives. `dead`: nothing is answered at all."""
        self._hub.faults.silent[device.jid] = Silence(how)

    def unsilence(self, device: Device) -> None:
        """Talk again; what was queued meanwhile is written now."""
        if self._hub.faults.silent.pop(device.jid, None) is None:
            return
        connection = self._hub.post.online.get(device.jid)
        if connection is not None and connection.listening:
            self._hub.post.catch_up(connection, device)

    def refuse_logins(
        self,
        reason: int = 503,
        *,
        seconds: float | None = None,
        device: Device | None = None,
        attrs: Mapping[str, str] | None = None,
    ) -> None:
        """Turn logins away with a failure code: 401, 402 (`ban` is simpler), 403, 405 (outdated), 503, …

        `attrs` are further attributes of the failure node.
        """
        until = None if seconds is None else time.monotonic() + seconds
        self._hub.faults.refusals.append(
            Refusal(reason, dict(attrs or {}), until, device.jid if device else None)
        )

    def ban(self, *, code: int = 101, expire: int = 3600, seconds: float | None = None) -> None:
        """A temporary ban: logins are refused and the client is told for how many seconds."""
        self.refuse_logins(402, seconds=seconds, attrs={"code": str(code), "expire": str(expire)})

    def fail_sends(
        self,
        action: str = "nack",
        *,
        code: int = 463,
        seconds: float = 0,
        times: int | None = None,
        to: Phone | Group | None = None,
    ) -> None:
        """What clients' sends meet: `nack` (with `code`), `swallow_ack`, `swallow`, `delay_ack` (`seconds`)."""
        target = to.id if isinstance(to, Group) else to.lid if to else None
        self._hub.faults.sends.append(SendFault(SendAction(action), code, seconds, times, target))

    def fail_media(
        self,
        action: str = "status",
        *,
        status: int = 404,
        seconds: float = 0,
        times: int | None = None,
        message_id: str | None = None,
        upload: bool = False,
    ) -> None:
        """What downloads (or uploads) meet: `status`, `slow` and `hang` (`seconds`), `cut`, `corrupt`.

        `message_id`: only the media of this message.
        """
        token = self._hub.media.token_of(self._media_path(message_id)) if message_id else None
        self._hub.faults.media.append(MediaFault(MediaAction(action), status, seconds, times, token, upload))

    def lose_receipts(self, on: bool = True) -> None:
        """Receipts from clients get lost on the way: their messages are delivered again after the next login."""
        self._hub.faults.lose_receipts = on

    def clear_faults(self) -> None:
        """End refusals, send faults and silences."""
        self._hub.faults.clear()
        for device in list(self._hub.world.devices()):
            self.unsilence(device)

    def _connection(self, device: Device) -> Connection:
        connection = self._hub.post.online.get(device.jid)
        if connection is None:
            raise ValueError(f"{device.jid} is not connected")
        return connection
