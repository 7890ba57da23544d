"""A proxy before the API server, which can make each watch begin at a version that is forgotten."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from aiohttp import web

from .cluster import Cluster

__all__ = ["ApiProxy", "api_proxy"]

# After a restart of the API server it does not remember the first version.
_FORGOTTEN: Final = "1"
_FORWARDED: Final = ("authorization", "accept")


class ApiProxy:
    """`url` is that of the proxy; while `forgets` is set, watches get the server's own 410."""

    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        self.forgets = False
        self.url = ""
        self._server = cluster.url
        self._session = session

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Send the request on, and its answer back as it comes."""
        parameters = dict(request.query)
        if self.forgets and "watch" in parameters:
            parameters["resourceVersion"] = _FORGOTTEN
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        url = f"{self._server}{request.path}"
        try:
            async with self._session.get(url, params=parameters, headers=headers) as answer:
                response = web.StreamResponse(status=answer.status)
                response.content_type = answer.content_type
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response
        except aiohttp.ClientConnectorError:
            return web.Response(status=502)


@asynccontextmanager
async def api_proxy(cluster: Cluster) -> AsyncIterator[ApiProxy]:
    """A proxy with the API server's own certificate."""
    tls = ssl.create_default_context(cafile=str(cluster.ca_file))
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        proxy = ApiProxy(cluster, session)
        app = web.Application()
        app.router.add_get("/{path:.*}", proxy.forward)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=cluster.serving())
        await site.start()
        proxy.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield proxy
        finally:
            await runner.cleanup()
