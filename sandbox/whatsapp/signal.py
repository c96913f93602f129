"""Signal's pairwise sessions (X3DH, double ratchet) and group sender keys, as libsignal v3 puts them on the wire.

For phones played by the sandbox. Plain Python state that pickles; nothing here knows a stanza.
"""

from __future__ import annotations

import copy
import os
import secrets
from dataclasses import dataclass, field

from sandbox.whatsapp.keys import DJB, KeyPair, agree, cbc_decrypt, cbc_encrypt, derive, mac, sign, verify

VERSION = b"\x33"
_SKIP_LIMIT = 2000  # message keys kept or skipped at most, as libsignal does


class DecryptError(Exception):
    """This message cannot be read with the keys at hand."""


class AlreadyRead(DecryptError):
    """Its key was used before: the very same ciphertext came again."""


# --- libsignal's messages are small protobufs without a schema of their own here ---


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        low, number = number & 127, number >> 7
        if not number:
            out.append(low)
            return bytes(out)
        out.append(low | 128)


def pack(fields: dict[int, int | bytes | None]) -> bytes:
    out = b""
    for number, value in fields.items():
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        elif value is not None:
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return out


@dataclass(frozen=True)
class Fields:
    numbers: dict[int, int]
    blobs: dict[int, bytes]

    def blob(self, number: int) -> bytes:
        try:
            return self.blobs[number]
        except KeyError:
            raise DecryptError(f"message lacks field {number}") from None


def unpack(data: bytes) -> Fields:
    fields = Fields({}, {})
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        while at < len(data):
            key = number()
            if key & 7 == 0:
                fields.numbers[key >> 3] = number()
            elif key & 7 == 2:
                size = number()
                fields.blobs[key >> 3] = data[at : at + size]
                at += size
            else:
                raise DecryptError("not a Signal message")
    except IndexError:
        raise DecryptError("message ends too early") from None
    return fields


def pad(plain: bytes) -> bytes:
    """WhatsApp's own padding, inside Signal's."""
    fill = secrets.randbelow(15) + 1
    return plain + bytes([fill]) * fill


def unpad(plain: bytes) -> bytes:
    return plain[: -plain[-1]]


@dataclass(frozen=True)
class Bundle:
    """What a sender fetches to open a session with a device."""

    registration: int
    identity: bytes
    signed_id: int
    signed_key: bytes
    signature: bytes
    one_time_id: int | None = None
    one_time_key: bytes | None = None


@dataclass(frozen=True)
class _Pending:
    one_time_id: int | None
    signed_id: int
    base: bytes
    registration: int


@dataclass
class _Chain:
    key: bytes
    index: int = 0


@dataclass(frozen=True)
class _MessageKeys:
    cipher: bytes
    mac: bytes
    iv: bytes


def _message_keys(chain_key: bytes) -> _MessageKeys:
    keys = derive(mac(chain_key, b"\1"), None, b"WhisperMessageKeys", 80)
    return _MessageKeys(keys[:32], keys[32:64], keys[64:])


def _step(chain_key: bytes) -> bytes:
    return mac(chain_key, b"\2")


@dataclass
class Session:
    """One pairwise session, seen from one side."""

    mine: KeyPair
    theirs: bytes
    root: bytes
    ratchet: KeyPair
    sending: bytes
    their_ratchet: bytes | None = None
    receiving: dict[bytes, _Chain] = field(default_factory=dict)
    skipped: dict[tuple[bytes, int], _MessageKeys] = field(default_factory=dict)
    pending: _Pending | None = None
    base: bytes = b""
    count: int = 0
    previous_count: int = 0

    @classmethod
    def initiate(cls, mine: KeyPair, registration: int, bundle: Bundle) -> Session:
        base = KeyPair.generate()
        their_identity = bundle.identity[-32:]
        secret = b"\xff" * 32 + agree(mine.private, bundle.signed_key)
        secret += agree(base.private, their_identity) + agree(base.private, bundle.signed_key)
        if bundle.one_time_key:
            secret += agree(base.private, bundle.one_time_key)
        keys = derive(secret, None, b"WhisperText", 64)
        session = cls(mine, their_identity, keys[:32], base, b"", bundle.signed_key[-32:])
        session.receiving[bundle.signed_key[-32:]] = _Chain(keys[32:])
        session.base = base.typed
        session._turn()
        session.pending = _Pending(bundle.one_time_id, bundle.signed_id, base.typed, registration)
        return session

    @classmethod
    def respond(cls, mine: KeyPair, signed: KeyPair, one_time: KeyPair | None, message: Fields) -> Session:
        base, identity = message.blob(2), message.blob(3)[-32:]
        secret = b"\xff" * 32 + agree(signed.private, identity)
        secret += agree(mine.private, base) + agree(signed.private, base)
        if one_time:
            secret += agree(one_time.private, base)
        keys = derive(secret, None, b"WhisperText", 64)
        return cls(mine, identity, keys[:32], signed, keys[32:], base=base)

    def _mix(self, secret: bytes) -> bytes:
        keys = derive(secret, self.root, b"WhisperRatchet", 64)
        self.root = keys[:32]
        return keys[32:]

    def _turn(self) -> None:
        """Start a new sending chain against their latest ratchet key."""
        if self.their_ratchet is None:
            raise DecryptError("no ratchet key of theirs yet")
        self.ratchet = KeyPair.generate()
        self.sending = self._mix(agree(self.ratchet.private, self.their_ratchet))
        self.previous_count, self.count = self.count, 0

    def encrypt(self, plain: bytes) -> tuple[str, bytes]:
        """(`pkmsg` until they have answered, else `msg`; the message)."""
        keys = _message_keys(self.sending)
        self.sending = _step(self.sending)
        body = VERSION + pack(
            {
                1: self.ratchet.typed,
                2: self.count,
                3: self.previous_count,
                4: cbc_encrypt(keys.cipher, keys.iv, plain),
            }
        )
        self.count += 1
        body += mac(keys.mac, self.mine.typed + DJB + self.theirs + body)[:8]
        if self.pending is None:
            return "msg", body
        first = self.pending
        return "pkmsg", VERSION + pack(
            {
                1: first.one_time_id,
                2: first.base,
                3: self.mine.typed,
                4: body,
                5: first.registration,
                6: first.signed_id,
            }
        )

    def decrypt(self, message: bytes) -> bytes:
        """Raises DecryptError and leaves the session as it was when the message does not belong to it."""
        trial = copy.copy(self)
        trial.receiving = {key: copy.copy(chain) for key, chain in self.receiving.items()}
        trial.skipped = dict(self.skipped)
        plain = trial._decrypt(message)
        self.__dict__.update(trial.__dict__)
        return plain

    def _decrypt(self, message: bytes) -> bytes:
        fields = unpack(message[1:-8])
        ratchet, index = fields.blob(1)[-32:], fields.numbers.get(2, 0)
        if ratchet not in self.receiving:
            self.receiving[ratchet] = _Chain(self._mix(agree(self.ratchet.private, ratchet)))
            self.their_ratchet = ratchet
            self._turn()
        chain = self.receiving[ratchet]
        if index - chain.index > _SKIP_LIMIT:
            raise DecryptError("too far ahead")
        while chain.index <= index:
            self.skipped[ratchet, chain.index] = _message_keys(chain.key)
            chain.key, chain.index = _step(chain.key), chain.index + 1
        keys = self.skipped.pop((ratchet, index), None)
        if keys is None:
            raise AlreadyRead("message key already used")
        if mac(keys.mac, DJB + self.theirs + self.mine.typed + message[:-8])[:8] != message[-8:]:
            raise DecryptError("wrong message authentication code")
        self.pending = None
        return cbc_decrypt(keys.cipher, keys.iv, fields.blob(4))


@dataclass
class SenderKey:
    """One member's key for a group, on the sending or the receiving side."""

    id: int
    iteration: int
    chain: bytes
    signing: KeyPair  # without a private half on the receiving side
    skipped: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def generate(cls) -> SenderKey:
        return cls(secrets.randbelow(2**31 - 1) + 1, 0, os.urandom(32), KeyPair.generate())

    @classmethod
    def from_distribution(cls, data: bytes) -> SenderKey:
        fields = unpack(data[1:])
        return cls(
            fields.numbers[1], fields.numbers.get(2, 0), fields.blob(3), KeyPair(b"", fields.blob(4)[-32:])
        )

    def distribution(self) -> bytes:
        return VERSION + pack({1: self.id, 2: self.iteration, 3: self.chain, 4: self.signing.typed})

    def _next(self) -> bytes:
        seed = derive(mac(self.chain, b"\1"), None, b"WhisperGroup", 48)
        self.chain, self.iteration = _step(self.chain), self.iteration + 1
        return seed

    def encrypt(self, plain: bytes) -> bytes:
        iteration = self.iteration
        seed = self._next()
        body = VERSION + pack({1: self.id, 2: iteration, 3: cbc_encrypt(seed[16:], seed[:16], plain)})
        return body + sign(self.signing.private, body)

    def decrypt(self, message: bytes) -> bytes:
        if not verify(self.signing.public, message[:-64], message[-64:]):
            raise DecryptError("wrong group signature")
        fields = unpack(message[1:-64])
        wanted = fields.numbers.get(2, 0)
        if fields.numbers.get(1) != self.id or wanted - self.iteration > _SKIP_LIMIT:
            raise DecryptError("not a message of this sender key")
        while self.iteration <= wanted:
            iteration = self.iteration
            self.skipped[iteration] = self._next()
        seed = self.skipped.pop(wanted, None)
        if seed is None:
            raise AlreadyRead("group message key already used")
        return cbc_decrypt(seed[16:], seed[:16], fields.blob(3))
