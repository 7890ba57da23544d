"""Measures how much memory a stream leaves behind that Envoy has reset, also outside Python's own.

A process of its own: what other tests give back in the meantime would disturb the figures.
Prints bytes for each stream, or nothing where the C library does not tell.
"""

import asyncio
import ctypes
import gc
import sys
from typing import Any

import grpc.aio

from extproc._protos import llm_extproc_pb2 as pb
from extproc.event_loop import EventLoop
from extproc.server.grpc_server import SERVICE
from tests.protocol.exchange import (
    Service,
    eventually,
    llm_body,
    request_body,
    request_headers,
    response_headers,
    serving,
)

AT_ONCE = 16
WARM_UP_STREAMS = 1000
STREAMS = 3000


NAMES = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of the C library."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


def allocated_bytes() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = MallocInfo
    gc.collect()
    found = library.mallinfo2()
    return int(found.uordblks) + int(found.hblkhd)


async def reset_streams(method: Any, count: int) -> None:
    """Streams like those of Envoy: the client's side is reset once the response has headers."""
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with at_once:
            call = method(metadata=(("x-extproc-pass", "route"),))
            for message in (request_headers(), request_body(llm_body()), response_headers()):
                await call.write(message)
                await call.read()
            call.cancel()

    await asyncio.gather(*[one() for _ in range(count)])


async def settled(service: Service) -> None:
    """Wait until gRPC is done with all streams, which it does not tell."""
    await eventually(lambda: not len(service.server.streams))
    await asyncio.sleep(0.3)


async def lost_bytes() -> float:
    """Lost for each stream."""
    service = Service(["m"], 2)
    async with serving(service), grpc.aio.insecure_channel(service.target) as channel:
        method = channel.stream_stream(
            f"/{SERVICE}/Process",
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )

        await reset_streams(method, WARM_UP_STREAMS)
        await settled(service)
        before = allocated_bytes()
        await reset_streams(method, STREAMS)
        await settled(service)
        return (allocated_bytes() - before) / STREAMS


if __name__ == "__main__" and hasattr(ctypes.CDLL(None), "mallinfo2"):
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        sys.stdout.write(str(runner.run(lost_bytes())))
