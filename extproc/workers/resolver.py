"""Resolves the host names of workers, since Envoy knows its hosts by `ip:port`."""

import asyncio
import socket
from typing import Protocol

from extproc.worker_url import WorkerUrl, format_endpoint

__all__ = ["Resolver", "SystemResolver"]

_TIMEOUT_SECONDS = 5.0


class Resolver(Protocol):
    """Resolves the host name in a worker's URL."""

    async def resolve(self, url: WorkerUrl) -> tuple[str, ...]:
        """The worker's `ip:port` addresses, the preferred one first; empty without an address."""
        ...


class SystemResolver:
    """The system's resolver; it prefers IPv4, like the cluster that is rendered for Envoy."""

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
        families = (socket.AF_INET, socket.AF_INET6)
        addresses = [
            format_endpoint(str(sockaddr[0]).partition("%")[0], url.port)
            for family in families
            for found_family, _, _, _, sockaddr in found
            if found_family == family
        ]
        # One family, sorted, so that the same answer always gives the same first address.
        ipv4 = [address for address in addresses if not address.startswith("[")]
        return tuple(sorted(set(ipv4 or addresses)))
