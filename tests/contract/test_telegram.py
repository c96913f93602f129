"""The suite over Telegram: the Bot API client against the sandbox's server."""

from __future__ import annotations

from tests.contract.contract import Contract
from tests.contract.telegram_peer import TelegramPeer


class TestTelegram(Contract, peer=TelegramPeer): ...
