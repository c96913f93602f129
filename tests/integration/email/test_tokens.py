"""A mailbox that is opened with tokens: renewed, refused, and above all a refresh token that is good only once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from core.channel import SessionStatus
from core.database import Database
from core.errors import DatabaseUnavailable, InvalidField
from core.metrics import Metrics
from core.store import credentials as sealed
from core.store.sessions import SessionRow
from gateway.email.kind import email_kind
from gateway.email.live import tls_context
from gateway.email.log_in import check_credentials
from gateway.email.oauth import Tokens
from gateway.email.problems import Problem
from gateway.email.settings import read_credentials
from gateway.session_secrets import SessionSecrets
from gateway.sessions import SessionManager
from sandbox.mail import MailSandbox
from tests.contract.email_peer import SHORT
from tests.support.mail import LOOPBACK
from tests.support.outbound import eventually
from tests.support.sessions import KEYS, QUICK, Inbox, becomes, new_session, new_tenant, settings_for, want
from tests.support.tokens import TokenServer, token_server, with_oauth


@pytest.fixture
async def mail() -> AsyncIterator[MailSandbox]:
    async with MailSandbox() as made:
        yield made


@pytest.fixture
async def server() -> AsyncIterator[TokenServer]:
    async with token_server() as made:
        yield made


def tokens_of(mail: MailSandbox, url: str, **more: Any) -> Tokens:
    read = read_credentials(with_oauth(mail, url))
    assert read.oauth is not None
    return Tokens(read.oauth, tls_context(read.ca), LOOPBACK, **more)


async def test_a_permission_taken_back_is_named(mail: MailSandbox) -> None:
    async with token_server([(400, {"error": "invalid_grant"})]) as refusing:
        with pytest.raises(InvalidField) as refused:
            await check_credentials(with_oauth(mail, refusing.url), {}, guard=LOOPBACK)
    assert refused.value.field == "credentials.oauth.refresh_token"
    assert "refresh-1" not in str(refused.value)
    assert "s3cret" not in str(refused.value)


async def test_checking_credentials_keeps_the_token_that_is_good_now(
    mail: MailSandbox, server: TokenServer
) -> None:
    mail.tokens = {"access-2"}
    found = await check_credentials(with_oauth(mail, server.url), {}, guard=LOOPBACK)
    assert server.asked == ["refresh-1"]
    assert found.credentials["oauth"]["refresh_token"] == "refresh-2"


async def test_nothing_is_done_with_a_new_token_before_it_is_kept(
    mail: MailSandbox, server: TokenServer
) -> None:
    kept: list[tuple[str, str]] = []
    away = True

    async def keep(old: str, new: str) -> None:
        if away:
            raise DatabaseUnavailable("away")
        kept.append((old, new))

    tokens = tokens_of(mail, server.url, keep=keep)
    for _ in range(2):
        with pytest.raises(Problem) as refused:
            await tokens.token()
        assert (refused.value.code, refused.value.lasting) == ("token_unavailable", False)
    away = False
    assert await tokens.token() == "access-2"
    assert (server.asked, kept) == (["refresh-1"], [("refresh-1", "refresh-2")])
    assert await tokens.token(renew=True) == "access-3"
    assert (server.asked[1:], kept[1:]) == (["refresh-2"], [("refresh-2", "refresh-3")])
    await tokens.close()


async def test_an_answer_under_way_is_not_lost_when_the_log_in_gives_up(
    mail: MailSandbox, server: TokenServer
) -> None:
    kept: list[str] = []

    async def keep(_old: str, new: str) -> None:
        kept.append(new)

    tokens = tokens_of(mail, server.url, keep=keep)
    server.open.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await tokens.token()
    others = [asyncio.create_task(tokens.token()) for _ in range(3)]
    await asyncio.sleep(0.05)
    server.open.set()
    assert await asyncio.gather(*others) == ["access-2"] * 3
    assert (server.asked, kept) == (["refresh-1"], ["refresh-2"])
    # A session that stops in the middle of one waits for it, too.
    server.open.clear()
    stopped = asyncio.create_task(tokens.token(renew=True))
    await eventually(lambda: asyncio.sleep(0, len(server.asked) == 2))
    stopped.cancel()
    asyncio.get_running_loop().call_later(0.1, server.open.set)
    await tokens.close()
    assert kept == ["refresh-2", "refresh-3"]


async def test_a_mailbox_opens_again_after_a_restart_with_the_token_it_was_given_last(
    mail: MailSandbox, server: TokenServer, database: Database, tmp_path: Path
) -> None:
    mail.tokens = {"access-2"}
    row = await stored_session(database, mail, server)
    for life in (2, 3):
        mail.tokens = {f"access-{life}"}
        kinds = {"email": email_kind(Metrics(), SHORT, guard=LOOPBACK)}
        sessions = SessionManager(
            database, Inbox(), Metrics(), kinds, settings_for(tmp_path), owner=f"gw-{life}", keys=KEYS,
            timings=QUICK,
        )  # fmt: skip
        await sessions.start()
        try:
            await want(database, row, "connected")
            await eventually(partial(_is, database, row, f"refresh-{life}"), what=f"refresh-{life}")
            await becomes(database, row, SessionStatus.ACTIVE)
        finally:
            await sessions.stop()
    assert server.asked == ["refresh-1", "refresh-2"]
    text = await value_of(database, row)
    assert b"refresh-3" not in text


async def test_credentials_that_somebody_entered_meanwhile_stay(
    mail: MailSandbox, server: TokenServer, database: Database
) -> None:
    row = await stored_session(database, mail, server)
    secrets = SessionSecrets(database, KEYS, row)
    path = ("oauth", "refresh_token")
    assert await secrets.renewed(path, "refresh-1", "refresh-2")
    assert await secrets.renewed(path, "refresh-1", "refresh-2"), "said twice"
    entered = with_oauth(mail, server.url)
    entered["oauth"]["refresh_token"] = "entered"
    async with database.worker() as conn:
        await sealed.put(conn, KEYS, tenant_id=row.tenant_id, session_id=row.id, credentials=entered)
    assert not await secrets.renewed(path, "refresh-2", "refresh-3")
    assert await stored_token(database, row) == "entered"
    async with database.worker() as conn:
        await sealed.put(
            conn, KEYS, tenant_id=row.tenant_id, session_id=row.id, credentials={"password": "x"}
        )
    assert not await secrets.renewed(path, "entered", "refresh-3")
    assert await secrets.read() == {"password": "x"}


async def stored_session(database: Database, mail: MailSandbox, server: TokenServer) -> SessionRow:
    tenant = await new_tenant(database)
    row = await new_session(database, tenant, channel="email", identifier=mail.account.address)
    async with database.worker() as conn:
        await sealed.put(
            conn, KEYS, tenant_id=tenant, session_id=row.id, credentials=with_oauth(mail, server.url)
        )
    return row


async def _is(database: Database, row: SessionRow, token: str) -> bool:
    return await stored_token(database, row) == token


async def stored_token(database: Database, row: SessionRow) -> str:
    kept = await SessionSecrets(database, KEYS, row).read()
    return str(kept["oauth"]["refresh_token"])


async def value_of(database: Database, row: SessionRow) -> bytes:
    async with database.worker() as conn:
        found: bytes = await conn.fetchval(
            "SELECT ciphertext FROM et_session_credentials WHERE session_id = $1", row.id
        )
    return found
