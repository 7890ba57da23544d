"""Sends requests to prefill workers, with aiohttp; each request has its own new connection.

A connection that was kept alive may be dead. When a request fails on it, it is unknown whether
the engine has begun to work on it. A new connection shows at once whether the engine can be
reached.
"""

import asyncio
import contextlib
import errno
import io
import math
import ssl
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from extproc.worker_url import WorkerUrl
from extproc.workers.engine_calls import (
    EngineAnswer,
    EngineTimeoutError,
    EngineUnreachableError,
    PrefillCall,
    PrefillClientOverloadedError,
)

__all__ = ["AiohttpPrefillClient"]

_READ_BYTES: Final = 64 * 1024
_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500
_REFUSAL_SECONDS: Final = 1.0
# Larger bodies are written in pieces, so that one body does not block the event loop.
_PIECEMEAL_BYTES: Final = 256 * 1024


class _AiohttpCall:
    """A PrefillCall; its task reads the answer even while no caller waits for it."""

    def __init__(self, task: "asyncio.Task[EngineAnswer]") -> None:
        self._task = task
        # asyncio reports exceptions that are never retrieved; here they are expected.
        task.add_done_callback(_retrieve)

    async def answer(self) -> EngineAnswer:
        return await self._task

    def cancel(self) -> None:
        self._task.cancel()


class AiohttpPrefillClient:
    """A PrefillClient; `open` and `close` are called in one event loop.

    It adds no headers: the API key of this service must not be sent with clients' requests.
    """

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    def use(self, tls: ssl.SSLContext | None) -> None:
        """Verify https workers with these authorities from now on."""
        self._tls = tls

    def open(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_connected)
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=connector,
            trust_env=False,
            trace_configs=[trace],
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding",),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(
        self,
        url: WorkerUrl,
        path: str,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        *,
        connect_seconds: float,
        answer_seconds: float,
        keep_bytes: int,
    ) -> PrefillCall:
        loop = asyncio.get_running_loop()
        connected: asyncio.Future[None] = loop.create_future()
        timeout = aiohttp.ClientTimeout(
            total=answer_seconds, connect=connect_seconds, ceil_threshold=math.inf
        )
        task = loop.create_task(
            self._send(f"{url}{path}", headers, body, timeout, connected, keep_bytes)
        )
        task.add_done_callback(lambda _: None if connected.done() else connected.set_result(None))
        try:
            await connected
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            task.result()  # raises, unless the engine has answered already
        return _AiohttpCall(task)

    async def _send(
        self,
        url: str,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        timeout: aiohttp.ClientTimeout,
        connected: "asyncio.Future[None]",
        keep_bytes: int,
    ) -> EngineAnswer:
        if self._session is None:
            raise RuntimeError("the client is not open")
        kept = bytearray()
        try:
            # The path stays as the client has sent it. A redirect could send the client's
            # credentials to a host that is not configured.
            async with self._session.post(
                URL(url, encoded=True),
                data=body if len(body) <= _PIECEMEAL_BYTES else io.BytesIO(body),
                headers=CIMultiDict(headers),
                ssl=self._tls if self._tls is not None else True,
                timeout=timeout,
                allow_redirects=False,
                trace_request_ctx={"connected": connected},
            ) as response:
                status = response.status
                if status >= _SERVER_ERROR:
                    return EngineAnswer(status, b"")
                if status >= _CLIENT_ERROR:
                    return await _refusal(response, keep_bytes)
                async for chunk in response.content.iter_chunked(_READ_BYTES):
                    if len(kept) < keep_bytes:
                        kept += chunk[: keep_bytes - len(kept)]
                return EngineAnswer(status, bytes(kept))
        except TimeoutError as error:
            raise EngineTimeoutError(type(error).__name__) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise PrefillClientOverloadedError from error
            raise EngineUnreachableError(str(error) or type(error).__name__) from error


async def _refusal(response: aiohttp.ClientResponse, keep_bytes: int) -> EngineAnswer:
    """A 4xx for the client: the body that comes within a second, its type, when to retry."""
    kept = bytearray()
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_REFUSAL_SECONDS):
            async for chunk in response.content.iter_chunked(_READ_BYTES):
                kept += chunk
                if len(kept) >= keep_bytes:
                    break
    headers = [
        (name, value)
        for name in ("content-type", "retry-after")
        if (value := response.headers.get(name)) is not None
    ]
    return EngineAnswer(response.status, bytes(kept[:keep_bytes]), tuple(headers))


async def _connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    connected = context.trace_request_ctx["connected"]
    if not connected.done():
        connected.set_result(None)


def _retrieve(task: "asyncio.Task[EngineAnswer]") -> None:
    if not task.cancelled():
        task.exception()
