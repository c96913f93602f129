"""The proxy does to a connection what it says, and takes it back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import asyncpg
import pytest

from tests.faults.proxy import Proxy


class Echo:
    """A server that remembers what arrived."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.more = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                self.seen += data
                self.more.set()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, Proxy]]:
    remembered = Echo()
    server = await asyncio.start_server(remembered.serve, "127.0.0.1", 0)
    async with Proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield remembered, proxy
    server.close()


async def talk(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"one")
    assert await asyncio.wait_for(reader.readexactly(3), 10) == b"one"
    return reader, writer


async def hears(reader: asyncio.StreamReader, count: int, within: float) -> bytes | None:
    try:
        return await asyncio.wait_for(reader.readexactly(count), within)
    except TimeoutError:
        return None


async def test_a_cut_resets_what_is_open_and_lets_new_connections_in(echo: tuple[Echo, Proxy]) -> None:
    _, proxy = echo
    reader, writer = await talk(proxy)
    proxy.cut()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 10)
    writer.transport.abort()
    _, writer = await talk(proxy)
    writer.transport.abort()


async def test_refusing_takes_nobody_until_it_is_healed(echo: tuple[Echo, Proxy]) -> None:
    _, proxy = echo
    proxy.refuse()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await talk(proxy)
    proxy.heal()
    _, writer = await talk(proxy)
    writer.transport.abort()


async def test_a_blackhole_holds_both_ways_and_delivers_late(echo: tuple[Echo, Proxy]) -> None:
    remembered, proxy = echo
    reader, writer = await talk(proxy)
    proxy.blackhole()
    writer.write(b"two")
    assert await hears(reader, 3, 0.1) is None
    assert remembered.seen == b"one"
    proxy.heal()
    assert await hears(reader, 3, 10) == b"two"
    writer.transport.abort()


async def test_half_open_lets_the_question_through_and_not_the_answer(echo: tuple[Echo, Proxy]) -> None:
    remembered, proxy = echo
    reader, writer = await talk(proxy)
    proxy.half_open()
    remembered.more.clear()
    writer.write(b"two")
    await asyncio.wait_for(remembered.more.wait(), 10)
    assert remembered.seen == b"onetwo"
    assert await hears(reader, 3, 0.1) is None
    proxy.heal()
    assert await hears(reader, 3, 10) == b"two"
    writer.transport.abort()


async def test_a_slow_line_takes_its_time(echo: tuple[Echo, Proxy]) -> None:
    _, proxy = echo
    reader, writer = await talk(proxy)
    proxy.slow(delay=0.1)
    began = time.monotonic()
    writer.write(b"two")
    assert await hears(reader, 3, 10) == b"two"
    assert time.monotonic() - began >= 0.2
    proxy.slow(bytes_per_second=100)
    began = time.monotonic()
    writer.write(b"x" * 10)
    assert await hears(reader, 10, 10)
    assert time.monotonic() - began >= 0.2
    writer.transport.abort()


async def test_a_database_is_reached_through_it(database_url: str) -> None:
    async with Proxy.to_database(database_url) as proxy:
        conn = await asyncpg.connect(proxy.url, timeout=20)
        assert await conn.fetchval("SELECT 41 + 1") == 42
        proxy.cut()
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await conn.fetchval("SELECT 1", timeout=20)
        with suppress(Exception):
            conn.terminate()
