"""Files, HTTPS servers on loopback with a certificate of their own, and a scripted channel, for the tests of media."""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from core.channel import Json, MediaTarget, SessionId, StoredMedia
from gateway.media import Fetcher, FetchLimits, Guard


def picture(form: str = "PNG", width: int = 5, height: int = 7) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, form)
    return out.getvalue()


@cache
def _identity() -> tuple[bytes, bytes]:
    """A key and a self-signed certificate for 127.0.0.1 and localhost, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("127.0.0.2")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return private, certificate.public_bytes(serialization.Encoding.PEM)


def trusting() -> ssl.SSLContext:
    """What a client needs to believe the test servers."""
    return ssl.create_default_context(cadata=_identity()[1].decode())


@dataclass
class Site:
    """A running server. `requests`: path and Range header of each call."""

    port: int
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"https://{host}:{self.port}{path}"

    def fetcher(self, **limits: Any) -> Fetcher:
        """One that may reach this server and believes its certificate."""
        guard = Guard(allow=[("127.0.0.1", self.port)])
        return Fetcher(guard, limits=FetchLimits(**limits), ssl=trusting())


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[Site]:
    site = Site(0)

    async def handle(request: web.Request) -> web.StreamResponse:
        site.requests.append((request.path, request.headers.get("Range")))
        return await handler(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    private, certificate = _identity()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with TemporaryDirectory() as folder:
        (Path(folder) / "pem").write_bytes(private + certificate)
        context.load_cert_chain(Path(folder) / "pem")
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    try:
        listener = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await listener.start()
        site.port = runner.addresses[0][1]
        yield site
    finally:
        await runner.cleanup()


async def cut_off(request: web.Request, body: bytes, *, after: int, **headers: str) -> web.StreamResponse:
    """Promise all of `body`, send the first bytes, hang up."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), **headers})
    await response.prepare(request)
    await response.write(body[:after])
    assert request.transport is not None
    await asyncio.sleep(0.05)  # let the bytes leave before the connection goes
    request.transport.abort()
    return response


class MediaChannel:
    """A channel whose downloads do what the test says: `script` holds bytes to give or an error to raise, in turn."""

    def __init__(self, *script: bytes | Exception) -> None:
        self.script = list(script)
        self.asked: list[StoredMedia] = []

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        self.asked.append(message)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        await target.write(step)


class RetryingChannel(MediaChannel):
    """One that can ask the phone for dropped media; `answer` is what the phone says."""

    answer: Json | Exception | None = None

    async def request_media_retry(self, message: StoredMedia) -> Json | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Owned:
    """The sessions of this process, for the media worker."""

    channels: dict[SessionId, Any]

    def owned(self) -> frozenset[SessionId]:
        return frozenset(self.channels)

    def capability(self, session_id: SessionId, kind: type[Any]) -> Any:
        channel = self.channels.get(session_id)
        return channel if isinstance(channel, kind) else None
