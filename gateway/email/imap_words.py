"""The words of IMAP: answers taken apart, sets of UIDs, dates, the names of folders. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

FETCHED = re.compile(rb"\d+ FETCH \(", re.I)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True, slots=True)
class Folder:
    name: str
    uidvalidity: int
    uidnext: int | None
    exists: int


@dataclass(frozen=True, slots=True)
class Item:
    """What a FETCH said of one mail. `body` is None when it was not asked for or the mail is gone."""

    uid: int
    size: int
    received_at: datetime | None
    body: bytes | None


def number(lines: Sequence[bytes], pattern: bytes) -> int | None:
    for line in lines:
        match = re.search(pattern, line, re.I)
        if match:
            return int(match[1])
    return None


def uid_set(uids: Sequence[int]) -> str:
    """`1,2,3,7` as `1:3,7`."""
    spans: list[tuple[int, int]] = []
    for uid in uids:
        if spans and uid == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], uid)
        else:
            spans.append((uid, uid))
    return ",".join(str(low) if low == high else f"{low}:{high}" for low, high in spans)


def items(lines: Sequence[bytes | bytearray]) -> list[Item]:
    """The answers of a FETCH: text lines, and bodies as `bytearray` between them."""
    found: list[Item] = []
    words, body = b"", None
    for line in (*lines, b"0 FETCH ("):
        if isinstance(line, bytearray):
            body = bytes(line)
        elif FETCHED.match(line):
            if item := _item(words, body):
                found.append(item)
            words, body = bytes(line), None
        else:
            words += b" " + line
    return found


def _item(words: bytes, body: bytes | None) -> Item | None:
    uid = re.search(rb"\bUID (\d+)", words)
    if uid is None:
        return None  # a change of flags, told in between
    size = re.search(rb"RFC822\.SIZE (\d+)", words)
    date = re.search(rb'INTERNALDATE "([^"]+)"', words)
    return Item(int(uid[1]), int(size[1]) if size else 0, _date(date[1]) if date else None, body)


def _date(value: bytes) -> datetime | None:
    """`17-Jul-2026 02:44:25 -0700`; the month's name is English whatever the locale."""
    match = re.fullmatch(r"\s*(\d+)-(\w+)-(\d+) (\d+:\d+:\d+) ([+-]\d{4})", value.decode("ascii", "replace"))
    if match is None or match[2].title() not in _MONTHS:
        return None
    month = _MONTHS.index(match[2].title()) + 1
    try:
        found = datetime.strptime(
            f"{match[3]}-{month}-{match[1]} {match[4]} {match[5]}", "%Y-%m-%d %H:%M:%S %z"
        )
    except ValueError:
        return None
    return found.astimezone(UTC)


def sent_folder(lines: Sequence[bytes | bytearray]) -> str | None:
    """Of the answers of a LIST the folder for sent mail: what the server marks so, else a usual name."""
    names: dict[str, str] = {}
    for line in lines:
        match = re.match(rb'(?:LIST )?\((?P<flags>[^)]*)\) (?:"[^"]*"|NIL) (?P<name>.+)$', bytes(line))
        if match is None:
            continue
        wire = match["name"].strip().decode("utf-8", "replace")
        name = decode_folder(wire[1:-1].replace('\\"', '"') if wire.startswith('"') else wire)
        if b"\\sent" in match["flags"].lower():
            return name
        names[re.split(r"[./]", name)[-1].lower()] = name
    usual = ("sent", "sent items", "sent mail", "sent messages", "gesendet", "gesendete elemente")
    return next((names[name] for name in usual if name in names), None)


def since(date: datetime) -> str:
    """A day as SEARCH wants it."""
    return f"{date.day}-{_MONTHS[date.month - 1]}-{date.year}"


def encode_folder(name: str) -> str:
    """Modified UTF-7 (RFC 3501, 5.1.3)."""
    out: list[str] = []
    for run in re.findall(r"[\x20-\x7e]+|[^\x20-\x7e]+", name):
        if run.isascii() and run.isprintable():
            out.append(run.replace("&", "&-"))
        else:
            coded = base64.b64encode(run.encode("utf-16-be")).decode().rstrip("=").replace("/", ",")
            out.append(f"&{coded}-")
    return "".join(out)


def decode_folder(wire: str) -> str:
    def plain(match: re.Match[str]) -> str:
        if not match[1]:
            return "&"
        coded = match[1].replace(",", "/")
        try:
            return base64.b64decode(coded + "=" * (-len(coded) % 4)).decode("utf-16-be")
        except ValueError:
            return match[0]

    return re.sub(r"&([A-Za-z0-9+,]*)-", plain, wire)
