"""The only wiring: builds every part from the settings, starts them in order, and stops them in the reverse one.

Holds no logic of its own. A part that cannot start raises a `GatewayError` whose text is the one line a person needs.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import web

from core import log, sending
from core.audit_trail import AuditTrail
from core.channel import Channel, ChannelKind, SessionContext, Sink
from core.database import Database, open_owner
from core.decide.rules import RulesDecider
from core.embedded import EmbeddedPostgres
from core.errors import SettingsError
from core.inbound import InboundWorker
from core.ingest import Ingest
from core.journal import Journal
from core.metrics import Metrics
from core.migrate import migrate
from core.outbound import OutboundWorker
from core.pilot import PilotKeeper
from core.secrets import KeyRing
from core.settings import Settings
from gateway import console
from gateway.api import Runner, Services, WebhookSpool, ensure_platform_key, make_app
from gateway.api.problems import Problem
from gateway.api.routing import KEYS
from gateway.email.kind import email_kind
from gateway.media import MediaStore, MediaWorker, OutgoingMedia
from gateway.media.guard import Guard
from gateway.sessions import SessionManager
from gateway.telegram import kind as telegram
from gateway.whatsapp.channel import WhatsAppChannel
from gateway.whatsapp.convert import convert_webhook
from gateway.whatsapp.settings import check as check_whatsapp_settings

logger = log.get(part="app")

STOP_SECONDS = 10
LAG_INTERVAL = 0.01
"""Seconds. A loop that is held up for so long or less may go unseen: what is measured is at most this too little."""


def registry(settings: Settings, metrics: Metrics) -> dict[str, ChannelKind]:
    """Every channel the gateway knows. A new one is a folder and a line here."""

    def whatsapp(context: SessionContext, sink: Sink) -> Channel:
        return WhatsAppChannel(context, sink, command=settings.whatsapp_command, metrics=metrics)

    return {
        "whatsapp": ChannelKind(
            "whatsapp",
            whatsapp,
            webhook=convert_webhook,
            settings=check_whatsapp_settings,
        ),
        "email": email_kind(metrics, guard=Guard(networks=settings.mail_private_networks)),
        "telegram": telegram(settings),
    }


class Gateway:
    """One gateway process. `without={"worker"}` leaves the inbound worker out: the demo's own test proves that it notices.

    Use as `async with Gateway(settings) as gateway:`; `gateway.url` is where it listens.
    """

    def __init__(self, settings: Settings, *, without: Collection[str] = ()) -> None:
        self.settings = settings
        self.without = frozenset(without)
        self.metrics = Metrics()
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.new_platform_key: str | None = None
        self.database_url = ""
        self.url = ""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Gateway:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        started = time.monotonic()
        try:
            await asyncio.wait_for(self._stack.aclose(), STOP_SECONDS)
        except TimeoutError:
            logger.error("gateway.stop_timed_out", action="ending all the same", seconds=STOP_SECONDS)
        logger.info("gateway.stopped", duration_ms=round((time.monotonic() - started) * 1000))

    async def _start(self) -> None:
        settings, metrics = self.settings, self.metrics
        data_dir = writable_directory(settings.data_dir)
        writable_directory(settings.whatsapp_dir, name="WHATSAPP_SESSION_DIR")

        self.database_url = await self._database_url(data_dir)
        async with open_owner(self.database_url) as owner_connection:
            for name in await migrate(owner_connection):
                logger.info("migration.applied", action=name)
        self.database = await Database.open(self.database_url, application_name="channel-gateway")
        self._stack.push_async_callback(self.database.close)

        keys = KeyRing.from_settings(settings)
        kinds = registry(settings, metrics)
        metrics.expect_channels(kinds)
        self.ingest = Ingest(self.database, metrics)
        await self._run(self.ingest.start, self.ingest.stop)
        store = MediaStore(writable_directory(settings.media_dir))
        media = OutgoingMedia(self.database, store, metrics=metrics)
        self.sessions = SessionManager(
            self.database,
            self.ingest,
            metrics,
            kinds,
            settings,
            owner=self.owner,
            keys=keys,
            prepare=media.prepare,
        )
        self.downloads = MediaWorker(self.database, metrics, store, self.sessions)
        self.outbound = OutboundWorker(
            self.database,
            metrics,
            self.sessions,
            owner=self.owner,
            max_attempts=settings.outbound_max_attempts,
            sending={name: sending.read(kind.sending) for name, kind in kinds.items()},
        )
        self.inbound = InboundWorker(
            self.database,
            metrics,
            {"rules": RulesDecider()},
            owner=self.owner,
            poll_seconds=settings.inbound_poll_seconds,
            rush=self.ingest.rush,
        )
        spool_dir = writable_directory(settings.spool_dir)
        journal = await asyncio.to_thread(Journal, spool_dir / "journal.db")
        self._stack.push_async_callback(asyncio.to_thread, journal.close)
        kept = await asyncio.to_thread(Journal, spool_dir / "audit.db")
        self._stack.push_async_callback(asyncio.to_thread, kept.close)
        self.audit = AuditTrail(self.database, kept)
        self.spool = WebhookSpool(journal, self.database, self.ingest, kinds, metrics)
        # Stopped the other way round: first nothing new is decided or claimed, calls under way end, then the sessions.
        await self._run(self.sessions.start, self.sessions.stop)
        await self._run(self.downloads.start, self.downloads.stop)
        self.pilot = PilotKeeper(self.database, metrics)
        await self._run(self.pilot.start, self.pilot.stop)
        await self._run(self.audit.start, self.audit.stop)
        await self._run(self.spool.start, self.spool.stop)
        await self._run(self.outbound.start, self.outbound.stop)
        if "worker" not in self.without:
            await self._run(self.inbound.start, self.inbound.stop)

        self.new_platform_key = await ensure_platform_key(self.database, settings)
        services = Services(
            db=self.database,
            ingest=self.ingest,
            sessions=self.sessions,
            spool=self.spool,
            metrics=metrics,
            settings=settings,
            inbound=self.inbound,
            outbound=self.outbound,
            registry=kinds,
            keys=keys,
            owner=self.owner,
            downloads=self.downloads,
            media=media,
            audit=self.audit,
        )
        app = make_app(services)
        console.install(
            app,
            db=self.database,
            authenticate=key_checker(app),
            kinds={name: kind for name, kind in kinds.items() if kind.factory},
            keys=keys,
            media=media,
        )
        await self._listen(app)
        lag = asyncio.create_task(self._measure_lag(), name="loop-lag")
        self._stack.callback(lag.cancel)
        logger.info("gateway.started", action=self.url, owner=self.owner)

    async def _run(self, start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]) -> None:
        await start()
        self._stack.push_async_callback(stop)

    async def _database_url(self, data_dir: Path) -> str:
        if self.settings.database_url is not None:
            return self.settings.database_url.get_secret_value()
        embedded = EmbeddedPostgres(data_dir / "postgres")
        url = await embedded.start()
        self._stack.push_async_callback(embedded.stop)
        logger.info("database.embedded", action="DATABASE_URL is unset: using the embedded server")
        return url

    async def _listen(self, app: web.Application) -> None:
        host, port = self.settings.host, self.settings.port
        runner = Runner(app, access_log=None, shutdown_timeout=3)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, host, port, reuse_address=True).start()
        except OSError as error:
            raise SettingsError(_why_not_listening(host, port, error)) from None
        address = runner.addresses[0]
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{shown}:{address[1]}"

    async def _measure_lag(self) -> None:
        """The worst delay of a timer in the last interval: what a blocked loop looks like from outside."""
        worst, until = 0.0, time.monotonic() + 10
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL)
            now = time.monotonic()
            worst = max(worst, now - before - LAG_INTERVAL)
            if now > until:
                self.metrics.loop_lag.set(worst)
                worst, until = 0.0, now + 10


async def serve(settings: Settings) -> None:
    """Run until SIGINT or SIGTERM, then stop cleanly within 10 s."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Gateway(settings) as gateway:
        if gateway.new_platform_key:
            # Once and never again: only its hash is stored.
            print(f"platform key (shown once): {gateway.new_platform_key}", flush=True)
        await stop.wait()
        logger.info("gateway.stopping")


def key_checker(app: web.Application) -> Callable[[str], Awaitable[console.Principal]]:
    """How the console proves a key: as the API does."""

    async def check(key: str) -> console.Principal:
        try:
            return await app[KEYS].principal(key)
        except Problem as problem:
            raise console.SignInRefused(problem.detail, problem.status) from None

    return check


def writable_directory(path: Path, *, name: str = "DATA_DIR") -> Path:
    """The resolved directory, made when missing. Raises SettingsError when nothing can be stored there."""
    path = path.resolve()
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"{name}={path}: nothing can be written there ({error.strerror}); name a folder this user may write to"
        ) from None
    return path


def _why_not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"PORT={port}: another program listens there already; choose another PORT"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"PORT={port}: this user may not listen there; choose a PORT from 1024 up"
    return f"HOST={host}: cannot listen there ({error.strerror}); name an address of this machine"
