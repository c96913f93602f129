"""The process that reads mails: a request on stdin, an answer on stdout, over and over, until stdin ends.

Started by `parser.py` alone. It has a memory limit and, for each request, an alarm that ends it: a mail can do no harm
but to this process. Frames are four bytes of length and then JSON (requests: one byte of what is wanted, then the mail).
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

import orjson

from gateway.email import parse

LENGTH = struct.Struct(">I")
PARSE, ATTACHMENT = b"P", b"A"
MEMORY = 2 << 30
PATIENCE = 30
"""Seconds after which it ends itself, whatever its parent does."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints must not get between the frames.
    os.dup2(2, 1)
    while (request := _read(incoming)) is not None:
        answer = _answer(request)
        outgoing.write(LENGTH.pack(len(answer)))
        outgoing.write(answer)
        outgoing.flush()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = stream.read(size)
    return body if len(body) == size else None


def _answer(request: bytes) -> bytes:
    """`P` and the parsed mail, `A` and an attachment's bytes, or `E` and why not."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _watchdog()
    try:
        if request[:1] == PARSE:
            # Lone surrogates (raw 8-bit headers) have no UTF-8; they are kept readable.
            return PARSE + orjson.dumps(_plain(parse.parse(request[1:])))
        (index,) = LENGTH.unpack(request[1:5])
        return ATTACHMENT + parse.attachment(request[5:], index)
    except (Exception, RecursionError) as error:
        return b"E" + f"{type(error).__name__}: {error}"[:300].encode("utf-8", "replace")


def _watchdog() -> None:
    """Kernel time this process may still use: a loop inside a C library ends with it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + PATIENCE
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _plain(value: object) -> object:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


if __name__ == "__main__":
    main()
