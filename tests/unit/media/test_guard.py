"""Which addresses may be reached."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.media.guard import Guard, PrivateAddressError, is_public

PRIVATE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.1", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.100.100.200",
    "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "192.88.99.1", "224.0.0.1",
    "239.1.2.3", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:808:808::1",
    "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "2001:10::1", "3fff::1", "fe80::1", "fe80::1%eth0",
    "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "5f00::1", "100::1", "4000::1", "not an address", "",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001:82a::200e"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(PrivateAddressError):
        Guard().check(address, 443)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_of_the_public_internet(address: str) -> None:
    Guard().check(address, 443)


def test_an_exception_is_for_one_address_and_port() -> None:
    guard = Guard(allow=[("127.0.0.1", 8443)])
    guard.check("127.0.0.1", 8443)
    for host, port in (("127.0.0.1", 443), ("127.0.0.2", 8443)):
        with pytest.raises(PrivateAddressError):
            guard.check(host, port)


def test_the_operators_own_networks_may_be_allowed() -> None:
    guard = Guard(networks=[ipaddress.ip_network("10.0.5.0/24"), ipaddress.ip_network("fd00::/64")])
    for address in ("10.0.5.9", "fd00::9", "8.8.8.8"):
        guard.check(address, 993)
    for address in ("10.0.6.9", "127.0.0.1", "169.254.169.254", "fd00:1::9", "::ffff:10.0.5.9"):
        with pytest.raises(PrivateAddressError):
            guard.check(address, 993)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server on 127.0.0.1 that says which address it was reached at."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_name_of_our_own_network_is_not_connected_to(port: int) -> None:
    for name in ("localhost", "127.0.0.1", "2130706433", "0177.0.0.1", "127.1"):
        with pytest.raises(PrivateAddressError):
            await Guard().connect(name, port)
    sock = await Guard(networks=[ipaddress.ip_network("127.0.0.0/8")]).connect("localhost", port)
    with sock:
        assert await asyncio.get_running_loop().sock_recv(sock, 5) == b"hello"


async def test_a_name_is_resolved_once_and_its_allowed_address_is_the_one_connected_to(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers with another address each time finds no second question."""
    loop = asyncio.get_running_loop()
    answers = [["10.0.0.1", "127.0.0.1"], ["10.0.0.1"]]

    async def resolve(host: str, number: int, **_: Any) -> list[Any]:
        assert host == "rebind.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, number)) for address in answers.pop(0)]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    sock = await Guard(allow=[("127.0.0.1", port)]).connect("rebind.example", port)
    with sock:
        assert sock.getpeername() == ("127.0.0.1", port)
    with pytest.raises(PrivateAddressError):
        await Guard(allow=[("127.0.0.1", port)]).connect("rebind.example", port)
