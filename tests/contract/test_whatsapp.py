"""The suite over WhatsApp: the real client against the sandbox."""

from __future__ import annotations

from tests.contract.contract import Contract
from tests.contract.whatsapp_peer import WhatsAppPeer


class TestWhatsApp(Contract, peer=WhatsAppPeer): ...
