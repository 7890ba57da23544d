"""Asks engines about themselves over HTTP, with aiohttp; one session for all workers."""

import ssl
from types import TracebackType
from typing import Self

import aiohttp

from extproc.worker_url import WorkerUrl
from extproc.workers.engine_calls import EngineAnswer, EngineTimeoutError, EngineUnreachableError

__all__ = ["AiohttpIntrospectionClient"]

_ANSWER_MAX_BYTES = 8 * 1024 * 1024


class AiohttpIntrospectionClient:
    """An IntrospectionClient and a TokensClient; it is used as an async context manager.

    `api_key` is sent to every worker. `tls` verifies https workers, by default with the
    system's authorities.
    """

    def __init__(self, api_key: str | None, tls: ssl.SSLContext | None) -> None:
        self.use(api_key, tls)
        self._session: aiohttp.ClientSession | None = None

    def use(self, api_key: str | None, tls: ssl.SSLContext | None) -> None:
        """Take another key or other authorities for the requests from now on."""
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._tls = tls

    async def __aenter__(self) -> Self:
        # A proxy from the environment is not meant for traffic inside the cluster.
        self._session = aiohttp.ClientSession(trust_env=False)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, url: WorkerUrl, path: str, timeout_seconds: float) -> EngineAnswer:
        return await self._ask("GET", f"{url}{path}", None, timeout_seconds, _ANSWER_MAX_BYTES)

    async def post(
        self, url: WorkerUrl, path: str, body: bytes, timeout_seconds: float, max_bytes: int
    ) -> EngineAnswer:
        """See TokensClient."""
        return await self._ask("POST", f"{url}{path}", body, timeout_seconds, max_bytes)

    async def _ask(
        self, method: str, url: str, body: bytes | None, timeout_seconds: float, max_bytes: int
    ) -> EngineAnswer:
        if self._session is None:
            raise RuntimeError("the client is used outside its context")
        headers = self._headers
        if body is not None:
            headers = {**headers, "content-type": "application/json"}
        try:
            # A redirect could send the API key to a host that is not configured.
            async with self._session.request(
                method,
                url,
                data=body,
                headers=headers,
                ssl=self._tls if self._tls is not None else True,
                timeout=aiohttp.ClientTimeout(total=timeout_seconds),
                allow_redirects=False,
            ) as response:
                received = bytearray()
                async for chunk in response.content.iter_chunked(64 * 1024):
                    received += chunk
                    if len(received) > max_bytes:
                        raise EngineUnreachableError("the answer is too large")
                return EngineAnswer(response.status, bytes(received))
        except TimeoutError as error:
            raise EngineTimeoutError("no answer in time") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineUnreachableError(str(error) or type(error).__name__) from error
