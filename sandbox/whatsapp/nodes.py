"""WhatsApp's binary XML: JIDs, nodes, and their wire form.

Pure functions over bytes; nothing here knows a connection.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from sandbox.whatsapp import tokens

PHONE_SERVER = "s.whatsapp.net"
LID_SERVER = "lid"
GROUP_SERVER = "g.us"

_DOMAINS = {PHONE_SERVER: 0, LID_SERVER: 1, "hosted": 128, "hosted.lid": 129}
_SERVERS = {number: server for server, number in _DOMAINS.items()}

_LIST_EMPTY, _LIST_8, _LIST_16 = 0, 248, 249
_BINARY_8, _BINARY_20, _BINARY_32 = 252, 253, 254
_DICTIONARY_0 = 236
_AD_JID, _JID_PAIR, _HEX_8, _NIBBLE_8 = 247, 250, 251, 255


@dataclass(frozen=True)
class JID:
    """An address. Device 0 is the phone itself; an empty user is the server."""

    user: str
    server: str = PHONE_SERVER
    device: int = 0

    def __str__(self) -> str:
        if not self.user:
            return self.server
        suffix = f":{self.device}" if self.device else ""
        return f"{self.user}{suffix}@{self.server}"

    @property
    def bare(self) -> JID:
        return JID(self.user, self.server)

    def of_device(self, device: int) -> JID:
        return JID(self.user, self.server, device)

    @classmethod
    def parse(cls, text: str) -> JID:
        user, _, server = text.rpartition("@")
        user, _, device = user.partition(":")
        return cls(user, server, int(device or 0))


SERVER = JID("")

Attribute: TypeAlias = str | int | JID | None
Content: TypeAlias = "str | bytes | list[Node] | None"


@dataclass
class Node:
    tag: str
    attrs: dict[str, Any] = field(default_factory=dict)  # values: see Attribute
    content: Content = None

    @property
    def children(self) -> list[Node]:
        return self.content if isinstance(self.content, list) else []

    @property
    def data(self) -> bytes:
        """The content as bytes; empty when the node holds none."""
        if isinstance(self.content, bytes):
            return self.content
        return self.content.encode() if isinstance(self.content, str) else b""

    def find(self, *path: str) -> Node | None:
        node: Node | None = self
        for tag in path:
            node = next((child for child in node.children if child.tag == tag), None) if node else None
        return node

    def get(self, *path: str) -> Node:
        """Like `find`, but the node must be there."""
        node = self.find(*path)
        if node is None:
            raise ValueError(f"<{self.tag}> has no <{'/'.join(path)}>")
        return node

    def text(self, name: str, default: str = "") -> str:
        value = self.attrs.get(name)
        return default if value is None else str(value)

    def number(self, name: str, default: int = 0) -> int:
        value = self.attrs.get(name)
        return default if value is None else int(str(value))

    def jid(self, name: str) -> JID | None:
        value = self.attrs.get(name)
        return value if isinstance(value, JID) else None

    def __str__(self) -> str:
        attrs = "".join(f' {name}="{value}"' for name, value in self.attrs.items() if value is not None)
        if isinstance(self.content, list):
            body = "".join(map(str, self.content))
        elif isinstance(self.content, bytes):
            body = f"[{len(self.content)} bytes]"
        else:
            body = self.content or ""
        return f"<{self.tag}{attrs}>{body}</{self.tag}>"


@lru_cache(maxsize=1)
def _token_bytes() -> Mapping[str, bytes]:
    table = tokens.load()
    codes = {
        word: bytes([_DICTIONARY_0 + number, index])
        for number, words in enumerate(table.double)
        for index, word in enumerate(words)
    }
    codes.update({word: bytes([index]) for index, word in enumerate(table.single) if word})
    return codes


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._tokens = tokens.load()

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise ValueError("node ends too early")
        return self._data[self._at - count : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _list_size(self, tag: int) -> int:
        if tag == _LIST_EMPTY:
            return 0
        if tag == _LIST_8:
            return self._number(1)
        if tag == _LIST_16:
            return self._number(2)
        raise ValueError(f"expected a list, found {tag}")

    def _packed(self, alphabet: str) -> str:
        head = self._number(1)
        digits = "".join(alphabet[b >> 4] + alphabet[b & 15] for b in self._take(head & 127))
        return digits[:-1] if head >> 7 else digits

    def _binary(self, tag: int) -> bytes:
        if tag == _BINARY_8:
            return self._take(self._number(1))
        if tag == _BINARY_20:
            return self._take(self._number(3) & 0xFFFFF)
        return self._take(self._number(4))

    def _scalar(self, tag: int) -> str | JID | None:
        if tag == _LIST_EMPTY:
            return None
        if _BINARY_8 <= tag <= _BINARY_32:
            return self._binary(tag).decode()
        if _DICTIONARY_0 <= tag < _DICTIONARY_0 + 4:
            return self._tokens.double[tag - _DICTIONARY_0][self._number(1)]
        if tag == _JID_PAIR:
            user = self._scalar(self._number(1))
            return JID(str(user) if user else "", str(self._scalar(self._number(1))))
        if tag == _AD_JID:
            domain, device = self._number(1), self._number(1)
            return JID(str(self._scalar(self._number(1))), _SERVERS.get(domain, PHONE_SERVER), device)
        if tag == _HEX_8:
            return self._packed("0123456789ABCDEF")
        if tag == _NIBBLE_8:
            return self._packed("0123456789-.\0\0\0\0")
        return self._tokens.single[tag]

    def _content(self) -> Content:
        tag = self._number(1)
        if tag in (_LIST_8, _LIST_16):
            return [self.node() for _ in range(self._list_size(tag))]
        if _BINARY_8 <= tag <= _BINARY_32:
            return self._binary(tag)
        value = self._scalar(tag)
        return None if value is None else str(value)

    def node(self) -> Node:
        size = self._list_size(self._number(1))
        tag = str(self._scalar(self._number(1)))
        attrs: dict[str, Attribute] = {}
        for _ in range((size - 1) // 2):
            name = str(self._scalar(self._number(1)))
            attrs[name] = self._scalar(self._number(1))
        return Node(tag, attrs, self._content() if size % 2 == 0 else None)


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray([0])  # the flag byte of an uncompressed frame
        self._tokens = _token_bytes()

    def _binary(self, data: bytes) -> None:
        size = len(data)
        if size < 1 << 8:
            self.out += bytes([_BINARY_8, size])
        elif size < 1 << 20:
            self.out += bytes([_BINARY_20]) + size.to_bytes(3, "big")
        else:
            self.out += bytes([_BINARY_32]) + size.to_bytes(4, "big")
        self.out += data

    def _string(self, text: str) -> None:
        token = self._tokens.get(text)
        if token is None:
            self._binary(text.encode())
        else:
            self.out += token

    def _list(self, size: int) -> None:
        if size == 0:
            self.out.append(_LIST_EMPTY)
        elif size < 256:
            self.out += bytes([_LIST_8, size])
        else:
            self.out += bytes([_LIST_16]) + size.to_bytes(2, "big")

    def _jid(self, jid: JID) -> None:
        if jid.device and jid.server in _DOMAINS:
            self.out += bytes([_AD_JID, _DOMAINS[jid.server], jid.device])
            self._string(jid.user)
            return
        self.out.append(_JID_PAIR)
        if jid.user:
            self._string(jid.user)
        else:
            self.out.append(_LIST_EMPTY)
        self._string(jid.server)

    def node(self, node: Node) -> None:
        attrs = {name: value for name, value in node.attrs.items() if value is not None and value != ""}
        self._list(1 + 2 * len(attrs) + (node.content is not None))
        self._string(node.tag)
        for name, value in attrs.items():
            self._string(name)
            if isinstance(value, JID):
                self._jid(value)
            else:
                self._string(str(value))
        if isinstance(node.content, list):
            self._list(len(node.content))
            for child in node.content:
                self.node(child)
        elif isinstance(node.content, bytes):
            self._binary(node.content)
        elif node.content is not None:
            self._string(node.content)


def decode(frame: bytes) -> Node:
    """Read one decrypted frame, whose first byte says whether the rest is compressed."""
    body = zlib.decompress(frame[1:]) if frame[0] & 2 else frame[1:]
    return _Reader(body).node()


def encode(node: Node) -> bytes:
    writer = _Writer()
    writer.node(node)
    return bytes(writer.out)
