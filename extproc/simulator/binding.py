"""Binds sockets while a port is still taken, and finds the host that clients can dial."""

import asyncio
import errno
import ipaddress
from collections.abc import Awaitable, Callable

from aiohttp import web

__all__ = ["dialled", "listen", "with_patience"]

_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.02


async def with_patience(bind: Callable[[], Awaitable[None]]) -> None:
    """Bind; try again for a moment while a port is taken.

    A worker that was killed gives its ports back a moment later, when another may be starting
    in its place. Raises OSError.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _PATIENCE_SECONDS
    while True:
        try:
            return await bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or loop.time() >= deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)


async def listen(runner: web.AppRunner, host: str, port: int, *, backlog: int = 128) -> None:
    """Set a server up and bind it with patience. Raises OSError and then leaves nothing open."""

    async def bind() -> None:
        site = web.TCPSite(runner, host, port, backlog=backlog)
        try:
            await site.start()
        except OSError:
            await site.stop()
            raise

    await runner.setup()
    try:
        await with_patience(bind)
    except BaseException:
        await runner.cleanup()
        raise


def dialled(host: str) -> str:
    """The host a client on this machine uses for a worker that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "127.0.0.1"
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"
