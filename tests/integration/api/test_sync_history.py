"""Asking a session's channel for older messages."""

from __future__ import annotations

import pytest

from core.errors import Conflict
from tests.support.api import Api, Tenant


class Giving:
    def __init__(self, parts: int) -> None:
        self.parts = parts

    async def sync_history(self) -> int:
        if not self.parts:
            raise Conflict("all of it is stored", code="history_only_after_pairing", action="pair again")
        return self.parts


@pytest.mark.parametrize(("parts", "status"), [(3, 202), (0, 409)])
async def test_older_messages_are_asked_for_where_the_channel_has_them(
    api: Api, shop: Tenant, parts: int, status: int
) -> None:
    path = f"/sessions/{shop.id}/{shop.session_id}/sync-history"
    assert (await api.post(path, None, shop.key)).json["code"] == "session_not_here"
    api.manager.capabilities[shop.session_id] = Giving(parts)
    answer = await api.post(path, None, shop.key)
    assert answer.status == status
    if parts:
        assert answer.json == {"success": True, "parts": 3}
    else:
        assert (answer.json["code"], answer.json["action"]) == ("history_only_after_pairing", "pair again")
