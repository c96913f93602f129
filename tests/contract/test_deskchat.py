"""The suite over the channel that docs/adding-a-channel.md is about: what a newcomer reads there works."""

from __future__ import annotations

from pathlib import Path

from tests.contract.contract import Contract
from tests.contract.deskchat_peer import DeskChatPeer, blocks

SCHEMA = Path(__file__).parents[2] / "schema"


class TestDeskChat(Contract, peer=DeskChatPeer): ...


def test_it_is_about_a_hundred_lines_and_needs_no_schema_change() -> None:
    lines = [line for block in blocks("python") for line in block.splitlines() if line.strip()]
    assert len(lines) < 150
    assert not [path for path in SCHEMA.glob("*.sql") if "deskchat" in path.read_text()]
