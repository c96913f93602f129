"""What a file is, by its bytes: type, picture size, and a name that is safe to show and to save.

The bytes win over what anybody says about them; what has no signature of its own (text, some audio) falls back to the
declared type. Blocks for some milliseconds: call it in a thread. Never decodes a picture.
"""

from __future__ import annotations

import codecs
import mimetypes
import re
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import puremagic
from PIL import Image

from core.errors import RefusedError

OCTETS = "application/octet-stream"
MAX_NAME = 120
_WEAK = 0.3
"""puremagic's confidence of a signature of three bytes."""

# A picture that unpacks to gigabytes must not get as far as a decoder: the warning is an error, here and in the tests.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_TYPES = mimetypes.MimeTypes(filenames=())
_ALIASES = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-ms-bmp": "image/bmp",
    "audio/wave": "audio/wav",
    "audio/x-wav": "audio/wav",
    "audio/mp3": "audio/mpeg",
    "audio/x-m4a": "audio/mp4",
    "audio/m4a": "audio/mp4",
    "audio/x-aac": "audio/aac",
    "video/x-matroska": "video/matroska",
    "application/x-matroska": "video/matroska",
    "text/x-vcard": "text/vcard",
    "application/x-zip-compressed": "application/zip",
}
_BY_EXTENSION = {
    ".m4a": "audio/mp4",
    ".amr": "audio/amr",
    ".3gp": "video/3gpp",
    ".ogg": "audio/ogg",
    ".oga": "audio/ogg",
    ".ogv": "video/ogg",
    ".opus": "audio/ogg",
    ".vcf": "text/vcard",
    ".webp": "image/webp",
    ".md": "text/markdown",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
}
# One container, sound or picture: the signature cannot tell, the declared type may.
_FAMILIES = (
    {"video/mp4", "audio/mp4", "video/quicktime", "video/3gpp", "audio/3gpp", "video/x-m4v", "audio/aac"},
    {"audio/ogg", "video/ogg", "application/ogg"},
    {"video/webm", "audio/webm", "video/matroska", "audio/matroska"},
)
_OGG = ((b"theora", "video/ogg"), (b"Opus", "audio/ogg"), (b"vorbis", "audio/ogg"), (b"Speex", "audio/ogg"))
_ZIP, _OLE = b"PK\x03\x04", bytes.fromhex("d0cf11e0a1b11ae1")
_TEXT_KINDS = {
    "application/json",
    "application/xml",
    "application/javascript",
    "application/rtf",
    "application/pdf",
    "application/postscript",
    "application/x-yaml",
    "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Kind:
    mime_type: str
    width: int | None = None
    height: int | None = None


def identify(head: bytes, foot: bytes, *, declared: str | None = None, filename: str | None = None) -> str:
    """The MIME type, lower-cased and without parameters."""
    said = normal(declared)
    if said in ("", OCTETS) and filename:
        said = _guess(Path(filename).suffix)
    found = _candidates(head, foot)
    if _is_text(head):
        readable = [kind for kind, _ in found if _textual(kind)]
        if said and _textual(said) and (said in readable or not readable or said.startswith("text/")):
            return said
        return readable[0] if readable else "text/plain"
    for mark, kind in _OGG:
        if head.startswith(b"OggS") and mark in head[:256]:
            return kind
    names = [kind for kind, _ in found]
    if said in names:
        return said
    if head.startswith(_ZIP):
        return "application/zip"  # every office document looks like any of them, see `names`
    if head.startswith(_OLE):
        return "application/x-ole-storage"
    for kind, confidence in found:
        if said and any(kind in family and said in family for family in _FAMILIES):
            return said
        if (
            confidence >= _WEAK
            or not said
            or said == OCTETS
            or said.partition("/")[0] == kind.partition("/")[0]
        ):
            return kind
    # Pictures and text always show what they are; other things may have no signature at all.
    return OCTETS if not said or said.startswith(("image/", "text/")) else said


def measure(path: Path, mime_type: str) -> tuple[int | None, int | None]:
    """Width and height of a picture from its header; None for anything else or a broken one.

    Raises RefusedError `media_too_large` for a picture whose decoded form would fill the memory.
    """
    if not mime_type.startswith("image/"):
        return None, None
    try:
        with Image.open(path, formats=("JPEG", "PNG", "GIF", "WEBP", "BMP")) as picture:
            return picture.size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RefusedError(
            "the picture has more pixels than can be handled safely; send it smaller, or as a document",
            code="media_too_large",
        ) from None
    except Exception:  # a broken picture has no size; what the channel makes of it is its business
        return None, None


def inspect(
    path: Path, head: bytes, foot: bytes, *, declared: str | None = None, filename: str | None = None
) -> Kind:
    kind = identify(head, foot, declared=declared, filename=filename)
    return Kind(kind, *measure(path, kind))


def normal(mime_type: str | None) -> str:
    """`Audio/OGG; codecs=opus` → `audio/ogg`; "" for what is no type."""
    base = (mime_type or "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,62}/[a-z0-9][a-z0-9!#$&^_.+-]{0,80}", base):
        return ""
    return _ALIASES.get(base, base)


def fits(message_type: str, mime_type: str) -> bool:
    """Whether a file of this type can be sent as a message of that one. Documents take everything."""
    wanted = {"image": ("image/",), "sticker": ("image/webp", "image/png", "image/jpeg"), "video": ("video/",),
              "audio": ("audio/",)}.get(message_type)  # fmt: skip
    return wanted is None or (mime_type.startswith(wanted) and mime_type != "image/svg+xml")


def safe_filename(name: str | None, mime_type: str, *, fallback: str = "file") -> str:
    """A name without folders, control characters or direction marks, at most 120 characters, with an extension."""
    text = unicodedata.normalize("NFC", (name or "").replace("\\", "/").rpartition("/")[2])
    text = "".join(c for c in text if unicodedata.category(c)[0] != "C" and c not in '<>:"|?*')
    text = re.sub(r"\s+", " ", text).strip(" .")
    stem, dot, suffix = text.rpartition(".")
    if not (dot and stem and re.fullmatch(r"\w{1,10}", suffix)):
        stem, suffix = text, _extension(mime_type)
    stem = (stem or fallback)[: MAX_NAME - len(suffix) - 1]
    return f"{stem}.{suffix}" if suffix else stem


def _candidates(head: bytes, foot: bytes) -> list[tuple[str, float]]:
    """puremagic's matches with a type, the surest first."""
    if not head:
        return []
    # It looks at the first and the last bytes of what it is given.
    try:
        matches = puremagic.magic_string(head + foot)
    except puremagic.PureError:
        return []
    found: dict[str, float] = {}
    for match in matches:
        kind = normal(match.mime_type) or _guess(match.extension)
        if kind and kind != OCTETS:
            found.setdefault(kind, match.confidence)
    return list(found.items())


def _guess(extension: str) -> str:
    extension = extension.lower()
    return normal(_BY_EXTENSION.get(extension) or _TYPES.guess_type(f"x{extension}")[0]) if extension else ""


def _extension(mime_type: str) -> str:
    ours = next((name for name, kind in _BY_EXTENSION.items() if kind == mime_type), None)
    return (ours or _TYPES.guess_extension(mime_type) or "").lstrip(".")


def _textual(kind: str) -> bool:
    return kind.startswith("text/") or kind in _TEXT_KINDS or kind.endswith(("+xml", "+json"))


def _is_text(head: bytes) -> bool:
    """UTF-8 without control characters; the last character may be cut in two."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head) and not re.search(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]", text)
