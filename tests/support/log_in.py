"""A channel of our own that logs in with credentials: a mailbox-like form, and a server that knows one password."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.channel import ChannelKind, CredentialField, Json, LogIn
from core.errors import InvalidField, NotSentError
from tests.support.fake_channel import FakePlatform

RIGHT = "s3cret-of-the-shop"
WRONG = "wr0ng-but-private"


@dataclass
class Desk:
    """The other side: what it was asked, and `kind()`, the registry's line for it."""

    platform: FakePlatform = field(default_factory=FakePlatform)
    asked: list[tuple[Json, dict[str, Any]]] = field(default_factory=list)

    async def check(self, credentials: Json, metadata: Mapping[str, Any]) -> LogIn:
        self.asked.append((credentials, dict(metadata)))
        password, host = credentials.get("password"), credentials.get("server", {}).get("host", "")
        if host == "hangs.test":
            await asyncio.Event().wait()
        if host == "broken.test":
            raise ValueError(f"a bug that prints {password}")
        if host == "away.test":
            raise NotSentError("the server cannot be reached now")
        if not host.endswith(".test"):
            raise InvalidField("credentials.server.host", f"there is no server called {host!r}")
        if password != RIGHT:
            raise InvalidField("credentials.password", f"the server said: 535 {password} is not the password")
        return LogIn(f"desk:{credentials['username']}", {"port": 993, **credentials}, "The shop's desk")

    def kind(self) -> ChannelKind:
        return ChannelKind(
            "desk",
            self.platform.factory,
            files=False,
            check_credentials=self.check,
            form=(
                CredentialField(("username",), "Address", help="shop@example.com"),
                CredentialField(("password",), "Password", "secret"),
                CredentialField(("server", "host"), "Server", default="desk.test"),
                CredentialField(("server", "port"), "Port", "number", required=False),
                CredentialField(
                    ("server", "security"), "Security", "choice", default="tls", choices=("tls", "starttls")
                ),
            ),
        )


def credentials(password: str = RIGHT, host: str = "desk.test", username: str = "shop@desk.test") -> Json:
    return {"username": username, "password": password, "server": {"host": host, "security": "tls"}}
