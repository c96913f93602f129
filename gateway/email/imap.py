"""One IMAP connection: aioimaplib with its gaps closed. Every call ends: with an answer, a lost connection, or a time-out.

Closed here: STARTTLS, quoting, commands that outlive a lost connection, EXISTS dropped during other commands, BYE inside
IDLE, recursion over long answers, literals without a limit, a refused XOAUTH2. After a time-out the connection is out of
step and is thrown away. Never marks mail as read and never logs what goes over the wire.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
import ssl
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from aioimaplib import aioimaplib
from aioimaplib.aioimaplib import (
    AUTH,
    IMAP4,
    NONAUTH,
    Command,
    FetchCommand,
    IMAP4ClientProtocol,
    IncompleteRead,
    Response,
    literal_data_re,
    quoted,
)

from gateway.email.oauth import Tokens
from gateway.email.problems import Problem, refused_login, throttled, unreachable
from gateway.email.settings import Credentials, Server
from gateway.email.timings import Timings
from gateway.media.guard import Guard

T = TypeVar("T")

# At debug it prints all that goes over the wire.
logging.getLogger("aioimaplib").setLevel(logging.WARNING)

MOST_LITERAL = 96 << 20
"""Bytes: no server has a reason to send a bigger piece, and it would all be held in memory."""
AT_ONCE = 200
"""UIDs in one FETCH."""

_PUSH = re.compile(rb"\* (\d+) (EXISTS|RECENT|EXPUNGE)\b", re.I)
_FETCHED = re.compile(rb"\d+ FETCH \(", re.I)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class ImapLost(Exception):
    """The connection is gone or can no longer be trusted: connect again."""


class ImapRefused(Exception):
    """The server said NO or BAD; the text is its own."""


@dataclass(frozen=True, slots=True)
class Folder:
    name: str
    uidvalidity: int
    uidnext: int | None
    exists: int


@dataclass(frozen=True, slots=True)
class Item:
    """What a FETCH said of one mail. `body` is None when it was not asked for or the mail is gone."""

    uid: int
    size: int
    received_at: datetime | None
    body: bytes | None


class _Fetch(FetchCommand):  # type: ignore[misc]
    """The library's, without looking at every earlier line for each new one: thousands of lines would block the loop."""

    _open = 0

    def append_to_resp(self, line: bytes | bytearray, result: str = "Pending") -> None:
        if isinstance(line, bytes) and result == "Pending":
            if _FETCHED.match(line):
                self._open = 0
            self._open += line.count(b"(") - line.count(b")")
        super().append_to_resp(line, result)

    def wait_data(self) -> bool:
        return self._open != 0 or self.wait_literal_data()


class _Protocol(IMAP4ClientProtocol):  # type: ignore[misc]
    """The library's protocol, with everything recorded that it drops."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lost: asyncio.Future[str]) -> None:
        super().__init__(loop, conn_lost_cb=lambda error: self._end(repr(error) if error else "closed"))
        self.lost = lost
        self.pushed = asyncio.Event()
        """Something may be new: EXISTS came, whatever was going on."""
        self.refused_token = ""
        self.plain_tail = False
        self._untrusted = False

    def _end(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)

    def expect_tls(self) -> None:
        """From now on nothing may come in after the answer to STARTTLS: what was sent in the clear is nobody's word."""
        self._untrusted = True

    def data_received(self, data: bytes) -> None:
        if self._untrusted:
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


class _Client(IMAP4):  # type: ignore[misc]
    """The library's client around our protocol."""

    def __init__(
        self, protocol: _Protocol, host: str, port: int, tls: ssl.SSLContext | None, guard: Guard
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


class Imap:
    """`await Imap.open(…)`, then the calls below, then `await close()`. Raises ImapLost and ImapRefused; `open` Problem."""

    def __init__(self, client: _Client, protocol: _Protocol, timings: Timings) -> None:
        self._client = client
        self._protocol = protocol
        self._timings = timings
        self.folder: Folder | None = None

    @classmethod
    async def open(
        cls,
        credentials: Credentials,
        tls: ssl.SSLContext,
        timings: Timings,
        tokens: Tokens | None,
        *,
        guard: Guard,
    ) -> Imap:
        """Connect, verify, log in. Raises Problem. `guard`: where the server may be."""
        server = credentials.imap
        loop = asyncio.get_running_loop()
        protocol = _Protocol(loop, loop.create_future())
        over_tls = tls if server.security == "tls" else None
        client = _Client(protocol, server.host, server.port, over_tls, guard)
        self = cls(client, protocol, timings)
        try:
            async with asyncio.timeout(timings.connect):
                await self._connect(server, tls)
        except Problem:
            await self._throw_away()
            raise
        except Exception as error:
            await self._throw_away()
            raise _not_connected(server, error) from None
        except BaseException:
            await self._throw_away()
            raise
        try:
            await self._log_in(credentials, tokens)
        except BaseException:
            await self._throw_away()
            raise
        return self

    # ---- connecting

    async def _connect(self, server: Server, tls: ssl.SSLContext) -> None:
        greeting = asyncio.ensure_future(self._client._wait_connection_and_hello())
        await self._race(greeting, None)
        if server.security != "starttls":
            return
        protocol = self._protocol
        if protocol.state != NONAUTH or "STARTTLS" not in _upper(protocol.capabilities):
            raise Problem(
                "tls_failed",
                f"{server.host}:{server.port} offers no STARTTLS",
                "Choose tls with its port (993), or another server: mail is not read in the clear.",
                lasting=True,
                field="security",
            )
        protocol.expect_tls()
        answer = await self._race(protocol.execute(Command("STARTTLS", protocol.new_tag())), None)
        if answer.result != "OK" or protocol.plain_tail or protocol.incomplete_line:
            raise Problem("tls_failed", f"{server.host}:{server.port} refused STARTTLS", field="security")
        loop = asyncio.get_running_loop()
        plain = protocol.transport
        secure = await loop.start_tls(plain, protocol, tls, server_hostname=server.host)
        protocol.transport = secure
        protocol._untrusted = False
        # What was said before nobody vouches for.
        await self._race(protocol.capability(), None)

    async def _log_in(self, credentials: Credentials, tokens: Tokens | None) -> None:
        oauth = tokens is not None
        try:
            async with asyncio.timeout(self._timings.connect):
                answer = await self._present(credentials, tokens, renew=False)
                if answer.result != "OK" and oauth:
                    answer = await self._present(credentials, tokens, renew=True)
        except Problem:
            raise
        except ImapLost as lost:
            if "BYE" in str(lost).upper():
                raise refused_login("imap", str(lost), oauth=oauth) from None
            raise unreachable("imap", credentials.imap.host, credentials.imap.port, lost) from None
        except TimeoutError as slow:
            raise unreachable("imap", credentials.imap.host, credentials.imap.port, slow) from None
        except ValueError:
            raise refused_login("imap", "the user name or password holds a line break", oauth=oauth) from None
        if answer.result != "OK":
            raise refused_login("imap", _last(answer) or self._protocol.refused_token, oauth=oauth)
        if "IDLE" not in _upper(self._protocol.capabilities):
            # Servers may offer more to those they know.
            with contextlib.suppress(ImapRefused, ImapLost):
                await self._run(self._protocol.capability(), self._timings.command)

    async def _present(self, credentials: Credentials, tokens: Tokens | None, *, renew: bool) -> Response:
        if tokens is not None:
            token = await tokens.token(renew=renew)
            return await self._race(self._protocol.xoauth2(credentials.username, token), None)
        assert credentials.password is not None
        password = credentials.password.get_secret_value()
        return await self._race(self._protocol.login(quoted(credentials.username), password), None)

    # ---- folders

    @property
    def pushed(self) -> asyncio.Event:
        """Set when the server said that there is more than before; clear it before looking."""
        return self._protocol.pushed

    @property
    def has_idle(self) -> bool:
        return "IDLE" in _upper(self._protocol.capabilities)

    @property
    def alive(self) -> bool:
        return not self._protocol.lost.done()

    async def select(self, name: str) -> Folder:
        """Open a folder. Raises ImapRefused when it does not exist."""
        answer = await self._run(self._client.protocol.select(quoted(encode_folder(name))))
        lines = [bytes(line) for line in answer.lines]
        self.folder = Folder(
            name,
            uidvalidity=_number(lines, rb"\[UIDVALIDITY (\d+)\]") or 0,
            uidnext=_number(lines, rb"\[UIDNEXT (\d+)\]"),
            exists=_number(lines, rb"(\d+) EXISTS") or 0,
        )
        return self.folder

    async def sent_folder(self) -> str | None:
        """Where this server keeps sent mail: what it marks so, else a usual name."""
        answer = await self._run(self._client.protocol.simple_command("LIST", '""', '"*"'))
        names: dict[str, str] = {}
        for line in answer.lines:
            match = re.match(rb'(?:LIST )?\((?P<flags>[^)]*)\) (?:"[^"]*"|NIL) (?P<name>.+)$', bytes(line))
            if match is None:
                continue
            wire = match["name"].strip().decode("utf-8", "replace")
            name = decode_folder(wire[1:-1].replace('\\"', '"') if wire.startswith('"') else wire)
            if b"\\sent" in match["flags"].lower():
                return name
            names[re.split(r"[./]", name)[-1].lower()] = name
        usual = ("sent", "sent items", "sent mail", "sent messages", "gesendet", "gesendete elemente")
        return next((names[name] for name in usual if name in names), None)

    async def create(self, name: str) -> None:
        await self._run(self._client.protocol.simple_command("CREATE", quoted(encode_folder(name))))

    # ---- mails

    async def search(self, *criteria: str) -> list[int]:
        """UIDs in rising order. A NOOP goes first: what arrived meanwhile would else not be found."""
        await self._run(self._client.protocol.simple_command("NOOP"))
        answer = await self._run(self._client.protocol.search(*criteria, by_uid=True, charset=None))
        found = {int(word) for line in answer.lines[:-1] for word in bytes(line).split() if word.isdigit()}
        return sorted(found)

    async def after(self, uid: int) -> list[int]:
        # `n:*` always holds the last mail, also when it is older.
        return [found for found in await self.search("UID", f"{uid + 1}:*") if found > uid]

    async def find(self, message_id: str) -> list[int]:
        """Mails with this Message-ID in the open folder."""
        plain = message_id.replace("\\", "").replace('"', "")
        return await self.search("HEADER", "MESSAGE-ID", f'"{plain}"') if plain.isascii() else []

    async def items(
        self, uids: Sequence[int], *, bodies: bool = False, first: int | None = None
    ) -> list[Item]:
        """What these are, in rising order; those that are gone are left out. `first`: only so many bytes of each body."""
        found: list[Item] = []
        what = "UID RFC822.SIZE INTERNALDATE"
        if bodies:
            what += " BODY.PEEK[]" if first is None else f" BODY.PEEK[]<0.{first}>"
        for start in range(0, len(uids), AT_ONCE):
            wanted = uids[start : start + AT_ONCE]
            command = _Fetch(self._protocol.new_tag(), _set(wanted), f"({what})", prefix="UID")
            answer = await self._run(
                self._protocol.execute(command),
                self._timings.fetch if bodies else self._timings.command,
            )
            found += [item for item in _items(answer.lines) if item.uid in set(wanted)]
        return sorted(found, key=lambda item: item.uid)

    async def append(self, folder: str, raw: bytes) -> None:
        """Keep a mail, marked as read."""
        await self._run(
            self._client.protocol.append(raw, quoted(encode_folder(folder)), "(\\Seen)"),
            self._timings.fetch,
        )

    async def wait(self) -> None:
        """Until something may be new, at most `timings.idle` seconds. Raises ImapLost."""
        if self.pushed.is_set():
            return
        if not self.has_idle:
            await self._wait_for_push(self._timings.poll)
            await self._run(self._client.protocol.simple_command("NOOP"))
            return
        running = asyncio.ensure_future(self._client.protocol.idle())
        running.add_done_callback(_looked_at)
        try:
            await self._race(self._client.protocol.wait_for_idle_response(), self._timings.command, running)
            if not running.done():
                await self._wait_for_push(self._timings.idle)
                self._client.protocol.idle_done()
            answer = await self._race(running, self._timings.command)
        except BaseException:
            running.cancel()
            self._protocol.abort()
            raise
        while not self._protocol.idle_queue.empty():
            self._protocol.idle_queue.get_nowait()
        if answer.result != "OK":
            raise ImapRefused(_last(answer))

    async def _wait_for_push(self, seconds: float) -> None:
        """A push, the time, or the end of the connection."""
        push = asyncio.ensure_future(self._protocol.pushed.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {push, self._protocol.lost}
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            push.cancel()
        if self._protocol.lost.done():
            raise ImapLost(self._protocol.lost.result())

    # ---- the end

    async def close(self) -> None:
        """Say goodbye where that is still possible; at most a second."""
        if self.alive and self._protocol.state in (AUTH, "SELECTED"):
            with contextlib.suppress(Exception):
                await self._run(self._client.protocol.logout(), 1.0)
        await self._throw_away()

    async def _throw_away(self) -> None:
        task = self._client._client_task
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
        self._protocol.abort()
        self._protocol._end("closed")
        for waiting in list(self._protocol.tasks):
            waiting.cancel()

    # ---- every command

    async def _run(self, command: Coroutine[Any, Any, Response], seconds: float | None = None) -> Response:
        """Raises ImapRefused when the server says anything but OK."""
        answer = await self._race(command, self._timings.command if seconds is None else seconds)
        if answer.result != "OK":
            raise ImapRefused(_last(answer))
        return answer

    async def _race(self, work: Awaitable[T], seconds: float | None, *others: asyncio.Future[Any]) -> T:
        """The work's result; a lost connection or a time-out ends it. Returns None when one of `others` ends first."""
        task = asyncio.ensure_future(work)
        lost = self._protocol.lost
        waiting: set[asyncio.Future[Any]] = {task, lost, *others}
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if any(other.done() for other in others) and not lost.done():
                return None  # type: ignore[return-value]
            if lost.done():
                # The TLS or connection error says more than "closed".
                raise _cause(self._client._client_task) or ImapLost(lost.result())
            self._protocol.abort("no answer in time")
            raise ImapLost("no answer in time")
        except (aioimaplib.AioImapException, AttributeError) as error:
            self._protocol.abort()
            raise ImapLost(f"{type(error).__name__}") from None
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(_looked_at)


def _looked_at(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _cause(task: asyncio.Task[Any]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _not_connected(server: Server, error: Exception) -> Problem:
    if isinstance(error, ImapLost):
        said = str(error)
        if said.upper().startswith(("BYE", "* BYE")):
            return throttled("imap", said)
        if "no answer" in said:
            return unreachable("imap", server.host, server.port, TimeoutError())
    return unreachable("imap", server.host, server.port, error)


def _upper(capabilities: set[str]) -> set[str]:
    return {one.upper() for one in capabilities}


def _last(answer: Response) -> str:
    return bytes(answer.lines[-1]).decode("utf-8", "replace") if answer.lines else ""


def _number(lines: Sequence[bytes], pattern: bytes) -> int | None:
    for line in lines:
        match = re.search(pattern, line, re.I)
        if match:
            return int(match[1])
    return None


def _set(uids: Sequence[int]) -> str:
    """`1,2,3,7` as `1:3,7`."""
    spans: list[tuple[int, int]] = []
    for uid in uids:
        if spans and uid == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], uid)
        else:
            spans.append((uid, uid))
    return ",".join(str(low) if low == high else f"{low}:{high}" for low, high in spans)


def _items(lines: Sequence[bytes | bytearray]) -> list[Item]:
    """The answers of a FETCH: text lines, and bodies as `bytearray` between them."""
    found: list[Item] = []
    words, body = b"", None
    for line in (*lines, b"0 FETCH ("):
        if isinstance(line, bytearray):
            body = bytes(line)
        elif _FETCHED.match(line):
            if item := _item(words, body):
                found.append(item)
            words, body = bytes(line), None
        else:
            words += b" " + line
    return found


def _item(words: bytes, body: bytes | None) -> Item | None:
    uid = re.search(rb"\bUID (\d+)", words)
    if uid is None:
        return None  # a change of flags, told in between
    size = re.search(rb"RFC822\.SIZE (\d+)", words)
    date = re.search(rb'INTERNALDATE "([^"]+)"', words)
    return Item(int(uid[1]), int(size[1]) if size else 0, _date(date[1]) if date else None, body)


def _date(value: bytes) -> datetime | None:
    """`17-Jul-2026 02:44:25 -0700`; the month's name is English whatever the locale."""
    match = re.fullmatch(r"\s*(\d+)-(\w+)-(\d+) (\d+:\d+:\d+) ([+-]\d{4})", value.decode("ascii", "replace"))
    if match is None or match[2].title() not in _MONTHS:
        return None
    month = _MONTHS.index(match[2].title()) + 1
    try:
        found = datetime.strptime(
            f"{match[3]}-{month}-{match[1]} {match[4]} {match[5]}", "%Y-%m-%d %H:%M:%S %z"
        )
    except ValueError:
        return None
    return found.astimezone(UTC)


def since(date: datetime) -> str:
    """A day as SEARCH wants it."""
    return f"{date.day}-{_MONTHS[date.month - 1]}-{date.year}"


def encode_folder(name: str) -> str:
    """Modified UTF-7 (RFC 3501, 5.1.3)."""
    out: list[str] = []
    for run in re.findall(r"[\x20-\x7e]+|[^\x20-\x7e]+", name):
        if run.isascii() and run.isprintable():
            out.append(run.replace("&", "&-"))
        else:
            coded = base64.b64encode(run.encode("utf-16-be")).decode().rstrip("=").replace("/", ",")
            out.append(f"&{coded}-")
    return "".join(out)


def decode_folder(wire: str) -> str:
    def plain(match: re.Match[str]) -> str:
        if not match[1]:
            return "&"
        coded = match[1].replace(",", "/")
        try:
            return base64.b64decode(coded + "=" * (-len(coded) % 4)).decode("utf-16-be")
        except ValueError:
            return match[0]

    return re.sub(r"&([A-Za-z0-9+,]*)-", plain, wire)
