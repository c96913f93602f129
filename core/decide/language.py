"""Which language a customer writes, by script and common words: good enough to pick one of the built-in texts, and no more.

Never raises; when nothing tells, the answer is None and the caller's default counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from core.decide.match import normalise
from core.decide.wordlists import load

_SCRIPTS: tuple[tuple[int, int, str], ...] = (
    (0x0400, 0x052F, "ru"),
    (0x0600, 0x06FF, "ar"),
    (0x0900, 0x097F, "hi"),
    (0x0B80, 0x0BFF, "ta"),
    (0x0E00, 0x0E7F, "th"),
    (0x3040, 0x30FF, "ja"),
    (0x4E00, 0x9FFF, "zh"),
    (0xAC00, 0xD7AF, "ko"),
)

_WORDS = {language: frozenset(words) for language, words in load("language").items()}
_VIETNAMESE_ONLY = frozenset("ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ")
_HINTS = {"ñ": "es", "¿": "es", "¡": "es", "ß": "de", "ğ": "tr", "ş": "tr", "ı": "tr", "ã": "pt", "õ": "pt"}


def guess(texts: Iterable[str | None]) -> str | None:
    """The language of the first text that tells, the newest given first."""
    for text in texts:
        if text and (found := _guess(text)):
            return found
    return None


def _guess(text: str) -> str | None:
    sample = text[:500].casefold()
    scripts: Counter[str] = Counter()
    for char in sample:
        code = ord(char)
        if code >= 0x0400:
            scripts.update(language for low, high, language in _SCRIPTS if low <= code <= high)
    letters = sum(char.isalpha() for char in sample)
    if scripts and sum(scripts.values()) * 3 >= letters:
        if scripts["ja"]:  # Japanese is mostly Han too; kana decide
            return "ja"
        return scripts.most_common(1)[0][0]
    scores: Counter[str] = Counter()
    for word in normalise(sample).words:
        for language, words in _WORDS.items():
            if word in words:
                scores[language] += 2
    for char in sample:
        if char in _VIETNAMESE_ONLY:
            scores["vi"] += 2
        elif char in _HINTS:
            scores[_HINTS[char]] += 2
    if not scores:
        return None
    best, points = scores.most_common(1)[0]
    if len(sample.split()) > 3 and points < 4:
        return None
    return best
