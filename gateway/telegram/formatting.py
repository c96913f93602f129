"""Bold, italic and the like as Telegram's entities: positions beside the text, never a language that the text could break.

Pure. Without a sender who asked for it nothing in a text means anything.
"""

from __future__ import annotations

import re

from gateway.telegram.values import Json

_STYLES = {"bold": "bold", "italic": "italic", "strike": "strikethrough"}
# As WhatsApp's: a mark counts only at the edge of words, so that 2*3*4 and snake_case_names stay what they are.
_MARKS = re.compile(
    r"```(?P<pre>[^`]+?)```"
    r"|`(?P<code>[^`\n]+)`"
    r"|\[(?P<words>[^\[\]\n]{1,1000})\]\((?P<url>https?://[^\s()<>]{1,2000})\)"
    r"|(?<![\w*])\*(?P<bold>[^\s*](?:[^*\n]*[^\s*])?)\*(?![\w*])"
    r"|(?<![\w_])_(?P<italic>[^\s_](?:[^_\n]*[^\s_])?)_(?![\w_])"
    r"|(?<![\w~])~(?P<strike>[^\s~](?:[^~\n]*[^\s~])?)~(?![\w~])"
)


def units(text: str) -> int:
    """Length as Telegram counts positions: UTF-16 code units."""
    return len(text) + sum(char > "\uffff" for char in text)


def markup(text: str) -> tuple[str, list[Json]]:
    """The text without its marks, and the entities they stand for."""
    out: list[str] = []
    entities: list[Json] = []
    _read(text, out, entities, 0)
    return "".join(out), sorted(entities, key=lambda entity: (entity["offset"], -entity["length"]))


def _read(text: str, out: list[str], entities: list[Json], at: int) -> int:
    """Append `text`, which begins at position `at`; returns where it ends. No deeper than the three styles."""
    begin = 0
    for match in _MARKS.finditer(text):
        at = _append(text[begin : match.start()], out, at)
        begin = match.end()
        name = match.lastgroup or ""
        start = at
        if name in _STYLES:
            style: Json = {"type": _STYLES[name], "offset": start}
            entities.append(style)  # before what is inside it
            at = _read(match[name], out, entities, at)
            style["length"] = at - start
        elif name == "url":
            at = _append(match["words"], out, at)
            entities.append({"type": "text_link", "offset": start, "length": at - start, "url": match["url"]})
        else:
            at = _append(match[name].strip("\n") if name == "pre" else match[name], out, at)
            if at > start:
                entities.append({"type": name, "offset": start, "length": at - start})
    return _append(text[begin:], out, at)


def _append(text: str, out: list[str], at: int) -> int:
    out.append(text)
    return at + units(text)
