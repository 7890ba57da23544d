"""The response path: which worker served, when load is released, and what is echoed."""

import asyncio
import time
from typing import Any

import pytest

from extproc.config.schema import LoadConfig
from extproc.routing.lease import Lease
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request
from extproc.server.stream_settings import Extension
from extproc.workers.circuit_breaker import BreakerState
from tests.protocol.exchange import (
    Envoy,
    Service,
    destination,
    echoed,
    error,
    eventually,
    kind,
    llm_body,
    request_body,
    request_headers,
    response_body,
    response_headers,
    response_trailers,
    serving,
    set_headers,
    stream,
)

FIRST, SECOND = "10.0.0.1:8000", "10.0.0.2:8000"
REFUSED = "upstream_reset_before_response_started{connection_failure|refused}"
BROKEN = "upstream_reset_before_response_started{connection_termination}"


async def routed(
    envoy: Envoy, *, mode: str = "BUFFERED", response_mode: str = "NONE", **headers: Any
) -> None:
    """Bring a stream to the point where Envoy waits for the upstream."""
    await envoy.send(
        request_headers(mode=mode, response_mode=response_mode, **headers),
        request_body(llm_body()),
    )
    await envoy.replies(2)


def sample(service: Service, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


def outcome(service: Service, worker: int, result: str) -> float:
    return sample(
        service,
        "extproc_worker_requests_total",
        worker=service.workers[worker].url,
        model="m",
        role="plain",
        outcome=result,
    )


@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_load_counts_from_the_decision_to_the_end_of_the_stream(mode: str) -> None:
    async with serving(Service(["m"], 1)) as service:
        async with stream(service) as envoy:
            await routed(envoy, mode=mode)
            assert service.in_flight == 1
            await envoy.send(response_headers(upstream=FIRST))
            assert kind(await envoy.reply()) == "response_headers"
            assert service.in_flight == 1
            await envoy.half_close()
            assert (await envoy.ended()).name == "OK"
        await eventually(lambda: service.in_flight == 0)
        assert outcome(service, 0, "success") == 1
        assert len(service.tickets) == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
async def test_an_abort_at_any_point_leaves_nothing_behind(steps: int) -> None:
    messages = [
        request_headers(),
        request_body(llm_body()),
        response_headers(upstream=FIRST),
    ]
    async with serving(Service(["m"], 1)) as service:
        async with stream(service) as envoy:
            for message in messages[:steps]:
                await envoy.send(message)
                await envoy.reply()
            await envoy.close()
        await eventually(lambda: service.in_flight == 0 and not service.server.open_streams)
        assert len(service.tickets) == 0
        assert outcome(service, 0, "cancelled") == (1 if steps == 2 else 0)


async def test_a_decision_that_takes_long_asks_the_gateway_for_more_time_once() -> None:
    extension = Extension(after_seconds=0.1, message_timeout_seconds=7.5)
    service = Service(["m"], 1, route_seconds=0.6, extension=extension)
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(), request_body(llm_body()))
        head, more, decision = await envoy.replies(3)
        assert head.WhichOneof("response") == "request_headers"
        assert more.WhichOneof("response") is None
        assert more.override_message_timeout.ToMilliseconds() == 7500
        assert decision.WhichOneof("response") == "request_body"


async def test_a_decision_that_never_comes_ends_at_its_deadline_after_the_extension() -> None:
    extension = Extension(after_seconds=0.05, message_timeout_seconds=7.5)
    server = {"step_deadline_secs": 0.3}
    service = Service(["m"], 1, server=server, route_seconds=30, extension=extension)
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(), request_body(llm_body()))
        _, more, reply = await envoy.replies(3)
        assert more.HasField("override_message_timeout")
        assert error(reply)[:2] == (503, "routing_timeout")


async def test_an_abort_while_the_router_decides_leaves_nothing_behind() -> None:
    async with serving(Service(["m"], 1, route_seconds=0.2)) as service:
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            await envoy.reply()
            await asyncio.sleep(0.05)
            await envoy.close()
        await eventually(lambda: not service.server.open_streams)
        await asyncio.sleep(0.3)
        assert service.in_flight == 0


async def test_a_500_is_an_error_and_503_and_429_mean_that_the_worker_is_busy() -> None:
    async with serving(Service(["m"], 1)) as service:
        for status in (500, 503, 429):
            async with stream(service) as envoy:
                await routed(envoy)
                await envoy.send(response_headers(status, upstream=FIRST, retry_after="3"))
                await envoy.reply()
        assert outcome(service, 0, "error") == 1
        assert outcome(service, 0, "busy") == 2
        breaker, now = service.workers[0].breaker, time.monotonic()
        assert breaker.state is BreakerState.BUSY
        assert not breaker.would_allow(now + 0.5)
        assert breaker.would_allow(now + 3.0)


async def test_three_broken_requests_open_the_breaker_of_a_worker_that_is_used_anyway() -> None:
    async with serving(Service(["m"], 1)) as service:
        for _ in range(3):
            async with stream(service) as envoy:
                await routed(envoy)
                await envoy.send(response_headers(503, upstream=FIRST, details=BROKEN))
                await envoy.reply()
        assert service.workers[0].breaker.state is BreakerState.OPEN
        async with stream(service) as envoy:
            await routed(envoy)
        url = service.workers[0].url
        assert sample(service, "extproc_last_resort_total", worker=url, role="plain") == 1


@pytest.mark.parametrize(
    ("attempts", "reason"), [(0, "other_worker"), (1, "other_worker"), (2, "further_attempt")]
)
async def test_a_response_of_another_endpoint_is_counted_and_is_no_workers_outcome(
    attempts: int, reason: str
) -> None:
    async with serving(Service(["m"], 2)) as service, stream(service) as envoy:
        await routed(envoy)
        await envoy.send(response_headers(upstream=SECOND, attempts=attempts))
        await envoy.reply()
        assert sample(service, "extproc_destination_missed_total", model="m", reason=reason) == 1
        assert sample(service, "extproc_worker_requests_total") == 0
        assert [worker.in_flight for worker in service.workers] == [0, 1]


async def test_the_served_endpoint_of_the_picker_protocol_settles_the_lease() -> None:
    async with serving(Service(["m"], 2)) as service, stream(service) as envoy:
        await routed(envoy)
        await envoy.send(response_headers(details="", served=FIRST))
        await envoy.reply()
        assert outcome(service, 0, "success") == 1


async def test_a_local_reply_without_an_upstream_does_not_count_against_the_worker() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await routed(envoy)
        await envoy.send(response_headers(503, details="overload"))
        await envoy.reply()
        assert outcome(service, 0, "error") == 0


async def test_debug_headers_only_when_configured_and_asked_for() -> None:
    for configured, asked, shown in (
        (True, "true", True),
        (True, "no", False),
        (False, "true", False),
    ):
        async with (
            serving(Service(["m"], 1, debug_headers=configured)) as service,
            stream(service) as envoy,
        ):
            await routed(envoy, x_extproc_debug=asked)
            await envoy.send(response_headers(upstream=FIRST))
            headers = set_headers(await envoy.reply())
            assert headers == (
                {
                    "x-extproc-worker": "http://10.0.0.1:8000",
                    "x-extproc-policy": "round_robin",
                    "x-extproc-reason": "next",
                    "x-extproc-overlap": "0/0",
                }
                if shown
                else {}
            )


async def test_streamed_response_bodies_get_one_reply_each() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await routed(envoy, response_mode="STREAMED")
        await envoy.send(
            response_headers(upstream=FIRST), response_body(b"a"), response_body(b"b", end=True)
        )
        replies = await envoy.replies(3)
        assert [kind(reply) for reply in replies] == ["response_headers", *["response_body"] * 2]
        assert not replies[1].response_body.HasField("response")
        assert service.in_flight == 0
        await envoy.no_reply()


async def test_full_duplex_responses_are_echoed_piece_by_piece() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await routed(envoy, mode="FULL_DUPLEX_STREAMED", response_mode="FULL_DUPLEX_STREAMED")
        await envoy.send(response_headers(upstream=FIRST))
        assert kind(await envoy.reply()) == "response_headers"
        pieces = [b"data: one\n\n", b"x" * 130_000, b""]
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            await envoy.send(response_body(piece, end=last))
            # 130 000 bytes come back as 62 000 + 62 000 + 6 000.
            data, ends = echoed(await envoy.replies(3 if index == 1 else 1))
            assert data == piece
            assert ends[-1] is last
            assert not any(ends[:-1])
        assert service.in_flight == 0


async def test_response_trailers_end_the_load_and_get_a_reply() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await routed(envoy)
        await envoy.send(response_headers(upstream=FIRST), response_trailers())
        assert [kind(reply) for reply in await envoy.replies(2)] == [
            "response_headers",
            "response_trailers",
        ]
        assert service.in_flight == 0


async def test_a_stale_request_is_answered_with_504() -> None:
    async with serving(Service(["m"], 1, stale_seconds=0.05)) as service:
        async with stream(service) as envoy:
            await routed(envoy)
            await asyncio.sleep(0.06)
            assert service.tickets.sweep() == 1
            assert service.tickets.sweep() == 0
            status, code, body = error(await envoy.reply())
            assert (status, code, body["request_id"]) == (504, "stale_request_expired", "req-1")
            assert outcome(service, 0, "error") == 1
        await eventually(lambda: service.in_flight == 0)


async def test_a_stale_stream_is_cut_after_its_headers() -> None:
    async with serving(Service(["m"], 1, stale_seconds=0.05)) as service:
        async with stream(service) as envoy:
            await routed(envoy)
            await envoy.send(response_headers(upstream=FIRST))
            await envoy.reply()
            await asyncio.sleep(0.06)
            service.tickets.sweep()
            # Envoy resets a response that has begun when it gets an immediate response.
            assert kind(await envoy.reply()) == "immediate_response"
            assert outcome(service, 0, "error") == 0
            # Whatever still comes is not replied to.
            await envoy.send(response_trailers())
            await envoy.no_reply()
        await eventually(lambda: service.in_flight == 0)


async def test_the_step_deadline_answers_before_the_proxy_gives_up() -> None:
    service = Service(["m"], 1, server={"step_deadline_secs": 0.05}, route_seconds=5)
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(), request_body(llm_body()))
        assert error((await envoy.replies(2))[1])[:2] == (503, "routing_timeout")


@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_a_body_that_never_comes_is_answered_with_408(mode: str) -> None:
    service = Service(["m"], 1, body_seconds=0.05)
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(mode=mode))
        replies = await envoy.replies(2 if mode == "BUFFERED" else 1)
        assert error(replies[-1])[:2] == (408, "request_timeout")


@pytest.mark.parametrize("pieces", [0, 1])
async def test_a_body_that_comes_after_the_decision_has_a_deadline_too(pieces: int) -> None:
    service = Service(["m"], 1, body_seconds=0.05)
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(mode="STREAMED"))
        destination(await envoy.reply())
        for _ in range(pieces):
            await envoy.send(request_body(b'{"model":"m"', end=False))
        assert error(await envoy.reply())[:2] == (408, "request_timeout")


async def test_a_late_body_that_is_complete_has_no_deadline() -> None:
    service = Service(["m"], 1, body_seconds=0.2)
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(mode="STREAMED"))
        destination(await envoy.reply())
        await envoy.send(request_body(llm_body()))
        await envoy.reply()
        assert not service.server.streams.deadlines
        await asyncio.sleep(0.3)
        await envoy.no_reply()


async def test_an_exception_in_the_router_is_answered_and_costs_one_request() -> None:
    class Exploding(Service):
        explodes = True

        async def route(self, request: Request) -> Lease | Pair:
            if self.explodes:
                raise ZeroDivisionError
            return await super().route(request)

    service = Exploding(["m"], 1)
    async with serving(service):
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            assert error((await envoy.replies(2))[1])[:2] == (500, "internal_error")
        service.explodes = False
        async with stream(service) as envoy:
            await routed(envoy)


async def test_an_estimated_release_outlives_a_stream_that_closes_at_the_headers() -> None:
    load = LoadConfig(release="estimate", estimated_stream_secs=0.05)
    async with serving(Service(["m"], 1, load=load)) as service:
        for content_type, still_counted in (("text/event-stream", 1), ("application/json", 0)):
            async with stream(service) as envoy:
                await routed(envoy)
                await envoy.send(response_headers(upstream=FIRST, content_type=content_type))
                await envoy.reply()
                await envoy.half_close()
                await envoy.ended()
            await eventually(lambda: not service.server.open_streams)
            assert service.in_flight == still_counted
            await asyncio.sleep(0.06)
            service.tickets.release_due()
            assert service.in_flight == 0


async def test_draining_ends_decided_streams_with_ok_and_first_answers_the_others() -> None:
    async with serving(Service(["m"], 1)) as service:
        async with stream(service) as decided, stream(service) as waiting:
            await routed(decided)
            await decided.send(response_headers(upstream=FIRST))
            await decided.reply()
            await waiting.send(request_headers())
            await waiting.reply()
            drain = asyncio.create_task(service.server.drain(10))
            assert (await decided.ended()).name == "OK"
            await waiting.send(request_body(llm_body()))
            assert kind(await waiting.reply()) == "request_body"
            assert (await waiting.ended()).name == "OK"
            await drain
        assert service.in_flight == 0


async def test_draining_does_not_end_a_full_duplex_response() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await routed(envoy, response_mode="FULL_DUPLEX_STREAMED")
        await envoy.send(response_headers(upstream=FIRST))
        await envoy.reply()
        drain = asyncio.create_task(service.server.drain(10))
        await asyncio.sleep(0.3)
        await envoy.send(response_body(b"last", end=True))
        assert echoed([await envoy.reply()]) == (b"last", [True])
        await envoy.half_close()
        assert (await envoy.ended()).name == "OK"
        await drain
