"""Lists and watches objects of one kind at the API server of a Kubernetes cluster.

lightkube connects, authenticates and decodes. What it lacks for a watch that must not lose
anything is added here: the end of a watch is an error, every wait has a limit on this side, too,
and every failure is one of a few reasons.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import httpx2
from lightkube.config.client_adapter import verify_cluster
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.core.async_client import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.core.exceptions import ConfigError as KubeConfigError
from lightkube.core.resource import NamespacedResource
from msgspec import Struct

from extproc.errors import ConfigError, ServiceError

__all__ = [
    "ApiTroubleError",
    "KubeApi",
    "ObjectApi",
    "Reason",
    "WatchEndedError",
    "WatchEvent",
    "WatchLimits",
    "open_client",
]

_KindT = TypeVar("_KindT", bound=NamespacedResource)

Reason = Literal[
    "unreachable",
    "timeout",
    "unauthorized",
    "forbidden",
    "throttled",
    "expired",
    "server_error",
    "refused",
    "invalid",
]

_REASONS: Final[dict[int, Reason]] = {
    401: "unauthorized",
    403: "forbidden",
    410: "expired",
    429: "throttled",
}
_ALL_NAMESPACES: Final = "*"
# A page is decoded in one go; a slice may name a thousand endpoints.
_PAGE_OBJECTS: Final = 20
_REQUEST_SECONDS: Final = 10.0
_LIST_SECONDS: Final = 60.0
_DETAIL_MAX_CHARS: Final = 200


class ApiTroubleError(ServiceError):
    """The API server did not do what was asked. `retry_after_seconds` is its own wish, or 0."""

    def __init__(self, reason: Reason, detail: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class WatchEndedError(ServiceError):
    """The watch has ended without an error."""


class WatchEvent(Struct, Generic[_KindT], frozen=True):
    """`type` is ADDED, MODIFIED, DELETED, or BOOKMARK, whose object has a version only."""

    type: str
    object: _KindT


class WatchLimits(Struct, frozen=True, kw_only=True):
    """How long a watch lasts and how long it may be silent.

    The server ends a watch after `seconds`, and is given `grace_seconds` for it. It sends
    bookmarks about every minute: so a connection that is silent for longer may be dead.
    """

    seconds: int = 270
    grace_seconds: float = 30.0
    silence_seconds: float = 150.0


class ObjectApi(Protocol[_KindT]):
    """Objects of one kind, as the list-watch loop needs them."""

    async def list(self) -> tuple[list[_KindT], str]:
        """All objects and the version of the list; raises ApiTroubleError."""
        ...

    def watch(self, version: str) -> AsyncGenerator[WatchEvent[_KindT], None]:
        """What happens after that version; raises WatchEndedError or ApiTroubleError at its end."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class KubeApi(Generic[_KindT]):
    """Objects of one kind in a namespace, or in all if it is empty."""

    def __init__(
        self,
        client: AsyncClient,
        kind: type[_KindT],
        *,
        namespace: str,
        selector: str | None = None,
        name: str | None = None,
        limits: WatchLimits | None = None,
        owns_client: bool = True,
    ) -> None:
        """`selector` and `name` are evaluated by the API server.

        The client is closed with this object if it is its own.
        """
        self._client = client
        self._kind = kind
        self._namespace = namespace or _ALL_NAMESPACES
        # lightkube writes the keys of this mapping as they are when their value is None.
        self._labels: dict[str, Any] | None = None if selector is None else {selector: None}
        self._fields: dict[str, Any] | None = None if name is None else {"metadata.name": name}
        self._limits = limits or WatchLimits()
        self._owns_client = owns_client

    async def list(self) -> tuple[list[_KindT], str]:
        """In pages, so that the event loop is not held up by a large answer."""
        try:
            async with asyncio.timeout(_LIST_SECONDS):
                found = self._client.list(
                    self._kind,
                    namespace=self._namespace,
                    labels=self._labels,
                    fields=self._fields,
                    chunk_size=_PAGE_OBJECTS,
                )
                objects = [one async for one in found]
                await asyncio.sleep(0)  # The last page was decoded in this turn.
                return objects, found.resourceVersion
        except Exception as error:
            raise _trouble(error) from error

    async def watch(self, version: str) -> AsyncGenerator[WatchEvent[_KindT], None]:
        """Raises WatchEndedError or ApiTroubleError; never returns."""
        limits, loop = self._limits, asyncio.get_running_loop()
        ends_at = loop.time() + limits.seconds + limits.grace_seconds
        events = aiter(
            self._client.watch(
                self._kind,
                namespace=self._namespace,
                labels=self._labels,
                fields=self._fields,
                server_timeout=limits.seconds,
                resource_version=version,
            )
        )
        try:
            while True:
                try:
                    limit = min(loop.time() + limits.silence_seconds, ends_at)
                    async with asyncio.timeout_at(limit):
                        kind, one = await anext(events)
                except (_EndOfWatchError, StopAsyncIteration):
                    raise WatchEndedError from None
                except Exception as error:
                    raise _trouble(error) from error
                yield WatchEvent(kind, one)
        finally:
            # Its type hides that it is a generator, which holds a connection until it is closed.
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    async def close(self) -> None:
        if self._owns_client:
            await self._client.close()


def open_client(
    kubeconfig: str | None, transport: httpx2.AsyncBaseTransport | None = None
) -> AsyncClient:
    """A client of the cluster; raises ConfigError.

    Without a `kubeconfig` it is the cluster in which this process runs as a pod. A service
    account's token is read again from its file when the API server refuses it.
    """
    try:
        config = _cluster(kubeconfig)
        if transport is None:
            if config.user is None:
                raise KubeConfigError("the context names no user")
            tls = verify_cluster(config.cluster, config.user, config.abs_file)
            transport = httpx2.AsyncHTTPTransport(verify=tls)
        return AsyncClient(
            config=config,
            timeout=httpx2.Timeout(_REQUEST_SECONDS),
            transport=_WatchTransport(transport),
        )
    except Exception as error:  # a file that is no kubeconfig fails in many ways
        where = "the service account of this pod" if kubeconfig is None else kubeconfig
        raise ConfigError(
            [
                f"discovery.backend: {where} cannot be used: {error}; run as a pod with a mounted "
                "service account token, or set kubeconfig to a readable file"
            ]
        ) from error


def _cluster(kubeconfig: str | None) -> SingleConfig:
    found = (
        KubeConfig.from_service_account()
        if kubeconfig is None
        else KubeConfig.from_file(kubeconfig)
    ).get()
    if found is None:
        raise KubeConfigError("it names no current context")
    return found


class _EndOfWatchError(ServiceError, httpx2.TransportError):
    """lightkube would start a watch that has ended again by itself, for ever and at once."""


class _WatchTransport(httpx2.AsyncBaseTransport):
    """Asks for bookmarks in watches, and lets the end of a watch be seen."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        is_watch = request.url.params.get("watch") == "true"
        if is_watch:
            request.url = request.url.copy_add_param("allowWatchBookmarks", "true")
        response = await self._inner.handle_async_request(request)
        if is_watch and response.status_code == 200:
            stream = response.stream
            if isinstance(stream, httpx2.AsyncByteStream):
                response.stream = _EndingStream(stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _EndingStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            yield chunk
        raise _EndOfWatchError("the watch has ended")

    async def aclose(self) -> None:
        await self._inner.aclose()


def _trouble(error: Exception) -> ApiTroubleError:
    """The error in this service's own words; one of an unknown kind is an invalid answer."""
    if not isinstance(error, ApiError) and isinstance(error.__context__, httpx2.HTTPStatusError):
        # lightkube could not read the answer that came with this status.
        error = error.__context__
    detail = f"{type(error).__name__}: {error}".replace("\n", " ")[:_DETAIL_MAX_CHARS]
    if isinstance(error, httpx2.HTTPStatusError):
        # An error within a watch has no response of its own.
        response: httpx2.Response | None = getattr(error, "response", None)
        status = error.status.code if isinstance(error, ApiError) and error.status else None
        code = status or (response.status_code if response is not None else 0)
        reason = _REASONS.get(code, "server_error" if code >= 500 else "refused")
        return ApiTroubleError(reason, detail, _retry_after_seconds(response))
    if isinstance(error, (TimeoutError, httpx2.TimeoutException)):
        return ApiTroubleError("timeout", detail)
    if isinstance(error, (OSError, httpx2.TransportError)):
        return ApiTroubleError("unreachable", detail)
    return ApiTroubleError("invalid", detail)


def _retry_after_seconds(response: httpx2.Response | None) -> float:
    text = "" if response is None else response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0
