"""A file on its way to WhatsApp's media server, inside the child: read, a small picture made of it, its length found out.

Blocking and memory-hungry by nature, so it runs in the child's threads and never in the gateway. Everything but the upload
itself is a courtesy: what cannot be made of a file is left out.
"""

from __future__ import annotations

import contextlib
import io
import struct
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

MAX_PIXELS = 30_000_000
"""A picture of more is sent without a preview."""
PREVIEW = 100
"""Pixels on the longer side: what is seen blurred until the picture is there."""
STICKER = 512


class BadSticker(ValueError):
    """The picture cannot be made into a sticker. Its text begins as `sending.refusal` expects of what is never taken."""

    def __init__(self, why: str) -> None:
        super().__init__(f"invalid message: {why}")


def prepare(wanted: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes to upload, and what was found out about them, named as in WhatsApp's protobuf JSON.

    `wanted`: path, preview, sticker, duration. Raises OSError and BadSticker.
    """
    data = Path(wanted["path"]).read_bytes()
    found: dict[str, Any] = {}
    if wanted.get("sticker"):
        data, moves = sticker(data)
        found |= {"isAnimated": moves, "width": STICKER, "height": STICKER}
    if wanted.get("preview") and (small := preview(data)):
        found["JPEGThumbnail"] = b64encode(small).decode()
    if wanted.get("duration"):
        if (length := seconds(data)) is not None:
            found["seconds"] = length
        if (size := dimensions(data)) is not None:
            found["width"], found["height"] = size
    return data, found


def placed(response: Any) -> dict[str, Any]:
    """Where the file is now and how it is read, from neonize's answer."""
    return {
        "URL": response.url,
        "directPath": response.DirectPath,
        "mediaKey": b64encode(response.MediaKey).decode(),
        "fileEncSHA256": b64encode(response.FileEncSHA256).decode(),
        "fileSHA256": b64encode(response.FileSHA256).decode(),
        "fileLength": str(response.FileLength),
        "mediaKeyTimestamp": str(int(time.time())),
    }


def preview(data: bytes) -> bytes | None:
    """A JPEG of some kilobytes at most."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            return None
        picture.draft("RGB", (PREVIEW * 2, PREVIEW * 2))  # a JPEG need not be unpacked whole
        picture.thumbnail((PREVIEW, PREVIEW))
        out = io.BytesIO()
        _on_white(picture).save(out, "JPEG", quality=50)
        return out.getvalue()
    return None


def sticker(data: bytes) -> tuple[bytes, bool]:
    """The WebP of 512 × 512 pixels that phones show, and whether it moves. A WebP stays as it is. Raises BadSticker."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.format == "WEBP":
                return data, bool(getattr(picture, "is_animated", False))
            if picture.width * picture.height > MAX_PIXELS:
                raise BadSticker("the picture has too many pixels for a sticker")
            picture.thumbnail((STICKER, STICKER))
            square = Image.new("RGBA", (STICKER, STICKER))
            corner = ((STICKER - picture.width) // 2, (STICKER - picture.height) // 2)
            square.paste(picture.convert("RGBA"), corner)
            out = io.BytesIO()
            square.save(out, "WEBP", quality=85)
            return out.getvalue(), False
    except BadSticker:
        raise
    except Exception as error:
        raise BadSticker(f"the picture cannot be read ({type(error).__name__})") from None


_FORMATS = ("JPEG", "PNG", "WEBP")


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "L"):
        return picture
    with_alpha = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return white


def seconds(data: bytes) -> int | None:
    """How long Ogg or MP4 plays, rounded up; None for anything else."""
    with contextlib.suppress(struct.error, ValueError, IndexError, ZeroDivisionError):
        if data.startswith(b"OggS"):
            return _ogg(data)
        if data[4:8] == b"ftyp":
            return _mp4(data)
    return None


def dimensions(data: bytes) -> tuple[int, int] | None:
    """Width and height of an MP4's picture."""
    with contextlib.suppress(struct.error, ValueError, IndexError):
        if data[4:8] == b"ftyp":
            for track in _boxes(data, b"moov", b"trak", b"tkhd"):
                width, height = struct.unpack(">II", track[-8:])
                if width and height:
                    return width >> 16, height >> 16
    return None


def _ogg(data: bytes) -> int | None:
    """The last page says how many samples came up to its end (RFC 3533); Opus always counts 48,000 a second (RFC 7845)."""
    head = data[:512]
    opus = head.find(b"OpusHead")
    if opus >= 0:
        skipped, rate = struct.unpack_from("<H", head, opus + 10)[0], 48_000
    else:
        vorbis = head.index(b"\x01vorbis")
        skipped, rate = 0, struct.unpack_from("<I", head, vorbis + 12)[0]
    last = data.rindex(b"OggS")
    samples = struct.unpack_from("<q", data, last + 6)[0] - skipped
    return _whole(samples / rate) if samples > 0 else None


def _mp4(data: bytes) -> int | None:
    for header in _boxes(data, b"moov", b"mvhd"):
        if header[0] == 1:
            scale, length = struct.unpack_from(">IQ", header, 20)
        else:
            scale, length = struct.unpack_from(">II", header, 12)
        return _whole(length / scale) if length else None
    return None


def _boxes(data: bytes, *path: bytes) -> Iterator[memoryview]:
    """The contents of every box at this path."""

    def within(part: memoryview, names: tuple[bytes, ...]) -> Iterator[memoryview]:
        at = 0
        while at + 8 <= len(part):
            size, name = struct.unpack_from(">I4s", part, at)
            start = 8
            if size == 1:
                size, start = struct.unpack_from(">Q", part, at + 8)[0], 16
            elif size == 0:
                size = len(part) - at
            if size < start:
                return
            if name == names[0]:
                inside = part[at + start : at + size]
                if len(names) == 1:
                    yield inside
                else:
                    yield from within(inside, names[1:])
            at += size

    yield from within(memoryview(data), path)


def _whole(value: float) -> int:
    return min(86_400, max(1, round(value)))
