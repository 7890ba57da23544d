"""Both passes of a request over a real gRPC connection; only the engines are made up."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineUnreachableError
from tests.protocol.exchange import (
    Envoy,
    Service,
    destination,
    error,
    eventually,
    header_map,
    kind,
    llm_body,
    request_body,
    request_headers,
    response_body,
    response_headers,
    serving,
    set_headers,
    stream,
)
from tests.unit.routing.pd.pd_fleet import ADDRESSES, KV, PREFILLS, PdFleet

DECODE = (("x-extproc-pass", "decode"),)
REFUSED = "upstream_reset_before_response_started{remote_connection_failure}"


class PdService(Service):
    """A service whose router has workers that prefill and decode apart."""

    def __init__(self, fleet: PdFleet, **options: Any) -> None:
        super().__init__(["m"], 0, **options)
        self.fleet = fleet
        self.router = fleet.router

    async def settled(self) -> None:
        """Everything that was held is released."""
        await eventually(lambda: not self.server.open_streams)
        self.fleet.nothing_is_left()


@asynccontextmanager
async def service(
    *, options: dict[str, Any] | None = None, **fleet: Any
) -> AsyncIterator[PdService]:
    workers = PdFleet(**fleet)
    try:
        async with serving(PdService(workers, **(options or {}))) as running:
            assert isinstance(running, PdService)
            yield running
    finally:
        PdFleet.made.remove(workers)
        await workers.close()


def decode_headers(order: str | None, attempt: int = 1, **more: str) -> pb.ProcessingRequest:
    """What the second filter sees: the headers as the first pass has made them."""
    fields = {":method": "POST", ":path": "/generate", "x-request-id": "req-1"}
    fields |= {"x-extproc-model": "m", "x-envoy-attempt-count": str(attempt), **more}
    if order is not None:
        fields["x-extproc-decode-order"] = order
    return pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=header_map(fields)))


async def first_pass(envoy: Envoy, mode: str = "BUFFERED", **body: Any) -> pb.ProcessingResponse:
    """The reply that carries the decision."""
    await envoy.send(request_headers(mode=mode), request_body(llm_body(**body)))
    if mode == "FULL_DUPLEX_STREAMED":
        return await envoy.reply()
    return (await envoy.replies(2))[1]


def order_of(reply: pb.ProcessingResponse) -> str:
    return set_headers(reply)["x-extproc-decode-order"]


# -- both passes


async def test_the_first_pass_sends_the_prefill_and_the_request_on_to_the_second() -> None:
    async with service() as running, stream(running) as envoy:
        reply = await first_pass(envoy)
        (post,) = running.fleet.prefill_client.posts
        assert (post.url, post.path) == (PREFILLS[0], "/v1/chat/completions")
        assert dict(post.headers)["x-request-id"] == "req-1"
        headers = set_headers(reply)
        order = DecodeOrder.from_header(headers.pop("x-extproc-decode-order"))
        assert sorted(order.addresses) == ADDRESSES
        sent = reply.request_body.response.body_mutation.body
        assert sent == post.body
        assert headers == {
            "x-extproc-cluster": "decode_pass",
            "x-extproc-model": "m",
            "x-envoy-max-retries": "2",
            "x-envoy-upstream-rq-timeout-ms": "300000",
            "content-length": str(len(sent)),
        }
        assert json.loads(sent)["bootstrap_host"] == "10.0.0.1"
        assert reply.request_body.response.clear_route_cache
        metadata = MessageToDict(reply.dynamic_metadata)
        assert metadata["extproc"]["destination"] == ""
        assert "envoy.lb" not in metadata


async def test_the_prefill_worker_gets_the_clients_headers_that_concern_it() -> None:
    passed_on = {
        "authorization": "Bearer client",
        "traceparent": "00-1",
        "tracestate": "vendor=1",
        "x-correlation-id": "c",
        "x-request-id-parent": "p",
        "x-sgl-anything": "s",
    }
    kept_back = {"cookie": "secret", "x-forwarded-for": "10.1.1.1", "x-override-rid": "0"}
    async with service() as running, stream(running) as envoy:
        message = request_headers()
        message.request_headers.headers.MergeFrom(header_map(passed_on | kept_back))
        await envoy.send(message, request_body(llm_body()))
        await envoy.replies(2)
        (post,) = running.fleet.prefill_client.posts
        assert dict(post.headers) == passed_on | {
            "content-type": "application/json",
            "x-request-id": "req-1",
        }


@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_the_second_pass_answers_with_a_worker_and_both_end_well(mode: str) -> None:
    async with service() as running:
        async with stream(running) as first, stream(running, DECODE) as second:
            order = order_of(await first_pass(first, mode, stream=True))
            await second.send(decode_headers(order))
            reply = await second.reply()
            assert kind(reply) == "request_headers"
            address = destination(reply)
            assert address in DecodeOrder.from_header(order).attempt_group(1)
            assert set_headers(reply)["x-extproc-cluster"] == "workers"
            assert set_headers(reply)["x-envoy-max-retries"] == "0"
            assert MessageToDict(reply.dynamic_metadata)["extproc"] == {
                "model": "m",
                "policy": "decode_affinity",
                "reason": "no_peer",
                "destination": address,
            }
            assert sum(running.fleet.load[1]) == 1
            await second.send(response_headers(upstream=address))
            assert kind(await second.reply()) == "response_headers"
            worker = running.fleet.registry.at_address(address)
            assert worker is not None
            assert running.fleet.outcomes() == {worker.url: ["success"]}
            running.fleet.prefill_client.calls[0].respond(200)
            await eventually(lambda: not running.fleet.load[0][0])
            assert sum(running.fleet.load[1]) == 1
            await second.send(response_body(b"x", end=True))
            await second.reply()
            assert sum(running.fleet.load[1]) == 0
        await running.settled()
        assert running.fleet.outcomes()[PREFILLS[0]] == ["success"]


async def test_the_end_of_the_second_stream_releases_its_worker() -> None:
    async with service() as running:
        async with stream(running) as first:
            order = order_of(await first_pass(first))
            async with stream(running, DECODE) as second:
                await second.send(decode_headers(order))
                await second.reply()
                assert sum(running.fleet.load[1]) == 1
            await eventually(lambda: not sum(running.fleet.load[1]))
            # The first pass goes on, perhaps with another attempt.
            assert running.fleet.prefill_client.calls[0].is_open
        await running.settled()


async def test_a_further_attempt_gets_a_worker_of_its_own_group() -> None:
    async with service(threshold=1) as running:
        async with stream(running) as first:
            order = order_of(await first_pass(first))
            served = []
            for attempt in (1, 2, 3):
                async with stream(running, DECODE) as second:
                    await second.send(decode_headers(order, attempt))
                    served.append(destination(await second.reply()))
                    details = REFUSED if attempt < 3 else "via_upstream"
                    status = 503 if attempt < 3 else 200
                    await second.send(
                        response_headers(status, upstream=served[-1], details=details)
                    )
                    await second.reply()
            assert tuple(served) == DecodeOrder.from_header(order).addresses
        await running.settled()
        found = [running.fleet.registry.at_address(address) for address in served]
        states = [worker.breaker.state for worker in found if worker is not None]
        assert states == [BreakerState.OPEN, BreakerState.OPEN, BreakerState.CLOSED]


@pytest.mark.parametrize(("attempt", "retry"), [(1, True), (2, True), (3, False)])
async def test_without_a_worker_only_the_last_attempt_is_final(attempt: int, retry: bool) -> None:
    async with service() as running:
        async with stream(running) as first:
            order = order_of(await first_pass(first))
            running.fleet.leave(*running.fleet.decodes)
            async with stream(running, DECODE) as second:
                await second.send(decode_headers(order, attempt))
                reply = await second.reply()
                assert error(reply)[:2] == (503, "no_decode_workers_available")
                assert ("x-extproc-retry" in set_headers(reply)) == retry
        await running.settled()


@pytest.mark.parametrize("order", [None, "", "garbage", "0;h;p;a:1", "2;h;p"])
async def test_a_second_pass_without_a_decode_order_is_an_internal_error(order: str | None) -> None:
    async with service() as running:
        async with stream(running, DECODE) as second:
            await second.send(decode_headers(order))
            reply = await second.reply()
            assert error(reply)[:2] == (500, "internal_error")
            assert "x-extproc-retry" not in set_headers(reply)
            await second.no_reply()
        await running.settled()


async def test_another_replica_can_have_the_second_pass() -> None:
    async with service() as one, service() as other, stream(one) as first:
        order = order_of(await first_pass(first))
        async with stream(other, DECODE) as second:
            await second.send(decode_headers(order))
            assert destination(await second.reply()) in ADDRESSES
        await other.settled()


# -- the name of the pass


async def test_an_unknown_pass_is_refused() -> None:
    async with (
        service() as running,
        stream(running, (("x-extproc-pass", "prefill"),)) as envoy,
    ):
        assert await envoy.ended() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_do_not_parse_end_the_stream_of_the_second_pass() -> None:
    async with service() as running:
        async with grpc.aio.insecure_channel(running.target) as channel:
            method: Any = channel.stream_stream(
                "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
            )
            call = method(metadata=DECODE)
            await call.write(b"\xff\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await running.settled()


async def test_headers_of_the_second_pass_have_no_effect_in_the_first() -> None:
    async with service() as running, stream(running) as envoy:
        await envoy.send(decode_headers("1;10.0.0.1;x;10.9.9.9:1"), request_body(b'{"model":"m"}'))
        # It is a request like any other: its worker is picked anew.
        reply = (await envoy.replies(2))[1]
        assert sorted(DecodeOrder.from_header(order_of(reply)).addresses) == ADDRESSES


# -- ways to end early


async def test_a_failed_prefill_is_answered_while_the_client_waits() -> None:
    async with service(threshold=1) as running:
        async with stream(running) as first:
            await first_pass(first)
            running.fleet.prefill_client.calls[0].fail(EngineUnreachableError("broken off"))
            reply = await first.reply()
            assert error(reply)[:2] == (502, "prefill_failed")
            assert running.fleet.prefills[0].breaker.state is BreakerState.OPEN
        await running.settled()
        assert running.fleet.metric("extproc_pd_fail_fast_seconds_count") == 1


async def test_a_refused_prefill_is_answered_with_the_engines_own_body() -> None:
    words = b'{"object":"error","message":"too long"}'
    async with service() as running:
        async with stream(running) as first:
            await first_pass(first)
            running.fleet.prefill_client.calls[0].respond(400, words)
            immediate = (await first.reply()).immediate_response
            assert (immediate.status.code, immediate.body) == (400, words)
        await running.settled()


async def test_a_client_that_leaves_ends_the_prefill() -> None:
    async with service() as running:
        async with stream(running) as first:
            await first_pass(first)
            assert running.fleet.prefill_client.calls[0].is_open
        await running.settled()
        assert running.fleet.prefill_client.calls[0].cancels
        assert running.fleet.outcomes() == {PREFILLS[0]: ["cancelled"]}


async def test_a_bad_response_ends_the_prefill_at_once() -> None:
    async with service() as running:
        async with stream(running) as first:
            await first_pass(first)
            await first.send(response_headers(503, upstream="", details=REFUSED))
            assert kind(await first.reply()) == "response_headers"
            assert not running.fleet.prefill_client.calls[0].is_open
            await first.no_reply()
        await running.settled()
        outcome = {"model": "m", "outcome": "decode_failed"}
        assert running.fleet.metric("extproc_pd_pairs_total", **outcome) == 1


async def test_our_deadline_leaves_no_prefill_behind() -> None:
    server = {"step_deadline_secs": 0.2}
    async with service(prefills=PREFILLS[:1], options={"server": server}) as running:
        running.fleet.prefill_client.silent.add(PREFILLS[0])
        async with stream(running) as first:
            assert error(await first_pass(first))[:2] == (503, "routing_timeout")
            running.fleet.nothing_is_left()
        await running.settled()


async def test_without_prefill_workers_the_error_comes_before_anything_is_sent() -> None:
    async with service() as running, stream(running) as first:
        running.fleet.leave(*running.fleet.prefills)
        reply = await first_pass(first)
        assert error(reply)[:2] == (503, "no_prefill_workers_available")
        assert running.fleet.prefill_client.posts == []


# -- one pass


async def test_with_inline_decode_one_reply_names_the_decode_workers() -> None:
    async with service(inline=True, decode_attempts=2) as running:
        async with stream(running) as envoy:
            reply = await first_pass(envoy)
            first, second = destination(reply).split(",")
            headers = set_headers(reply)
            assert headers["x-extproc-cluster"] == "workers"
            assert headers["x-envoy-max-retries"] == "1"
            assert "x-extproc-decode-order" not in headers
            await envoy.send(response_headers(upstream=second))
            await envoy.reply()
            assert running.fleet.outcomes() == {
                f"http://{first}": ["error"],
                f"http://{second}": ["success"],
            }
        await running.settled()


async def test_with_nixl_the_reply_waits_for_the_prefill() -> None:
    async with service(protocols={"m": "nixl"}) as running:
        async with stream(running) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            await envoy.reply()
            await envoy.no_reply()
            answer = b'{"kv_transfer_params":%b}' % KV
            running.fleet.prefill_client.calls[0].respond(200, answer)
            reply = await envoy.reply()
            sent = reply.request_body.response.body_mutation.body
            assert json.loads(sent)["kv_transfer_params"] == json.loads(KV)
            assert order_of(reply)
        await running.settled()


async def test_a_client_that_leaves_ends_the_prefill_that_its_reply_waits_for() -> None:
    async with service(protocols={"m": "nixl"}) as running:
        async with stream(running) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            await envoy.reply()
            await eventually(lambda: running.fleet.prefill_client.calls)
        await running.settled()
        assert running.fleet.prefill_client.calls[0].cancels


# -- many at once


async def test_many_requests_with_mixed_ends_leave_nothing_behind() -> None:
    async with service(threshold=1000) as running:

        async def one(number: int) -> None:
            async with stream(running) as first, stream(running, DECODE) as second:
                order = order_of(await first_pass(first))
                if number % 4 == 0:
                    return
                await second.send(decode_headers(order))
                address = destination(await second.reply())
                if number % 4 == 1:
                    return
                status = 200 if number % 4 == 2 else 500
                await second.send(response_headers(status, upstream=address))
                await first.send(response_headers(status, upstream=""))
                await asyncio.gather(first.reply(), second.reply())

        await asyncio.gather(*(one(number) for number in range(40)))
        await running.settled()
