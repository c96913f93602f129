"""One session per channel for the whole suite, and a check after each behaviour that nothing is left broken."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from core.channel import SessionStatus
from tests.contract.world import World
from tests.support.postgres import PostgresServer


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def shared(
    request: pytest.FixtureRequest,
    postgres_server: PostgresServer,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[World]:
    url = postgres_server.create_database(migrated_template)
    folder = tmp_path_factory.mktemp(request.cls.peer_class.channel)
    async with World(request.cls.peer_class(), url, folder) as world:
        yield world
    postgres_server.drop_database(url)


@pytest_asyncio.fixture(loop_scope="class")
async def world(shared: World) -> AsyncIterator[World]:
    """The session active, nothing broken; and so it is left behind."""
    yield shared
    await shared.peer.come_back()
    if (await shared.row()).status is not SessionStatus.ACTIVE:
        await shared.want("connected")
        await shared.active()
