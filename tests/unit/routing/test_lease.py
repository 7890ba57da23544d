"""What Envoy reports is recorded for the worker that served; each request counts once."""

import pytest

from extproc.config.schema import LoadConfig
from extproc.errors import stale_request_expired
from extproc.routing.lease import Lease
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_fleet, make_worker

VIA = "via_upstream"
REFUSED = (
    "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_"
    "Connection_refused}"
)
ADDRESSES = [f"10.0.0.{n}:8000" for n in (1, 2, 3)]
URLS = [f"http://{address}" for address in ADDRESSES]
UNKNOWN = "10.9.9.9:8000"
CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
HALF_OPEN, BUSY = BreakerState.HALF_OPEN, BreakerState.BUSY


class Case:
    """Three workers, of which the first is always chosen and the others are its fallbacks.

    A threshold of 1 makes each failure visible in the breaker's state.
    """

    def __init__(self, *, threshold: int = 1, load: LoadConfig | None = None) -> None:
        self.workers = [
            make_worker(url, order=order, threshold=threshold, in_flight=10 * order)
            for order, url in enumerate(URLS)
        ]
        self.routing = make_fleet(self.workers, policy="least_load", load=load)

    @property
    def chosen(self) -> Worker:
        return self.workers[0]

    async def lease(self) -> Lease:
        lease = await self.routing.route()
        assert lease.decision.destinations == tuple(ADDRESSES)
        return lease

    async def probe(self) -> Lease:
        """A lease that holds the probe of the chosen worker."""
        for _ in range(self.chosen.breaker.threshold):
            self.chosen.breaker.failure(self.routing.clock.monotonic())
        self.routing.clock.tick(30.0)
        lease = await self.lease()
        assert self.chosen.breaker.state is HALF_OPEN
        assert not self.probe_is_free()
        return lease

    def probe_is_free(self) -> bool:
        return self.chosen.breaker.would_allow(self.routing.clock.monotonic())

    def states(self) -> list[BreakerState]:
        return [worker.breaker.state for worker in self.workers]

    def load(self) -> list[int]:
        """In flight beyond what the workers began with."""
        return [worker.in_flight - 10 * order for order, worker in enumerate(self.workers)]


def counted(routing: Fleet, metric: str) -> float:
    return routing.metric(metric, model="m")


def missed(routing: Fleet, reason: str | None = None) -> float:
    reasons = ("other_worker", "unknown_address", "lag", "further_attempt")
    counts = {
        one: routing.metric("extproc_destination_missed_total", model="m", reason=one)
        for one in reasons
    }
    return sum(counts.values()) if reason is None else counts[reason]


FALLBACK_SERVED = "extproc_fallback_served_total"


# -- which worker an outcome belongs to


@pytest.mark.parametrize("status", [200, 201, 204, 301, 400, 401, 404, 408, 413, 422, 499])
async def test_an_answer_below_500_is_a_success(status: int) -> None:
    case = Case(threshold=2)
    case.chosen.breaker.failure(0.0)
    lease = await case.lease()
    lease.responded(status, ADDRESSES[0], VIA, streamed=False)
    case.chosen.breaker.failure(0.0)  # a success in between has reset the count
    assert case.states() == [CLOSED, CLOSED, CLOSED]
    assert case.routing.outcomes() == {URLS[0]: ["success"]}
    assert lease.served is case.chosen


@pytest.mark.parametrize("status", [500, 502, 504, 529, 599])
async def test_a_5xx_counts_for_the_worker_and_opens_nothing_by_itself(status: int) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(status, ADDRESSES[0], VIA, streamed=False)
    assert OPEN not in case.states()
    assert case.routing.outcomes() == {URLS[0]: ["error"]}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_worker_that_says_it_is_full_is_avoided_for_a_moment(status: int) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(status, ADDRESSES[0], VIA, False, 1, retry_after=2.0)
    assert case.states() == [BUSY, CLOSED, CLOSED]
    now = case.routing.clock.monotonic()
    assert not case.chosen.breaker.would_allow(now + 1.9)
    assert case.chosen.breaker.would_allow(now + 2.0)
    assert case.routing.outcomes() == {URLS[0]: ["busy"]}


@pytest.mark.parametrize(
    ("position", "status", "states", "outcomes"),
    [
        (1, 200, [OPEN, CLOSED, CLOSED], {URLS[0]: ["error"], URLS[1]: ["success"]}),
        (1, 404, [OPEN, CLOSED, CLOSED], {URLS[0]: ["error"], URLS[1]: ["success"]}),
        (1, 503, [OPEN, BUSY, CLOSED], {URLS[0]: ["error"], URLS[1]: ["busy"]}),
        (
            2,
            200,
            [OPEN, OPEN, CLOSED],
            {URLS[0]: ["error"], URLS[1]: ["error"], URLS[2]: ["success"]},
        ),
    ],
)
async def test_the_destinations_before_the_fallback_that_served_have_failed(
    position: int, status: int, states: list[BreakerState], outcomes: dict[str, list[str]]
) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(status, ADDRESSES[position], VIA, streamed=False)
    assert case.states() == states
    assert case.routing.outcomes() == outcomes
    assert lease.served is case.workers[position]
    assert case.load()[position] == 1
    assert sum(case.load()) == 1
    assert counted(case.routing, FALLBACK_SERVED) == 1
    assert missed(case.routing) == 0
    lease.close()
    assert case.load() == [0, 0, 0]


async def test_the_load_moves_to_a_worker_that_was_not_named_and_no_outcome_is_recorded() -> None:
    case = Case()
    other = make_worker("http://10.0.0.4:8000", order=9, threshold=1)
    lease = await case.lease()
    case.routing.registry.upsert(other)
    lease.responded(500, "10.0.0.4:8000", VIA, streamed=False)
    assert case.states() == [CLOSED, CLOSED, CLOSED]
    assert other.breaker.state is CLOSED
    assert case.routing.outcomes() == {}
    assert lease.served is other
    assert (case.load(), other.in_flight) == ([0, 0, 0], 1)
    assert missed(case.routing, "other_worker") == 1
    assert counted(case.routing, FALLBACK_SERVED) == 0
    lease.close()
    assert other.in_flight == 0


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [(0, "unknown_address"), (1, "unknown_address"), (2, "further_attempt")],
)
@pytest.mark.parametrize("status", [200, 500])
async def test_a_response_of_an_unknown_address_is_no_workers_outcome(
    attempts: int, reason: str, status: int
) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(status, UNKNOWN, VIA, False, attempts)
    assert case.states() == [CLOSED, CLOSED, CLOSED]
    assert case.routing.outcomes() == {}
    assert lease.served is None
    assert missed(case.routing, reason) == 1
    lease.close()
    assert case.load() == [0, 0, 0]


@pytest.mark.parametrize(
    ("position", "attempts", "states"),
    [
        (1, 2, [OPEN, CLOSED, CLOSED]),
        (2, 3, [OPEN, OPEN, CLOSED]),
        # In the first attempt: those before are unknown to the gateway.
        (1, 1, [CLOSED, CLOSED, CLOSED]),
        (2, 1, [CLOSED, CLOSED, CLOSED]),
        # One of two has failed, and the other is unknown to the gateway.
        (2, 2, [CLOSED, CLOSED, CLOSED]),
        (1, 3, [CLOSED, CLOSED, CLOSED]),
    ],
)
async def test_only_destinations_that_were_tried_have_failed(
    position: int, attempts: int, states: list[BreakerState]
) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(200, ADDRESSES[position], VIA, False, attempts)
    assert case.states() == states
    assert lease.served is case.workers[position]
    assert missed(case.routing, "other_worker") == (attempts == 1)
    assert counted(case.routing, FALLBACK_SERVED) == 1


async def test_a_stale_request_is_not_the_chosen_workers_failure_if_the_gateway_ignores_it() -> (
    None
):
    case = Case()
    for _ in range(5):
        (await case.lease()).responded(200, UNKNOWN, VIA, False, 1)
    (await case.lease()).abort(stale_request_expired())
    assert case.states() == [CLOSED, CLOSED, CLOSED]


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("details", ["", VIA])
async def test_a_gateway_without_attributes_is_taken_to_have_asked_the_chosen_worker(
    status: int, details: str
) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(status, "", details, streamed=False)
    assert case.states() == [BUSY if status == 503 else CLOSED, CLOSED, CLOSED]
    assert lease.served is case.chosen
    assert missed(case.routing) == 0


# -- Envoy's own replies


async def test_when_all_workers_refuse_all_that_were_tried_have_failed_and_no_worker_served() -> (
    None
):
    case = Case()
    lease = await case.lease()
    lease.responded(503, ADDRESSES[2], REFUSED, streamed=False)
    assert case.states() == [OPEN, OPEN, OPEN]
    assert case.routing.outcomes() == {url: ["error"] for url in URLS}
    assert counted(case.routing, FALLBACK_SERVED) == 0
    lease.close()
    assert case.load() == [0, 0, 0]


@pytest.mark.parametrize(
    "details",
    [REFUSED, "upstream_response_timeout", "response_timeout", "upstream_per_try_timeout"],
)
async def test_envoys_own_reply_in_place_of_the_chosen_worker_is_the_workers_failure(
    details: str,
) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(504, ADDRESSES[0], details, streamed=False)
    assert case.states() == [OPEN, CLOSED, CLOSED]
    assert case.routing.outcomes() == {URLS[0]: ["error"]}


async def test_a_refused_connection_is_a_failure_even_without_an_address() -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(503, "", REFUSED, streamed=False)
    assert case.chosen.breaker.state is OPEN


@pytest.mark.parametrize("details", ["no_healthy_upstream", "route_not_found", "cluster_not_found"])
async def test_envoys_own_reply_without_an_attempt_records_no_failure(details: str) -> None:
    case = Case()
    lease = await case.probe()
    lease.responded(503, "", details, streamed=False)
    assert case.chosen.breaker.state is HALF_OPEN
    assert case.probe_is_free()
    assert case.routing.outcomes() == {URLS[0]: ["cancelled"]}
    lease.close()
    assert case.load() == [0, 0, 0]
    assert case.routing.outcomes() == {URLS[0]: ["cancelled"]}


# -- the probe


@pytest.mark.parametrize(
    ("status", "address", "state"),
    [
        (200, ADDRESSES[0], CLOSED),
        (429, ADDRESSES[0], BUSY),
        (500, ADDRESSES[0], HALF_OPEN),
        (200, ADDRESSES[1], OPEN),
        (200, "", CLOSED),
        (500, "", HALF_OPEN),
    ],
)
async def test_an_outcome_resolves_the_probe(
    status: int, address: str, state: BreakerState
) -> None:
    case = Case(threshold=3)
    lease = await case.probe()
    lease.responded(status, address, VIA, streamed=False)
    assert case.chosen.breaker.state is state
    lease.close()
    assert case.chosen.breaker.state is state


@pytest.mark.parametrize("address", [UNKNOWN, ADDRESSES[1]])
async def test_a_gateway_that_passes_over_the_chosen_worker_gives_the_probe_back(
    address: str,
) -> None:
    case = Case()
    lease = await case.probe()
    lease.responded(200, address, VIA, False, 1)
    assert case.chosen.breaker.state is HALF_OPEN
    assert case.probe_is_free()


async def test_a_fallback_that_serves_closes_its_own_breaker() -> None:
    case = Case()
    case.workers[1].breaker.failure(case.routing.clock.monotonic())
    case.routing.clock.tick(30.0)
    lease = await case.lease()
    lease.responded(200, ADDRESSES[1], VIA, streamed=False)
    assert case.states() == [OPEN, CLOSED, CLOSED]


async def test_a_client_that_leaves_gives_the_probe_back_without_an_outcome() -> None:
    case = Case()
    lease = await case.probe()
    lease.close()
    assert case.chosen.breaker.state is HALF_OPEN
    assert case.probe_is_free()
    assert case.routing.outcomes() == {URLS[0]: ["cancelled"]}
    assert case.load() == [0, 0, 0]


async def test_a_client_that_leaves_does_not_touch_a_closed_breaker() -> None:
    case = Case(threshold=2)
    case.chosen.breaker.failure(0.0)
    (await case.lease()).close()
    case.chosen.breaker.failure(0.0)
    assert case.chosen.breaker.state is OPEN  # neither a success nor a failure in between


async def test_a_late_close_does_not_free_the_probe_of_another_request() -> None:
    case = Case()
    first = await case.probe()
    case.chosen.breaker.failure(case.routing.clock.monotonic())
    case.routing.clock.tick(60.0)
    await case.lease()
    first.close()
    assert not case.probe_is_free()


# -- once


async def test_a_second_report_changes_nothing() -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(200, ADDRESSES[0], VIA, streamed=False)
    lease.responded(500, ADDRESSES[1], VIA, streamed=False)
    assert case.states() == [CLOSED, CLOSED, CLOSED]
    assert case.routing.outcomes() == {URLS[0]: ["success"]}
    assert counted(case.routing, "extproc_response_headers_seconds_count") == 1


async def test_close_is_idempotent() -> None:
    case = Case()
    first, second = await case.lease(), await case.routing.route()
    for _ in range(3):
        first.close()
    assert sum(case.load()) == 1
    assert case.routing.outcomes() == {URLS[0]: ["cancelled"]}
    second.close()
    assert case.load() == [0, 0, 0]


async def test_the_load_stays_until_the_stream_ends() -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(200, ADDRESSES[0], VIA, streamed=True)
    case.routing.clock.tick(500.0)
    case.routing.tickets.sweep()
    assert case.load() == [1, 0, 0]
    lease.close()
    assert case.load() == [0, 0, 0]
    assert case.routing.outcomes() == {URLS[0]: ["success"]}


async def test_the_time_to_the_headers_is_measured_from_the_decision() -> None:
    case = Case()
    lease = await case.lease()
    case.routing.clock.tick(0.75)
    lease.responded(200, ADDRESSES[0], VIA, streamed=True)
    assert counted(case.routing, "extproc_response_headers_seconds_sum") == pytest.approx(0.75)


async def test_the_load_of_a_replaced_worker_is_neither_inherited_nor_negative() -> None:
    case = Case()
    lease = await case.lease()
    new = make_worker(URLS[0], order=0, threshold=1)
    case.routing.registry.upsert(new)
    lease.responded(500, ADDRESSES[0], VIA, streamed=False)
    lease.close()
    assert (new.in_flight, new.breaker.state) == (0, CLOSED)
    assert case.load() == [0, 0, 0]


# -- stale


async def test_a_stale_request_without_response_headers_is_a_failure_of_the_chosen_worker() -> None:
    case = Case()
    lease = await case.probe()
    lease.abort(stale_request_expired())
    lease.close()
    assert case.chosen.breaker.state is OPEN
    assert case.routing.outcomes() == {URLS[0]: ["error"]}
    assert case.load() == [0, 0, 0]


async def test_a_stale_request_with_response_headers_changes_no_outcome() -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(200, ADDRESSES[0], VIA, streamed=True)
    lease.abort(stale_request_expired())
    lease.close()
    assert case.states() == [CLOSED, CLOSED, CLOSED]
    assert case.routing.outcomes() == {URLS[0]: ["success"]}
    assert case.load() == [0, 0, 0]


async def test_response_headers_of_a_stale_request_are_not_recorded() -> None:
    case = Case()
    lease = await case.lease()
    lease.abort(stale_request_expired())
    lease.abort(stale_request_expired())
    lease.responded(200, ADDRESSES[1], VIA, streamed=False)
    assert case.states() == [OPEN, CLOSED, CLOSED]
    assert case.routing.outcomes() == {URLS[0]: ["error"]}


# -- a worker that may have become another engine


@pytest.mark.parametrize(
    ("status", "details", "rechecked"),
    [(200, VIA, 0), (400, VIA, 0), (404, VIA, 1), (500, VIA, 0), (503, REFUSED, 1)],
)
async def test_a_worker_that_does_not_know_the_model_or_refuses_is_asked_again(
    status: int, details: str, rechecked: int
) -> None:
    case = Case()
    (await case.lease()).responded(status, ADDRESSES[0], details, False, 1)
    assert case.routing.rechecked == [case.chosen] * rechecked


async def test_workers_that_refused_before_another_served_are_asked_again() -> None:
    case = Case()
    (await case.lease()).responded(200, ADDRESSES[2], VIA, False, 3)
    assert case.routing.rechecked == case.workers[:2]


# -- busy answers of earlier attempts


@pytest.mark.parametrize(
    ("busy", "outcomes", "first"),
    [
        # The breaker knows since the attempt was reported, to this process.
        ([(ADDRESSES[0], True)], {URLS[0]: ["busy"], URLS[1]: ["success"]}, CLOSED),
        # Reported to another replica.
        ([(ADDRESSES[0], False)], {URLS[0]: ["busy"], URLS[1]: ["success"]}, BUSY),
        # Not reported: the connection was refused.
        ([], {URLS[0]: ["error"], URLS[1]: ["success"]}, OPEN),
    ],
)
async def test_a_worker_that_was_busy_has_not_failed(
    busy: list[tuple[str, bool]], outcomes: dict[str, list[str]], first: BreakerState
) -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(200, ADDRESSES[1], VIA, False, 2, busy)
    assert case.routing.outcomes() == outcomes
    assert case.states() == [first, CLOSED, CLOSED]
    assert case.load() == [0, 1, 0]
    assert lease.served is case.workers[1]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("here", [True, False])
async def test_the_last_answer_is_busy_too_if_it_was_reported(status: int, here: bool) -> None:
    case = Case()
    lease = await case.lease()
    busy = [(address, here) for address in ADDRESSES]
    lease.responded(status, ADDRESSES[2], VIA, False, 3, busy)
    assert case.states() == [CLOSED if here else BUSY] * 3
    assert case.routing.outcomes() == {url: ["busy"] for url in URLS}
    lease.close()
    assert case.load() == [0, 0, 0]


async def test_of_two_earlier_attempts_one_may_be_busy_and_the_other_refused() -> None:
    case = Case()
    lease = await case.lease()
    lease.responded(200, ADDRESSES[2], VIA, False, 3, [(ADDRESSES[1], False)])
    assert case.routing.outcomes() == {
        URLS[0]: ["error"],
        URLS[1]: ["busy"],
        URLS[2]: ["success"],
    }
    assert case.routing.rechecked == [case.chosen]


async def test_a_busy_answer_gives_the_probe_back() -> None:
    case = Case()
    lease = await case.probe()
    lease.responded(200, ADDRESSES[1], VIA, False, 2, [(ADDRESSES[0], True)])
    assert case.chosen.breaker.state is HALF_OPEN
    assert case.probe_is_free()
