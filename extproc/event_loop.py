"""The uvloop event loop, without a thread for every connection to an IP address.

To connect a socket, uvloop (0.22) resolves its address once more. Only if the type of socket is
given it sees that there is nothing to resolve. Otherwise it uses a thread, which costs more than
the connection.
"""

import socket
from typing import Any

import uvloop

__all__ = ["EventLoop"]


class EventLoop(uvloop.Loop):
    """For `asyncio.Runner(loop_factory=EventLoop)`."""

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 (asyncio's name)
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """As the loop's own method, but for stream sockets unless a type is given."""
        return await super().getaddrinfo(
            host,
            port,
            family=family,
            type=type or socket.SOCK_STREAM,
            proto=proto,
            flags=flags,
        )
