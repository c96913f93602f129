"""What a file is, and what it may be called."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from core.errors import RefusedError
from gateway.media.sniff import fits, identify, inspect, measure, normal, safe_filename
from tests.support.media import picture


def box(brand: bytes) -> bytes:
    return bytes.fromhex("0000001866747970") + brand + bytes(4) + brand + b"isom" + bytes(200)


def archive(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            file.writestr(name, "<x/>")
    return out.getvalue()


DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
OFFICE = archive("[Content_Types].xml", "xl/workbook.xml")
OPUS = b"OggS\0\2" + bytes(22) + b"\1\x13OpusHead" + bytes(50)


@pytest.mark.parametrize(
    ("body", "declared", "filename", "expected"),
    [
        (picture("PNG"), None, None, "image/png"),
        (picture("JPEG"), "image/png", None, "image/jpeg"),
        (picture("WEBP"), "application/octet-stream", None, "image/webp"),
        (picture("GIF"), "text/html", None, "image/gif"),
        (picture("BMP"), None, None, "image/bmp"),
        (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + bytes(50), "image/jpeg", None, "application/pdf"),
        (box(b"mp42"), None, None, "video/mp4"),
        (box(b"mp42"), "audio/mp4", None, "audio/mp4"),
        (box(b"M4A "), None, None, "audio/mp4"),
        (OPUS, "audio/ogg; codecs=opus", None, "audio/ogg"),
        (OPUS, None, None, "audio/ogg"),
        (b"ID3\3" + bytes(60), "audio/mp3", None, "audio/mpeg"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), None, None, "audio/wav"),
        (OFFICE, XLSX, None, XLSX),
        (OFFICE, DOCX, None, DOCX),
        (OFFICE, None, "sheet.xlsx", XLSX),
        (archive("a.txt"), None, None, "application/zip"),
        (archive("a.txt"), "image/png", None, "application/zip"),
        (b"MZ" + bytes(200), "image/png", None, "application/octet-stream"),
        (b"\0\1\2\3 nothing known", "image/png", None, "application/octet-stream"),
        (b"\0\1\2\3 nothing known", "audio/x-strange", None, "audio/x-strange"),
        (b"hello", "image/jpeg", None, "text/plain"),
        (b"BM and MZ begin this text", None, None, "text/plain"),
        (b"a,b\n1,2\n", "text/csv; charset=utf-8", None, "text/csv"),
        ("naïve".encode()[:4], None, "notes.md", "text/markdown"),
        (b"<html><body>", "image/png", None, "text/html"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "image/png", None, "image/svg+xml"),
        (b'{"a":1}', "application/json", None, "application/json"),
        (b"BEGIN:VCARD\nVERSION:3.0\nEND:VCARD", None, None, "text/vcard"),
        (b"", None, None, "application/octet-stream"),
    ],
)
def test_the_bytes_decide_and_the_declared_type_fills_in(
    body: bytes, declared: str | None, filename: str | None, expected: str
) -> None:
    assert identify(body[:16384], body[-4096:], declared=declared, filename=filename) == expected


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_are_measured(tmp_path: Path, form: str) -> None:
    path = tmp_path / "p"
    path.write_bytes(body := picture(form, 31, 17))
    kind = inspect(path, body, body)
    assert (kind.width, kind.height) == (31, 17)


def test_what_is_no_picture_or_a_broken_one_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(picture()[:20])
    assert measure(path, "image/png") == (None, None)
    assert measure(path, "video/mp4") == (None, None)


def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    path = tmp_path / "bomb"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(RefusedError) as error:
        measure(path, "image/png")
    assert error.value.code == "media_too_large"


@pytest.mark.parametrize(
    ("name", "mime_type", "expected"),
    [
        ("report.pdf", "application/pdf", "report.pdf"),
        ("../../etc/passwd", "text/plain", "passwd.txt"),
        ("C:\\Users\\me\\bill.pdf", "application/pdf", "bill.pdf"),
        ("a\r\nSet-Cookie: x\0.png", "image/png", "aSet-Cookie x.png"),
        ("evil\u202egnp.exe", "image/png", "evilgnp.exe"),
        ("...", "image/png", "file.png"),
        (None, "image/png", "file.png"),
        ("", "application/x-unheard-of", "file"),
        (".htaccess", "text/plain", "htaccess.txt"),
        ("résumé.pdf", "application/pdf", "résumé.pdf"),
        ("x" * 500 + ".jpeg", "image/jpeg", "x" * 115 + ".jpeg"),
    ],
)
def test_names_are_made_safe(name: str | None, mime_type: str, expected: str) -> None:
    assert safe_filename(name, mime_type) == expected


def test_types_are_normalised_and_nonsense_is_none() -> None:
    assert normal("Audio/OGG; codecs=opus") == "audio/ogg"
    assert normal("image/jpg") == "image/jpeg"
    assert normal("text/html\r\nX: y") == normal("nonsense") == normal(None) == ""


def test_which_file_fits_which_message() -> None:
    assert fits("image", "image/png")
    assert fits("document", "application/zip")
    assert fits("audio", "audio/ogg")
    assert not fits("image", "image/svg+xml")
    assert not fits("image", "text/html")
    assert not fits("video", "audio/mp4")
    assert not fits("sticker", "image/gif")
