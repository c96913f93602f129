"""The suite over the in-process channel."""

from __future__ import annotations

from tests.contract.contract import Contract
from tests.contract.fake_peer import FakePeer


class TestFake(Contract, peer=FakePeer): ...
