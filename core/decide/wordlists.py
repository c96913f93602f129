"""Reading `words/*.txt`: one line per language (or other key), entries separated by `|`. Knows nothing of their use."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "words"


def load(name: str) -> dict[str, tuple[str, ...]]:
    """One list by key; the key `*` stands for all languages. Raises ValueError for a line that is none."""
    found: dict[str, tuple[str, ...]] = {}
    for line in (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        key, colon, rest = line.partition(":")
        if not colon or key in found:
            raise ValueError(
                f"words/{name}.txt: expected `language: entry | entry` once each, got {line[:40]!r}"
            )
        found[key.strip()] = tuple(entry.strip() for entry in rest.split("|") if entry.strip())
    return found
