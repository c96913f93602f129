"""One client's connection: frames, handshake, login, and which part of the server each stanza goes to.

Writing never blocks the sender of a stanza: everything goes through one queue and one writing task, so that a
client which has stopped reading holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable

from aiohttp import ClientError, WSMsgType, web
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox.whatsapp import outbound, presence, queries
from sandbox.whatsapp.faults import Refusal, Silence
from sandbox.whatsapp.hub import Event, Hub
from sandbox.whatsapp.keys import KeyPair, agree
from sandbox.whatsapp.nodes import JID, SERVER, Node, decode, encode
from sandbox.whatsapp.noise import Noise, nonce
from sandbox.whatsapp.protos import wa6
from sandbox.whatsapp.world import Account, Device

log = logging.getLogger("sandbox.whatsapp")

_ANSWER_LIMIT = 20.0  # seconds a client may take to answer the server's question
_LINGER = 0.6  # seconds between a last node and the close: a client drops what it has not read by then
_numbers = itertools.count(1)


class Closed(ConnectionError):
    """The client is gone."""


class Connection:
    def __init__(
        self, hub: Hub, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None
    ) -> None:
        self.hub = hub
        self.account: Account | None = None
        self.device: Device | None = None
        self.noise = b""  # the client's static key
        self.active = False  # it has asked for its messages
        self.seen: set[int] = set()  # numbers of the queued stanzas written here
        self.opened = time.monotonic()
        self._socket = socket
        self._transport = transport
        self._buffer = b""
        self._outgoing: asyncio.Queue[tuple[Node, Callable[[], None] | None]] = asyncio.Queue()
        self._questions: dict[str, asyncio.Future[Node]] = {}
        self._rx: AESGCM
        self._tx: AESGCM
        self._received = 0

    @property
    def silence(self) -> Silence | None:
        return self.hub.faults.silent.get(self.device.jid) if self.device else None

    @property
    def listening(self) -> bool:
        return self.active and self.silence is None

    # --- bytes ---

    async def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            message = await self._socket.receive()
            if message.type is not WSMsgType.BINARY:
                raise Closed(str(message.type))
            self._buffer += message.data

    async def _read(self) -> bytes:
        await self._fill(3)
        size = int.from_bytes(self._buffer[:3], "big")
        await self._fill(3 + size)
        frame, self._buffer = self._buffer[3 : 3 + size], self._buffer[3 + size :]
        return frame

    async def _write_raw(self, data: bytes) -> None:
        await self._socket.send_bytes(len(data).to_bytes(3, "big") + data)

    async def _writer(self) -> None:
        for counter in itertools.count():
            node, written = await self._outgoing.get()
            try:
                log.debug(">> %s", node)
                await self._write_raw(self._tx.encrypt(nonce(counter), encode(node), None))
                if written is not None:
                    written()
            except (OSError, ClientError, RuntimeError):
                self.abort()
                return
            finally:
                self._outgoing.task_done()

    # --- stanzas to the client ---

    def send(self, node: Node, written: Callable[[], None] | None = None) -> None:
        self._outgoing.put_nowait((node, written))

    async def ask(self, node: Node) -> Node:
        """Send an iq and wait for its answer. Raises TimeoutError, Closed."""
        question = node.text("id") or f"sandbox-{next(_numbers)}"
        node.attrs["id"] = question
        answer: asyncio.Future[Node] = asyncio.get_running_loop().create_future()
        self._questions[question] = answer
        self.send(node)
        async with asyncio.timeout(_ANSWER_LIMIT):
            return await answer

    async def last_words(self, node: Node) -> None:
        """Send a final node, give the client time to read it, and close."""
        self.active = False
        self.send(node)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._outgoing.join()
        await asyncio.sleep(_LINGER)
        await self.close()

    async def close(self) -> None:
        """A clean close of the web socket."""
        with contextlib.suppress(TimeoutError, OSError, ClientError, RuntimeError):
            async with asyncio.timeout(1):
                await self._socket.close()
        self.abort()

    def abort(self) -> None:
        """Cut the wire without a word."""
        if self._transport is not None and isinstance(self._transport, asyncio.Transport):
            self._transport.abort()

    # --- life ---

    async def run(self) -> None:
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(20):
                payload = await self._handshake()
            writer = asyncio.create_task(self._writer())
            if payload.HasField("devicePairingData"):
                self.hub.spawn(self.hub.desk.offer(self))
            elif not self._login(payload):
                await self._read()  # until the client or `last_words` closes
                return
            while True:
                frame = await self._read()
                node = decode(self._rx.decrypt(nonce(self._received), frame, None))
                self._received += 1
                log.debug("<< %s", node)
                self._handle(node)
        except (Closed, OSError, TimeoutError, ClientError):
            pass
        except Exception as error:
            log.exception("connection.failed")
            self.hub.events.add(
                Event("connection_failed", repr(error), self.device.jid if self.device else None)
            )
        finally:
            if writer is not None:
                writer.cancel()
            for answer in self._questions.values():
                if not answer.done():
                    answer.set_exception(Closed("the client is gone"))
                    answer.exception()  # whoever asked may be gone too
            self.hub.desk.withdraw(self)
            if self.device and self.hub.post.online.get(self.device.jid) is self:
                del self.hub.post.online[self.device.jid]
                self.hub.pulse.touch()
            self.abort()

    async def _handshake(self) -> wa6.ClientPayload:
        await self._fill(4)
        header, self._buffer = self._buffer[:4], self._buffer[4:]
        if header[:2] != b"WA":
            raise Closed("not a WhatsApp client")
        noise = Noise(header)
        theirs = wa6.HandshakeMessage.FromString(await self._read()).clientHello.ephemeral
        noise.authenticate(theirs)
        ephemeral, world = KeyPair.generate(), self.hub.world
        hello = wa6.HandshakeMessage()
        noise.authenticate(ephemeral.public)
        noise.mix(agree(ephemeral.private, theirs))
        hello.serverHello.ephemeral = ephemeral.public
        hello.serverHello.static = noise.encrypt(world.static.public)
        noise.mix(agree(world.static.private, theirs))
        hello.serverHello.payload = noise.encrypt(world.certificates)
        await self._write_raw(hello.SerializeToString())
        finish = wa6.HandshakeMessage.FromString(await self._read()).clientFinish
        self.noise = noise.decrypt(finish.static)
        noise.mix(agree(ephemeral.private, self.noise))
        payload = wa6.ClientPayload.FromString(noise.decrypt(finish.payload))
        self._rx, self._tx = noise.finish()
        return payload

    def _login(self, payload: wa6.ClientPayload) -> bool:
        """Whether the device may come in; if not, the refusal is on its way."""
        account = self.hub.world.account(str(payload.username))
        device = account.devices.get(payload.device) if account else None
        if account is None or device is None or device.noise != self.noise:
            self.hub.spawn(self.last_words(Node("failure", {"reason": "401", "location": "cln"})))
            return False
        refusal = self.hub.faults.for_login(device.jid)
        if refusal is not None:
            self.hub.spawn(self.last_words(_failure(refusal)))
            return False
        self.account, self.device = account, device
        earlier = self.hub.post.online.get(device.jid)
        self.hub.post.online[device.jid] = self
        if earlier is not None:
            earlier.active = False
            self.hub.spawn(earlier.last_words(stream_error(None, "replaced")))
        self.hub.post.logins.add(device.jid)
        self.send(
            Node("success", {"t": int(time.time()), "lid": device.lid, "location": "cln", "props": "27"})
        )
        return True

    def _handle(self, node: Node) -> None:
        if self.silence is not None:
            if self.silence is Silence.DEAF and node.text("xmlns") == "w:p":
                queries.answer(self, node)
            return
        if node.tag == "iq" and node.text("type") in ("result", "error"):
            answer = self._questions.pop(node.text("id"), None)
            if answer is not None and not answer.done():
                answer.set_result(node)
        elif node.tag == "iq":
            queries.answer(self, node)
            if node.text("xmlns") == "passive" and node.find("active") and self.device and not self.active:
                self.hub.post.flush(self, self.device)
                self.hub.pulse.touch()
        elif self.account is None or self.device is None:
            return  # while pairing there is nothing else
        elif node.tag == "message":
            outbound.message(self.hub, self, self.account, self.device, node)
        elif node.tag == "receipt":
            outbound.receipt(self.hub, self, self.account, self.device, node)
        elif node.tag == "ack":
            settle_ack(self.hub, self.device, node)
        elif node.tag in ("presence", "chatstate"):
            outbound.presence(self.hub, self.device, node)
        elif node.tag == "call":
            presence.from_client(self.hub, self.account, self.device, node)


def settle_ack(hub: Hub, device: Device, node: Node) -> None:
    kind = node.text("class")
    author = node.jid("participant") or node.jid("to")
    account = hub.world.account_at(author)
    hub.post.settle(device, kind, node.text("id"), account.lid.user if account else None, "ack")


def stream_error(code: str | None, conflict: str | None = None) -> Node:
    """The node after which the client must not use this stream any more."""
    inner = [Node("conflict", {"type": conflict})] if conflict else None
    return Node("stream:error", {"code": code}, inner)


def _failure(refusal: Refusal) -> Node:
    return Node("failure", {"reason": str(refusal.reason), "location": "cln", **refusal.attrs})


def device_removed() -> Node:
    return stream_error("401", "device_removed")


__all__ = ["JID", "SERVER", "Closed", "Connection", "device_removed", "stream_error"]
