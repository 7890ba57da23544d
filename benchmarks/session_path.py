"""Measures the CPU time of our own code for one request, without gRPC and Envoy.

That is everything between the bytes of Envoy's messages and the bytes of the replies: parsing,
session, stream, router, policy, lease, metrics. The rest of a request's cost is the transport's.

Run: `python -m benchmarks.session_path [--requests 20000] [--profile]`.
"""

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import time
from itertools import cycle, islice
from typing import Any

from grpc.aio import EOF

from extproc._protos import llm_extproc_pb2 as pb
from extproc.build import build_kv, build_router, build_shared
from extproc.config.loading import parse_config
from extproc.server.route_session import RouteSession
from extproc.server.stream import Streams
from extproc.serving import build_streams
from extproc.worker_url import parse_worker_url
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.introspection_client import AiohttpIntrospectionClient
from extproc.workers.prefill_client import AiohttpPrefillClient
from extproc.workers.worker import Worker, WorkerSpec

_MODEL = "benchmark-model"
_HEADERS = {
    ":path": "/v1/chat/completions",
    ":method": "POST",
    "content-type": "application/json",
    "x-request-id": "7b81811c-9cbc-4f3b-aa0a-52d02348ad88",
}


def messages(body_bytes: int, served: int) -> list[bytes]:
    """Envoy's messages for one buffered request; `served` is the number of the worker."""
    fields = {"model": _MODEL, "messages": [{"role": "user", "content": "x" * (body_bytes - 80)}]}
    body = json.dumps(fields).encode()
    headers = _HEADERS | {"content-length": str(len(body))}
    first = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(headers=_header_map(headers)),
        protocol_config=pb.ProtocolConfiguration(request_body_mode=pb.ProcessingMode.BUFFERED),
    )
    second = pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=True))
    answer = {":status": "200", "content-type": "application/json"}
    third = pb.ProcessingRequest(response_headers=pb.HttpHeaders(headers=_header_map(answer)))
    third.attributes["envoy.filters.http.ext_proc"].update(
        {
            "upstream.address": f"10.0.0.{served + 1}:8000",
            "upstream.request_attempt_count": 1,
            "response.code_details": "via_upstream",
        }
    )
    return [message.SerializeToString() for message in (first, second, third)]


def _header_map(headers: dict[str, str]) -> pb.HeaderMap:
    return pb.HeaderMap(
        headers=[
            pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()
        ]
    )


class Call:
    """The gRPC side of one stream: gives the messages of one request, and drops the replies."""

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = iter(messages)

    async def read(self) -> Any:
        return next(self._messages, EOF)

    async def write(self, reply: bytes) -> None:
        pass


def build(workers: int) -> Streams:
    """A router over that many workers, and the streams that ask it."""
    urls = [f"http://10.0.0.{order + 1}:8000" for order in range(workers)]
    config = parse_config(
        {
            "models": [{"id": _MODEL, "policy": "round_robin"}],
            "discovery": {"backend": "static_urls", "static_urls": {"urls": urls}},
        }
    )
    shared = build_shared(config)
    for order, text in enumerate(urls):
        url = parse_worker_url(text)
        worker = Worker(
            WorkerSpec(id=text, url=url, model_ids=(_MODEL,)),
            order=order,
            breaker=CircuitBreaker(3, 30.0),
            address=f"{url.host}:{url.port}",
        )
        shared.registry.upsert(worker)
    kv = build_kv(
        config, shared, EngineTokenizer(AiohttpIntrospectionClient(None, None)), lambda worker: None
    )
    client = AiohttpPrefillClient(None)
    routing = build_router(config, shared, kv, {}, client, lambda worker: None)
    return build_streams(config, shared, routing.router)


async def run(streams: Streams, wires: list[list[bytes]], count: int) -> None:
    """One stream after the other, as the gRPC server serves them."""
    # Round robin chooses the workers in turn, so they answer in turn.
    for wire in islice(cycle(wires), count):
        await streams.serve(Call(wire), RouteSession)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the 25 dearest functions")
    options = parser.parse_args()
    # A multiple of the number of workers.
    count = options.requests // 5 // options.workers * options.workers
    for body_bytes in (1200, 33_000):
        streams = build(options.workers)
        wires = [messages(body_bytes, served) for served in range(options.workers)]
        asyncio.run(run(streams, wires, 500 * options.workers))
        gc.collect()
        best = float("inf")
        for _ in range(5):
            started = time.process_time()
            asyncio.run(run(streams, wires, count))
            best = min(best, time.process_time() - started)
        print(f"{body_bytes:6} B: {best / count * 1e6:6.1f} us per request")
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(asyncio.run, run(streams, wires, count))
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
