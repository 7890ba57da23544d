"""Reports of single attempts: a worker that answered 503 or 429 before another one was tried."""

from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.server.messages import ResponseTable
from extproc.workers.circuit_breaker import BreakerState
from tests.protocol.exchange import (
    Envoy,
    Service,
    kind,
    llm_body,
    request_body,
    request_headers,
    response_headers,
    serving,
    set_headers,
    stream,
)

FIRST, SECOND = "10.0.0.1:8000", "10.0.0.2:8000"
ATTEMPT = (("x-extproc-pass", "attempt"),)


def busy_counts(service: Service) -> list[float]:
    names = {"model": "m", "role": "plain", "outcome": "busy"}
    return [
        service.metrics.registry.get_sample_value(
            "extproc_worker_requests_total", names | {"worker": worker.url}
        )
        or 0.0
        for worker in service.workers
    ]


def with_reports(message: pb.ProcessingRequest, reports: dict[str, str]) -> pb.ProcessingRequest:
    """Envoy's message with the metadata that reports of attempts have left."""
    metadata = Struct()
    metadata.update(reports)
    message.metadata_context.filter_metadata["extproc.attempts"].CopyFrom(metadata)
    return message


async def report(service: Service, address: str, number: int, status: int = 503) -> dict[str, Any]:
    """Report an attempt; returns the metadata of the reply."""
    async with stream(service, ATTEMPT) as envoy:
        await envoy.send(response_headers(status, upstream=address, attempts=number, details=""))
        reply = await envoy.reply()
        assert kind(reply) == "response_headers"
        await envoy.half_close()
        assert (await envoy.ended()).name == "OK"
    found: dict[str, Any] = MessageToDict(reply.dynamic_metadata).get("extproc.attempts", {})
    return found


async def routed(envoy: Envoy) -> dict[str, str]:
    await envoy.send(request_headers(), request_body(llm_body()))
    return set_headers((await envoy.replies(2))[1])


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_answer_is_recorded_once_whatever_follows(status: int) -> None:
    service = Service(["m"], 2, retry_busy=True)
    async with serving(service), stream(service) as envoy:
        headers = await routed(envoy)
        assert headers["x-gateway-destination-endpoint"] == f"{FIRST},{SECOND}"
        assert headers["x-envoy-retry-on"] == "retriable-status-codes"
        assert headers["x-envoy-retriable-status-codes"] == "429,503"
        assert headers["x-envoy-max-retries"] == "1"
        reports = await report(service, FIRST, 1, status)
        # The worker is avoided at once; the request's own stream knows the model to count for.
        assert service.workers[0].breaker.state is BreakerState.BUSY
        assert busy_counts(service) == [0, 0]
        await envoy.send(with_reports(response_headers(upstream=SECOND, attempts=2), reports))
        await envoy.reply()
        assert busy_counts(service) == [1, 0]
        assert [worker.in_flight for worker in service.workers] == [0, 1]


async def test_a_report_to_another_replica_is_recorded_with_the_response() -> None:
    service = Service(["m"], 2, retry_busy=True)
    async with serving(service), stream(service) as envoy:
        await routed(envoy)
        reports = {"1": f"{FIRST} another"}
        await envoy.send(with_reports(response_headers(upstream=SECOND, attempts=2), reports))
        await envoy.reply()
        assert busy_counts(service) == [1, 0]


async def test_a_reload_between_report_and_response_records_nothing_twice() -> None:
    service = Service(["m"], 2, retry_busy=True)
    async with serving(service), stream(service) as envoy:
        await routed(envoy)
        streams = service.server.streams
        renewed = msgspec.structs.replace(streams.session_context, responses=ResponseTable())
        streams.use(renewed, service, streams.settings)
        reports = await report(service, FIRST, 1)
        await envoy.send(with_reports(response_headers(upstream=SECOND, attempts=2), reports))
        await envoy.reply()
        assert busy_counts(service) == [1, 0]


async def test_without_the_setting_no_answer_is_retried() -> None:
    service = Service(["m"], 2, retry_busy=False)
    async with serving(service), stream(service) as envoy:
        assert "x-envoy-retry-on" not in await routed(envoy)


async def test_an_unknown_address_is_answered_and_not_recorded() -> None:
    async with serving(Service(["m"], 1)) as service:
        assert await report(service, "10.9.9.9:1", 1) == {}
        assert busy_counts(service) == [0]


async def test_a_busy_decode_worker_is_left_to_the_lease_of_its_request() -> None:
    async with serving(Service(["m"], 1)) as service:
        service.registry.set_role(service.workers[0], "decode", None)
        assert await report(service, FIRST, 1) == {}
        assert service.metrics.registry.get_sample_value("extproc_worker_requests_total") is None


async def test_a_report_that_cannot_be_parsed_ends_its_stream_with_a_clear_status() -> None:
    async with (
        serving(Service(["m"], 1)) as service,
        grpc.aio.insecure_channel(service.target) as channel,
    ):
        method: Any = channel.stream_stream("/envoy.service.ext_proc.v3.ExternalProcessor/Process")
        call = method(metadata=ATTEMPT)
        await call.write(b"\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
