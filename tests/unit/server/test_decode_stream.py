"""A stream of the second pass: what its session says is counted and settled."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import no_decode_workers, stale_request_expired
from extproc.metrics.service import Metrics
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import Answer
from extproc.routing.pd.decode_order import DecodeQuery
from extproc.routing.request import Request
from extproc.server.decode_session import DecodeSession
from extproc.server.stream import Stream, Streams
from extproc.server.stream_settings import StreamSettings
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_fleet, make_worker
from tests.fakes import settle
from tests.protocol.exchange import (
    destination,
    error,
    kind,
    response_body,
    response_headers,
    response_trailers,
    set_headers,
)
from tests.unit.server.building import FakeCall, make_context
from tests.unit.server.test_decode_session import ADDRESS, DECISION, ORDER, decode_headers

REFUSED = "upstream_reset_before_response_started{remote_connection_failure}"


class PickDecode:
    """A decider with one decode worker; `error` is raised in place of a decision."""

    def __init__(self, fleet: Fleet, worker: Worker, error: Exception | None) -> None:
        self._fleet = fleet
        self._worker = worker
        self._error = error
        self.queries: list[DecodeQuery] = []
        self.leases: list[Lease] = []

    def pick_decode(self, query: DecodeQuery) -> Lease:
        self.queries.append(query)
        if self._error is not None:
            raise self._error
        fleet, worker = self._fleet, self._worker
        now = fleet.clock.monotonic()
        claim = fleet.claims.take(worker, now)
        lease = Lease(fleet.lease_parts, DECISION, [worker], claim, now)
        self.leases.append(lease)
        return lease

    def answered_busy(self, address: str, retry_after_seconds: float | None) -> bool:
        raise AssertionError(f"a report of another pass: {address}")

    async def route(self, request: Request) -> Lease:
        raise AssertionError(f"a question of the first pass: {request}")

    async def answer(self, request: Request) -> Answer:
        raise AssertionError(f"a question of the first pass: {request}")


class Case:
    """A stream with one decode worker, of which a failure opens the breaker."""

    def __init__(self, error: Exception | None) -> None:
        self.worker = make_worker(f"http://{ADDRESS}", role="decode", threshold=1)
        self.fleet = make_fleet([self.worker])
        self.decider = PickDecode(self.fleet, self.worker, error)
        self.metrics = Metrics(CollectorRegistry())
        settings = StreamSettings(
            step_deadline_seconds=5.0, body_deadline_seconds=300.0, log_decisions=False
        )
        context = make_context()
        streams = Streams(context, self.decider, self.metrics, settings)
        self._call = FakeCall()
        self._stream = Stream(streams, self._call, DecodeSession(context))
        self._served = asyncio.ensure_future(self._stream.serve())

    async def receive(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        self._call.send(message)
        return await self.replies()

    async def replies(self) -> list[pb.ProcessingResponse]:
        await settle()
        return self._call.take_replies()

    async def reply(self, message: pb.ProcessingRequest) -> pb.ProcessingResponse:
        (reply,) = await self.receive(message)
        return reply

    async def close(self) -> None:
        """Envoy ends the stream; idempotent."""
        self._call.end()
        await self._served
        self._stream.close()

    def requests_counted(self) -> int:
        return sum(counter.value for counter in self.metrics.requests.children.values())


@asynccontextmanager
async def running(error: Exception | None = None) -> AsyncIterator[Case]:
    case = Case(error)
    try:
        yield case
    finally:
        await case.close()


async def test_the_router_is_asked_and_its_worker_answered() -> None:
    async with running() as case:
        assert destination(await case.reply(decode_headers())) == ADDRESS
        assert case.decider.queries == [DecodeQuery("m", ORDER, 1)]
        assert case.worker.in_flight == 1
        # The request was counted by the first pass.
        assert case.requests_counted() == 0
    assert case.worker.in_flight == 0


async def test_without_a_worker_the_error_is_answered() -> None:
    async with running(no_decode_workers()) as case:
        assert error(await case.reply(decode_headers()))[0] == 503
        assert case.requests_counted() == 0
        assert await case.receive(response_headers(503)) == []
        assert await case.receive(decode_headers()) == []


async def test_without_an_order_no_worker_is_picked() -> None:
    async with running() as case:
        assert error(await case.reply(decode_headers("")))[:2] == (500, "internal_error")
        assert case.decider.queries == []
        assert case.worker.in_flight == 0


async def test_an_exception_in_the_router_is_answered_as_an_internal_error() -> None:
    async with running(ZeroDivisionError()) as case:
        assert error(await case.reply(decode_headers()))[:2] == (500, "internal_error")


async def test_the_second_headers_of_a_stream_pick_no_worker() -> None:
    async with running() as case:
        await case.receive(decode_headers())
        assert await case.receive(decode_headers()) == []
        assert len(case.decider.queries) == 1
    assert case.worker.in_flight == 0


@pytest.mark.parametrize(
    ("status", "details", "state"),
    [
        (200, "via_upstream", BreakerState.CLOSED),
        (422, "via_upstream", BreakerState.CLOSED),
        (500, "via_upstream", BreakerState.CLOSED),
        (503, "via_upstream", BreakerState.BUSY),
        (503, REFUSED, BreakerState.OPEN),
        (504, "stream_idle_timeout", BreakerState.OPEN),
        (413, "request_payload_too_large", BreakerState.CLOSED),
    ],
)
async def test_the_response_decides_the_outcome_and_the_breaker(
    status: int, details: str, state: BreakerState
) -> None:
    async with running() as case:
        await case.receive(decode_headers())
        reply = await case.reply(response_headers(status, upstream=ADDRESS, details=details))
        assert kind(reply) == "response_headers"
        assert set_headers(reply) == ({"retry-after": "1"} if status == 503 else {})
        assert case.worker.breaker.state is state
        assert len(case.fleet.outcomes()[case.worker.url]) == 1
        assert case.worker.in_flight == 1
        await case.close()
    assert case.worker.in_flight == 0
    assert len(case.fleet.outcomes()[case.worker.url]) == 1


async def test_debug_headers_name_the_worker_that_served() -> None:
    async with running() as case:
        await case.receive(decode_headers(more={"x-extproc-debug": "true"}))
        reply = await case.reply(response_headers(upstream=ADDRESS))
        assert set_headers(reply) == {"x-extproc-decode-worker": f"http://{ADDRESS}"}


@pytest.mark.parametrize("how", ["headers", "body", "trailers"])
async def test_the_end_of_the_response_releases_the_worker(how: str) -> None:
    async with running() as case:
        await case.receive(decode_headers())
        await case.receive(response_headers(upstream=ADDRESS, end=how == "headers"))
        match how:
            case "body":
                await case.receive(response_body(b"x", end=True))
            case "trailers":
                await case.receive(response_trailers())
        assert case.worker.in_flight == 0


async def test_a_client_that_leaves_does_not_count_against_the_worker() -> None:
    async with running() as case:
        await case.receive(decode_headers())
    assert case.fleet.outcomes() == {case.worker.url: ["cancelled"]}
    assert case.worker.breaker.state is BreakerState.CLOSED


async def test_a_request_that_is_too_old_is_ended_without_another_attempt() -> None:
    async with running() as case:
        await case.receive(decode_headers())
        (lease,) = case.decider.leases
        # As the janitor does.
        lease.abort(stale_request_expired())
        (reply,) = await case.replies()
        assert error(reply)[:2] == (504, "stale_request_expired")
        assert "x-extproc-retry" not in set_headers(reply)
        assert case.worker.breaker.state is BreakerState.OPEN
        assert await case.receive(response_headers(upstream=ADDRESS)) == []
    assert case.worker.in_flight == 0
    assert case.requests_counted() == 0
