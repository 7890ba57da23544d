"""The uvloop event loop, with two faults of libraries worked around.

To connect a socket, uvloop (0.22) resolves its address once more. Only if the type of socket is
given it sees that there is nothing to resolve. Otherwise it uses a thread, which costs more than
the connection.

gRPC (1.71 to 1.85) loses 80 bytes for each stream that the client has reset, as Envoy does with
most: if its read is cancelled, and if a status is sent to it. So a stream that reads is not
cancelled before the end of the read, which comes in the same moment, and a stream at its end waits
a moment for the cancellation.
"""

import asyncio
import socket
from typing import Any, Final, Protocol

import uvloop

__all__ = [
    "EventLoop",
    "Reads",
    "StreamTask",
    "let_cancellation_come",
]

# The coroutine in which gRPC runs the handler of a stream.
_GRPC_STREAM: Final = "_handle_exceptions"
# The end of the messages is seen first. On a busy machine the cancellation comes a while later.
_CANCELLATION_SECONDS: Final = 0.05


class Reads(Protocol):
    """A stream; `reading` is True while it waits for a message."""

    @property
    def reading(self) -> bool: ...


class StreamTask(asyncio.Task[Any]):
    """The task of a gRPC stream, whose handler sets `stream`.

    A cancellation while the stream reads is only noted: the handler looks at `was_cancelled` when
    the read has ended.
    """

    stream: Reads | None = None
    was_cancelled = False

    def cancel(self, msg: Any = None) -> bool:
        if self.stream is not None and self.stream.reading:
            self.was_cancelled = True
            return True
        return super().cancel(msg)


async def let_cancellation_come() -> None:
    """At the end of a settled stream's messages: is cancelled if the client has reset it."""
    await asyncio.sleep(_CANCELLATION_SECONDS)


class EventLoop(uvloop.Loop):
    """For `asyncio.Runner(loop_factory=EventLoop)`."""

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """As the loop's own method, but streams of gRPC get a StreamTask."""
        if getattr(coro, "__qualname__", "") == _GRPC_STREAM:
            return StreamTask(coro, loop=self, **options)
        return super().create_task(coro, **options)

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
