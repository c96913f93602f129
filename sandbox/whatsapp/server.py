"""The network side: an HTTP CONNECT proxy in front of a TLS server with the web socket and the media endpoints.

The proxy sends WhatsApp's host names to the local TLS port and refuses every other host, so that a redirected
client can reach nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox.whatsapp import transfers
from sandbox.whatsapp.connection import Connection
from sandbox.whatsapp.hub import Event, Hub

LOOPBACK = "127.0.0.1"
_HOSTS = ("web.whatsapp.com", "*.whatsapp.com", "mmg.whatsapp.net", "*.whatsapp.net")
_UPLOAD_LIMIT = 128 << 20


def make_certificates(folder: Path) -> Path:
    """A certificate authority and a server certificate in `folder`, made once; the authority's path."""
    authority, server = folder / "ca.pem", folder / "server.pem"
    if authority.exists() and server.exists():
        return authority
    now = datetime.datetime.now(datetime.UTC)
    start, end = now - datetime.timedelta(days=1), now + datetime.timedelta(days=800)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sandbox authority")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )

    ca = (
        builder("sandbox authority", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in _HOSTS])
    leaf = (
        builder(_HOSTS[0], key.public_key())
        .add_extension(names, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    server.write_bytes(
        leaf.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    authority.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    return authority


class Server:
    """Listens on loopback; after a stop it can start again on the same ports."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._runner: web.AppRunner | None = None
        self._proxy: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()

    @property
    def proxy_url(self) -> str:
        return f"http://{LOOPBACK}:{self._hub.world.ports['proxy']}"

    async def start(self) -> None:
        """Raises OSError when a port of an earlier run is taken."""
        try:
            await self._listen()
        except OSError:
            await self.stop()
            raise

    async def _listen(self) -> None:
        make_certificates(self._hub.folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._hub.folder / "server.pem")
        app = web.Application(client_max_size=_UPLOAD_LIMIT)
        app.router.add_get("/ws/chat", self._socket)
        app.router.add_post("/mms/{kind}/{token}", self._upload)
        app.router.add_get("/v/t62/{token}", self._download)
        app.router.add_delete("/mms/{kind}/{token}", self._delete)
        ports = self._hub.world.ports
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, ports.get("tls", 0), ssl_context=context)
        await site.start()
        ports["tls"] = self._runner.addresses[0][1]
        self._proxy = await asyncio.start_server(self._accept, LOOPBACK, ports.get("proxy", 0))
        ports["proxy"] = self._proxy.sockets[0].getsockname()[1]
        self._hub.changed()

    async def stop(self) -> None:
        """As a crash looks from outside: every connection is cut at once."""
        if self._proxy is not None:
            self._proxy.close()
        for connection in list(self._connections):
            connection.abort()
        pipes = list(self._pipes)
        for task in pipes:
            task.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)
        if self._proxy is not None:
            await self._proxy.wait_closed()
            self._proxy = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # --- proxy ---

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._pipes.add(task)
            task.add_done_callback(self._pipes.discard)
        upstream: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(10):
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split()
            host = request[1].rpartition(":")[0]
            if request[0] != "CONNECT" or not host.endswith((".whatsapp.com", ".whatsapp.net")):
                self._hub.events.add(Event("host_refused", " ".join(request[:2])))
                writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return
            back, upstream = await asyncio.open_connection(LOOPBACK, self._hub.world.ports["tls"])
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _both_ways(reader, writer, back, upstream)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, IndexError):
            pass
        except asyncio.CancelledError:
            pass  # the server is stopping; nobody awaits this task's result
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.transport.abort()

    # --- TLS endpoints ---

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0, compress=False, autoping=True)
        await socket.prepare(request)
        connection = Connection(self._hub, socket, request.transport)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
        return socket

    async def _upload(self, request: web.Request) -> web.Response:
        return await transfers.upload(self._hub, request)

    async def _delete(self, request: web.Request) -> web.Response:
        return transfers.delete(self._hub, request)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        return await transfers.download(self._hub, request)


async def _both_ways(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    back: asyncio.StreamReader,
    upstream: asyncio.StreamWriter,
) -> None:
    async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        with contextlib.suppress(OSError, RuntimeError):
            sink.close()

    await asyncio.gather(pipe(reader, upstream), pipe(back, writer))
