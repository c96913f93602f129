"""WhatsApp's binary-XML token tables, read at run time out of the installed client library.

Nothing is copied into the project: a library whose tables cannot be found makes this fail loudly, which is
what should happen after an update. The tables are Go string slices: pairs of (pointer, length), whose pointers
are R_X86_64_RELATIVE relocations of the shared object.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_SINGLE_SIZE = 236
_DOUBLE_SIZE = 256
_DOUBLE_COUNT = 4
_R_X86_64_RELATIVE = 8
_SHT_NOBITS = 8
_STRING_HEADER = 16  # pointer and length
_SLICE_HEADER = 24  # pointer, length and capacity


class TokensNotFound(RuntimeError):
    """The installed library does not hold the tables where this version of the sandbox looks for them."""


@dataclass(frozen=True)
class Tokens:
    single: tuple[str, ...]
    double: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Section:
    kind: int
    address: int
    offset: int
    size: int


class _Library:
    """The parts of an ELF file that are needed to follow pointers which the loader would fill in."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        if self.data[:5] != b"\x7fELF\x02":
            raise TokensNotFound(f"{path.name} is not a 64-bit ELF library")
        (table,) = struct.unpack_from("<Q", self.data, 40)
        size, count, names_index = struct.unpack_from("<HHH", self.data, 58)
        raw = [struct.unpack_from("<IIQQQQ", self.data, table + i * size) for i in range(count)]
        names_at = raw[names_index][4]
        self.sections: dict[str, _Section] = {}
        for name, kind, _flags, address, offset, length in raw:
            start = names_at + name
            label = self.data[start : self.data.index(b"\0", start)].decode()
            self.sections[label] = _Section(kind, address, offset, length)
        self._loaded = [s for s in self.sections.values() if s.address and s.kind != _SHT_NOBITS]
        self.pointers: dict[int, int] = {}
        self.users: dict[int, list[int]] = {}
        relocations = self.sections[".rela.dyn"]
        block = self.data[relocations.offset : relocations.offset + relocations.size]
        for at, info, target in struct.iter_unpack("<QQq", block):
            if info & 0xFFFFFFFF == _R_X86_64_RELATIVE:
                self.pointers[at] = target
                self.users.setdefault(target, []).append(at)

    def offset(self, address: int) -> int:
        for section in self._loaded:
            if section.address <= address < section.address + section.size:
                return section.offset + address - section.address
        raise KeyError(address)

    def _string(self, at: int) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.offset(at + 8))
        if length == 0:
            return ""
        start = self.offset(self.pointers[at])
        return self.data[start : start + length].decode()

    def strings(self, at: int, count: int) -> tuple[str, ...] | None:
        """The array of `count` Go strings at this address, or None when there is none."""
        try:
            return tuple(self._string(at + _STRING_HEADER * i) for i in range(count))
        except (KeyError, UnicodeDecodeError, struct.error):
            return None

    def headers_of(self, word: str) -> Iterator[int]:
        """Addresses of string headers that point at exactly this word."""
        needle = word.encode()
        text = self.sections[".rodata"]
        end = text.offset + text.size
        found = self.data.find(needle, text.offset, end)
        while found >= 0:
            for at in self.users.get(text.address + found - text.offset, ()):
                (length,) = struct.unpack_from("<Q", self.data, self.offset(at + 8))
                if length == len(needle):
                    yield at
            found = self.data.find(needle, found + 1, end)


def library_path() -> Path:
    """The shared object that pip installed with neonize."""
    spec = importlib.util.find_spec("neonize")
    if spec is None or spec.origin is None:
        raise TokensNotFound("neonize is not installed: install the project's dependencies")
    found = sorted(Path(spec.origin).parent.glob("neonize-linux-*.so"))
    if not found:
        raise TokensNotFound("the installed neonize wheel carries no library for this platform")
    return found[0]


@lru_cache(maxsize=1)
def load() -> Tokens:
    """Read both tables (about 0.15 s the first time)."""
    library = _Library(library_path())
    single = next(
        (
            table
            for at in library.headers_of("xmlstreamstart")
            if (table := library.strings(at - _STRING_HEADER, _SINGLE_SIZE)) and table[3] == "s.whatsapp.net"
        ),
        None,
    )
    # The double-byte tables hang on one slice of slices, found through the first word of its first table.
    double: tuple[tuple[str, ...], ...] = ()
    for first in library.headers_of("read-self"):
        for header in library.users.get(first, ()):
            sizes = struct.unpack_from("<QQ", library.data, library.offset(header + 8))
            if sizes != (_DOUBLE_SIZE, _DOUBLE_SIZE):
                continue
            tables = [
                library.strings(library.pointers.get(header + _SLICE_HEADER * i, 0), _DOUBLE_SIZE)
                for i in range(_DOUBLE_COUNT)
            ]
            double = tuple(table for table in tables if table is not None)
    if single is None or len(double) != _DOUBLE_COUNT:
        raise TokensNotFound(
            "the installed neonize library does not hold the token tables where they were in 0.5.2: "
            "install the pinned version"
        )
    return Tokens(single, double)
