"""The words of a mail: text from HTML, and the reply without what it quotes. Pure, and slow on hostile input.

Runs in the worker process alone, under its time limits (`limited`); whoever is cut off gets the plain way.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from contextlib import suppress
from html import unescape
from typing import Any

from inscriptis import get_text
from lxml import etree, html
from mailparser_reply import EmailReplyParser

MOST_CHARS = 200_000
"""Of a text that is looked through for quotes; what is longer is cut there first."""
LANGUAGES = ["en", "de", "fr", "es", "it", "nl", "da", "pl", "sv", "cs", "zh", "ko", "ja"]
REPLY_SECONDS = 1.0
HTML_SECONDS = 1.5

_TAG = re.compile(r"<[^<>]{0,2000}>")
_HIDDEN = re.compile(r"<(script|style|head)\b[^>]{0,1000}>.{0,100000}?</\1\s*>", re.I | re.S)
_BLANKS = re.compile(r"\n{3,}")
_FORWARD = re.compile(r"\s*(fwd?|wg|tr|rv|i|vs|doorst|enc|pd)\s*:", re.I)
_QUOTED = (
    "//blockquote[@type='cite']",
    "//*[contains(concat(' ', normalize-space(@class), ' '), ' gmail_quote ')]",
    "//*[contains(concat(' ', normalize-space(@class), ' '), ' gmail_extra ')]",
    "//*[contains(concat(' ', normalize-space(@class), ' '), ' yahoo_quoted ')]",
    "//*[contains(concat(' ', normalize-space(@class), ' '), ' moz-cite-prefix ')]",
    "//*[@id='divRplyFwdMsg' or @id='appendonsend']/following-sibling::*",
    "//*[@id='divRplyFwdMsg' or @id='appendonsend' or @id='OLK_SRC_BODY_SECTION']",
)


class TooSlow(Exception):
    pass


def limited(seconds: float, work: Callable[[], str], otherwise: Callable[[], str]) -> str:
    """`work()`, or `otherwise()` when it fails or takes longer. Main thread only: the limit is a timer signal, which also
    ends a regular expression that runs away."""

    def slow(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, slow)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    except (Exception, RecursionError):
        signal.setitimer(signal.ITIMER_REAL, 0)
        return otherwise()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def from_html(source: str) -> tuple[str, str]:
    """All of its text, and the text without what it quotes."""
    full = limited(HTML_SECONDS, lambda: _rendered(_tree(source)), lambda: _stripped(source))
    if not full.strip():
        full = limited(HTML_SECONDS, lambda: _stripped(source), lambda: source)
    own = limited(HTML_SECONDS, lambda: _rendered(_unquoted(_tree(source))), lambda: full)
    return tidy(full), tidy(own) or tidy(full)


def _tree(source: str) -> Any:
    parser = html.HTMLParser(huge_tree=True, remove_comments=True, encoding="utf-8")
    return html.document_fromstring(source.encode("utf-8", "replace") or b"<p></p>", parser=parser)


def _unquoted(tree: Any) -> Any:
    for path in _QUOTED:
        for element in tree.xpath(path):
            with suppress(AttributeError):
                element.drop_tree()
    return tree


def _rendered(tree: Any) -> str:
    etree.strip_elements(tree, "script", "style", "head", "title", with_tail=False)
    return str(get_text(etree.tostring(tree, encoding="unicode", method="html")))


def _stripped(source: str) -> str:
    """The plain way, for what no parser takes."""
    return unescape(_TAG.sub(" ", _HIDDEN.sub(" ", source)))


def tidy(text: str) -> str:
    """Line ends as everywhere, no lines of blanks, at most one empty line."""
    lines = (line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return _BLANKS.sub("\n\n", "\n".join(lines)).strip().replace("\0", "")


def flowed(text: str, *, delsp: bool) -> str:
    """Lines that a `format=flowed` mail (RFC 3676) broke, made whole."""
    out: list[str] = []
    joining = False
    for line in text.replace("\r\n", "\n").split("\n"):
        body = line[1:] if line.startswith(" ") and not line.startswith(" >") else line
        if joining and not body.startswith(">") and body != "-- ":
            out[-1] += body
        else:
            out.append(body)
        joining = body.endswith(" ") and body != "-- " and not body.startswith(">")
        if joining and delsp:
            out[-1] = out[-1][:-1]
    return "\n".join(out)


def reply_of(text: str, subject: str) -> str:
    """What was written anew: no quoted mail below or above, no signature after `-- `. A forwarded mail stays whole."""
    whole = tidy(text[:MOST_CHARS])
    if _FORWARD.match(subject):
        return whole
    reply = limited(REPLY_SECONDS, lambda: _reply(whole), lambda: whole)
    return reply or whole


def _reply(text: str) -> str:
    found = EmailReplyParser(languages=list(LANGUAGES)).read(text).replies
    content = found[0].content if found else text
    lines = tidy(str(content or "")).split("\n")
    for n, line in enumerate(lines):
        if n and line.strip() == "--":
            lines = lines[:n]
            break
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith(">")):
        lines.pop()
    own = [line for line in lines if not line.lstrip().startswith(">")]
    return tidy("\n".join(own if any(line.strip() for line in own) else lines))
