"""Connections to servers as they really are: both kinds of TLS, tokens that run out, and everything that breaks in between.

The sandbox where it does, else a server that says what the test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.channel import SessionState
from core.errors import InvalidField, NotSentError, RefusedError, ThrottledError, UnknownOutcomeError
from core.metrics import Metrics
from gateway.email.imap import Imap, ImapLost
from gateway.email.imap_words import decode_folder, encode_folder
from gateway.email.kind import email_kind
from gateway.email.live import tls_context
from gateway.email.log_in import check_credentials
from gateway.email.oauth import Tokens
from gateway.email.problems import Problem
from gateway.email.settings import read_credentials
from gateway.email.smtp import Smtp
from gateway.email.timings import Timings
from gateway.media.guard import Guard
from sandbox.mail import MailSandbox
from sandbox.mail.certificate import make_certificate
from tests.support.dovecot import PASSWORD, USER, Dovecot
from tests.support.mail import CONTEXT, LOOPBACK, OWN
from tests.support.tokens import token_server, with_oauth
from tests.support.whatsapp_sink import MemorySink, until

SHORT = Timings(connect=10, command=5, fetch=10, idle=5, data=5, keep=30)
MAIL = b"Subject: hi\r\nMessage-ID: <x@y>\r\n\r\nhello\r\n"
CERTIFICATE = make_certificate()


@pytest.fixture
async def mail() -> AsyncIterator[MailSandbox]:
    async with MailSandbox() as made:
        yield made


async def opened(given: dict[str, Any], timings: Timings = SHORT, tokens: Tokens | None = None) -> Imap:
    credentials = read_credentials(given)
    return await Imap.open(credentials, tls_context(credentials.ca), timings, tokens, guard=LOOPBACK)


def sending(given: dict[str, Any], timings: Timings = SHORT, tokens: Tokens | None = None) -> Smtp:
    credentials = read_credentials(given)
    return Smtp(credentials, tls_context(credentials.ca), timings, tokens, guard=LOOPBACK)


# --- TLS


async def test_both_kinds_of_tls_open_a_real_dovecot() -> None:
    dovecot = Dovecot()
    try:
        await asyncio.to_thread(dovecot.start)
        for port, security in ((dovecot.port, "tls"), (dovecot.plain_port, "starttls")):
            given = {
                "imap": {"host": "localhost", "port": port, "security": security},
                "smtp": {"host": "localhost", "port": 1},
                "username": USER,
                "password": PASSWORD,
                "ca": dovecot.ca,
            }
            connection = await opened(given)
            folder = await connection.select("INBOX")
            assert folder.uidvalidity
            assert await connection.sent_folder() == "Sent"
            await connection.close()
            with pytest.raises(Problem) as refused:
                await opened({**given, "ca": None})
            assert refused.value.code == "certificate_not_trusted"
    finally:
        await asyncio.to_thread(dovecot.close)


async def test_smtp_demands_starttls(mail: MailSandbox) -> None:
    port = {"host": "localhost", "port": mail.starttls_port, "security": "starttls"}
    smtp = sending({**mail.credentials, "smtp": port})
    mei = mail.person("Mei")
    await smtp.send(mail.account.address, [mei.address], MAIL, "<x@y>")
    await smtp.close()
    assert [one.subject for one in mei.letters] == ["hi"]
    untrusting = sending({**mail.credentials, "smtp": port, "ca": make_certificate().pem})
    with pytest.raises(Problem) as refused:
        await untrusting.probe()
    assert refused.value.code == "certificate_not_trusted"


# --- tokens


async def test_a_mailbox_opens_with_a_token_that_is_renewed_when_it_is_refused(mail: MailSandbox) -> None:
    answers = [
        (200, {"access_token": "stale", "expires_in": 3600}),
        (200, {"access_token": "fresh", "expires_in": 3600, "refresh_token": "refresh-2"}),
        (200, {"access_token": "newest", "expires_in": 3600}),
    ]
    mail.tokens = {"fresh"}
    async with token_server(answers) as server:
        given = with_oauth(mail, server.url)
        credentials = read_credentials(given)
        assert credentials.oauth is not None
        tokens = Tokens(credentials.oauth, tls_context(credentials.ca), LOOPBACK)
        connection = await opened(given, tokens=tokens)
        assert (await connection.select("INBOX")).exists == 0
        await connection.close()
        assert server.asked == ["refresh-1", "refresh-1"]
        smtp = sending(given, tokens=tokens)
        mei = mail.person("Mei")
        await smtp.send(mail.account.address, [mei.address], MAIL, "<x@y>")
        await smtp.close()
        assert len(mei.letters) == 1
        assert len(server.asked) == 2, "the token at hand was good"
        mail.tokens = {"newest"}
        smtp = sending(given, tokens=tokens)
        await smtp.probe()
        await smtp.close()
        assert server.asked[-1] == "refresh-2"


async def test_checked_credentials_come_back_complete(mail: MailSandbox) -> None:
    given = {**mail.credentials, "imap": {"host": "localhost", "port": mail.imap_port}}
    found = await check_credentials(given, {}, guard=LOOPBACK)
    assert found.identifier == mail.account.address
    assert found.credentials["imap"] == {"host": "localhost", "port": mail.imap_port, "security": "tls"}
    assert found.credentials["password"] == mail.account.password


# --- servers in our own network


async def test_a_server_in_our_own_network_is_refused_before_anything_is_connected_to(
    mail: MailSandbox,
) -> None:
    guard = Guard(allow=[("127.0.0.1", mail.imap_port), ("::1", mail.imap_port)])  # for SMTP's turn
    async with token_server() as server:
        for given, allowed, field in (
            (mail.credentials, Guard(), "credentials.imap.host"),
            (mail.credentials, guard, "credentials.smtp.host"),
            (with_oauth(mail, server.url), guard, "credentials.oauth.token_url"),
        ):
            with pytest.raises(InvalidField) as refused:
                await check_credentials(given, {}, guard=allowed)
            assert (refused.value.field, refused.value.code) == (field, "private_address")
            assert "MAIL_PRIVATE_NETWORKS" in refused.value.detail
        assert server.asked == []


async def test_a_session_that_names_one_says_what_to_do_and_stays_away(tmp_path: Path) -> None:
    """Credentials that were stored before, or by a gateway that was allowed to."""
    reached: list[object] = []
    server = await asyncio.start_server(lambda *both: reached.append(both), "127.0.0.1", 0)
    states: list[SessionState] = []

    class Told(MemorySink):
        async def state(self, state: SessionState) -> None:
            states.append(state)

    where = {"host": "127.0.0.1", "port": server.sockets[0].getsockname()[1]}
    context = replace(
        CONTEXT,
        folder=tmp_path,
        credentials={"imap": where, "smtp": where, "username": OWN, "password": "x"},
    )
    kind = email_kind(Metrics(), replace(SHORT, backoff_first=0.05))
    assert kind.factory is not None
    channel = kind.factory(context, Told())
    async with server:
        await channel.connect()
        try:
            await until(lambda: any(s.reason == "private_address" for s in states))
        finally:
            await channel.disconnect()
    said = next(s for s in states if s.reason == "private_address")
    assert said.status == "disconnected"
    assert "MAIL_PRIVATE_NETWORKS" in (said.action or "")
    assert reached == []


# --- what a send proves


async def test_each_way_a_send_can_end_is_told_apart(mail: MailSandbox) -> None:
    smtp = sending(mail.credentials)
    mei = mail.person("Mei")

    async def send(*more: str) -> None:
        await smtp.send(mail.account.address, [mei.address, *more], MAIL, "<x@y>")

    mail.refuse("gone@customers.example", "550 5.1.1 no such mailbox")
    mail.refuse("full@customers.example", "452 4.2.2 mailbox full")
    with pytest.raises(RefusedError, match=r"gone@customers\.example.*no such mailbox"):
        await send("gone@customers.example")
    with pytest.raises(NotSentError, match="full@customers"):
        await send("full@customers.example")
    mail.answer_next("554 5.7.1 this looks like spam")
    with pytest.raises(RefusedError, match="spam"):
        await send()
    mail.answer_next("451 4.3.0 out of disk")
    with pytest.raises(NotSentError) as later:
        await send()
    assert not isinstance(later.value, ThrottledError)
    mail.answer_next("421 4.7.0 slow down")
    with pytest.raises(ThrottledError):
        await send()
    mail.cut_next("mail")
    with pytest.raises(NotSentError, match="before it was given"):
        await send()
    for where in ("data", "accepted"):
        mail.cut_next(where)  # type: ignore[arg-type]
        with pytest.raises(UnknownOutcomeError) as unknown:
            await send()
        assert unknown.value.channel_message_id == "<x@y>"
    assert len(mei.letters) == 1, "only the one that was accepted before the cut"
    await send()
    # A connection that went away while nobody used it is no reason for anything.
    mail.kill_connections()
    await send()
    assert len(mei.letters) == 3
    await smtp.close()


# --- a server that says what it is told


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script, *, tls: bool = True) -> AsyncIterator[dict[str, Any]]:
    """An IMAP server; yields credentials for it."""
    open_writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(reader, writer)

    context = CERTIFICATE.server_context() if tls else None
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        yield {
            "imap": {"host": "localhost", "port": port, "security": "tls" if tls else "starttls"},
            "smtp": {"host": "localhost", "port": 1},
            "username": "shop@example.com",
            "password": "x",
            "ca": CERTIFICATE.pem,
        }
    finally:
        server.close()
        for writer in open_writers:
            writer.transport.abort()
        await asyncio.sleep(0)


async def until_selected(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, capabilities: str = "IMAP4rev1 IDLE"
) -> None:
    writer.write(b"* OK hello\r\n")
    while True:
        tag, name, *_ = (await reader.readline()).decode().split(" ", 2)
        name = name.strip().upper()
        if name == "CAPABILITY":
            writer.write(f"* CAPABILITY {capabilities}\r\n".encode())
        if name == "SELECT":
            writer.write(b"* 0 EXISTS\r\n* OK [UIDVALIDITY 7] x\r\n* OK [UIDNEXT 1] x\r\n")
        writer.write(f"{tag} OK done\r\n".encode())
        if name == "SELECT":
            return


async def tag_of(reader: asyncio.StreamReader, *, wanted: str) -> str:
    line = (await reader.readline()).decode()
    assert wanted in line.upper(), line
    return line.split(" ")[0]


async def test_a_push_in_the_middle_of_a_search_is_not_lost() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until_selected(reader, writer)
        writer.write(f"{await tag_of(reader, wanted='NOOP')} OK done\r\n".encode())
        tag = await tag_of(reader, wanted="SEARCH")
        writer.write(f"* SEARCH 1\r\n* 2 EXISTS\r\n{tag} OK done\r\n".encode())
        await reader.readline()

    async with scripted(script) as given:
        connection = await opened(given)
        await connection.select("INBOX")
        connection.pushed.clear()
        assert await connection.search("ALL") == [1]
        async with asyncio.timeout(5):
            await connection.wait()  # at once: IDLE would have stayed silent
        await connection.close()


async def test_a_goodbye_in_the_middle_of_idle_is_noticed() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until_selected(reader, writer)
        await tag_of(reader, wanted="IDLE")
        writer.write(b"+ idling\r\n* BYE the server goes down\r\n")
        await reader.readline()

    async with scripted(script) as given:
        connection = await opened(given)
        await connection.select("INBOX")
        connection.pushed.clear()
        with pytest.raises(ImapLost, match="BYE"):
            async with asyncio.timeout(5):
                await connection.wait()
        await connection.close()


async def test_a_server_that_falls_silent_is_given_up() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until_selected(reader, writer)
        await reader.readline()
        await asyncio.sleep(30)

    async with scripted(script) as given:
        connection = await opened(given, Timings(connect=10, command=0.2))
        await connection.select("INBOX")
        with pytest.raises(ImapLost, match="no answer"):
            await connection.search("ALL")
        assert not connection.alive
        await connection.close()


async def test_thousands_of_lines_in_one_answer_are_read() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until_selected(reader, writer)
        tag = await tag_of(reader, wanted="FETCH")
        lines = [f"* {n} FETCH (UID {n} RFC822.SIZE {n})\r\n" for n in range(1, 5001)]
        writer.write("".join([*lines, f"{tag} OK done\r\n"]).encode())
        await reader.readline()

    async with scripted(script) as given:
        connection = await opened(given)
        await connection.select("INBOX")
        assert [item.uid for item in await connection.items([1, 2, 200])] == [1, 2, 200]
        await connection.close()


async def test_a_literal_without_an_end_is_not_believed() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until_selected(reader, writer)
        await tag_of(reader, wanted="FETCH")
        writer.write(b"* 1 FETCH (UID 1 BODY[] {99999999999}\r\nx")
        await reader.readline()

    async with scripted(script) as given:
        connection = await opened(given)
        await connection.select("INBOX")
        with pytest.raises(ImapLost):
            await connection.items([1], bodies=True)
        await connection.close()


async def test_words_before_the_encryption_are_nobodys() -> None:
    """STARTTLS, and something sent in the clear behind the answer to it."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"* OK hello\r\n")
        tag = await tag_of(reader, wanted="CAPABILITY")
        writer.write(f"* CAPABILITY IMAP4rev1 STARTTLS\r\n{tag} OK done\r\n".encode())
        tag = await tag_of(reader, wanted="STARTTLS")
        writer.write(f"{tag} OK go on\r\n* CAPABILITY IMAP4rev1 EVIL\r\n".encode())
        await reader.readline()

    async with scripted(script, tls=False) as given:
        with pytest.raises(Problem) as refused:
            await opened(given)
        assert refused.value.code == "tls_failed"


async def test_a_server_without_starttls_gets_no_password() -> None:
    said: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"* OK hello\r\n")
        tag = await tag_of(reader, wanted="CAPABILITY")
        writer.write(f"* CAPABILITY IMAP4rev1\r\n{tag} OK done\r\n".encode())
        said.append(await reader.readline())

    async with scripted(script, tls=False) as given:
        with pytest.raises(Problem) as refused:
            await opened(given)
        assert (refused.value.code, refused.value.lasting) == ("tls_failed", True)
        assert said in ([], [b""])


async def test_a_server_that_turns_everybody_away_is_left_alone_for_a_while() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"* BYE too many connections\r\n")
        await reader.readline()

    async with scripted(script) as given:
        with pytest.raises(Problem) as refused:
            await opened(given)
        assert refused.value.code == "throttled"


def test_folders_of_every_script_have_names() -> None:
    for name in ("INBOX", "Gesendete Objekte", "Entwürfe & mehr", "送信済み", "a&b"):
        assert decode_folder(encode_folder(name)) == name
    assert encode_folder("Entwürfe") == "Entw&APw-rfe"
