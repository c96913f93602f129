"""Fixtures shared by every test: a real PostgreSQL server and databases on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support.postgres import PostgresServer

if TYPE_CHECKING:
    from core.database import Database

# The same examples in every run, and no verdict by the clock: a busy machine is not a wrong answer.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The server of this run. Started by the first test that asks; shared, so never kill this one."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def private_postgres() -> Iterator[PostgresServer]:
    """A server of the test's own, to kill, freeze and restart."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh, empty database; its owner is a login that may create roles and is no superuser."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


def migrate_blocking(url: str) -> None:
    """Run the project's migrations from synchronous code: a thread with a loop of its own."""
    from core.migrate import migrate

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(migrate(url))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="migrate")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(scope="session")
def migrated_template(postgres_server: PostgresServer) -> str:
    """The name of a database that was migrated once in this run; copies of it are cheap."""
    url = postgres_server.create_database()
    migrate_blocking(url)
    return url.split("?")[0].rsplit("/", 1)[-1]


@pytest.fixture
def migrated_url(postgres_server: PostgresServer, migrated_template: str) -> Iterator[str]:
    """A fresh database with the whole schema in it."""
    url = postgres_server.create_database(migrated_template)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
async def database(migrated_url: str) -> AsyncIterator[Database]:
    """The project's own database layer, open on a fresh migrated database."""
    from core.database import Database

    opened = await Database.open(migrated_url)
    try:
        yield opened
    finally:
        await opened.close()
