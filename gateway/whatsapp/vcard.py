"""A contact as the vCard that WhatsApp shows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import Invalid
from core.identity import phone_e164


def write(name: str, phones: Sequence[str], emails: Sequence[str]) -> str:
    """Version 3.0. `waid` makes "message" and "add contact" appear on the phone. Raises Invalid that names the field."""
    lines = ["BEGIN:VCARD", "VERSION:3.0", f"N:;{_escaped(name)};;;", f"FN:{_escaped(name)}"]
    for index, phone in enumerate(phones):
        try:
            number = phone_e164(phone)
        except Invalid as error:
            raise Invalid(f"payload.phones.{index}: {error.detail}") from None
        lines.append(f"TEL;type=CELL;type=VOICE;waid={number[1:]}:{_escaped(phone.strip())}")
    for index, email in enumerate(emails):
        if "@" not in email.strip("@ "):
            raise Invalid(f"payload.emails.{index}: is no e-mail address")
        lines.append(f"EMAIL;type=INTERNET:{_escaped(email.strip())}")
    return "\n".join([*lines, "END:VCARD"])


def _escaped(text: str) -> str:
    for char in "\\,;":
        text = text.replace(char, f"\\{char}")
    return text.replace("\r", "").replace("\n", "\\n")
