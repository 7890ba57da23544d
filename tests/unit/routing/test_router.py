"""From a request to a decision: which workers may be chosen, what is claimed and named."""

from collections import Counter
from collections.abc import Sequence

import pytest

from extproc.errors import RouterError
from extproc.policies.base import CandidateT, Choice
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_fleet, make_worker, routing_settings


def pool(count: int, **common: int) -> list[Worker]:
    return [
        make_worker(f"http://10.0.0.{n}:8000", order=n, threshold=common.get("threshold", 3))
        for n in range(1, count + 1)
    ]


def open_breaker(routing: Fleet, worker: Worker) -> None:
    for _ in range(worker.breaker.threshold):
        worker.breaker.failure(routing.clock.monotonic())
    assert worker.breaker.state is BreakerState.OPEN


async def refused(routing: Fleet, model: str | None = "m") -> RouterError:
    with pytest.raises(RouterError) as caught:
        await routing.route(model)
    return caught.value


# -- models


async def test_an_unknown_model_is_404_even_without_any_worker() -> None:
    error = await refused(make_fleet(), "other")
    assert (error.code, error.status) == ("model_not_found", 404)
    assert "other" in error.message


async def test_an_unconfigured_model_is_404_even_when_a_worker_serves_it() -> None:
    routing = make_fleet([make_worker(model_ids=("other",))])
    assert (await refused(routing, "other")).status == 404


async def test_a_configured_model_without_workers_is_503() -> None:
    error = await refused(make_fleet())
    assert (error.code, error.status) == ("no_healthy_workers", 503)


async def test_a_request_without_a_model_gets_the_only_one() -> None:
    routing = make_fleet(pool(1))
    assert routing.router.only_model == "m"
    assert (await routing.route(None)).decision.model == "m"


async def test_a_request_without_a_model_is_404_if_there_are_several() -> None:
    routing = make_fleet(pool(1), models=("m", "n"))
    assert routing.router.only_model is None
    assert routing.router.model_ids == ["m", "n"]
    assert (await refused(routing, None)).status == 404


async def test_a_model_is_served_by_its_own_workers_only() -> None:
    a = make_worker("http://10.0.0.1:8000", model_ids=("m",))
    b = make_worker("http://10.0.0.2:8000", order=1, model_ids=("n",))
    routing = make_fleet([a, b], models=("m", "n"))
    for _ in range(3):
        assert (await routing.route("m")).decision.destinations == ("10.0.0.1:8000",)
        assert (await routing.route("n")).decision.destinations == ("10.0.0.2:8000",)


async def test_an_error_names_no_worker() -> None:
    routing = make_fleet([make_worker("http://10.0.0.1:8000", resolved=False)])
    assert "10.0.0" not in (await refused(routing)).message


# -- the decision


@pytest.mark.parametrize(("stream", "timeout_ms"), [(False, 300_000), (True, 0)])
async def test_the_decision_has_the_destination_and_the_reason(
    stream: bool, timeout_ms: int
) -> None:
    routing = make_fleet(pool(1))
    decision = (await routing.route(stream=stream)).decision
    assert decision.worker_url == "http://10.0.0.1:8000"
    assert decision.destinations == ("10.0.0.1:8000",)
    assert (decision.model, decision.policy, decision.reason) == ("m", "round_robin", "next")
    assert decision.timeout_ms == timeout_ms
    labels = {"model": "m", "policy": "round_robin", "reason": "next"}
    assert routing.metric("extproc_decisions_total", **labels) == 1


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.001, 1), (0.0001, 1), (1.5, 1500)])
async def test_a_time_out_is_never_rounded_to_no_time_out(
    seconds: float, milliseconds: int
) -> None:
    routing = make_fleet(pool(1), request_timeout_seconds=seconds)
    assert (await routing.route()).decision.timeout_ms == milliseconds


async def test_an_ipv6_worker_is_named_in_brackets() -> None:
    routing = make_fleet([make_worker("http://[2001:db8::1]:8000")])
    assert (await routing.route()).decision.destinations == ("[2001:db8::1]:8000",)


# -- load


async def test_a_booking_is_seen_by_the_next_decision() -> None:
    workers = pool(3)
    routing = make_fleet(workers, policy="least_load")
    for _ in range(9):
        await routing.route()
    assert [worker.in_flight for worker in workers] == [3, 3, 3]
    assert len(routing.tickets) == 9


async def test_a_refused_request_books_nothing() -> None:
    workers = [make_worker("http://10.0.0.1:8000", resolved=False)]
    routing = make_fleet(workers)
    await refused(routing)
    assert (workers[0].in_flight, len(routing.tickets)) == (0, 0)


async def test_a_policy_that_raises_leaves_no_ticket_and_no_probe() -> None:
    class Broken:
        name = "broken"

        def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
            raise RuntimeError("boom")

    (worker,) = pool(1)
    routing = make_fleet([worker], policy=Broken())
    open_breaker(routing, worker)
    routing.clock.tick(30.0)
    with pytest.raises(RuntimeError, match="boom"):
        await routing.route()
    assert (worker.in_flight, worker.breaker.state) == (0, BreakerState.OPEN)


# -- breakers


async def test_with_all_breakers_open_those_that_failed_first_are_used_anyway() -> None:
    workers = pool(5)
    routing = make_fleet(workers)
    for worker in workers:
        open_breaker(routing, worker)
        routing.clock.tick(1.0)
    chosen = {(await routing.route()).decision.worker_url for _ in range(30)}
    assert chosen == {worker.url for worker in workers[:3]}
    assert {worker.breaker.state for worker in workers} == {BreakerState.OPEN}
    url = workers[0].url
    assert routing.metric("extproc_last_resort_total", worker=url, role="plain") == 10
    # One that fails as the last resort makes room for another.
    workers[0].breaker.failure(routing.clock.monotonic())
    chosen = {(await routing.route()).decision.worker_url for _ in range(30)}
    assert chosen == {worker.url for worker in workers[1:4]}


async def test_an_open_worker_is_neither_chosen_nor_a_fallback() -> None:
    workers = pool(3)
    routing = make_fleet(workers)
    open_breaker(routing, workers[1])
    for _ in range(10):
        assert "10.0.0.2:8000" not in (await routing.route()).decision.destinations


async def test_being_a_candidate_or_a_fallback_claims_no_probe() -> None:
    workers = pool(2)
    routing = make_fleet(workers)
    open_breaker(routing, workers[1])
    routing.clock.tick(30.0)
    lease = await routing.route()
    assert lease.decision.destinations == ("10.0.0.1:8000", "10.0.0.2:8000")
    assert workers[1].breaker.state is BreakerState.OPEN
    assert workers[1].breaker.would_allow(routing.clock.monotonic())


async def test_the_probe_is_claimed_for_the_chosen_worker_and_only_once() -> None:
    workers = pool(2)
    routing = make_fleet(workers)
    for worker in workers:
        open_breaker(routing, worker)
    routing.clock.tick(30.0)
    await routing.route()
    states = [worker.breaker.state for worker in workers]
    assert states == [BreakerState.HALF_OPEN, BreakerState.OPEN]
    lease = await routing.route()
    assert lease.decision.destinations == ("10.0.0.2:8000",)
    states = [worker.breaker.state for worker in workers]
    assert states == [BreakerState.HALF_OPEN, BreakerState.HALF_OPEN]


# -- fallbacks


@pytest.mark.parametrize(
    ("workers", "destinations_max", "named"),
    [(1, 3, 1), (2, 3, 2), (3, 3, 3), (9, 3, 3), (9, 1, 1), (9, 9, 9), (4, 9, 4)],
)
async def test_fallbacks_are_distinct_and_never_the_chosen_worker(
    workers: int, destinations_max: int, named: int
) -> None:
    routing = make_fleet(pool(workers), destinations_max=destinations_max)
    for turn in range(30):
        decision = (await routing.route()).decision
        assert len(decision.destinations) == named
        assert len(set(decision.destinations)) == named
        assert decision.destinations[0] == f"10.0.0.{turn % workers + 1}:8000"
        assert decision.worker_url == f"http://{decision.destinations[0]}"


@pytest.mark.parametrize(
    ("workers", "retry_busy", "named"), [(3, True, True), (1, True, False), (3, False, False)]
)
async def test_a_busy_answer_may_go_to_another_worker_if_there_is_one(
    workers: int, retry_busy: bool, named: bool
) -> None:
    fleet = Fleet(pool(workers), settings=routing_settings(retry_busy=retry_busy))
    assert (await fleet.route()).decision.retry_busy is named


async def test_a_reported_busy_answer_is_recorded_for_the_worker_at_the_address() -> None:
    fleet = Fleet(pool(2))
    assert fleet.router.answered_busy("10.0.0.2:8000", 1.0)
    assert not fleet.router.answered_busy("10.9.9.9:8000", None)
    states = [worker.breaker.state for worker in fleet.workers]
    assert states == [BreakerState.CLOSED, BreakerState.BUSY]


async def test_the_less_loaded_of_the_drawn_fallbacks_come_first() -> None:
    workers = pool(4)
    for worker, load in zip(workers, (0, 9, 1, 5), strict=True):
        worker.in_flight = load
    # All four are drawn: 2 * 2 + 1 > 4.
    routing = make_fleet(workers, policy="least_load")
    decision = (await routing.route()).decision
    assert decision.destinations == ("10.0.0.1:8000", "10.0.0.3:8000", "10.0.0.4:8000")


async def test_the_requests_of_a_dead_worker_fall_on_different_workers() -> None:
    routing = make_fleet(pool(5), destinations_max=2)
    seconds: Counter[str] = Counter()
    for _ in range(500):
        lease = await routing.route()
        first, second = lease.decision.destinations
        lease.close()
        if first == "10.0.0.1:8000":
            seconds[second] += 1
    # 100 requests over four others, 25 each.
    assert len(seconds) == 4
    assert max(seconds.values()) < 50
