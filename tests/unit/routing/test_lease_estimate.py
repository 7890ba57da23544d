"""`load.release: estimate`, for gateways that close our stream at the response headers."""

import pytest

from extproc.config.schema import LoadConfig
from tests.builders import Fleet, make_fleet, make_worker

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
VIA = "via_upstream"


def estimating(stale_seconds: float = 600.0) -> Fleet:
    return make_fleet(
        [make_worker(f"http://{A}"), make_worker(f"http://{B}", order=1)],
        load=LoadConfig(release="estimate", estimated_stream_secs=15.0),
        stale_seconds=stale_seconds,
    )


def load(routing: Fleet) -> list[int]:
    return [worker.in_flight for worker in routing.registry]


def later(routing: Fleet, seconds: float) -> list[int]:
    routing.clock.tick(seconds)
    routing.tickets.release_due()
    routing.tickets.sweep()
    return load(routing)


async def test_a_streamed_response_counts_for_the_estimated_time_after_its_headers() -> None:
    routing = estimating()
    lease = await routing.route(stream=True)
    routing.clock.tick(100.0)
    lease.responded(200, A, VIA, streamed=True)
    lease.close()
    assert load(routing) == [1, 0]
    assert later(routing, 14.9) == [1, 0]
    assert later(routing, 0.1) == [0, 0]
    lease.close()
    assert load(routing) == [0, 0]


async def test_the_estimated_time_counts_on_the_worker_that_serves() -> None:
    routing = estimating()
    lease = await routing.route(stream=True)
    lease.responded(200, B, VIA, streamed=True)
    lease.close()
    assert load(routing) == [0, 1]
    assert later(routing, 15.0) == [0, 0]


@pytest.mark.parametrize("status", [200, 503])
async def test_a_response_that_is_not_streamed_ends_with_the_stream(status: int) -> None:
    routing = estimating()
    lease = await routing.route()
    lease.responded(status, A, VIA, streamed=False)
    assert load(routing) == [1, 0]
    lease.close()
    assert load(routing) == [0, 0]


async def test_a_client_that_leaves_before_the_headers_is_released_at_once() -> None:
    routing = estimating()
    (await routing.route(stream=True)).close()
    assert load(routing) == [0, 0]


async def test_a_stream_that_has_ended_is_not_aborted() -> None:
    routing, aborts = estimating(stale_seconds=10.0), list[int]()
    lease = await routing.route(stream=True)
    lease.on_abort = lambda _: aborts.append(1)
    lease.responded(200, A, VIA, streamed=True)
    lease.close()
    later(routing, 10.0)
    assert not aborts
    assert routing.metric("extproc_stale_requests_total") == 0
