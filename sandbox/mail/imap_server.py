"""A small honest IMAP4rev1 server (RFC 3501, IDLE, UIDPLUS' rules for UIDs): as much as a mail program that reads needs.

LOGIN, AUTHENTICATE XOAUTH2, SELECT, EXAMINE, LIST, CREATE, STATUS, APPEND, NOOP, IDLE, EXPUNGE, CLOSE, and FETCH, SEARCH,
STORE by sequence or UID. What it does not know it refuses with BAD. No TLS of its own: `server.py` wraps its sockets.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import re
from collections.abc import Callable
from datetime import UTC, date, datetime

from sandbox.mail.mailbox import DELETED, Account, Folder, Mail

CAPABILITIES = "IMAP4rev1 IDLE SASL-IR AUTH=PLAIN AUTH=XOAUTH2 SPECIAL-USE"
MOST_LITERAL = 64 << 20
IDLE_SECONDS = 1800.0
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\([^()]*(?:\([^()]*\)[^()]*)*\))|([^\s]+)')
_LITERAL = re.compile(rb"\{(\d+)\+?\}\r\n$")
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class Refuse(Exception):
    """Answered with NO."""


class Bad(Exception):
    """Answered with BAD."""


class Session:
    """One connection, from greeting to end."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log_in: Callable[[str, str], Account | None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._log_in = log_in
        self._account: Account | None = None
        self._folder: Folder | None = None
        self._seen: list[int] = []
        """UIDs in the order of the sequence numbers that this client knows."""
        self._read_only = False
        self._changed = asyncio.Event()

    async def serve(self) -> None:
        self._say(f"* OK [CAPABILITY {CAPABILITIES}] the mail sandbox is ready")
        try:
            while await self._one():
                await self._writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._leave()

    async def _one(self) -> bool:
        line, literals = await self._command()
        tag, _, rest = line.partition(" ")
        name, _, words = rest.partition(" ")
        name = name.upper()
        try:
            return await self._do(tag, name, words, literals)
        except Refuse as error:
            self._say(f"{tag} NO {error}")
        except (Bad, ValueError, IndexError) as error:
            self._say(f"{tag} BAD {error}")
        return True

    async def _command(self) -> tuple[str, list[bytes]]:
        """A line, with every literal in it read."""
        line = b""
        literals: list[bytes] = []
        while True:
            part = await self._reader.readline()
            if not part:
                raise ConnectionResetError
            match = _LITERAL.search(part)
            line += part
            if match is None:
                return line.decode("utf-8", "replace").strip(), literals
            size = int(match[1])
            if size > MOST_LITERAL:
                raise ConnectionResetError
            self._say("+ go on")
            await self._writer.drain()
            literals.append(await self._reader.readexactly(size))

    # ---- commands

    async def _do(self, tag: str, name: str, words: str, literals: list[bytes]) -> bool:
        if name == "LOGOUT":
            self._say("* BYE until then")
            self._say(f"{tag} OK")
            await self._writer.drain()
            return False
        if name == "CAPABILITY":
            self._say(f"* CAPABILITY {CAPABILITIES}")
        elif name == "LOGIN":
            user, password = _words(words)[:2]
            self._enter(user, password)
        elif name == "AUTHENTICATE":
            await self._authenticate(words)
        elif name == "NOOP":
            self._news()
        else:
            await self._logged_in(tag, name, words, literals)
            return True
        self._say(f"{tag} OK {name} done")
        return True

    def _enter(self, user: str, password: str) -> None:
        self._account = self._log_in(user, password)
        if self._account is None:
            raise Refuse("[AUTHENTICATIONFAILED] wrong user name or password")

    async def _authenticate(self, words: str) -> None:
        method, _, initial = words.partition(" ")
        if not initial:
            self._say("+ ")
            await self._writer.drain()
            initial = (await self._reader.readline()).decode().strip()
        said = base64.b64decode(initial).decode("utf-8", "replace")
        if method.upper() == "PLAIN":
            _, user, password = said.split("\0")
            self._enter(user, password)
            return
        match = re.fullmatch("user=(.*)\1auth=Bearer (.*)\1\1", said)
        account = self._log_in(match[1], match[2]) if method.upper() == "XOAUTH2" and match else None
        if account is None:
            self._say("+ " + base64.b64encode(b'{"status":"401"}').decode())
            await self._writer.drain()
            await self._reader.readline()
            raise Refuse("[AUTHENTICATIONFAILED] the token is not accepted")
        self._account = account

    async def _logged_in(self, tag: str, name: str, words: str, literals: list[bytes]) -> None:
        account = self._account
        if account is None:
            raise Bad("log in first")
        if name in ("SELECT", "EXAMINE"):
            self._select(account, _words(words)[0], read_only=name == "EXAMINE")
            self._say(f"{tag} OK [{'READ-ONLY' if self._read_only else 'READ-WRITE'}] {name} done")
            return
        if name == "LIST":
            for folder in account.folders.values():
                flags = "\\HasNoChildren" + (" \\Sent" if folder.name == "Sent" else "")
                self._say(f'* LIST ({flags}) "/" {_quoted(folder.name)}')
        elif name == "CREATE":
            wanted = _words(words)[0]
            if account.folder(wanted) is not None:
                raise Refuse("[ALREADYEXISTS] there is such a folder")
            account.folders[wanted] = Folder(wanted)
        elif name == "STATUS":
            folder = self._existing(account, _words(words)[0])
            numbers = (
                f"MESSAGES {len(folder.mails)} UIDNEXT {folder.next_uid} UIDVALIDITY {folder.uidvalidity}"
            )
            self._say(f"* STATUS {_quoted(folder.name)} ({numbers})")
        elif name == "APPEND":
            given = set(re.findall(r"\\\w+", words))
            mail = self._existing(account, _words(words)[0]).add(literals[-1], given)
            self._news()
            self._say(f"{tag} OK [APPENDUID 1 {mail.uid}] APPEND done")
            return
        else:
            await self._selected(name, words)
        self._say(f"{tag} OK {name} done")

    async def _selected(self, name: str, words: str) -> None:
        folder = self._folder
        if folder is None:
            raise Bad("unknown, or no folder is selected")
        if name == "IDLE":
            await self._idle()
        elif name == "EXPUNGE":
            folder.remove({mail.uid for mail in folder.mails if DELETED in mail.flags})
            self._news()
        elif name == "CLOSE":
            folder.remove({mail.uid for mail in folder.mails if DELETED in mail.flags})
            self._leave()
        elif name == "UID":
            verb, _, rest = words.partition(" ")
            self._on_mails(verb.upper(), rest, by_uid=True)
        else:
            self._on_mails(name, words, by_uid=False)

    def _on_mails(self, name: str, words: str, *, by_uid: bool) -> None:
        if name == "SEARCH":
            found = self._search(_words(words))
            numbers = [mail.uid if by_uid else self._seen.index(mail.uid) + 1 for mail in found]
            self._say("* SEARCH" + "".join(f" {number}" for number in numbers))
        elif name == "FETCH":
            wanted, _, items = words.partition(" ")
            for mail in self._named(wanted, by_uid=by_uid):
                self._fetch(mail, items.upper(), by_uid=by_uid)
        elif name == "STORE":
            wanted, how, flags = words.split(" ", 2)
            for mail in self._named(wanted, by_uid=by_uid):
                given = set(re.findall(r"\\?\w+", flags))
                mail.flags = (
                    mail.flags | given if how[0] == "+" else mail.flags - given if how[0] == "-" else given
                )
        else:
            raise Bad(f"{name} is not known here")

    # ---- folders

    def _existing(self, account: Account, name: str) -> Folder:
        folder = account.folder(name)
        if folder is None:
            raise Refuse("[NONEXISTENT] there is no such folder")
        return folder

    def _select(self, account: Account, name: str, *, read_only: bool) -> None:
        self._leave()
        folder = self._folder = self._existing(account, name)
        self._read_only = read_only
        self._seen = [mail.uid for mail in folder.mails]
        folder.watchers.add(self._changed.set)
        self._say("* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft)")
        self._say(f"* {len(self._seen)} EXISTS")
        self._say("* 0 RECENT")
        self._say(f"* OK [UIDVALIDITY {folder.uidvalidity}] UIDs valid")
        self._say(f"* OK [UIDNEXT {folder.next_uid}] next UID")

    def _leave(self) -> None:
        if self._folder is not None:
            self._folder.watchers.discard(self._changed.set)
        self._folder = None

    def _news(self) -> None:
        """EXPUNGE and EXISTS, as far as this client does not know them yet."""
        folder = self._folder
        self._changed.clear()
        if folder is None:
            return
        present = [mail.uid for mail in folder.mails]
        for number in range(len(self._seen), 0, -1):
            if self._seen[number - 1] not in present:
                del self._seen[number - 1]
                self._say(f"* {number} EXPUNGE")
        if len(present) > len(self._seen):
            self._seen = present
            self._say(f"* {len(present)} EXISTS")

    async def _idle(self) -> None:
        self._say("+ idling")
        self._news()
        await self._writer.drain()
        done = asyncio.ensure_future(self._reader.readline())
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                while not done.done():
                    news = asyncio.ensure_future(self._changed.wait())
                    await asyncio.wait({done, news}, return_when=asyncio.FIRST_COMPLETED)
                    news.cancel()
                    if self._changed.is_set():
                        self._news()
                        await self._writer.drain()
            line = done.result()
        finally:
            done.cancel()
        if line.strip().upper() != b"DONE":
            raise ConnectionResetError

    # ---- mails

    def _named(self, wanted: str, *, by_uid: bool) -> list[Mail]:
        assert self._folder is not None
        numbers = self._numbers(wanted, by_uid=by_uid)
        by_number = {mail.uid: mail for mail in self._folder.mails}
        uids = numbers if by_uid else [self._seen[n - 1] for n in numbers if 0 < n <= len(self._seen)]
        return [by_number[uid] for uid in uids if uid in by_number]

    def _numbers(self, wanted: str, *, by_uid: bool) -> list[int]:
        known = self._seen if by_uid else list(range(1, len(self._seen) + 1))
        last = known[-1] if known else 0
        chosen: set[int] = set()
        for part in wanted.split(","):
            low, colon, high = part.partition(":")
            first = last if low == "*" else int(low)
            final = (last if high == "*" else int(high)) if colon else first
            low_number, high_number = sorted((first, final))
            chosen |= {number for number in known if low_number <= number <= high_number}
        return sorted(chosen)

    def _search(self, words: list[str]) -> list[Mail]:
        assert self._folder is not None
        visible = set(self._seen)
        found = [mail for mail in self._folder.mails if mail.uid in visible]
        while words:
            word = words.pop(0).upper()
            if word == "ALL":
                continue
            if word == "CHARSET":
                words.pop(0)
            elif word == "UID":
                chosen = set(self._numbers(words.pop(0), by_uid=True))
                found = [mail for mail in found if mail.uid in chosen]
            elif word == "HEADER":
                name, text = words.pop(0), words.pop(0).lower()
                found = [mail for mail in found if text in _header(mail.raw, name)]
            elif word in ("SINCE", "BEFORE"):
                day = _day(words.pop(0))
                since = word == "SINCE"
                found = [
                    m for m in found if (datetime.fromtimestamp(m.arrived_at, UTC).date() >= day) is since
                ]
            elif word in ("SEEN", "UNSEEN", "DELETED", "UNDELETED"):
                flag = "\\" + word.removeprefix("UN").title()
                found = [mail for mail in found if (flag in mail.flags) is not word.startswith("UN")]
            else:
                if not word[0].isdigit():
                    raise Bad(f"SEARCH {word} is not known here")
                chosen = {mail.uid for mail in self._named(word, by_uid=False)}
                found = [mail for mail in found if mail.uid in chosen]
        return found

    def _fetch(self, mail: Mail, items: str, *, by_uid: bool) -> None:
        out: list[bytes] = []
        if "UID" in items or by_uid:
            out.append(b"UID %d" % mail.uid)
        if "FLAGS" in items:
            out.append(f"FLAGS ({' '.join(sorted(mail.flags))})".encode())
        if "INTERNALDATE" in items:
            came = datetime.fromtimestamp(mail.arrived_at, UTC)
            shown = f"{came.day:2d}-{_MONTHS[came.month - 1]}-{came:%Y %H:%M:%S} +0000"
            out.append(f'INTERNALDATE "{shown}"'.encode())
        if "RFC822.SIZE" in items:
            out.append(b"RFC822.SIZE %d" % len(mail.raw))
        for match in re.finditer(r"BODY(\.PEEK)?\[([^\]]*)\](?:<(\d+)\.(\d+)>)?", items):
            body = _part(mail.raw, match[2])
            name = f"BODY[{match[2]}]"
            if match[3]:
                first = int(match[3])
                body, name = body[first : first + int(match[4])], f"{name}<{first}>"
            if not match[1] and not self._read_only:
                mail.flags.add("\\Seen")
            out.append(b"%s {%d}\r\n%s" % (name.encode(), len(body), body))
        number = self._seen.index(mail.uid) + 1
        self._writer.write(b"* %d FETCH (" % number + b" ".join(out) + b")\r\n")

    def _say(self, line: str) -> None:
        self._writer.write(line.encode() + b"\r\n")


def same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(), right.encode())


def _words(text: str) -> list[str]:
    found = []
    for match in _WORD.finditer(text):
        quoted, group, plain = match.groups()
        found.append(re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else group or plain)
    return found


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _part(raw: bytes, section: str) -> bytes:
    head, blank, body = raw.partition(b"\r\n\r\n")
    if section == "HEADER" or section.startswith("HEADER.FIELDS"):
        return head + blank
    return body if section == "TEXT" else raw


def _header(raw: bytes, name: str) -> str:
    head = raw.partition(b"\r\n\r\n")[0].decode("utf-8", "replace").lower()
    unfolded = re.sub(r"\r\n[ \t]+", " ", head)
    return "\n".join(line for line in unfolded.split("\r\n") if line.startswith(f"{name.lower()}:"))


def _day(text: str) -> date:
    day, month, year = text.strip('"').split("-")
    return datetime(int(year), _MONTHS.index(month.title()) + 1, int(day), tzinfo=UTC).date()


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    log_in: Callable[[str, str], Account | None],
) -> None:
    try:
        await Session(reader, writer, log_in).serve()
    finally:
        writer.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(writer.wait_closed(), 1)
