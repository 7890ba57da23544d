"""A session context, and Envoy's side of a stream without gRPC."""

import asyncio
from typing import Any

import grpc.aio
import msgspec

from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.envoy import EnvoyConfig
from extproc.headers import DEFAULT_MODEL_HEADER
from extproc.server.admission import Admission, AdmissionLimits
from extproc.server.messages import RequestHeadTable, ResponseTable
from extproc.server.replies import ReplyBuilder
from extproc.server.session import SessionContext

NEW_REQUEST_ID = "made-here"


def make_context(*, authorization: str | None = None, **changes: Any) -> SessionContext:
    """The context of a service with one model `m`."""
    context = SessionContext(
        admission=Admission(AdmissionLimits(max_requests=1000, max_buffered_bytes=1024 * 1024)),
        builder=ReplyBuilder(EnvoyConfig(), authorization),
        heads=RequestHeadTable(),
        responses=ResponseTable(),
        max_body_bytes=1024,
        models_body=lambda: b'{"data":[]}',
        only_model="m",
        debug_headers=True,
        prompt_max_bytes=0,
        model_header=DEFAULT_MODEL_HEADER,
        new_request_id=lambda: NEW_REQUEST_ID,
    )
    return msgspec.structs.replace(context, **changes)


class FakeCall:
    """The gRPC call of one stream, whose messages are in the hands of the test."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._written: list[bytes] = []

    async def read(self) -> Any:
        return await self._messages.get()

    async def write(self, reply: bytes) -> None:
        self._written.append(reply)

    def send(self, message: pb.ProcessingRequest) -> None:
        self._messages.put_nowait(message.SerializeToString())

    def end(self) -> None:
        """Envoy is done with the stream."""
        self._messages.put_nowait(grpc.aio.EOF)

    def take_replies(self) -> list[pb.ProcessingResponse]:
        """The replies since the last call."""
        written, self._written = self._written, []
        return [pb.ProcessingResponse.FromString(reply) for reply in written]
