"""Puts figures into a Markdown page, between two markers. Touches nothing outside them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.common import Figure

BEGIN = "<!-- figures: written by `python -m bench`, do not edit -->"
END = "<!-- end of figures -->"

Section = tuple[str, Sequence[Figure]]


def render(sections: Sequence[Section], *, date: str, machine: str, command: str) -> str:
    """The text between the markers: where it was measured, and one table a section."""
    lines = [f"Measured {date} on {machine}, with `{command}`.", ""]
    for title, figures in sections:
        lines += [f"**{title}**", "", "| what | figure | goal |", "| --- | --- | --- |"]
        lines += [f"| {_cell(f.what)} | {_cell(f.value)} | {_cell(f.goal)} |" for f in figures]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def replace(page: str, figures: str) -> str:
    """The page with `figures` between its markers. Raises ValueError when they are not there exactly once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise ValueError(f"the page must hold the lines {BEGIN!r} and {END!r} once, in this order")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{figures.strip()}\n\n{END}{tail}"
