"""Keeps what tenants name (files to fetch, mail servers, token addresses) away from our own network: every address is
judged when the socket is made.

Judging names or resolving twice would leave gaps (IP literals, a name that changes its address between look and use);
the socket factory sees the address that is really connected to.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from typing import Any

import aiohttp

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Global by some version of the book, but they lead elsewhere: to IPv4 addresses wrapped in IPv6, to a cloud's own services.
_DENIED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "2001::/23",  # Teredo, ORCHID, benchmarking
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
        "0.0.0.0/8",
        "100.64.0.0/10",  # also a cloud's metadata
        "168.63.129.16/32",  # a cloud's platform services
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",
        "240.0.0.0/4",
    )
)
# All of IPv6 that was ever given out to be global. Outside: IPv4-mapped (::ffff:0:0/96), NAT64 (64:ff9b::/96), link-local,
# unique local (a cloud's metadata), site-local.
_UNICAST = ipaddress.ip_network("2000::/3")


class PrivateAddressError(OSError):
    """The address is not one of the public internet. An OSError, so that the client tries a name's next address."""


def is_public(host: str) -> bool:
    """Whether a numeric address is one that the whole internet can reach."""
    try:
        address: Address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if address.is_multicast or not address.is_global:
        return False
    if address.version == 6 and address not in _UNICAST:
        return False
    return not any(address in network for network in _DENIED if network.version == address.version)


class Guard:
    """Opens sockets to public addresses alone. `allow`: (address, port) pairs for tests; `networks`: what the operator says
    may be reached as well."""

    def __init__(
        self, allow: Collection[tuple[str, int]] = (), *, networks: Collection[Network] = ()
    ) -> None:
        self._allow = frozenset(allow)
        self._networks = tuple(networks)

    def check(self, host: str, port: int) -> None:
        """Raises PrivateAddressError."""
        if not (is_public(host) or (host, port) in self._allow or self._is_ours(host)):
            raise PrivateAddressError("not a public address")

    def _is_ours(self, host: str) -> bool:
        if not self._networks:
            return False
        address = ipaddress.ip_address(host.partition("%")[0])
        return any(address in network for network in self._networks if network.version == address.version)

    async def connect(self, host: str, port: int) -> socket.socket:
        """A connected, non-blocking socket. The name is resolved once, and what it gave is what is connected to.

        Raises PrivateAddressError when the name has no address that may be reached, OSError when none answers. Waits as
        long as the system does: put a limit around it."""
        loop = asyncio.get_running_loop()
        failed: OSError | None = None
        for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                self.check(str(address[0]), port)
            except PrivateAddressError as error:
                failed = failed or error
                continue
            made = socket.socket(family, kind, protocol)
            try:
                made.setblocking(False)
                await loop.sock_connect(made, address)
            except OSError as error:
                made.close()
                failed = error
            except BaseException:
                made.close()
                raise
            else:
                return made
        raise failed or OSError(f"{host} has no address")

    def connector(self, ssl: Any = True) -> Connector:
        return Connector(self, ssl)


class Connector(aiohttp.TCPConnector):
    """For one fetch: no pool that outlives it, no cache of names. `refused` says that an address was turned down."""

    def __init__(self, guard: Guard, ssl: Any) -> None:
        super().__init__(socket_factory=self._socket, force_close=True, use_dns_cache=False, ssl=ssl)
        self._guard = guard
        self.refused = False

    def _socket(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        try:
            self._guard.check(str(address[0]), int(address[1]))
        except PrivateAddressError:
            self.refused = True
            raise
        return socket.socket(family=family, type=kind, proto=protocol)
