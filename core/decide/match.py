"""Comparing what people type with phrases: one normal form, whole-message and word-bounded matching.

Linear in the text, no regular expressions from outside, never raises on any text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from core.decide.wordlists import load

MAX_CHARS = 4000
"""More than this of one message is not looked at: intents stand at the beginning."""
MAX_WHOLE_CHARS = 200

_APOSTROPHES = dict.fromkeys(map(ord, "'’‘`´ʼ＇"), None)
_UNSPACED = (
    (0x0E00, 0x0E7F),  # Thai
    (0x3040, 0x30FF),  # Kana
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xAC00, 0xD7AF),  # Hangul: spaced, but particles cling to words
    (0x20000, 0x2FA1F),
)
_SENTENCE_ENDS = ".!?;\n\r。！？；…,，、"

EXACT_LANGUAGES = frozenset({"vi"})
"""Languages in which dropping accents makes other words: Vietnamese `dừng` (stop) and `đúng` (right)."""

FILLERS = frozenset(load("fillers")["*"])
"""Politeness that may stand around a whole-message word and changes nothing."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text in normal form: lower case, words separated by one space, padded with one at each end."""

    plain: str
    folded: str
    """The same without accents (Latin, Cyrillic, Greek, Arabic; marks that make the letter elsewhere stay)."""
    question: bool = False

    @property
    def words(self) -> list[str]:
        return self.folded.split()


@lru_cache(maxsize=4096)
def normalise(text: str) -> Text:
    """NFKC, case-folded, apostrophes dropped, punctuation, symbols and emoji turned into spaces."""
    raw = unicodedata.normalize("NFKC", text[:MAX_CHARS]).translate(_APOSTROPHES).casefold()
    question = any(mark in raw for mark in "?؟")
    plain = _spaced(unicodedata.normalize("NFC", raw))
    folded = _spaced(_without_accents(raw))
    return Text(plain, folded, question)


def _spaced(text: str) -> str:
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if category[0] in "LN" or (category in ("Mn", "Mc") and not 0xFE00 <= ord(char) <= 0xFE0F):
            kept.append(char)
        elif category != "Cf":  # joiners and direction marks vanish, all else separates
            kept.append(" ")
    return " " + " ".join("".join(kept).split()) + " "


def _without_accents(text: str) -> str:
    out: list[str] = []
    foldable = False
    for char in unicodedata.normalize("NFD", text):
        code = ord(char)
        if unicodedata.category(char) == "Mn":
            if not foldable:
                out.append(char)
            continue
        # Latin, Greek, Cyrillic and Arabic: an accent there is often left out by who types in a hurry.
        foldable = code < 0x0530 or 0x0600 <= code < 0x0700 or 0x1E00 <= code < 0x2000
        if code != 0x0640:  # the Arabic stretching dash
            out.append({"ı": "i", "ى": "ي", "ة": "ه", "ё": "е", "ø": "o", "ł": "l"}.get(char, char))
    return unicodedata.normalize("NFC", "".join(out))


def unspaced(text: str) -> bool:
    """Whether the text is in a script that does not separate words."""
    return any(low <= ord(char) <= high for char in text for low, high in _UNSPACED)


class Phrases:
    """A set of phrases in many languages. `word*` matches every word that begins so."""

    __slots__ = ("_compact", "_folded", "_plain", "_whole")

    def __init__(self, by_language: Mapping[str, Iterable[str]] | Iterable[str]) -> None:
        groups = by_language.items() if isinstance(by_language, Mapping) else [("", by_language)]
        self._plain: list[str] = []
        self._folded: list[str] = []
        self._compact: list[str] = []
        self._whole: set[str] = set()
        for language, phrases in groups:
            for phrase in phrases:
                self._add(phrase, exact=language in EXACT_LANGUAGES)

    def _add(self, phrase: str, *, exact: bool) -> None:
        form = normalise(phrase.rstrip("*"))
        prefix = phrase.endswith("*")
        if not form.plain.strip():
            return
        text = form.plain if exact else form.folded
        if unspaced(text):
            self._compact.append(text.replace(" ", ""))
            self._whole.add(text.replace(" ", ""))
            return
        self._whole.add(text.strip())
        (self._plain if exact else self._folded).append(text.rstrip() if prefix else text)

    def within(self, text: Text) -> bool:
        """Whether one of the phrases stands in the text, at word borders."""
        if any(phrase in text.folded for phrase in self._folded):
            return True
        if any(phrase in text.plain for phrase in self._plain):
            return True
        if self._compact:
            compact = text.folded.replace(" ", "")
            return any(phrase in compact for phrase in self._compact)
        return False

    def whole(self, message: str) -> bool:
        """Whether the message says nothing but one of the phrases: repeated, in sentences of their own, politely."""
        if not message or len(message) > MAX_WHOLE_CHARS:
            return False
        if self._is(normalise(message)):
            return True
        pieces = [normalise(piece) for piece in _sentences(message)]
        said = [piece for piece in pieces if set(piece.words) - FILLERS]
        return bool(said) and all(self._is(piece) for piece in said)

    def _is(self, text: Text) -> bool:
        return any(
            form in self._whole for source in (text.plain, text.folded) for form in _forms(source.split())
        )


def _forms(words: list[str]) -> Iterable[str]:
    """A message as it stands, without fillers around it, without repeats, and written together."""
    if not words:
        return
    yield " ".join(words)
    yield "".join(words)
    start, end = 0, len(words)
    while start < end and words[start] in FILLERS:
        start += 1
    while end > start and words[end - 1] in FILLERS:
        end -= 1
    core = words[start:end]
    if core:
        yield " ".join(core)
        yield "".join(core)
        if len(set(core)) == 1:
            yield core[0]


def _sentences(message: str) -> list[str]:
    for end in _SENTENCE_ENDS:
        message = message.replace(end, "\n")
    return [line for line in message.split("\n") if line.strip()]
