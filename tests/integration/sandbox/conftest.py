"""A sandbox with one real client linked to it, shared by all modules that leave it linked and connected."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio

from sandbox.whatsapp.phone import Phone
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from sandbox.whatsapp.world import Device
from tests.support.whatsapp_real import RealClient


@dataclass
class Linked:
    wa: WhatsAppSandbox
    shop: Phone
    mei: Phone
    client: RealClient
    device: Device

    @property
    def database(self) -> str:
        return f"{self.wa.folder}/session.db"


async def link(wa: WhatsAppSandbox, number: str = "+60123456789") -> Linked:
    """Start a client and scan its first QR code."""
    shop, mei = wa.phone(number, "Shop"), wa.person("+60111222333", "Mei", auto_receipts=None)
    client = await RealClient.start(wa)
    linked = Linked(wa, shop, mei, client, None)  # type: ignore[arg-type]  # set in the next lines
    await client.do("connect", db=linked.database)
    linked.device = await shop.scan((await client.wait("qr"))["qr"])
    await client.wait("ConnectedEv")
    await wa.wait_online(linked.device)
    return linked


@contextmanager
def quick_folder() -> Iterator[Path]:
    """In memory where there is such a place: the client's library writes 812 keys to disk one by one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="wa-sandbox-", dir=memory) as folder:
        yield Path(folder)


@asynccontextmanager
async def a_sandbox() -> AsyncIterator[WhatsAppSandbox]:
    with quick_folder() as folder:
        async with WhatsAppSandbox(folder) as wa:
            yield wa


@asynccontextmanager
async def linking() -> AsyncIterator[Linked]:
    async with a_sandbox() as wa:
        found = await link(wa)
        try:
            yield found
        finally:
            await found.client.kill()


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def linked() -> AsyncIterator[Linked]:
    async with linking() as found:
        yield found
