"""A gateway that ignores decisions is noticed, and one that is only late is not reported."""

import pytest
import structlog.testing

from extproc.routing.gateway_watch import GatewayWatch
from extproc.workers.worker import Worker
from tests.builders import make_shared, make_worker
from tests.fakes import FakeClock

ELSEWHERE = "10.9.9.9:8000"


class Case:
    """A gateway of two workers; `respond` says what it did with a request for the first."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.workers = [make_worker(f"http://10.0.0.{n}:8000", order=n) for n in (1, 2)]
        shared = make_shared(self.workers, clock=self.clock)
        self.metrics, self.registry = shared.metrics, shared.registry
        self.watch = GatewayWatch(self.clock, shared.registry, shared.metrics, ["m"])

    def respond(self, chosen: Worker, served: str) -> None:
        self.metrics.response_seconds("m").observe(0.1)
        if served == chosen.address:
            self.watch.followed(served)
        else:
            self.watch.passed_over("m", [chosen], served)

    def missed(self, reason: str) -> int:
        return self.metrics.missed("m", reason).value


def test_a_gateway_that_serves_elsewhere_is_reported_once_after_five_requests() -> None:
    case = Case()
    first, second = case.workers
    with structlog.testing.capture_logs() as logs:
        for number in range(10):
            assert case.watch.ignores("m") == (number >= 5)
            case.respond((first, second)[number % 2], ELSEWHERE)
    assert [one["event"] for one in logs] == [
        "worker_unknown_to_gateway",
        "worker_unknown_to_gateway",
        "gateway_does_not_follow",
    ]
    assert case.watch.verdicts() == {"m": True}
    assert case.missed("unknown_address") == 10


def test_a_gateway_that_does_not_know_one_of_several_workers_follows() -> None:
    case = Case()
    unknown, known = case.workers
    address = known.address or ""
    for _ in range(20):
        case.respond(unknown, address)
        case.respond(known, address)
        case.respond(known, address)
        case.clock.tick(0.1)
    assert case.watch.verdicts() == {"m": False}
    assert [case.watch.knows(worker) for worker in case.workers] == [False, True]
    assert case.missed("other_worker") == 20
    case.respond(unknown, unknown.address or "")
    assert case.watch.knows(unknown)


def test_a_gateway_that_hits_the_chosen_worker_by_chance_is_reported() -> None:
    """Of two workers an own balancer hits the chosen one in half of the requests."""
    case = Case()
    first, second = case.workers
    for number in range(12):
        case.respond(first, ((first, second)[number % 2].address) or "")
    assert case.watch.ignores("m")


def test_a_worker_known_for_less_than_five_seconds_counts_as_lag() -> None:
    case = Case()
    case.watch.workers_changed()
    case.clock.tick(4.9)
    for _ in range(10):
        case.respond(case.workers[0], ELSEWHERE)
    assert (case.missed("lag"), case.missed("unknown_address")) == (10, 0)
    assert not case.watch.ignores("m")
    assert case.watch.knows(case.workers[0])
    case.clock.tick(0.1)
    case.respond(case.workers[0], ELSEWHERE)
    assert case.missed("unknown_address") == 1
    assert not case.watch.knows(case.workers[0])


@pytest.mark.parametrize("at_rest", [False, True])
def test_a_gateway_that_follows_again_is_cleared(at_rest: bool) -> None:
    case = Case()
    first = case.workers[0]
    for _ in range(10):
        case.respond(first, ELSEWHERE)
    case.clock.tick(11)
    assert case.watch.ignores("m")  # the window is over, and its verdict holds
    if at_rest:
        case.clock.tick(600)
        assert case.watch.ignores("m")  # without requests nothing says otherwise
    for _ in range(30):
        case.respond(first, first.address or "")
    case.clock.tick(11)
    assert not case.watch.ignores("m")
    assert case.watch.doubts == {}


def test_a_worker_that_left_is_forgotten() -> None:
    case = Case()
    gone = case.workers[0]
    case.respond(gone, ELSEWHERE)
    assert set(case.watch.doubts) == {gone.address}
    case.registry.remove(gone.id)
    case.watch.workers_changed()
    assert case.watch.doubts == {}


def test_a_model_without_requests_is_followed() -> None:
    assert Case().watch.verdicts() == {"m": False}
    assert not Case().watch.ignores("n")
