"""One IMAP connection: every call ends, with an answer, a lost connection, or a time-out.

STARTTLS, quoting and commands that outlive a lost connection are seen to here, the library's other gaps in `imap_wire`.
After a time-out the connection is out of step and is thrown away. Never marks mail as read and never logs what goes over
the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from aioimaplib import aioimaplib
from aioimaplib.aioimaplib import AUTH, NONAUTH, Command, Response, quoted

from gateway.email import imap_words as words
from gateway.email.imap_wire import Client, Fetch, Protocol
from gateway.email.imap_words import Folder, Item, encode_folder
from gateway.email.oauth import Tokens
from gateway.email.problems import Problem, refused_login, throttled, unreachable
from gateway.email.settings import Credentials, Server
from gateway.email.timings import Timings
from gateway.media.guard import Guard

T = TypeVar("T")

AT_ONCE = 200
"""UIDs in one FETCH."""


class ImapLost(Exception):
    """The connection is gone or can no longer be trusted: connect again."""


class ImapRefused(Exception):
    """The server said NO or BAD; the text is its own."""


class Imap:
    """`await Imap.open(…)`, then the calls below, then `await close()`. Raises ImapLost and ImapRefused; `open` Problem."""

    def __init__(self, client: Client, protocol: Protocol, timings: Timings) -> None:
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
        protocol = Protocol(loop, loop.create_future())
        over_tls = tls if server.security == "tls" else None
        client = Client(protocol, server.host, server.port, over_tls, guard)
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
        protocol.untrusted = False
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
            uidvalidity=words.number(lines, rb"\[UIDVALIDITY (\d+)\]") or 0,
            uidnext=words.number(lines, rb"\[UIDNEXT (\d+)\]"),
            exists=words.number(lines, rb"(\d+) EXISTS") or 0,
        )
        return self.folder

    async def sent_folder(self) -> str | None:
        """Where this server keeps sent mail: what it marks so, else a usual name."""
        answer = await self._run(self._client.protocol.simple_command("LIST", '""', '"*"'))
        return words.sent_folder(answer.lines)

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
            command = Fetch(self._protocol.new_tag(), words.uid_set(wanted), f"({what})", prefix="UID")
            answer = await self._run(
                self._protocol.execute(command),
                self._timings.fetch if bodies else self._timings.command,
            )
            found += [item for item in words.items(answer.lines) if item.uid in set(wanted)]
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
