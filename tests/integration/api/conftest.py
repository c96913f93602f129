"""One running server per test, on a fresh migrated database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.database import Database
from tests.support.api import Api, Tenant, running_api


@pytest.fixture
async def api(database: Database, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(database, tmp_path) as running:
        yield running


@pytest.fixture
async def shop(api: Api) -> Tenant:
    return await api.tenant("shop")


@pytest.fixture
async def platform_key(api: Api) -> str:
    return await api.make_key(None)
