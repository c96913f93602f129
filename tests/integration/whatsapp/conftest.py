"""Real sessions against the sandbox: the real child with the unmodified library, and a sink in memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from core.channel import (
    Attempt,
    MessageId,
    MessageType,
    OutboundMessage,
    QueueId,
    Quoted,
    SessionContext,
    SessionId,
    TenantId,
)
from core.journal import Journal
from core.metrics import Metrics
from gateway.whatsapp.channel import WhatsAppChannel
from gateway.whatsapp.protocol import journal_path
from gateway.whatsapp.timings import Timings
from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from sandbox.whatsapp.world import Device, load, save
from tests.support.whatsapp_sink import MemorySink

QUICK = Timings(
    ping=0.3,
    pong=2.0,
    silence=1.0,
    probe=2.0,
    grace=1.0,
    backoff_first=0.05,
    backoff_cap=1.0,
    reconnect=15.0,
    poll=0.1,
    store_retry=0.05,
    store_retry_cap=0.2,
    gate_alarm=3.0,
    send=3.0,
    resolve=0.5,
    link=2.0,
)


@dataclass
class Session:
    """A WhatsApp session on the sandbox."""

    wa: WhatsAppSandbox
    channel: WhatsAppChannel
    sink: MemorySink
    context: SessionContext
    metrics: Metrics
    shop: Phone
    device: Device | None = None
    queue: int = field(default=100)

    @property
    def pid(self) -> int:
        child = self.channel._supervisor.child
        assert child is not None
        return child.pid

    async def pair(self) -> Device:
        await self.channel.pair_qr()
        self.device = await self.shop.scan(await self.sink.code())
        await self.sink.stands("active")
        await self.wa.wait_online(self.device)
        return self.device

    def attempt(self, recipient: str, *, queue_id: int | None = None, epoch: int = 1) -> Attempt:
        self.queue += 1
        return Attempt(
            self.context.tenant_id,
            self.context.session_id,
            QueueId(queue_id or self.queue),
            MessageId(1),
            epoch,
            recipient,
        )

    def text(
        self, recipient: str, text: str, *, quoted: Quoted | None = None, **fields: Any
    ) -> OutboundMessage:
        return OutboundMessage(
            self.attempt(recipient, **fields), MessageType.TEXT, content=text, quoted=quoted
        )

    def journaled(self) -> set[str]:
        """Ids of the messages in the journal."""
        with Journal(journal_path(self.context.folder)) as journal:
            return {key.partition(" ")[0] for key in journal.keys("message")}


Opener = Callable[..., Session]


def make_session(
    wa: WhatsAppSandbox,
    folder: Path,
    number: str = "+60123456789",
    *,
    timings: Timings = QUICK,
    metadata: dict[str, Any] | None = None,
    credentials: dict[str, Any] | None = None,
) -> Session:
    folder.mkdir(mode=0o700, exist_ok=True)
    context = SessionContext(
        TenantId(1), SessionId(7), "whatsapp", "pending:1", None, metadata or {}, credentials or {}, folder
    )
    sink, metrics = MemorySink(), Metrics()
    channel = WhatsAppChannel(
        context, sink, command=tuple(wa.child_command()[0]), metrics=metrics, timings=timings
    )
    return Session(wa, channel, sink, context, metrics, wa.phone(number, "Shop"))


@dataclass(frozen=True)
class Template:
    """A sandbox and a session that were paired once; copies of them are cheap, pairing is not (812 keys)."""

    sandbox: Path
    session: Path


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("paired")
    with pytest.MonkeyPatch.context() as patch:
        async with WhatsAppSandbox(folder / "sandbox") as wa:
            for name, value in wa.launch_env().items():
                patch.setenv(name, value)
            session = make_session(wa, folder / "session")
            try:
                await session.pair()
            finally:
                await session.channel.disconnect()
    state = folder / "sandbox" / "state.pickle"
    world = load(state)
    assert world is not None
    world.ports.clear()  # each copy listens on ports of its own
    save(world, state, clean=True)
    return Template(folder / "sandbox", folder / "session")


@contextlib.asynccontextmanager
async def sandbox_at(folder: Path) -> AsyncIterator[WhatsAppSandbox]:
    """A running sandbox, and the environment that leads children to it."""
    with pytest.MonkeyPatch.context() as patch:
        async with WhatsAppSandbox(folder) as wa:
            for name, value in wa.launch_env().items():
                patch.setenv(name, value)
            yield wa


async def resume(wa: WhatsAppSandbox, folder: Path, **options: Any) -> Session:
    """A session of the template, active again."""
    session = make_session(wa, folder, **options)
    [session.device] = session.shop.devices
    await session.channel.connect()
    await session.sink.stands("active", timeout=40)
    await wa.wait_online(session.device)
    return session


@pytest_asyncio.fixture
async def wa(tmp_path: Path) -> AsyncIterator[WhatsAppSandbox]:
    async with sandbox_at(tmp_path / "sandbox") as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def session_of(wa: WhatsAppSandbox, tmp_path: Path) -> AsyncIterator[Opener]:
    """Make sessions; each is disconnected when the test ends."""
    async with AsyncExitStack() as stack:

        def make(number: str = "+60123456789", *, folder: Path | None = None, **options: Any) -> Session:
            session = make_session(wa, folder or tmp_path / f"session{number}", number, **options)
            stack.push_async_callback(session.channel.disconnect)
            return session

        yield make


@pytest_asyncio.fixture
async def session(template: Template, tmp_path: Path) -> AsyncIterator[Session]:
    """A paired, active session on a sandbox of its own."""
    shutil.copytree(template.sandbox, tmp_path / "sandbox")
    shutil.copytree(template.session, tmp_path / "session")
    async with sandbox_at(tmp_path / "sandbox") as wa:
        opened = None
        try:
            opened = await resume(wa, tmp_path / "session")
            yield opened
        finally:
            if opened is not None:
                await opened.channel.disconnect()


@pytest.fixture
def mei(session: Session) -> Phone:
    return session.wa.person("+60111222333", "Mei", auto_receipts=None)
