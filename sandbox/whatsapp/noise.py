"""The server's half of WhatsApp's Noise XX handshake, and the certificate chain it shows.

Source: measured against whatsmeow. The AEAD counter starts again at every key mix.
"""

from __future__ import annotations

import hashlib
import time

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox.whatsapp.keys import KeyPair, derive, sign
from sandbox.whatsapp.protos import cert

PATTERN = b"Noise_XX_25519_AESGCM_SHA256".ljust(32, b"\0")
_DAY = 86400


class Noise:
    """One handshake; `finish` gives the ciphers of the transport."""

    def __init__(self, prologue: bytes) -> None:
        self._hash = self._salt = PATTERN
        self._cipher, self._counter = AESGCM(PATTERN), 0
        self.authenticate(prologue)

    def authenticate(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _nonce(self) -> bytes:
        self._counter += 1
        return nonce(self._counter - 1)

    def encrypt(self, plain: bytes) -> bytes:
        data = self._cipher.encrypt(self._nonce(), plain, self._hash)
        self.authenticate(data)
        return data

    def decrypt(self, data: bytes) -> bytes:
        plain = self._cipher.decrypt(self._nonce(), data, self._hash)
        self.authenticate(data)
        return plain

    def mix(self, secret: bytes) -> None:
        keys = derive(secret, self._salt, b"", 64)
        self._salt, self._cipher, self._counter = keys[:32], AESGCM(keys[32:]), 0

    def finish(self) -> tuple[AESGCM, AESGCM]:
        """(client to server, server to client)."""
        keys = derive(b"", self._salt, b"", 64)
        return AESGCM(keys[:32]), AESGCM(keys[32:])


def nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")


def certificate_chain(root: KeyPair, static: KeyPair) -> bytes:
    """Root signs an intermediate (issuer serial 0), which signs the leaf that holds the server's static key."""
    intermediate = KeyPair.generate()
    now = int(time.time())
    details = cert.CertChain.NoiseCertificate.Details
    middle = details(
        serial=7, issuerSerial=0, key=intermediate.public, notBefore=now - _DAY, notAfter=now + 3650 * _DAY
    ).SerializeToString()
    leaf = details(
        serial=8, issuerSerial=7, key=static.public, notBefore=now - _DAY, notAfter=now + 3650 * _DAY
    ).SerializeToString()
    chain = cert.CertChain()
    chain.intermediate.details, chain.intermediate.signature = middle, sign(root.private, middle)
    chain.leaf.details, chain.leaf.signature = leaf, sign(intermediate.private, leaf)
    return bytes(chain.SerializeToString())
