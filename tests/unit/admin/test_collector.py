"""The gauges of the workers show the registry at the time of the scrape."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from extproc.admin.collector import WorkerCollector
from extproc.workers.registry import WorkerRegistry
from extproc.workers.source_health import SourceHealth
from extproc.workers.tickets import Tickets
from tests.builders import Fleet, make_fleet, make_worker

A, B = "http://10.0.0.1:8000", "http://10.0.0.2:8000"


def watched(routing: Fleet) -> Fleet:
    routing.prometheus.register(WorkerCollector(routing.registry, routing.tickets, SourceHealth()))
    return routing


def test_without_workers_there_are_no_worker_series() -> None:
    routing = watched(make_fleet())
    assert b"extproc_worker_in_flight{" not in generate_latest(routing.prometheus)
    assert routing.metric("extproc_tickets_open") == 0


async def test_load_and_breaker_are_read_at_the_scrape() -> None:
    worker = make_worker(A, threshold=1)
    routing = watched(make_fleet([worker]))
    leases = [await routing.route() for _ in range(3)]
    assert routing.metric("extproc_worker_in_flight", worker=A) == 3
    assert routing.metric("extproc_tickets_open") == 3
    assert routing.metric("extproc_worker_breaker_state", worker=A) == 0
    leases[0].close()
    leases[1].responded(503, "", "upstream_reset_before_response", streamed=False)
    assert routing.metric("extproc_worker_in_flight", worker=A) == 2
    assert routing.metric("extproc_worker_breaker_state", worker=A) == 1
    worker.breaker.claim(routing.clock.monotonic() + 30.0)
    assert routing.metric("extproc_worker_breaker_state", worker=A) == 2


def test_a_worker_that_left_has_no_series() -> None:
    routing = watched(make_fleet([make_worker(A), make_worker(B, order=1)]))
    routing.registry.remove(A)
    text = generate_latest(routing.prometheus).decode()
    assert A not in text
    assert B in text


@pytest.mark.parametrize(
    ("model", "role", "count"),
    [("m", "plain", 2), ("n", "plain", 1), ("pd", "decode", 1), ("", "plain", 1)],
)
def test_workers_are_counted_by_model_and_role(model: str, role: str, count: int) -> None:
    routing = watched(
        make_fleet(
            [
                make_worker("http://a:1", model_ids=("m",)),
                make_worker("http://b:1", model_ids=("m", "n")),
                make_worker("http://c:1", model_ids=("pd",), role="decode"),
                make_worker("http://d:1", model_ids=()),
            ]
        )
    )
    assert routing.metric("extproc_workers", model=model, role=role) == count


def test_workers_that_an_operator_added_are_counted() -> None:
    routing = watched(make_fleet([make_worker(A), make_worker(B, id=f"runtime/{B}", order=1)]))
    assert routing.metric("extproc_runtime_workers") == 1


def test_two_workers_at_one_url_share_their_series() -> None:
    routing = watched(
        make_fleet([make_worker(A, id="old-pod"), make_worker(A, id="new-pod", order=1)])
    )
    lines = [
        line.rpartition(" ")[0]
        for line in generate_latest(routing.prometheus).decode().splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) == len(set(lines))


def test_workers_that_discovery_does_not_confirm_are_stale() -> None:
    routing = make_fleet([make_worker(A), make_worker(B, order=1)])
    sources = SourceHealth()
    routing.prometheus.register(WorkerCollector(routing.registry, routing.tickets, sources))
    assert routing.metric("extproc_workers_stale") == 0
    next(iter(routing.registry)).vanished = True
    assert routing.metric("extproc_workers_stale") == 1
    sources.fails("pods", "forbidden", 0.0)
    assert routing.metric("extproc_workers_stale") == 2


def test_registering_the_collector_does_not_read_the_workers() -> None:
    routing = make_fleet()

    class Exploding(WorkerRegistry):
        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("read at registration")

    collector = WorkerCollector(
        Exploding(), Tickets(routing.clock, 1.0, _stale(routing)), SourceHealth()
    )
    CollectorRegistry(auto_describe=True).register(collector)


def _stale(routing: Fleet):  # type: ignore[no-untyped-def]
    return routing.metrics.stale_requests
