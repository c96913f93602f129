"""The other side of the channel in docs/adding-a-channel.md, whose code is taken out of that page.

A chat server over HTTP: a numbered log of what customers said, and messages by reference, each taken at most once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import orjson
from aiohttp import web

from core.channel import ChannelKind, Converted, Json, MessageType
from core.metrics import Metrics
from core.settings import Settings
from tests.contract.peer import Arrival, Can, LogIn, Peer, context_for

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-channel.md"
TOKEN, WRONG_TOKEN = "deskchat-token-5fe1", "deskchat-token-wrong-77"
SHOP = "@shop"
TEXT_ALONE = "desk chat carries text alone"


def blocks(language: str) -> list[str]:
    """What stands in the page's fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def load_page(folder: Path) -> Any:
    """The page's Python as a module."""
    path = folder / "deskchat.py"
    path.write_text("\n\n".join(blocks("python")))
    spec = importlib.util.spec_from_file_location("deskchat_of_the_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and typing look modules up by name
    spec.loader.exec_module(module)
    return module


@dataclass
class DeskCustomer:
    server: DeskServer
    name: str
    arrivals: list[Arrival] = field(default_factory=list)
    said: int = 0

    @property
    def external_id(self) -> str:
        return f"deskchat:{self.name}"

    @property
    def address(self) -> str:
        return self.name

    async def say(self, text: str, *, reply_to: str | None = None) -> str:
        self.said += 1
        line: Json = {"id": f"{self.name}/{self.said}", "from": self.name, "text": text}
        self.server.write(line | ({"answers": reply_to} if reply_to else {}))
        return str(line["id"])

    async def send_media(
        self, kind: MessageType, data: bytes, *, mime_type: str, filename: str, caption: str | None = None
    ) -> str:
        raise AssertionError(TEXT_ALONE)

    async def redeliver(self, message_id: str) -> None:
        self.server.write(next(line for line in self.server.log if line["id"] == message_id))


class DeskServer:
    """`faults` are spent one a send: a status, or `cut before`, `cut after`."""

    def __init__(self) -> None:
        self.log: list[Json] = []
        self.people: dict[str, DeskCustomer] = {}
        self.taken: dict[str, Json | None] = {}
        """By reference; None: withdrawn, never to be taken."""
        self.faults: list[int | str] = []
        self.refusing = False
        self.talking = asyncio.Event()
        self.talking.set()
        self._new = asyncio.Event()
        self._site: web.TCPSite | None = None
        self._port = 0

    async def start(self) -> None:
        app = web.Application(middlewares=[self._guarded])
        app.router.add_get("/me", self._me)
        app.router.add_get("/log", self._read)
        app.router.add_post("/messages", self._take)
        app.router.add_delete("/messages/{ref}", self._withdraw)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()

    async def listen(self) -> None:
        if self._site is None:
            self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
            await self._site.start()
            self._port = self._runner.addresses[0][1]

    async def vanish(self) -> None:
        site, self._site = self._site, None
        if site is not None:
            await site.stop()
        self.cut_all()

    def cut_all(self) -> None:
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            connection.force_close()

    async def stop(self) -> None:
        self.talking.set()
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def write(self, line: Json) -> None:
        self.log.append({**line, "n": len(self.log) + 1, "at": int(time.time() * 1000)})
        self._new.set()

    @web.middleware
    async def _guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        await self.talking.wait()
        if self.refusing or request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"why": "unknown token"}, status=401)
        return await handler(request)

    async def _me(self, request: web.Request) -> web.Response:
        return web.json_response({"address": SHOP})

    async def _read(self, request: web.Request) -> web.Response:
        after, wait = int(request.query["after"]), float(request.query["wait"])
        if len(self.log) <= after and wait:
            self._new.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._new.wait()
            except TimeoutError:
                pass
        return web.json_response(self.log[after:])

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.json()
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return web.json_response({"why": "not now, please", "seconds": 0.2}, status=fault)
        if fault != "cut before":
            if body["to"] not in self.people:
                return web.json_response({"why": "there is nobody of that name"}, status=404)
            said = self._deliver(body)
            if fault is None:
                return web.json_response(said or {"why": "withdrawn"}, status=200 if said else 410)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _deliver(self, body: Json) -> Json | None:
        if body["ref"] not in self.taken:
            message_id = f"shop/{len(self.taken) + 1}"
            self.taken[body["ref"]] = {"id": message_id, "at": int(time.time() * 1000)}
            arrival = Arrival(message_id, body["text"], reply_to=body["answers"])
            self.people[body["to"]].arrivals.append(arrival)
        return self.taken[body["ref"]]

    async def _withdraw(self, request: web.Request) -> web.Response:
        said = self.taken.setdefault(request.match_info["ref"], None)
        return web.json_response(said, status=409 if said else 404)


class DeskChatPeer:
    channel: ClassVar[str] = "deskchat"
    cannot: ClassVar[Mapping[Can, str]] = {Can.MEDIA_IN: TEXT_ALONE, Can.MEDIA_OUT: TEXT_ALONE}
    never: ClassVar[Mapping[MessageType, str]] = {
        kind: TEXT_ALONE for kind in MessageType if kind is not MessageType.TEXT
    }

    async def open(self, folder: Path) -> None:
        self.module = load_page(folder)
        self.server = DeskServer()
        await self.server.start()

    async def close(self) -> None:
        await self.server.stop()

    def settings(self) -> Mapping[str, str]:
        return {}

    def kind(self, settings: Settings, metrics: Metrics) -> ChannelKind:
        kind: ChannelKind = self.module.KIND
        return replace(kind, factory=partial(self.module.DeskChat, hold=1.0))

    def log_in(self) -> LogIn:
        return LogIn(SHOP, {"url": self.server.url, "token": TOKEN})

    async def scan(self, qr: str) -> None:
        raise AssertionError("this channel is not paired")

    def secrets(self) -> Sequence[str]:
        return [TOKEN, WRONG_TOKEN]

    def wrong_credentials(self) -> Mapping[str, Json]:
        return {
            "credentials.token": {"url": self.server.url, "token": WRONG_TOKEN},
            "credentials.url": {"url": "http://127.0.0.1:1", "token": TOKEN},
        }

    def customer(self, name: str) -> DeskCustomer:
        return self.server.people.setdefault(name, DeskCustomer(self.server, name))

    def unreachable(self) -> str:
        return "nobody"

    def recorded(self) -> Iterator[tuple[str, Converted]]:
        context = context_for("deskchat", SHOP)
        for number, text in enumerate(blocks("json")):
            yield f"line {number} of the page", Converted((self.module.convert(orjson.loads(text), context),))

    async def throttle_next(self) -> None:
        self.server.faults.append(429)

    async def fail_next(self) -> None:
        self.server.faults.append(503)

    async def cut_before_acceptance(self) -> None:
        self.server.faults.append("cut before")

    async def cut_after_acceptance(self) -> None:
        self.server.faults.append("cut after")

    async def drop_connections(self) -> None:
        await self.server.vanish()

    async def hang(self) -> None:
        self.server.talking.clear()

    async def refuse_login(self) -> None:
        self.server.refusing = True
        self.server.cut_all()

    async def come_back(self) -> None:
        self.server.refusing = False
        self.server.talking.set()
        await self.server.listen()


def _keeps_the_contract() -> Peer:
    peer: Peer = DeskChatPeer()
    return peer
