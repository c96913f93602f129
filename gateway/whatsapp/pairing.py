"""One pairing in progress: by QR or by phone code, from the first code to its end. Pure: clock passed in, no IO."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from core.channel import PairingUpdate
from core.errors import Invalid
from core.identity import phone_e164
from gateway.whatsapp.timings import Timings


@dataclass(slots=True)
class Pairing:
    timings: Timings
    deadline: float
    """Monotonic: when the child is ended whatever whatsmeow says."""
    phone: str | None = None
    """E.164 for a pairing by code; None: by QR."""
    codes: int = 0
    code_asked: bool = False
    current: PairingUpdate | None = None
    """What a person sees now, for whoever asks again."""

    def qr(self, code: str, now: datetime | None = None) -> PairingUpdate:
        """The next QR code: the first lasts longest."""
        seconds = self.timings.first_qr if self.codes == 0 else self.timings.next_qr
        self.codes += 1
        self.current = PairingUpdate(
            kind="qr", qr=code, expires_at=(now or datetime.now(UTC)) + timedelta(seconds=seconds)
        )
        return self.current

    def code(self, code: str, now: datetime | None = None) -> PairingUpdate:
        """The phone code, in the form a person types it: `ABCD-EFGH`."""
        plain = code.replace("-", "")
        shown = f"{plain[:4]}-{plain[4:]}" if len(plain) == 8 else code
        expires = (now or datetime.now(UTC)) + timedelta(seconds=self.timings.code)
        self.current = PairingUpdate(kind="code", code=shown, expires_at=expires)
        return self.current


def is_expected(identifier: str, expected: object) -> bool:
    """Whether the number that was paired is the one asked for; anything goes when none was."""
    if not isinstance(expected, str) or not expected.strip():
        return True
    try:
        return phone_e164(expected) == identifier
    except Invalid:  # nobody can have been meant
        return False
