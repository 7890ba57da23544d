"""What this service asks of engines over HTTP: the protocols of both clients, and their errors.

It is separate from the aiohttp clients so that code which decides does not import aiohttp, and
so that tests replace an engine by a few lines.
"""

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct

from extproc.errors import ServiceError
from extproc.worker_url import WorkerUrl

__all__ = [
    "EngineAnswer",
    "EngineTimeoutError",
    "EngineUnreachableError",
    "IntrospectionClient",
    "PrefillCall",
    "PrefillClient",
    "PrefillClientOverloadedError",
    "TokensClient",
]


class EngineUnreachableError(ServiceError):
    """There is no complete HTTP answer: refused, timed out, broken off or far too large."""


class EngineTimeoutError(EngineUnreachableError):
    """The engine did not answer in time."""


class PrefillClientOverloadedError(ServiceError):
    """This process has no file descriptor left for a connection; the engine is not to blame."""


class EngineAnswer(Struct, frozen=True):
    """The status and body of an engine's answer, and the headers that the client receives."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class IntrospectionClient(Protocol):
    """Reads what an engine says about itself."""

    async def get(self, url: WorkerUrl, path: str, timeout_seconds: float) -> EngineAnswer:
        """Send a GET request; raises EngineUnreachableError, EngineTimeoutError."""
        ...


class TokensClient(Protocol):
    """Asks an engine for the tokens of a body."""

    async def post(
        self, url: WorkerUrl, path: str, body: bytes, timeout_seconds: float, max_bytes: int
    ) -> EngineAnswer:
        """Send a POST request with a JSON body, without following redirects.

        Raises EngineUnreachableError, also for an answer of more than `max_bytes`, and
        EngineTimeoutError.
        """
        ...


class PrefillCall(Protocol):
    """A request to a prefill worker, over a connection that has been made."""

    async def answer(self) -> EngineAnswer:
        """Wait for the status and the first `keep_bytes` of the body; the rest is dropped.

        Of a 5xx only the headers are awaited; of a 4xx also the part of the body that comes
        within a second.

        Raises EngineUnreachableError, EngineTimeoutError.
        """
        ...

    def cancel(self) -> None:
        """Close the connection, which makes the engine abort the request; idempotent."""
        ...


class PrefillClient(Protocol):
    """Sends requests to prefill workers."""

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
        """Start a request; returns as soon as the connection is made.

        Raises EngineUnreachableError when it is not made, and PrefillClientOverloadedError
        when this process has no file descriptor left for it.
        """
        ...
