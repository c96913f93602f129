"""The key ring that encrypts credentials at rest: AES-256-GCM, bound to the row it stands in.

Never logs and never stores a key anywhere but in the key file it makes itself.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.errors import GatewayError, SettingsError

if TYPE_CHECKING:
    from core.settings import Settings

KEY_FILE = "secret.keys"
KEY_BYTES = 32
_MAGIC = b"cg1"
_ID_BYTES = 4
_NONCE_BYTES = 12
_HEADER = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES


class SecretError(GatewayError):
    """A stored secret cannot be read with the keys at hand."""

    code = "secret"


class KeyRing:
    """Seals with the newest key, opens with whichever key a text names.

    A sealed text is `cg1`, 4 bytes of key id, a nonce of 12 bytes, the ciphertext with its tag. Tenant and row are
    associated data: a text that was copied to another row does not open there.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        """`keys`, newest first, 32 bytes each. Raises SettingsError."""
        if not keys:
            raise SettingsError("SECRET_KEYS: no key; give at least one (openssl rand -base64 32)")
        for key in keys:
            if len(key) != KEY_BYTES:
                raise SettingsError(f"SECRET_KEYS: a key of {len(key)} bytes; every key has {KEY_BYTES}")
        self._ciphers = {_id_of(key): AESGCM(key) for key in keys}
        self._newest = _id_of(keys[0])

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(key.hex() for key in self._ciphers)})"

    @classmethod
    def from_settings(cls, settings: Settings) -> KeyRing:
        """The ring that `SECRET_KEYS` holds, else the key file in `DATA_DIR` (made when there is none)."""
        if settings.secret_keys is not None:
            return cls.parse(settings.secret_keys.get_secret_value())
        return cls.from_file(settings.data_dir / KEY_FILE)

    @classmethod
    def parse(cls, text: str, *, source: str = "SECRET_KEYS") -> KeyRing:
        """Keys separated by commas or lines, newest first, base64 or hex. Raises SettingsError."""
        parts = [part.strip() for line in text.splitlines() for part in line.split(",")]
        return cls([_decode(part, source) for part in parts if part])

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Read the key file, or make one with mode 600. Two gateways that start together end up with one key.

        Raises SettingsError when others may read it, or when it cannot be read or made.
        """
        try:
            if not path.exists():
                _make(path)
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                raise SettingsError(f"{path}: mode {mode:o} lets others read the keys; chmod 600 it")
            return cls.parse(path.read_text("ascii"), source=str(path))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise SettingsError(
                f"{path}: the key file cannot be used ({why}); mend it or set SECRET_KEYS"
            ) from None

    @property
    def newest(self) -> str:
        """The id of the key that seals now."""
        return self._newest.hex()

    def seal(self, plain: bytes, *, tenant_id: int, row_id: int) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        cipher = self._ciphers[self._newest].encrypt(nonce, plain, _bound_to(tenant_id, row_id))
        return _MAGIC + self._newest + nonce + cipher

    def open(self, sealed: bytes, *, tenant_id: int, row_id: int) -> bytes:
        """Raises SecretError, which names the missing key."""
        if len(sealed) < _HEADER or not sealed.startswith(_MAGIC):
            raise SecretError("these credentials were not sealed by this product; enter them again")
        key_id = sealed[len(_MAGIC) : len(_MAGIC) + _ID_BYTES]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SecretError(
                f"these credentials were sealed with key {key_id.hex()}, which is not in the key ring; "
                "put that key back at the end of SECRET_KEYS, or enter the credentials again",
                code="secret_key_missing",
            )
        try:
            nonce = sealed[len(_MAGIC) + _ID_BYTES : _HEADER]
            return cipher.decrypt(nonce, sealed[_HEADER:], _bound_to(tenant_id, row_id))
        except InvalidTag:
            raise SecretError(
                "these credentials were changed or belong to another row; enter them again",
                code="secret_damaged",
            ) from None

    def stale(self, sealed: bytes) -> bool:
        """Whether an older key sealed this, so that rotation should seal it again."""
        return sealed[len(_MAGIC) : len(_MAGIC) + _ID_BYTES] != self._newest


def generate() -> str:
    """A new key as `SECRET_KEYS` takes it."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def key_id(sealed: bytes) -> str:
    return sealed[len(_MAGIC) : len(_MAGIC) + _ID_BYTES].hex()


def _id_of(key: bytes) -> bytes:
    return hashlib.sha256(b"channel-gateway key id" + key).digest()[:_ID_BYTES]


def _bound_to(tenant_id: int, row_id: int) -> bytes:
    return f"tenant={tenant_id};row={row_id}".encode()


def _decode(text: str, source: str) -> bytes:
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text)
        key = base64.b64decode(
            text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True
        )
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise SettingsError(
            f"{source}: a key is not 32 bytes in base64 or hex (not shown); make one with: openssl rand -base64 32"
        )
    return key


def _make(path: Path) -> None:
    """Write it aside and link it into place: whoever is second uses the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(generate() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        aside.unlink()
