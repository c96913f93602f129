"""Media as WhatsApp stores it: encrypted by the sender, opaque to the server."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from sandbox.whatsapp.keys import cbc_decrypt, cbc_encrypt, derive, mac

_INFO = {
    "image": b"WhatsApp Image Keys",
    "sticker": b"WhatsApp Image Keys",
    "video": b"WhatsApp Video Keys",
    "audio": b"WhatsApp Audio Keys",
    "document": b"WhatsApp Document Keys",
    "md-msg-hist": b"WhatsApp History Keys",
}
_MAC_SIZE = 10


@dataclass(frozen=True)
class EncryptedMedia:
    key: bytes
    blob: bytes
    plain_sha256: bytes
    blob_sha256: bytes


def _keys(key: bytes, kind: str) -> tuple[bytes, bytes, bytes]:
    material = derive(key, None, _INFO[kind], 112)
    return material[:16], material[16:48], material[48:80]


def encrypt(plain: bytes, kind: str) -> EncryptedMedia:
    key = os.urandom(32)
    iv, cipher, mac_key = _keys(key, kind)
    body = cbc_encrypt(cipher, iv, plain)
    blob = body + mac(mac_key, iv + body)[:_MAC_SIZE]
    return EncryptedMedia(key, blob, hashlib.sha256(plain).digest(), hashlib.sha256(blob).digest())


def decrypt(blob: bytes, key: bytes, kind: str) -> bytes:
    iv, cipher, mac_key = _keys(key, kind)
    body = blob[:-_MAC_SIZE]
    if mac(mac_key, iv + body)[:_MAC_SIZE] != blob[-_MAC_SIZE:]:
        raise ValueError("media was changed or the key is not its own")
    return cbc_decrypt(cipher, iv, body)
