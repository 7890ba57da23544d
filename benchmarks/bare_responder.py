"""The cheapest ext_proc service with Python's gRPC library: the baseline of the benchmarks.

It parses, decides, counts and logs nothing, and every reply is serialised before the first
request. The replies name the same destinations with the same headers and metadata as the
service's, from the same code, so that Envoy does the same work for both. Its cost is the cost
of any service on grpc.aio; the difference is the cost of our own code.
"""

import argparse
import asyncio
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2_grpc

from extproc.config.envoy import EnvoyConfig
from extproc.config.schema import ProxyConfig
from extproc.config.server import ServerConfig
from extproc.routing.decision import Decision
from extproc.server import replies
from extproc.server.grpc_server import SERVICE, grpc_options

__all__ = ["BareResponder", "body_replies"]

# The first byte of a serialised ProcessingRequest is the tag of its kind: fields are written
# in the order of their numbers, and the fields before the kinds are not used.
_REQUEST_HEADERS: Final = 0x12
_RESPONSE_HEADERS: Final = 0x1A
_REQUEST_BODY: Final = 0x22
_RESPONSE_TRAILERS: Final = 0x3A


def body_replies(model: str, addresses: list[str]) -> list[bytes]:
    """The reply to a request body for each worker in turn, with the others as its fallbacks."""
    builder = replies.ReplyBuilder(EnvoyConfig(), None)
    named = 1 + ProxyConfig().fallback_workers
    timeout_ms = round(ProxyConfig().request_timeout_secs * 1000)
    return [
        builder.routed(
            Decision(
                model=model,
                policy="round_robin",
                reason="round_robin",
                worker_url=f"http://{addresses[first]}",
                destinations=tuple((addresses[first:] + addresses[:first])[:named]),
                timeout_ms=timeout_ms,
            ),
            in_body=True,
            request_id=None,
        )
        for first in range(len(addresses))
    ]


class BareResponder:
    """The gRPC service."""

    def __init__(self, model: str, addresses: list[str]) -> None:
        self._body_replies: Iterator[bytes] = itertools.cycle(body_replies(model, addresses))
        self._fixed = {
            _REQUEST_HEADERS: replies.REQUEST_HEADERS_CONTINUE,
            _RESPONSE_HEADERS: replies.RESPONSE_HEADERS_CONTINUE,
            _RESPONSE_TRAILERS: replies.RESPONSE_TRAILERS_CONTINUE,
        }

    async def process(self, _: Any, context: Any) -> None:
        while True:
            message = await context.read()
            if message is grpc.aio.EOF:
                return
            kind = message[0]
            if kind == _REQUEST_BODY:
                await context.write(next(self._body_replies))
            else:
                await context.write(self._fixed[kind])

    def handler(self) -> grpc.GenericRpcHandler:
        """Without serialisers: messages stay bytes."""
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(
            self.process
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": method})


async def _serve(port: int, model: str, addresses: list[str]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = grpc.aio.server(options=grpc_options(ServerConfig().max_body_bytes))
    server.add_generic_rpc_handlers((BareResponder(model, addresses).handler(),))
    # Answers SERVING for the whole process at once.
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await stop.wait()
    await server.stop(None)


def main() -> None:
    parser = argparse.ArgumentParser(description="A bare ext_proc responder.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--worker", action="append", required=True, metavar="IP:PORT")
    options = parser.parse_args()
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    uvloop.run(_serve(options.port, options.model, options.worker))


if __name__ == "__main__":
    main()
