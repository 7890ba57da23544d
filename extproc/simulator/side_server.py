"""A second server of a worker at which other workers fetch KV, and the client for it."""

import asyncio
from collections.abc import Iterable
from typing import Final

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from extproc.simulator.binding import Listener, listen

__all__ = ["UNREACHABLE", "SideServer", "patient_client"]

# Failures of a connection, and invalid addresses.
UNREACHABLE: Final = (aiohttp.ClientError, OSError, ValueError)
_SHUTDOWN_SECONDS = 1.0  # handlers were cancelled already


class SideServer:
    """Serves these routes between `start` and `stop`; `port` is the real one after the start.

    A client that disconnects cancels its handler; a stop cancels all of them.
    """

    def __init__(self, setting: str, host: str, port: int, routes: Iterable[web.RouteDef]) -> None:
        """`setting` names the port in errors; `port` 0 picks a free one at the first start."""
        self.port = port
        self._setting = setting
        self._host = host
        self._routes = list(routes)
        self._listener: Listener | None = None
        self._handlers: set[asyncio.Task[object]] = set()

    async def start(self) -> None:
        """Listen; raises OSError, which names the setting, when the port cannot be bound."""
        app = web.Application(middlewares=[self._tracked])
        app.add_routes(self._routes)
        app.on_shutdown.append(self._break_off)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        try:
            self._listener = await listen(runner, self._host, self.port)
        except OSError as error:
            place = f"{self._host}:{self.port}"
            raise OSError(error.errno, f"{self._setting}: {place}: {error.strerror}") from error
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.stop()

    @web.middleware
    async def _tracked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("requests are handled in tasks")
        self._handlers.add(task)
        try:
            return await handler(request)
        finally:
            self._handlers.discard(task)

    async def _break_off(self, app: web.Application) -> None:
        for task in self._handlers:
            task.cancel()


def patient_client() -> aiohttp.ClientSession:
    """A client without a time-out that uses a new connection for each request."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    )
