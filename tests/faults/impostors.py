"""What can listen in a dead worker's place: servers that accept and then misbehave."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final

__all__ = ["silent", "swallowing", "with_wrong_length"]

_SHORT: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{}"
)
_FILLING_CONNECTIONS: Final = 4
_HOST: Final = "127.0.0.1"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def silent(port: int) -> AsyncIterator[None]:
    """Accepts and reads, and never answers or closes: the other side of a half-open connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async with _serving(port, handle):
        yield


@contextlib.asynccontextmanager
async def with_wrong_length(port: int) -> AsyncIterator[None]:
    """Answers with fewer bytes than its content-length says, then closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_SHORT)
        await writer.drain()

    async with _serving(port, handle):
        yield


@contextlib.asynccontextmanager
async def _serving(port: int, handle: Handler) -> AsyncIterator[None]:
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await handle(reader, writer)
        except asyncio.CancelledError:
            pass  # the end of the impostor
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(run, _HOST, port, reuse_address=True)
    try:
        yield
    finally:
        server.close()
        for task in tasks.copy():
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def swallowing(port: int) -> Iterator[None]:
    """Listens with a full backlog, so that the system drops every further SYN."""
    with contextlib.ExitStack() as exits:
        listener = exits.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen(0)
        for _ in range(_FILLING_CONNECTIONS):
            filling = exits.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect((_HOST, port))
        yield
