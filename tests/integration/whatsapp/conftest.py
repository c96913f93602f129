"""Real sessions against the sandbox: the real child with the unmodified library, and a sink in memory."""

from __future__ import annotations

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
from sandbox.whatsapp.world import Device
from tests.support.whatsapp_sink import MemorySink

QUICK = Timings(
    ping=0.3,
    silence=1.0,
    probe=1.0,
    grace=1.0,
    backoff_first=0.05,
    backoff_cap=1.0,
    reconnect=5.0,
    poll=0.1,
    store_retry=0.05,
    store_retry_cap=0.2,
    gate_alarm=3.0,
    send=3.0,
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
) -> Session:
    folder.mkdir(mode=0o700, exist_ok=True)
    context = SessionContext(
        TenantId(1), SessionId(7), "whatsapp", "pending:1", None, metadata or {}, {}, folder
    )
    sink, metrics = MemorySink(), Metrics()
    channel = WhatsAppChannel(
        context, sink, command=tuple(wa.child_command()[0]), metrics=metrics, timings=timings
    )
    return Session(wa, channel, sink, context, metrics, wa.phone(number, "Shop"))


@pytest_asyncio.fixture
async def wa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WhatsAppSandbox]:
    async with WhatsAppSandbox(tmp_path / "sandbox") as sandbox:
        for name, value in sandbox.launch_env().items():
            monkeypatch.setenv(name, value)
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
async def session(session_of: Opener) -> Session:
    """A paired, active session."""
    opened = session_of()
    await opened.pair()
    return opened


@pytest.fixture
def mei(wa: WhatsAppSandbox) -> Phone:
    return wa.person("+60111222333", "Mei", auto_receipts=None)
