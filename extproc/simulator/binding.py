"""Binds sockets while a port is still taken, and finds the host that clients can dial."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable

from aiohttp import web

__all__ = ["Listener", "dialled", "listen", "with_patience"]

_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.02
# Turns of the event loop from the accept of a connection until its server knows it, with room.
_ACCEPT_TURNS = 5


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


class Listener:
    """A server that listens on one socket."""

    def __init__(self, runner: web.AppRunner, listening: socket.socket) -> None:
        self._runner = runner
        self._listening = listening

    async def stop(self) -> None:
        """Close all connections, also those that are being accepted; a second call does nothing.

        A connection is known to the server some turns of the event loop after its accept. If
        the server closes in between, asyncio (3.11 to 3.13) leaves the connection open. So the
        accepts stop first.
        """
        if self._listening.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listening)
            for _ in range(_ACCEPT_TURNS):
                await asyncio.sleep(0)
        await self._runner.cleanup()


async def listen(runner: web.AppRunner, host: str, port: int, *, backlog: int = 128) -> Listener:
    """Set a server up and bind it with patience. Raises OSError and then leaves nothing open."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening: list[socket.socket] = []

    async def bind() -> None:
        listening.append(socket.create_server((host, port), family=family, backlog=backlog))

    await runner.setup()
    try:
        await with_patience(bind)
        await web.SockSite(runner, listening[0], backlog=backlog).start()
    except BaseException:
        for one in listening:
            one.close()
        await runner.cleanup()
        raise
    return Listener(runner, listening[0])


def dialled(host: str) -> str:
    """The host a client on this machine uses for a worker that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "127.0.0.1"
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"
