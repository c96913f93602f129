"""What an invitation (iCalendar, RFC 5545) says, in a sentence and in fields. Pure, and content with broken ones."""

from __future__ import annotations

import re
from typing import Any

_METHODS = {
    "REQUEST": "Invitation",
    "CANCEL": "Cancelled",
    "REPLY": "Answer to an invitation",
    "COUNTER": "Another time proposed",
    "PUBLISH": "Event",
}
_ANSWERS = {"ACCEPTED": "accepted", "DECLINED": "declined", "TENTATIVE": "perhaps"}
_LINE = re.compile(r'(?P<name>[A-Za-z-]+)(?P<params>(?:;[^":;=]+=(?:"[^"]*"|[^":;]*))*):(?P<value>.*)', re.S)
_STAMP = re.compile(r"(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)\d\d(Z?))?")
MOST_CHARS = 100_000


def read(text: str) -> dict[str, Any] | None:
    """The first event: `{method, uid, summary, start, end, timezone, location, organizer, answer}`, or None."""
    found: dict[str, Any] = {}
    inside = 0
    for name, params, value in _lines(text[:MOST_CHARS]):
        if name == "METHOD":
            found["method"] = value.upper()
        elif name == "BEGIN":
            if value.upper() == "VEVENT" and "event" in found:
                break
            inside += value.upper() == "VEVENT" or inside > 0
            if value.upper() == "VEVENT":
                found["event"] = True
        elif name == "END":
            inside = max(0, inside - 1)
        elif inside == 1:
            _take(found, name, params, value)
    if not found.pop("event", False):
        return None
    return found


def _take(found: dict[str, Any], name: str, params: dict[str, str], value: str) -> None:
    if name in ("SUMMARY", "LOCATION", "UID"):
        found.setdefault(name.lower(), _plain(value))
    elif name in ("DTSTART", "DTEND"):
        found.setdefault("start" if name == "DTSTART" else "end", _stamp(value))
        if "TZID" in params:
            found.setdefault("timezone", params["TZID"])
    elif name == "ORGANIZER":
        found.setdefault("organizer", params.get("CN") or value.removeprefix("mailto:"))
    elif name == "ATTENDEE" and params.get("PARTSTAT") in _ANSWERS:
        found.setdefault("answer", _ANSWERS[params["PARTSTAT"]])


def _lines(text: str) -> list[tuple[str, dict[str, str], str]]:
    unfolded = re.sub(r"\r?\n[ \t]", "", text)
    out = []
    for line in unfolded.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match:
            pairs = (part.partition("=") for part in match["params"].split(";") if "=" in part)
            params = {key.upper(): value.strip('"') for key, _, value in pairs}
            out.append((match["name"].upper(), params, match["value"]))
    return out


def _plain(value: str) -> str:
    text = value.replace("\\n", "\n").replace("\\N", "\n").replace("\\,", ",").replace("\\;", ";")
    return " ".join(text.replace("\\\\", "\\").split())[:500]


def _stamp(value: str) -> str:
    match = _STAMP.fullmatch(value.strip())
    if match is None:
        return value.strip()[:40]
    year, month, day, hour, minute, utc = match.groups()
    date = f"{year}-{month}-{day}"
    return date if hour is None else f"{date} {hour}:{minute}{' UTC' if utc else ''}"


def sentence(event: dict[str, Any]) -> str:
    """`Invitation: Demo, 2026-11-23 10:00 to 11:00 (Europe/Berlin), at Room 4, from Ada`."""
    start, end = str(event.get("start") or ""), str(event.get("end") or "")
    if start and end.startswith(start[:10]) and len(end) > 10:
        end = end[11:]
    when = " to ".join(part for part in (start.removesuffix(" UTC") if end else start, end) if part)
    zone = f" ({event['timezone']})" if event.get("timezone") and when else ""
    pieces = [
        event.get("summary") or "without a title",
        f"{when}{zone}" if when else "",
        f"at {event['location']}" if event.get("location") else "",
        f"from {event['organizer']}" if event.get("organizer") else "",
        str(event.get("answer") or "") if event.get("method") == "REPLY" else "",
    ]
    kind = _METHODS.get(str(event.get("method") or ""), "Event")
    return f"{kind}: " + ", ".join(piece for piece in pieces if piece)
