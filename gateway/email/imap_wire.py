"""The IMAP library's protocol and client with their gaps closed: nothing dropped, nothing held without a limit.

Closed here: EXISTS dropped during other commands, BYE inside IDLE, recursion over long answers, literals without a limit,
a refused XOAUTH2, what comes in the clear behind STARTTLS. It knows no folders and no mails.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
import ssl
from typing import Any

from aioimaplib.aioimaplib import (
    IMAP4,
    Command,
    FetchCommand,
    IMAP4ClientProtocol,
    IncompleteRead,
    literal_data_re,
)

from gateway.email.imap_words import FETCHED
from gateway.media.guard import Guard

# At debug it prints all that goes over the wire.
logging.getLogger("aioimaplib").setLevel(logging.WARNING)

MOST_LITERAL = 96 << 20
"""Bytes: no server has a reason to send a bigger piece, and it would all be held in memory."""

_PUSH = re.compile(rb"\* (\d+) (EXISTS|RECENT|EXPUNGE)\b", re.I)


class Fetch(FetchCommand):  # type: ignore[misc]
    """The library's, without looking at every earlier line for each new one: thousands of lines would block the loop."""

    _open = 0

    def append_to_resp(self, line: bytes | bytearray, result: str = "Pending") -> None:
        if isinstance(line, bytes) and result == "Pending":
            if FETCHED.match(line):
                self._open = 0
            self._open += line.count(b"(") - line.count(b")")
        super().append_to_resp(line, result)

    def wait_data(self) -> bool:
        return self._open != 0 or self.wait_literal_data()


class Protocol(IMAP4ClientProtocol):  # type: ignore[misc]
    """The library's protocol, with everything recorded that it drops."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lost: asyncio.Future[str]) -> None:
        super().__init__(loop, conn_lost_cb=lambda error: self._end(repr(error) if error else "closed"))
        self.lost = lost
        self.pushed = asyncio.Event()
        """Something may be new: EXISTS came, whatever was going on."""
        self.refused_token = ""
        self.plain_tail = False
        self.untrusted = False

    def _end(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)

    def expect_tls(self) -> None:
        """From now on nothing may come in after the answer to STARTTLS: what was sent in the clear is nobody's word."""
        self.untrusted = True

    def data_received(self, data: bytes) -> None:
        if self.untrusted:
            self.plain_tail = self.plain_tail or not data.endswith(b"\r\n") or data.count(b"\r\n") != 1
        try:
            super().data_received(data)
        except Exception as error:  # an answer it does not expect: nothing after it can be trusted
            self._end(f"{type(error).__name__}")
            self.abort()

    def abort(self, why: str = "given up") -> None:
        self._end(why)
        if self.transport is not None:
            self.transport.abort()

    def _handle_responses(
        self, data: bytes, line_handler: Any, current_cmd: Command | None = None
    ) -> None:  # a loop where the library calls itself once a line
        while True:
            if not data:
                if self.pending_sync_command is not None:
                    self.pending_sync_command.flush()
                if current_cmd is not None and current_cmd.wait_data():
                    raise IncompleteRead(current_cmd)
                return
            if current_cmd is not None and current_cmd.wait_literal_data():
                data = current_cmd.append_literal_data(data)
                if current_cmd.wait_literal_data():
                    raise IncompleteRead(current_cmd)
            line, separator, tail = data.partition(b"\r\n")
            if not separator:
                raise IncompleteRead(current_cmd, data)
            command = line_handler(line, current_cmd)
            literal = literal_data_re.match(line)
            if literal:
                size = int(literal.group("size"))
                if size > MOST_LITERAL:
                    raise ValueError("a literal over the limit")
                if command is None:
                    command = Command("NIL", "unused")
                command.begin_literal_data(size)
                current_cmd = command
            elif command is not None and command.wait_data():
                current_cmd = command
            else:
                current_cmd = None
            data = tail

    async def welcome(self, command: bytes) -> None:
        try:
            await super().welcome(command)
        except Exception:
            self._end(command.decode("utf-8", "replace"))

    def _untagged_response(self, line: bytes) -> Any:
        if _PUSH.match(line):
            if b"EXISTS" in line.upper():
                self.pushed.set()
            if not self.has_pending_idle_command() and self.pending_sync_command is None:
                return None
        if line.upper().startswith(b"* BYE") and (
            self.pending_sync_command is None or self.pending_sync_command.name != "LOGOUT"
        ):
            self._end(line[2:].decode("utf-8", "replace"))
        return super()._untagged_response(line)

    def _continuation(self, line: bytes) -> None:
        pending = self.pending_sync_command
        if pending is not None and pending.name == "AUTHENTICATE":
            # Why the token is refused; the server waits for an empty line before it says NO.
            with contextlib.suppress(Exception):
                self.refused_token = base64.b64decode(line[1:].strip()).decode("utf-8", "replace")
            self.transport.write(b"\r\n")
            return
        super()._continuation(line)


class Client(IMAP4):  # type: ignore[misc]
    """The library's client around our protocol."""

    def __init__(
        self, protocol: Protocol, host: str, port: int, tls: ssl.SSLContext | None, guard: Guard
    ) -> None:
        self._ours, self._guard = protocol, guard
        super().__init__(host, port, ssl_context=tls, timeout=None)

    def create_client(
        self, host: str, port: int, loop: Any, conn_lost_cb: Any = None, ssl_context: Any = None
    ) -> None:
        self.protocol = self._ours
        self._client_task = asyncio.get_running_loop().create_task(self._dial(host, port, ssl_context))

    async def _dial(self, host: str, port: int, tls: ssl.SSLContext | None) -> Any:
        sock = await self._guard.connect(host, port)
        return await asyncio.get_running_loop().create_connection(
            lambda: self._ours, sock=sock, ssl=tls, server_hostname=host if tls else None
        )
