"""The gRPC service of ADS: reads and writes the messages of Envoys' streams.

It is a thin adapter: `session` decides, and `publisher` has what all streams have in common.
"""

import asyncio
import hashlib
from collections.abc import Callable, Collection
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from extproc._protos import llm_extproc_pb2 as pb
from extproc.event_loop import let_cancellation_come
from extproc.xds.client import Client, Outgoing
from extproc.xds.publisher import Envoy, Publisher
from extproc.xds.session import (
    NAMES_MAX,
    DeltaSession,
    Request,
    Response,
    StateSession,
    StreamLimitError,
)

__all__ = ["SERVICE", "DiscoveryService"]

SERVICE: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"

# What gRPC servers accept unless they are configured otherwise. The limit of this server is that of
# request bodies, and a message of that size would hold up the event loop while it is parsed.
_MESSAGE_MAX_BYTES: Final = 4 * 1024**2
_NAME_MAX_CHARS: Final = 1024
# Of the reason of a rejection, which is logged and shown.
_ERROR_MAX_CHARS: Final = 1024
# A client that reads what it acknowledges has at most one unread response of each type.
_UNREAD_MAX: Final = 16
_LAST_WRITE_SECONDS: Final = 1.0

# A request and the type that it is about.
_Incoming = tuple[str, Request]


class DiscoveryService:
    """Serves the clusters and endpoints of a publisher. Other types are not answered."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._closing = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        """What the gRPC server is given."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(self._state),
                "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(self._delta),
            },
        )

    def close(self) -> None:
        """End all streams; Envoys keep what they have, and connect to another replica."""
        self._closing.set()

    async def _state(self, _: Any, context: Any) -> None:
        client = Client(StateSession, self._publisher.snapshot)
        await self._serve(context, client, _read_state, _write_state)

    async def _delta(self, _: Any, context: Any) -> None:
        client = Client(DeltaSession, self._publisher.snapshot)
        await self._serve(context, client, _read_delta, _write_delta)

    async def _serve(
        self,
        context: Any,
        client: Client,
        read: Callable[[bytes, Envoy], _Incoming],
        write: Callable[[Outgoing], bytes],
    ) -> None:
        responses: asyncio.Queue[Outgoing] = asyncio.Queue()
        envoy = Envoy(client, context.peer(), responses.put_nowait)

        async def receive() -> None:
            while (raw := await context.read()) is not grpc.aio.EOF:
                if len(raw) > _MESSAGE_MAX_BYTES:
                    raise StreamLimitError(f"a request has more than {_MESSAGE_MAX_BYTES} bytes")
                self._publisher.receive(envoy, *read(raw, envoy))
                # Only acknowledgements of the client make the queue longer.
                if responses.qsize() > _UNREAD_MAX:
                    raise StreamLimitError("responses are acknowledged, but not read")

        async def send() -> None:
            while True:
                await _write_whole(context, write(await responses.get()))

        self._publisher.connect(envoy)
        works = [asyncio.create_task(one) for one in (receive(), send(), self._closing.wait())]
        try:
            done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._publisher.disconnect(envoy)
            for one in works:
                one.cancel()
            results = await asyncio.gather(*works, return_exceptions=True)
        if any(isinstance(one, DecodeError) for one in results):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a discovery request")
        for error in results:
            if isinstance(error, StreamLimitError):
                self._publisher.refuse(envoy, str(error))
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        if works[0] in done:
            await let_cancellation_come()


async def _write_whole(context: Any, response: bytes) -> None:
    """Write a response; a cancellation waits until it is out.

    Otherwise the stream could not be ended with a status: gRPC refuses that beside a write.
    """
    writing = asyncio.ensure_future(context.write(response))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        # A client that does not read is not waited for.
        await asyncio.wait([writing], timeout=_LAST_WRITE_SECONDS)
        writing.cancel()
        raise


def _error(request: pb.DiscoveryRequest | pb.DeltaDiscoveryRequest) -> str | None:
    if not request.HasField("error_detail"):
        return None
    return str(request.error_detail.message[:_ERROR_MAX_CHARS])


def _check_sizes(texts: Collection[str]) -> None:
    """Raises StreamLimitError for more or longer names than a client needs."""
    if len(texts) > NAMES_MAX:
        raise StreamLimitError(f"a request names more than {NAMES_MAX} resources")
    if any(len(one) > _NAME_MAX_CHARS for one in texts):
        raise StreamLimitError(f"a name has more than {_NAME_MAX_CHARS} characters")


def _read_state(raw: bytes, envoy: Envoy) -> _Incoming:
    """Raises DecodeError and StreamLimitError."""
    request = pb.DiscoveryRequest.FromString(raw)
    _check_sizes(request.resource_names)
    envoy.node = request.node.id or envoy.node
    return request.type_url, Request(
        names=tuple(request.resource_names),
        nonce=request.response_nonce,
        error=_error(request),
    )


def _read_delta(raw: bytes, envoy: Envoy) -> _Incoming:
    """Raises DecodeError and StreamLimitError."""
    request = pb.DeltaDiscoveryRequest.FromString(raw)
    versions = request.initial_resource_versions
    _check_sizes(request.resource_names_subscribe)
    _check_sizes(request.resource_names_unsubscribe)
    _check_sizes(versions)
    _check_sizes(versions.values())
    envoy.node = request.node.id or envoy.node
    return request.type_url, Request(
        names=tuple(request.resource_names_subscribe),
        unsubscribed=tuple(request.resource_names_unsubscribe),
        known_versions=dict(versions),
        nonce=request.response_nonce,
        error=_error(request),
    )


def _write_state(outgoing: Outgoing) -> bytes:
    type_url, response = outgoing
    message = pb.DiscoveryResponse(
        version_info=_version(response), type_url=type_url, nonce=response.nonce
    )
    for one in response.resources.values():
        message.resources.add(type_url=type_url, value=one.body)
    return message.SerializeToString()


def _write_delta(outgoing: Outgoing) -> bytes:
    type_url, response = outgoing
    message = pb.DeltaDiscoveryResponse(
        system_version_info=_version(response),
        type_url=type_url,
        nonce=response.nonce,
        removed_resources=response.removed,
    )
    for name, one in response.resources.items():
        resource = message.resources.add(name=name, version=one.version)
        resource.resource.type_url, resource.resource.value = type_url, one.body
    return message.SerializeToString()


def _version(response: Response) -> str:
    """The same resources have the same version at every replica."""
    versions = sorted((name, one.version) for name, one in response.resources.items())
    return hashlib.sha256(repr(versions).encode()).hexdigest()[:16]
