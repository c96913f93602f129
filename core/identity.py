"""The one form of every address: bare channel addresses in, external ids (`whatsapp:+60123456789`) out, and back.

Pure text: no IO, no look-ups. Raises Invalid with what is allowed; two ways of writing one address give one external id.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from core.errors import Invalid

_PHONE_SERVERS = frozenset({"s.whatsapp.net", "c.us", "hosted"})
_LID_SERVERS = frozenset({"lid", "hosted.lid"})
_JID = re.compile(r"(?P<user>[0-9]+)(?:[._][0-9]+)?(?::[0-9]+)?@(?P<server>[a-z.]+)")
"""`60123456789@s.whatsapp.net`; linked devices add `:12`, older forms an agent (`.0` or `_1`)."""
_GROUP_JID = re.compile(r"[0-9]{5,25}(-[0-9]{5,20})?@g\.us")
_LID = re.compile(r"[0-9]{5,20}")
_EMAIL = re.compile(
    r"[^\s@<>()\[\],;:\\\"]{1,64}@(?=.{1,190}$)[^\W_](?:[\w-]*[^\W_])?(?:\.[^\W_](?:[\w-]*[^\W_])?)*",
    re.ASCII | re.I,
)
_TELEGRAM = re.compile(r"-?[1-9][0-9]{0,18}")
_CHANNEL = re.compile(r"[a-z][a-z0-9_]{0,31}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SPACE = re.compile(r"\s")
_PHONE_NOISE = re.compile(r"[\s().\-/\u00a0\u2010-\u2015\u2060]+")

_ALLOWED = {
    "whatsapp": "a phone number with its country code (+60123456789) or a group id (120363000000000000@g.us)",
    "email": "an e-mail address (john@example.com)",
    "telegram": "a numeric chat id (telegram:123456789); bots cannot write to @names",
}


def phone_e164(text: str) -> str:
    """`60123456789`, `+60 12-345 6789`, `0060123456789` → `+60123456789`.

    A number without `+` is taken as international. Digits are never rewritten by a country's dialling rules (as
    libraries do: they drop Mexico's 1): what the channel calls its user must stay what it is. Raises Invalid.
    """
    plain = unicodedata.normalize("NFKC", text).strip().removeprefix("tel:")
    # "+60 (0)12…": the zero is only dialled inside the country.
    plain = re.sub(r"(?<=[0-9\s])\(0\)", "", plain)
    plain = _PHONE_NOISE.sub("", plain)
    digits = plain.removeprefix("+")
    if digits == plain and digits.startswith("00"):
        digits = digits[2:]
    problem = _phone_problem(digits)
    if problem is not None:
        raise Invalid(f"phone number {text!r} {problem}; write it with its country code, like +60123456789")
    return f"+{digits}"


def _phone_problem(digits: str) -> str | None:
    if not digits.isascii() or not digits.isdigit():
        return "holds something that is not a digit" if digits else "is empty"
    if digits.startswith("0"):
        return "has no country code"
    if not 7 <= len(digits) <= 15:
        return "must have 7 to 15 digits"
    return None


def external_id(channel: str, address: str) -> str:
    """The external id of a bare address (or of one already in external form) on a channel. Raises Invalid."""
    text = address.strip()
    if len(text) > 320 or _CONTROL.search(text):
        raise _invalid(channel, address)
    if channel == "whatsapp":
        return _whatsapp(text)
    if channel == "email":
        return _email(text)
    if channel == "telegram":
        return _telegram(text)
    # A channel added later: it checks its own addresses, here only the form.
    bare = text.removeprefix(f"{channel}:")
    if not _CHANNEL.fullmatch(channel) or not bare or _SPACE.search(bare):
        raise _invalid(channel, address)
    return f"{channel}:{bare}"


def _whatsapp(text: str) -> str:
    if text.startswith("whatsapp-lid:"):
        lid = text.removeprefix("whatsapp-lid:").partition("@")[0].partition(":")[0]
        if not _LID.fullmatch(lid):
            raise _invalid("whatsapp", text)
        return f"whatsapp-lid:{lid}"
    bare = text.removeprefix("whatsapp-group:").removeprefix("whatsapp:")
    if "@" not in bare:
        if text.startswith("whatsapp-group:"):
            raise _invalid("whatsapp", text)
        return f"whatsapp:{phone_e164(bare)}"
    bare = bare.lower()
    if _GROUP_JID.fullmatch(bare):
        return f"whatsapp-group:{bare}"
    match = _JID.fullmatch(bare)
    if match is None:
        raise _invalid("whatsapp", text)
    user, server = match["user"], match["server"]
    if server in _LID_SERVERS and _LID.fullmatch(user):
        return f"whatsapp-lid:{user}"
    if server in _PHONE_SERVERS and _phone_problem(user) is None:
        return f"whatsapp:+{user}"
    raise _invalid("whatsapp", text)


def _email(text: str) -> str:
    bare = text.removeprefix("email:").removeprefix("mailto:")
    if not _EMAIL.fullmatch(bare):
        bare = _with_ascii_domain(bare)
        if not _EMAIL.fullmatch(bare):
            raise _invalid("email", text)
    return f"email:{bare.lower()}"


def _with_ascii_domain(address: str) -> str:
    """`john@bücher.de` → `john@xn--bcher-kva.de`; anything that cannot be one comes back as it was."""
    local, _, domain = address.rpartition("@")
    try:
        return f"{local}@{domain.encode('idna').decode('ascii')}"
    except UnicodeError:
        return address


def _telegram(text: str) -> str:
    bare = text.removeprefix("telegram:")
    if not _TELEGRAM.fullmatch(bare):
        raise _invalid("telegram", text)
    return f"telegram:{bare}"


def channel_of(external: str) -> str:
    """`whatsapp-lid:100…` → `whatsapp`. Raises Invalid when it is no external id."""
    prefix, colon, rest = external.partition(":")
    channel, _, variant = prefix.partition("-")
    known = not variant or (channel == "whatsapp" and variant in ("lid", "group"))
    if not colon or not rest or not known or not _CHANNEL.fullmatch(channel):
        raise Invalid(
            f"{external!r} is no external id; one looks like whatsapp:+60123456789 or email:john@example.com"
        )
    return channel


def kind_of(external: str) -> Literal["person", "group"]:
    """Whether an external id is a whole chat or one person."""
    return "group" if external.startswith(("whatsapp-group:", "telegram:-")) else "person"


def checked(external: str) -> str:
    """An external id somebody handed in, validated and in its one form. Raises Invalid."""
    return external_id(channel_of(external), external)


def address_of(external: str) -> str:
    """The bare address that `recipient` and `sender_identifier` carry: `+60…`, `…@lid`, `…@g.us`, `john@…`,
    `telegram:123`. `external_id(channel_of(x), address_of(x)) == x`. Raises Invalid."""
    channel = channel_of(external)
    prefix, _, rest = external.partition(":")
    if prefix == "whatsapp-lid":
        return f"{rest}@lid"
    return rest if channel in ("whatsapp", "email") else external


def _invalid(channel: str, address: str) -> Invalid:
    shown = address if len(address) <= 80 else address[:77] + "..."
    allowed = _ALLOWED.get(channel, f"an address of the channel {channel!r}")
    return Invalid(f"{shown!r} is no {channel} address; allowed: {allowed}")
