"""Curve25519 key pairs, XEdDSA signatures and HKDF: what both Noise and Signal are made of."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

import xeddsa.bindings as xeddsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

DJB = b"\x05"  # libsignal's type byte before a public key


@dataclass(frozen=True)
class KeyPair:
    private: bytes
    public: bytes

    @classmethod
    def generate(cls) -> KeyPair:
        secret = bytearray(os.urandom(32))
        secret[0] &= 248
        secret[31] = (secret[31] & 127) | 64
        private = bytes(secret)
        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())

    @property
    def typed(self) -> bytes:
        """The public key with libsignal's type byte (33 bytes)."""
        return DJB + self.public


def agree(private: bytes, public: bytes) -> bytes:
    """Diffie-Hellman; the public key with or without its type byte."""
    return X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(public[-32:])
    )


def sign(private: bytes, message: bytes) -> bytes:
    return xeddsa.ed25519_priv_sign(xeddsa.priv_force_sign(private, False), message, os.urandom(64))


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Check an XEdDSA signature, whose last bit carries the sign of the Edwards key."""
    edwards = xeddsa.curve25519_pub_to_ed25519_pub(public[-32:], bool(signature[63] >> 7))
    return bool(xeddsa.ed25519_verify(signature[:63] + bytes([signature[63] & 0x7F]), edwards, message))


def mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)


def derive(secret: bytes, salt: bytes | None, info: bytes, length: int) -> bytes:
    """HKDF-SHA256."""
    seed = mac(salt or bytes(32), secret)
    block, out, counter = b"", b"", 1
    while len(out) < length:
        block = mac(seed, block + info + bytes([counter]))
        out += block
        counter += 1
    return out[:length]


def cbc_encrypt(key: bytes, iv: bytes, plain: bytes) -> bytes:
    fill = 16 - len(plain) % 16
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(plain + bytes([fill]) * fill) + encryptor.finalize()


def cbc_decrypt(key: bytes, iv: bytes, data: bytes) -> bytes:
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    plain = decryptor.update(data) + decryptor.finalize()
    return plain[: -plain[-1]]
