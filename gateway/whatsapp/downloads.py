"""Media from WhatsApp's servers into a file: streamed, decrypted on the way, resumed where it broke off, checked at the end.

Runs in the child, in threads; standard library and `cryptography` only. It goes to WhatsApp's media host and nowhere
else, whatever address a message names, and never holds more than a piece of the file in memory.

How WhatsApp keeps media (whatsmeow `download.go`): AES-256-CBC, then ten bytes of an HMAC; the keys are derived from the
message's media key. A block's initial vector is the block before it, so a download goes on anywhere from 16 bytes back.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import http.client
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

HOST = "mmg.whatsapp.net"
ORIGIN = "https://web.whatsapp.com"
IDLE_SECONDS = 30.0
"""Without a byte."""
PIECE = 256 << 10
BLOCK, MAC = 16, 10
GONE = frozenset({403, 404, 410})
"""As whatsmeow reads them: WhatsApp does not have it any more, or not under this path."""

KINDS: dict[str, tuple[str, str]] = {
    "imageMessage": ("WhatsApp Image Keys", "image"),
    "stickerMessage": ("WhatsApp Image Keys", "image"),
    "videoMessage": ("WhatsApp Video Keys", "video"),
    "ptvMessage": ("WhatsApp Video Keys", "video"),
    "audioMessage": ("WhatsApp Audio Keys", "audio"),
    "documentMessage": ("WhatsApp Document Keys", "document"),
    "historySyncNotification": ("WhatsApp History Keys", "md-msg-hist"),
}
"""Part of a message → what its keys are derived for, and the server's name of the kind."""


class Gone(Exception):
    """WhatsApp has dropped it."""


class Broken(Exception):
    """It can never be had: no key, no path, too large, not what its sender sent."""


class Later(Exception):
    """Not now. What came stays in the file."""

    def __init__(self, detail: str, after: float | None = None) -> None:
        super().__init__(detail)
        self.after = after
        """Seconds the server asks to wait."""


class Stopped(Later):
    """The asker went away."""


@dataclass(frozen=True, slots=True)
class Remote:
    """One file on WhatsApp's servers."""

    path: str
    """With its query: what stands behind the host."""
    key: bytes
    purpose: str
    kind: str
    enc_sha256: bytes | None
    sha256: bytes | None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Remote:
        """From the line the gateway sends: `kind` (part of the message), `path`, and base64 `key`, `enc_sha256`, `sha256`.

        Raises Broken."""
        purpose, kind = KINDS.get(str(fields.get("kind")), ("", ""))
        key = _bytes(fields.get("key"))
        if not kind or key is None:
            raise Broken("the message names no media or no key for it")
        path = str(fields.get("path") or "")
        if not path.startswith("/") or any(ord(c) <= 32 or ord(c) >= 127 for c in path):
            raise Broken("the message does not say where its media is")
        return cls(path, key, purpose, kind, _bytes(fields.get("enc_sha256")), _bytes(fields.get("sha256")))

    @property
    def url(self) -> str:
        """The path as whatsmeow asks for it."""
        digest = base64.urlsafe_b64encode(self.enc_sha256 or b"").decode()
        sign = "&" if "?" in self.path else "?"
        return f"{self.path}{sign}hash={digest}&mms-type={self.kind}&__wa-mms="


def path_of(direct: str | None, url: str | None) -> str:
    """Where a message says its media is: `directPath`, else the path of its address if that is WhatsApp's own."""
    if direct:
        return direct
    try:
        parts = urlsplit(url or "")
    except ValueError:
        return ""
    if not (parts.hostname or "").endswith(".whatsapp.net"):
        return ""
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


class Downloads:
    """Those of one child. A second download into the same file ends the first."""

    def __init__(self, *, proxy: str | None, limit: int) -> None:
        self._proxy, self._limit = proxy, limit
        self._lock = threading.Lock()
        self._running: dict[str, tuple[threading.Event, threading.Event]] = {}

    def fetch(self, remote: Remote, path: Path) -> int:
        """Complete the file at `path`; its size. Blocking. Raises Gone, Broken, Later."""
        with self._turn(str(path)) as stop:
            resume = True
            while True:
                try:
                    return _Download(remote, path, self._proxy, self._limit, stop).run(resume=resume)
                except _Spoilt as spoilt:
                    # Perhaps the part from an earlier try was at fault: once more, from the start.
                    os.truncate(path, 0)
                    if not spoilt.resumed:
                        raise Broken(str(spoilt)) from None
                    resume = False

    def stop(self, path: str) -> None:
        """Whoever asked for it does not wait any more."""
        with self._lock:
            running = self._running.get(path)
        if running is not None:
            running[0].set()

    @contextmanager
    def _turn(self, path: str) -> Iterator[threading.Event]:
        stop, over = threading.Event(), threading.Event()
        with self._lock:
            before = self._running.get(path)
            self._running[path] = (stop, over)
        try:
            if before is not None:
                before[0].set()
                if not before[1].wait(IDLE_SECONDS + 5):
                    raise Later("an earlier download of it does not end")
            yield stop
        finally:
            over.set()
            with self._lock:
                if self._running.get(path) == (stop, over):
                    del self._running[path]


class _Spoilt(Exception):
    """What came is not what was sent."""

    def __init__(self, detail: str, *, resumed: bool) -> None:
        super().__init__(detail)
        self.resumed = resumed


class _Download:
    """One request. Plain bytes go to the file in whole blocks; the end is held back until it is known to be the end."""

    def __init__(
        self, remote: Remote, path: Path, proxy: str | None, limit: int, stop: threading.Event
    ) -> None:
        self._remote, self._path, self._limit, self._stop = remote, path, limit, stop
        self._proxy = proxy or urllib.request.getproxies_environment().get("https")
        keys = HKDF(SHA256(), 112, None, remote.purpose.encode()).derive(remote.key)
        self._iv, self._cipher_key, self._mac_key = keys[:16], keys[16:48], keys[48:80]

    def run(self, *, resume: bool) -> int:
        have = self._path.stat().st_size if self._path.exists() else 0
        # Without the hash of the whole nothing would prove that both parts belong together.
        start = have - have % BLOCK if resume and self._remote.sha256 else 0
        try:
            with self._connected() as connection:
                response = self._ask(connection, start)
                if response.status == http.client.OK:
                    start = 0  # the server starts over
                return self._take(response, start)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Later("the disk is full") from None
            raise Later(f"the download broke off ({type(error).__name__})") from error

    @contextmanager
    def _connected(self) -> Iterator[http.client.HTTPSConnection]:
        context = ssl.create_default_context()
        if self._proxy:
            proxy = urlsplit(self._proxy if "://" in self._proxy else f"http://{self._proxy}")
            if proxy.scheme != "http" or not proxy.hostname:
                raise Later(f"media cannot go through a {proxy.scheme} proxy")
            connection = http.client.HTTPSConnection(
                proxy.hostname, proxy.port or 80, timeout=IDLE_SECONDS, context=context
            )
            headers = {}
            if proxy.username:
                pair = f"{proxy.username}:{proxy.password or ''}".encode()
                headers["Proxy-Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
            connection.set_tunnel(HOST, 443, headers)
        else:
            connection = http.client.HTTPSConnection(HOST, timeout=IDLE_SECONDS, context=context)
        try:
            yield connection
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPSConnection, start: int) -> http.client.HTTPResponse:
        headers = {"Origin": ORIGIN, "Referer": f"{ORIGIN}/", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start - BLOCK}-"
        connection.request("GET", self._remote.url, headers=headers)
        response = connection.getresponse()
        if response.status in GONE:
            raise Gone(f"WhatsApp does not have it any more ({response.status})")
        if response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _Spoilt("the part that was here is longer than the whole", resumed=True)
        expected = http.client.PARTIAL_CONTENT if start else http.client.OK
        if response.status not in (expected, http.client.OK):
            after = response.getheader("Retry-After") or ""
            raise Later(
                f"WhatsApp's media server answered {response.status}",
                min(float(after), 3600) if after.isdigit() else None,
            )
        return response

    def _take(self, response: http.client.HTTPResponse, start: int) -> int:
        resumed = start > 0
        announced = response.length
        plain_hash, whole, mac = (
            hashlib.sha256(),
            hashlib.sha256(),
            hmac.new(self._mac_key, self._iv, "sha256"),
        )
        mode = "r+b" if self._path.exists() else "w+b"
        with self._path.open(mode) as file:
            _hash_start(file, start, plain_hash)
            file.truncate(start)
            held = bytearray()
            decryptor = None if resumed else self._decryptor(self._iv)
            received = 0
            while piece := response.read(PIECE):
                if self._stop.is_set():
                    raise Stopped("nobody waits for it any more")
                received += len(piece)
                whole.update(piece)
                held += piece
                if decryptor is None:
                    if len(held) < BLOCK:
                        continue
                    decryptor = self._decryptor(bytes(held[:BLOCK]))
                    del held[:BLOCK]
                ready = len(held) - BLOCK - MAC
                ready -= ready % BLOCK
                if ready > 0:
                    cipher = bytes(held[:ready])
                    del held[:ready]
                    mac.update(cipher)
                    plain = decryptor.update(cipher)
                    plain_hash.update(plain)
                    file.write(plain)
                    if file.tell() > self._limit:
                        raise Broken(f"it is larger than {self._limit >> 20} MiB")
            if announced is not None and received < announced:
                raise Later("the download broke off")
            if decryptor is None or len(held) < BLOCK + MAC or (len(held) - MAC) % BLOCK:
                raise _Spoilt("it is not a whole file", resumed=resumed)
            cipher, sign = bytes(held[:-MAC]), bytes(held[-MAC:])
            mac.update(cipher)
            last = _unpadded(decryptor.update(cipher))
            plain_hash.update(last)
            # What was resumed is proven by the hash of the whole, which only the sender and we know.
            sound = resumed or (
                hmac.compare_digest(mac.digest()[:MAC], sign)
                and self._remote.enc_sha256 in (None, whole.digest())
            )
            if not sound or self._remote.sha256 not in (None, plain_hash.digest()):
                raise _Spoilt("it is not what its sender sent: the hash differs", resumed=resumed)
            file.write(last)
            file.flush()
            return file.tell()

    def _decryptor(self, iv: bytes) -> CipherContext:
        return Cipher(algorithms.AES(self._cipher_key), modes.CBC(iv)).decryptor()


def _hash_start(file: IO[bytes], size: int, digest: Any) -> None:
    while size > 0:
        piece = file.read(min(PIECE, size))
        if not piece:
            raise OSError(errno.EIO, "the file became shorter")
        digest.update(piece)
        size -= len(piece)
        time.sleep(0)  # other threads of the child answer WhatsApp


def _unpadded(plain: bytes) -> bytes:
    """Without PKCS #7 padding; as it is when there is none, and the hash then tells."""
    count = plain[-1] if plain else 0
    return plain[:-count] if 0 < count <= BLOCK and plain.endswith(bytes([count]) * count) else plain


def _bytes(value: Any) -> bytes | None:
    if not isinstance(value, str) or not value:
        return None
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return None
