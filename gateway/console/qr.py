"""A QR code as SVG that fits into a page: modules as one path, no style, no script. Pure."""

from __future__ import annotations

import io
from functools import lru_cache

import segno
from markupsafe import Markup


@lru_cache(maxsize=64)
def svg(text: str) -> Markup:
    """Black on white with the quiet zone a camera needs, whatever the page's colours are."""
    out = io.BytesIO()
    segno.make_qr(text, error="L").save(
        out,
        kind="svg",
        xmldecl=False,
        svgns=False,
        nl=False,
        border=4,
        light="#fff",
        dark="#000",
        omitsize=True,
    )
    return Markup(out.getvalue().decode())  # noqa: S704  (segno's own drawing; the text is only in its shape)
