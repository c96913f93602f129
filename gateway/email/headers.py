"""Reading a mail's headers without the standard library's strict parsers: bounded, lenient, never raising on content.

`email.policy.default` needs 7 s for 20,000 addresses and raises on `<[a]@[b>`; here every value is cut first and read raw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.header import decode_header
from email.message import Message
from email.utils import getaddresses, parsedate_to_datetime
from typing import Any

MOST_CHARS = 16_384
"""Of one header's value: more is nobody's writing."""
MOST_ADDRESSES = 100
MOST_HEADERS = 200
MOST_IDS = 50

_ID = re.compile(r"<[^<>\r\n\0]{1,900}>")
_RAW = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_ADDRESS = re.compile(r"[^\s@<>()\[\],;:\\\"]{1,64}@[^\s@<>()\[\],;:\\\"]{1,190}")


def raw(message: Message, name: str) -> str:
    """The first value of that name, unfolded and cut; empty when there is none."""
    for value in all_raw(message, name):
        return value
    return ""


def all_raw(message: Message, name: str) -> list[str]:
    wanted = name.lower()
    found = (value for key, value in message.raw_items() if key.lower() == wanted)
    return [unfolded(str(value)) for value in found]


def unfolded(value: str) -> str:
    text = value[:MOST_CHARS].replace("\r", "").replace("\n", "")
    if not _RAW.search(text):
        return text
    try:
        # Bytes that are no ASCII come as surrogates: mostly UTF-8 that nobody encoded.
        return text.encode("ascii", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def decoded(value: str) -> str:
    """`=?utf-8?q?Gr=C3=BC=C3=9Fe?=` → `Grüße`; what cannot be decoded stays as it is."""
    text = unfolded(value)
    if "=?" in text:
        try:
            text = "".join(_piece(data, charset) for data, charset in decode_header(text))
        except Exception:
            text = unfolded(value)
    return clean(text)


def _piece(data: Any, charset: str | None) -> str:
    if isinstance(data, str):
        return data
    for name in (charset, "utf-8"):
        try:
            return str(data, name or "ascii")
        except (LookupError, UnicodeError, ValueError):
            continue
    return str(data, "cp1252", "replace")


def clean(text: str) -> str:
    return " ".join(_CONTROL.sub(" ", text).split())


def addresses(values: Iterable[str]) -> list[dict[str, str]]:
    """`[{"address", "name"}]`, what is no address left out, each once, in order."""
    found: dict[str, str] = {}
    for value in values:
        for name, address in _pairs(value):
            match = _ADDRESS.fullmatch(address.strip().strip("<>").strip("'\""))
            if match:
                found.setdefault(match[0].lower(), clean(decoded(name)))
            if len(found) >= MOST_ADDRESSES:
                break
    return [{"address": address, "name": name} for address, name in found.items()]


def _pairs(value: str) -> list[tuple[str, str]]:
    cut = value[:MOST_CHARS]
    try:
        pairs = [(name, address) for name, address in getaddresses([cut]) if "@" in address]
    except Exception:
        pairs = []
    if pairs:
        return pairs
    # The standard parser gives up on half of what spammers and old programs write.
    return [("", match) for match in _ADDRESS.findall(cut)]


def ids(value: str) -> list[str]:
    """The `<…>` of a References or In-Reply-To header, newest last; the last ones where there are too many."""
    return list(dict.fromkeys(_ID.findall(value)))[-MOST_IDS:]


def message_id(value: str) -> str | None:
    """A Message-ID as it was written, brackets and all; broken ones are kept too, for they are sent back to us so."""
    found = ids(value)
    if found:
        return found[0]
    text = clean(value)
    return text[:900] if text and " " not in text else None


def milliseconds(value: str) -> int | None:
    try:
        date = parsedate_to_datetime(value)
        aware = date if date.tzinfo else date.replace(tzinfo=UTC)
        stamp = int(aware.timestamp() * 1000)
    except Exception:
        return None
    return stamp if 0 < stamp < int(datetime(9999, 1, 1, tzinfo=UTC).timestamp() * 1000) else None


def listed(message: Message) -> list[list[str]]:
    """All headers as they came, for `raw_payload`."""
    return [[str(name)[:200], clean(unfolded(str(value)))] for name, value in message.raw_items()][
        :MOST_HEADERS
    ]
