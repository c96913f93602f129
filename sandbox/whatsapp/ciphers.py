"""A phone's Signal sessions with linked devices: encrypting for them, reading what they send."""

from __future__ import annotations

from sandbox.whatsapp.nodes import Node
from sandbox.whatsapp.signal import AlreadyRead, DecryptError, SenderKey, Session, pad, unpack, unpad
from sandbox.whatsapp.world import Account, Device

_ARCHIVED = 40  # earlier sessions kept per device, as libsignal does


def encrypt(account: Account, device: Device, plain: bytes, *, fresh: bool = False) -> tuple[str, bytes]:
    """(type, ciphertext); `fresh` opens a new session first, keeping the earlier ones for reading."""
    sessions = account.sessions.setdefault(device.lid, [])
    if not sessions or fresh:
        sessions.insert(
            0, Session.initiate(account.keys.identity, account.keys.registration, device.bundle())
        )
        del sessions[_ARCHIVED:]
    return sessions[0].encrypt(pad(plain))


def decrypt(account: Account, device: Device, enc: Node) -> bytes:
    """Raises AlreadyRead for a repeated ciphertext, else DecryptError."""
    sessions, data = account.sessions.setdefault(device.lid, []), enc.data
    if enc.text("type") == "pkmsg":
        fields = unpack(data[1:])
        data = fields.blob(4)
        if not any(session.base == fields.blob(2) for session in sessions):
            one_time = account.keys.one_time.get(fields.numbers.get(1, 0))
            session = Session.respond(account.keys.identity, account.keys.signed, one_time, fields)
            plain = session.decrypt(data)
            sessions.insert(0, session)
            del sessions[_ARCHIVED:]
            return unpad(plain)
    failure = DecryptError("no session")
    for session in sessions:  # the current one first, then the archived ones
        try:
            plain = session.decrypt(data)
        except (DecryptError, ValueError) as error:
            if not isinstance(failure, AlreadyRead):
                failure = error if isinstance(error, DecryptError) else DecryptError(str(error))
            continue
        sessions.remove(session)
        sessions.insert(0, session)
        return unpad(plain)
    raise failure


def encrypt_group(account: Account, group_id: str, plain: bytes) -> bytes:
    return sender_key(account, group_id).encrypt(pad(plain))


def sender_key(account: Account, group_id: str) -> SenderKey:
    return account.own_sender_keys.setdefault(group_id, SenderKey.generate())


def decrypt_group(account: Account, group_id: str, device: Device, enc: Node) -> bytes:
    """Raises DecryptError."""
    key = account.sender_keys.get((group_id, device.lid))
    if key is None:
        raise DecryptError("no sender key")
    return unpad(key.decrypt(enc.data))
