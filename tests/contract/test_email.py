"""The suite over email."""

from __future__ import annotations

from tests.contract.contract import Contract
from tests.contract.email_peer import EmailPeer


class TestEmail(Contract, peer=EmailPeer): ...
