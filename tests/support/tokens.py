"""A token server on loopback: answers as it is told, or takes each refresh token once and gives another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from sandbox.mail import MailSandbox


@dataclass
class TokenServer:
    """`answers`: the last one is given again and again; None: one refresh token after the other, each good once."""

    answers: list[tuple[int, dict[str, Any]]] | None = None
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """The refresh tokens that came."""
    good: int = 1
    """`refresh-<good>` is the one that is taken."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Clear it to let askers wait."""

    async def answer(self, request: web.Request) -> web.Response:
        came = str((await request.post())["refresh_token"])
        self.asked.append(came)
        if self.answers is not None:
            status, body = self.answers[min(len(self.asked), len(self.answers)) - 1]
        elif came != f"refresh-{self.good}":
            status, body = 400, {"error": "invalid_grant"}
        else:
            self.good += 1
            fresh = {"access_token": f"access-{self.good}", "refresh_token": f"refresh-{self.good}"}
            status, body = 200, {**fresh, "expires_in": 3600}
        await self.open.wait()
        return web.json_response(body, status=status)

    @property
    def token(self) -> str:
        """The newest access token."""
        return f"access-{self.good}"


@asynccontextmanager
async def token_server(
    answers: list[tuple[int, dict[str, Any]]] | None = None,
) -> AsyncIterator[TokenServer]:
    server = TokenServer(answers)
    server.open.set()
    app = web.Application()
    app.router.add_post("/token", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/token"
    try:
        yield server
    finally:
        server.open.set()
        await runner.cleanup()


def with_oauth(mail: MailSandbox, url: str) -> dict[str, Any]:
    """The sandbox's credentials with tokens in the place of the password."""
    given = {name: value for name, value in mail.credentials.items() if name != "password"}
    oauth = {"client_id": "app", "client_secret": "s3cret", "refresh_token": "refresh-1", "token_url": url}
    return {**given, "oauth": oauth}
