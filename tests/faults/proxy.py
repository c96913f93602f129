"""A TCP proxy between a gateway and its database (or any server): it delays, slows, cuts, half-opens and blackholes.

Forwards bytes and reads none of them. Runs in the loop of the harness; one for each gateway that is to be cut off alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, quote, urlsplit

CHUNK = 1 << 16


@dataclass(eq=False)
class _Pair:
    """One client's connection and ours to the server."""

    writers: list[asyncio.StreamWriter]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def abort(self) -> None:
        """Both sides see a reset at once."""
        for writer in self.writers:
            raw: socket.socket | None = writer.get_extra_info("socket")
            if raw is not None and raw.family == socket.AF_INET:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()
        for task in self.tasks:
            task.cancel()


class Proxy:
    """`async with Proxy.to_database(url) as proxy:`; hand `proxy.url` to the gateway.

    The faults can be combined and taken back at any time; they act on what is connected and on what connects next.
    """

    def __init__(self, target: str | Path, port: int = 0, *, url: str = "") -> None:
        """`target`: a host with `port`, or a unix socket."""
        self._target = target
        self._target_port = port
        self._url = url
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None
        self._flow = {"up": asyncio.Event(), "down": asyncio.Event()}
        for event in self._flow.values():
            event.set()
        self._refusing = False
        self._delay = 0.0
        self._rate: float | None = None
        self.port = 0
        self.accepted = 0

    @classmethod
    def to_database(cls, url: str) -> Proxy:
        """In front of the server of this PostgreSQL URL, over TCP or a unix socket."""
        parts = urlsplit(url)
        host = parse_qs(parts.query).get("host", [parts.hostname or "127.0.0.1"])[0]
        port = int(parse_qs(parts.query).get("port", [parts.port or 5432])[0])
        if host.startswith("/"):
            return cls(Path(host) / f".s.PGSQL.{port}", url=url)
        return cls(host, port, url=url)

    # ---- life ----

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [task for pair in self._pairs for task in pair.tasks]
        self.cut()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    async def __aenter__(self) -> Proxy:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """The database's URL, by way of this proxy."""
        parts = urlsplit(self._url)
        user = quote(parts.username or "", safe="")
        if parts.password:
            user += f":{quote(parts.password, safe='')}"
        return f"postgresql://{user}@127.0.0.1:{self.port}{parts.path}"

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    # ---- faults ----

    def cut(self) -> None:
        """Reset everything that is connected. New connections are taken."""
        for pair in list(self._pairs):
            pair.abort()

    def refuse(self) -> None:
        """Reset what is connected and whatever connects, until `heal`."""
        self._refusing = True
        self.cut()

    def blackhole(self) -> None:
        """Connections stay open and new ones are taken, but no byte goes through either way."""
        for event in self._flow.values():
            event.clear()

    def half_open(self) -> None:
        """What the gateway says arrives, what the server answers does not: commits happen and nobody hears of it."""
        self._flow["down"].clear()

    def slow(self, *, delay: float = 0.0, bytes_per_second: float | None = None) -> None:
        """Each piece waits `delay` seconds each way, and no more than so many bytes pass in a second."""
        self._delay, self._rate = delay, bytes_per_second

    def heal(self) -> None:
        """Take every fault back. What a blackhole held goes through now, late."""
        self._refusing = False
        self._delay, self._rate = 0.0, None
        for event in self._flow.values():
            event.set()

    def break_off(self) -> None:
        """Reset everything, and heal: what was held back never arrives."""
        self.cut()
        self.heal()

    # ---- forwarding ----

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        pair = _Pair([writer])
        current = asyncio.current_task()
        assert current is not None
        pair.tasks.append(current)
        self._pairs.add(pair)
        try:
            if self._refusing:
                return
            try:
                up_reader, up_writer = await self._connect()
            except OSError:
                return
            pair.writers.append(up_writer)
            async with asyncio.TaskGroup() as group:
                pair.tasks.append(group.create_task(self._pump("up", reader, up_writer)))
                pair.tasks.append(group.create_task(self._pump("down", up_reader, writer)))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._pairs.discard(pair)
            for end in pair.writers:
                end.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(str(self._target))
        return await asyncio.open_connection(self._target, self._target_port)

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if self._delay:
                await asyncio.sleep(self._delay)
            if self._rate:
                await asyncio.sleep(len(data) / self._rate)
            await self._flow[way].wait()
            writer.write(data)
            await writer.drain()
        # One side has ended: the other hears of it once everything has arrived.
        await self._flow[way].wait()
        with contextlib.suppress(OSError):
            writer.write_eof()
