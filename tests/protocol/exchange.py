"""Builders that make a whole ext_proc exchange one readable line.

The messages cross a real gRPC connection; only the workers behind the router are fakes.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.clock import Clock, SystemClock
from extproc.config.envoy import EnvoyConfig
from extproc.config.models import PolicyName
from extproc.config.schema import LoadConfig
from extproc.config.server import ServerConfig
from extproc.headers import DEFAULT_MODEL_HEADER
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import Answer
from extproc.routing.pd.decode_order import DecodeQuery
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request
from extproc.server.admission import Admission, AdmissionLimits
from extproc.server.grpc_server import SERVICE, ExtProcServer
from extproc.server.messages import RequestHeadTable, ResponseTable
from extproc.server.replies import ReplyBuilder
from extproc.server.session import SessionContext
from extproc.server.stream import Streams
from extproc.server.stream_settings import Extension, StreamSettings
from extproc.testing.stack import free_ports
from tests.builders import Fleet, make_shared, make_worker, routing_settings

MODES = {
    "BUFFERED": pb.ProcessingMode.BUFFERED,
    "BUFFERED_PARTIAL": pb.ProcessingMode.BUFFERED_PARTIAL,
    "STREAMED": pb.ProcessingMode.STREAMED,
    "FULL_DUPLEX_STREAMED": pb.ProcessingMode.FULL_DUPLEX_STREAMED,
    "NONE": pb.ProcessingMode.NONE,
}
REPLY_SECONDS = 60.0
QUIET_SECONDS = 0.15
NEW_REQUEST_ID = "7b81811c-9cbc-4f3b-aa0a-52d02348ad88"
ATTRIBUTES = "envoy.filters.http.ext_proc"


class Service:
    """One ExtProcServer over workers at 10.0.0.1:8000, 10.0.0.2:8000, …"""

    def __init__(
        self,
        models: Sequence[str],
        workers: int,
        *,
        policy: PolicyName = "round_robin",
        server: Mapping[str, Any] | None = None,
        envoy: EnvoyConfig | None = None,
        load: LoadConfig | None = None,
        stale_seconds: float = 600.0,
        body_seconds: float = 300.0,
        debug_headers: bool = False,
        authorization: str | None = None,
        clock: Clock | None = None,
        route_seconds: float = 0.0,
        retry_busy: bool | None = None,
        extension: Extension | None = None,
    ) -> None:
        """`retry_busy` is None for a gateway that takes a single destination."""
        self.workers = [
            make_worker(f"http://10.0.0.{order + 1}:8000", order=order, model_ids=(model,))
            for order, model in enumerate(model for model in models for _ in range(workers))
        ]
        self.clock = clock or SystemClock()
        fleet = Fleet(
            self.workers,
            policy=policy,
            models=models,
            settings=routing_settings(
                destinations_max=1 if retry_busy is None else 3,
                retry_busy=bool(retry_busy),
                load=load,
            ),
            shared=make_shared(clock=self.clock, seed=7, stale_seconds=stale_seconds),
        )
        self.close = fleet.close
        self.metrics, self.registry = fleet.metrics, fleet.registry
        self.tickets, self.router = fleet.tickets, fleet.router
        self.route_seconds = route_seconds
        self.config = ServerConfig(port=free_ports(1)[0], **(server or {}))
        self.admission = Admission(
            AdmissionLimits(
                max_requests=self.config.max_requests,
                max_buffered_bytes=self.config.max_buffered_bytes,
            )
        )
        context = SessionContext(
            admission=self.admission,
            builder=ReplyBuilder(envoy or EnvoyConfig(), authorization),
            heads=RequestHeadTable(),
            responses=ResponseTable(),
            max_body_bytes=self.config.max_body_bytes,
            models_body=lambda: json.dumps({"data": list(models)}).encode(),
            only_model=self.router.only_model,
            debug_headers=debug_headers,
            prompt_max_bytes=0,
            model_header=DEFAULT_MODEL_HEADER,
            new_request_id=lambda: NEW_REQUEST_ID,
        )
        stream_settings = StreamSettings(
            step_deadline_seconds=self.config.step_deadline_secs,
            body_deadline_seconds=body_seconds,
            log_decisions=False,
            extension=extension,
        )
        self.server = ExtProcServer(
            self.config, Streams(context, self, self.metrics, stream_settings)
        )

    async def answer(self, request: Request) -> Answer:
        return await self.router.answer(request)

    def pick_decode(self, query: DecodeQuery) -> Lease:
        return self.router.pick_decode(query)

    def answered_busy(self, address: str, retry_after_seconds: float | None) -> bool:
        return self.router.answered_busy(address, retry_after_seconds)

    async def route(self, request: Request) -> Lease | Pair:
        if self.route_seconds:
            await asyncio.sleep(self.route_seconds)
        return await self.router.route(request)

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.workers)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.config.port}"


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[Service]:
    service.server.bind()
    await service.server.start()
    try:
        yield service
    finally:
        await service.server.stop()
        await service.close()


class Envoy:
    """The proxy's side of one stream."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._pending: asyncio.Future[Any] | None = None

    async def send(self, *messages: pb.ProcessingRequest) -> None:
        for message in messages:
            await self._call.write(message)

    async def _read(self) -> Any:
        # A cancelled read would lose the reply: it is kept and awaited the next time.
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._call.read())
        return await asyncio.shield(self._pending)

    async def reply(self) -> pb.ProcessingResponse:
        async with asyncio.timeout(REPLY_SECONDS):
            reply = await self._read()
        self._pending = None
        assert isinstance(reply, pb.ProcessingResponse), f"the stream ended: {reply}"
        return reply

    async def replies(self, count: int) -> list[pb.ProcessingResponse]:
        return [await self.reply() for _ in range(count)]

    async def no_reply(self) -> None:
        """Check that no reply comes for a while."""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                reply = await self._read()
        except TimeoutError:
            return
        raise AssertionError(f"an unexpected reply: {reply}")

    async def half_close(self) -> None:
        await self._call.done_writing()

    async def ended(self) -> grpc.StatusCode:
        """Wait for the end of the stream and return its status."""
        async with asyncio.timeout(REPLY_SECONDS):
            return await self._call.code()  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self._call.cancel()

    async def close(self) -> None:
        """Reset the stream, as Envoy does when it is done with it."""
        self._call.cancel()
        if self._pending is not None:
            await asyncio.gather(self._pending, return_exceptions=True)


@asynccontextmanager
async def stream(
    service: Service, metadata: Sequence[tuple[str, str]] = (("x-extproc-pass", "route"),)
) -> AsyncIterator[Envoy]:
    # A body over the service's limits must be sendable.
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(service.target, options=options) as channel:
        method: Any = channel.stream_stream(
            f"/{SERVICE}/Process",
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )
        envoy = Envoy(method(metadata=metadata))
        try:
            yield envoy
        finally:
            await envoy.close()


def header_map(headers: Mapping[str, str]) -> pb.HeaderMap:
    return pb.HeaderMap(
        headers=[pb.HeaderValue(key=k, raw_value=v.encode()) for k, v in headers.items()]
    )


def request_headers(
    path: str = "/v1/chat/completions",
    *,
    method: str = "POST",
    mode: str = "BUFFERED",
    response_mode: str = "NONE",
    not_waiting: bool = False,
    end: bool = False,
    announce: bool = True,
    **headers: str,
) -> pb.ProcessingRequest:
    """The first message of a stream; keywords are further headers, `_` for `-`."""
    fields = {":method": method, ":path": path, ":authority": "api", "x-request-id": "req-1"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    message = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(headers=header_map(fields), end_of_stream=end)
    )
    if announce:
        message.protocol_config.request_body_mode = MODES[mode]
        message.protocol_config.response_body_mode = MODES[response_mode]
        message.protocol_config.send_body_without_waiting_for_header_response = not_waiting
    return message


def request_body(data: bytes | str, *, end: bool = True) -> pb.ProcessingRequest:
    raw = data.encode() if isinstance(data, str) else data
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=raw, end_of_stream=end))


def llm_body(model: str = "m", **fields: Any) -> bytes:
    return json.dumps({"model": model, "messages": [], **fields}).encode()


def request_trailers() -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_trailers=pb.HttpTrailers())


def response_headers(
    status: int = 200,
    *,
    upstream: str = "",
    details: str = "via_upstream",
    attempts: int = 0,
    content_type: str = "application/json",
    served: str = "",
    retry_after: str = "",
    end: bool = False,
) -> pb.ProcessingRequest:
    """Envoy's message with its attributes; `served` is the endpoint picker protocol's name."""
    message = pb.ProcessingRequest(
        response_headers=pb.HttpHeaders(
            headers=header_map(
                {":status": str(status), "content-type": content_type}
                | ({"retry-after": retry_after} if retry_after else {})
            ),
            end_of_stream=end,
        )
    )
    if upstream or details:
        attributes = Struct()
        attributes.update({"upstream.address": upstream, "response.code_details": details})
        if attempts:
            attributes["upstream.request_attempt_count"] = attempts
        message.attributes[ATTRIBUTES].CopyFrom(attributes)
    if served:
        metadata = Struct()
        metadata.update({"x-gateway-destination-endpoint-served": served})
        message.metadata_context.filter_metadata["envoy.lb"].CopyFrom(metadata)
    return message


def response_body(data: bytes, *, end: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_body=pb.HttpBody(body=data, end_of_stream=end))


def response_trailers() -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_trailers=pb.HttpTrailers())


def kind(reply: pb.ProcessingResponse) -> str:
    return str(reply.WhichOneof("response"))


def set_headers(reply: pb.ProcessingResponse) -> dict[str, str]:
    """The header mutation of a reply, whichever kind it is; every one must overwrite."""
    which = kind(reply)
    mutation = (
        reply.immediate_response.headers
        if which == "immediate_response"
        else getattr(reply, which).response.header_mutation
    )
    overwrite = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    assert all(option.append_action == overwrite for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def destination(reply: pb.ProcessingResponse) -> str:
    """The chosen endpoints; header and metadata must say the same, and the route is cleared."""
    header = set_headers(reply)["x-gateway-destination-endpoint"]
    metadata = MessageToDict(reply.dynamic_metadata)
    assert metadata["envoy.lb"]["x-gateway-destination-endpoint"] == header
    assert getattr(reply, kind(reply)).response.clear_route_cache
    return header


def echoed(replies: Sequence[pb.ProcessingResponse]) -> tuple[bytes, list[bool]]:
    """The body echoed in full duplex, and the end-of-stream flag of each piece."""
    pieces = [
        getattr(reply, kind(reply)).response.body_mutation.streamed_response for reply in replies
    ]
    return b"".join(piece.body for piece in pieces), [piece.end_of_stream for piece in pieces]


def error(reply: pb.ProcessingResponse) -> tuple[int, str, dict[str, Any]]:
    """Status, code and error object of an immediate response, checked against its headers."""
    immediate = reply.immediate_response
    body: dict[str, Any] = json.loads(immediate.body)["error"]
    headers = set_headers(reply)
    assert headers["content-type"] == "application/json"
    assert headers["x-router-error-code"] == body["code"]
    assert ("retry-after" in headers) == (immediate.status.code == 503)
    assert MessageToDict(reply).get("immediateResponse") is not None
    return immediate.status.code, body["code"], body


async def eventually(check: Any, seconds: float = REPLY_SECONDS) -> None:
    """Wait for check() to become true."""
    async with asyncio.timeout(seconds):
        while not check():  # noqa: ASYNC110 (any condition, not one event)
            await asyncio.sleep(0.01)
