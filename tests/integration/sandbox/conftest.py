"""A sandbox with one real client linked to it, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def linked() -> AsyncIterator[Linked]:
    async with WhatsAppSandbox() as wa:
        linked = await link(wa)
        try:
            yield linked
        finally:
            await linked.client.kill()
