"""Resolves the host names of workers, since Envoy knows its hosts by `ip:port`."""

import asyncio
import socket
from collections.abc import Collection
from typing import Final, Protocol

from extproc.config.schema import IP_VERSIONS, DnsLookupFamily
from extproc.worker_url import WorkerUrl, format_endpoint

__all__ = ["Resolver", "SystemResolver", "of_one_family"]

_TIMEOUT_SECONDS = 5.0
_SOCKET_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


class Resolver(Protocol):
    """Resolves the host name in a worker's URL."""

    async def resolve(self, url: WorkerUrl) -> tuple[str, ...]:
        """The worker's `ip:port` addresses, the preferred one first; empty without an address."""
        ...


class SystemResolver:
    """The system's resolver, for one choice of families: the one with which Envoy resolves."""

    def __init__(self, family: DnsLookupFamily = "v4_preferred") -> None:
        self._family = family

    async def resolve(self, url: WorkerUrl) -> tuple[str, ...]:
        if url.is_ip:
            return (format_endpoint(url.host, url.port),)
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                found = await asyncio.get_running_loop().getaddrinfo(
                    url.host, url.port, type=socket.SOCK_STREAM
                )
        except (OSError, TimeoutError, UnicodeError):
            return ()
        answers = {(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found}
        hosts = of_one_family(answers, self._family)
        return tuple([format_endpoint(host, url.port) for host in hosts])


def of_one_family(answers: Collection[tuple[int, str]], family: DnsLookupFamily) -> list[str]:
    """The addresses of the first family that has one, without their zones.

    They are sorted, so that the same answer always gives the same first address.
    """
    for version in IP_VERSIONS[family]:
        wanted = _SOCKET_FAMILIES[version]
        hosts = {host.partition("%")[0] for found, host in answers if found == wanted}
        if hosts:
            return sorted(hosts)
    return []
