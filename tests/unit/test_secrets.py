"""The key ring: what was sealed opens in its own row, with a key of the ring, and nowhere else."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import pytest

from core.errors import SettingsError
from core.secrets import KeyRing, SecretError, generate, key_id

OLD, NEW = generate(), generate()


def test_a_sealed_text_opens_in_its_own_row() -> None:
    ring = KeyRing.parse(NEW)
    sealed = ring.seal(b"hunter2", tenant_id=1, row_id=7)
    assert b"hunter2" not in sealed
    assert ring.open(sealed, tenant_id=1, row_id=7) == b"hunter2"
    assert ring.seal(b"hunter2", tenant_id=1, row_id=7) != sealed


@pytest.mark.parametrize(("tenant", "row"), [(2, 7), (1, 8)])
def test_a_text_copied_to_another_row_or_tenant_does_not_open(tenant: int, row: int) -> None:
    ring = KeyRing.parse(NEW)
    sealed = ring.seal(b"hunter2", tenant_id=1, row_id=7)
    with pytest.raises(SecretError, match="another row"):
        ring.open(sealed, tenant_id=tenant, row_id=row)


def test_an_older_key_of_the_ring_still_opens_and_is_told_apart() -> None:
    sealed = KeyRing.parse(OLD).seal(b"x", tenant_id=1, row_id=1)
    both = KeyRing.parse(f"{NEW},{OLD}")
    assert both.open(sealed, tenant_id=1, row_id=1) == b"x"
    assert both.stale(sealed)
    again = both.seal(b"x", tenant_id=1, row_id=1)
    assert not both.stale(again)
    assert key_id(again) == both.newest


def test_a_missing_key_is_named_and_not_shown() -> None:
    sealed = KeyRing.parse(OLD).seal(b"x", tenant_id=1, row_id=1)
    with pytest.raises(SecretError, match=key_id(sealed)) as caught:
        KeyRing.parse(NEW).open(sealed, tenant_id=1, row_id=1)
    assert OLD not in caught.value.detail
    assert caught.value.code == "secret_key_missing"


@pytest.mark.parametrize("damage", [0, 5, 15, -1])
def test_a_changed_byte_is_noticed(damage: int) -> None:
    ring = KeyRing.parse(NEW)
    sealed = bytearray(ring.seal(b"some longer secret", tenant_id=1, row_id=1))
    sealed[damage] ^= 1
    with pytest.raises(SecretError):
        ring.open(bytes(sealed), tenant_id=1, row_id=1)


@pytest.mark.parametrize(
    "text", ["", "   ", "short", "not base64 at all!", base64.b64encode(b"x" * 31).decode()]
)
def test_a_wrong_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(SettingsError, match="SECRET_KEYS") as caught:
        KeyRing.parse(text)
    assert not text.strip() or text not in caught.value.detail


def test_hex_and_url_safe_base64_are_the_same_key() -> None:
    raw = bytes(range(220, 252))
    forms = [raw.hex(), base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode().rstrip("=")]
    assert len({KeyRing.parse(form).newest for form in forms}) == 1


def test_the_key_file_is_made_once_with_mode_600(tmp_path: Path) -> None:
    path = tmp_path / "data" / "secret.keys"
    rings: list[KeyRing] = []
    threads = [threading.Thread(target=lambda: rings.append(KeyRing.from_file(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({ring.newest for ring in rings}) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["secret.keys"]


def test_a_key_file_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.keys"
    KeyRing.from_file(path)
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        KeyRing.from_file(path)
