"""The signals of pools, with known loads and with any."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from extproc.admin.pool_collector import PoolCollector
from extproc.config.models import QueueConfig
from extproc.routing.demand import Demand
from extproc.routing.pool_signals import WAIT_MAX_SECONDS, PoolSignal, PoolSignals, PoolSources
from extproc.routing.rank import Rank
from extproc.routing.spare_capacity import SpareCapacity
from extproc.routing.wait_queue import WaitQueue
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import Role, Worker
from tests.builders import make_shared, make_worker
from tests.fakes import FakeClock

SPEED = 1000.0


class Pools:
    """Workers of the model "m", with so many ranks each, and the signals of their pools."""

    def __init__(
        self, *roles: Role, ranks: int = 0, queue: QueueConfig | None = None, waiting: int = 0
    ) -> None:
        self.clock = FakeClock()
        self.workers = [
            make_worker(f"http://10.0.0.{order + 1}:1", order=order, role=role, threshold=1)
            for order, role in enumerate(roles)
        ]
        shared = make_shared(self.workers, clock=self.clock)
        self.registry, self.tickets = shared.registry, shared.tickets
        self._ranks = {
            worker: tuple(
                Rank(
                    worker,
                    number,
                    order=number,
                    load=RankLoad(PrefillSpeed(default_tokens_per_second=SPEED)),
                )
                for number in range(ranks)
            )
            for worker in self.workers
        }
        self.demand = Demand()
        waits = SimpleNamespace(waiting_requests=waiting, settings=queue)
        self.signals = PoolSignals(
            PoolSources(
                registry=self.registry,
                ranks=self,
                tickets=self.tickets,
                spare=SpareCapacity(self.registry, self),
                demand=self.demand,
                clock=self.clock,
                queues=lambda: {} if queue is None else {"m": cast(WaitQueue, waits)},
            )
        )

    def of(self, worker: Worker) -> Sequence[Rank]:
        return self._ranks.get(worker, ())

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def load(self, worker: int, rank: int = 0) -> RankLoad:
        return self.of(self.workers[worker])[rank].load

    def report(self, worker: int, *, rank: int = 0, **figures: Any) -> None:
        self.load(worker, rank).report(report(**figures), self.now)

    def asked(self) -> None:
        self.demand.asked("m", self.now)

    def read(self) -> dict[str, PoolSignal]:
        return {one.role: one for one in self.signals.read(["m"])}

    def wait(self, role: Role = "plain") -> float:
        return self.read()[role].wait_seconds

    def occupancy(self, role: Role = "plain") -> float | None:
        return self.read()[role].occupancy


def report(
    *,
    running: int = 0,
    waiting: int = 0,
    used: int = 0,
    capacity: int = 0,
    limit: int | None = None,
) -> Any:
    return SimpleNamespace(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_tokens=used,
        max_total_num_tokens=capacity,
        num_waiting_uncached_tokens=None,
        max_running_requests=limit,
        total_prefill_uncached_tokens=None,
        total_prefill_busy_us=None,
    )


def test_a_new_request_goes_to_the_worker_with_the_shortest_wait() -> None:
    pools = Pools("plain", "plain", ranks=2)
    pools.load(0, 0).book(4000, pools.now)
    pools.load(0, 1).book(2000, pools.now)
    pools.load(1, 0).book(3000, pools.now)
    assert pools.wait() == 0
    pools.load(1, 1).book(5000, pools.now)
    # 2000 tokens at 1000 tokens per second.
    assert pools.wait() == pytest.approx(2.0)


def test_a_speed_that_is_not_known_yet_is_corrected_by_the_prompt_that_is_late() -> None:
    pools = Pools("plain", ranks=1)
    for _ in range(4):
        pools.load(0).book(1000, pools.now)
    assert pools.wait() == pytest.approx(4.0)
    # The first one should have taken a second and has taken five: five more for each of three,
    # and as long again as it is late.
    pools.clock.tick(5.0)
    assert pools.wait() == pytest.approx(4.0 + 3 * 5.0)


def test_a_short_prompt_that_is_late_says_little_about_long_ones() -> None:
    pools = Pools("plain", ranks=1)
    pools.load(0).book(1, pools.now)
    pools.load(0).book(9000, pools.now)
    pools.clock.tick(0.5)
    assert pools.wait() == pytest.approx(9.0)


def test_workers_that_hang_are_not_idle() -> None:
    pools = Pools("plain", "plain", ranks=1)
    for worker in (0, 1):
        pools.load(worker).book(100, pools.now)
    pools.clock.tick(60.0)
    assert pools.wait() == pytest.approx(59.9)
    pools.clock.tick(6000.0)
    assert pools.wait() == WAIT_MAX_SECONDS


def test_one_worker_that_hangs_does_not_count_beside_another() -> None:
    pools = Pools("plain", "plain", ranks=1)
    pools.load(0).book(100, pools.now)
    pools.clock.tick(60.0)
    assert pools.wait() == 0


def test_workers_without_ranks_are_judged_by_their_pace() -> None:
    pools = Pools("plain")
    (worker,) = pools.workers
    for _ in range(4):
        ticket = pools.tickets.book(worker, pools.now)
        pools.clock.tick(0.5)
        ticket.started(pools.now)
        ticket.release()
    assert pools.wait() == 0
    tickets = [pools.tickets.book(worker, pools.now) for _ in range(3)]
    assert pools.wait() == pytest.approx(1.5)
    other = make_worker("http://10.0.0.9:1", order=9)
    tickets[0].move(other, pools.now)
    assert pools.wait() == pytest.approx(1.0)
    for ticket in tickets:
        ticket.release()
    assert pools.wait() == 0


def test_requests_that_are_not_streamed_do_not_show_their_beginning() -> None:
    pools = Pools("plain")
    ticket = pools.tickets.book(pools.workers[0], pools.now, streamed=False)
    pools.clock.tick(50.0)
    assert pools.wait() == 0
    ticket.started(pools.now)
    ticket.release()
    assert pools.workers[0].pace.request_seconds == 50


def test_a_worker_that_says_that_it_is_full_has_no_room_before_a_request_ends() -> None:
    pools = Pools("plain")
    (worker,) = pools.workers
    worker.pace.ended(8.0)
    for _ in range(4):
        pools.tickets.book(worker, pools.now, streamed=False)
    worker.breaker.busy(pools.now)
    assert pools.wait() == pytest.approx(2.0)


def test_requests_that_wait_in_the_service_leave_one_by_one() -> None:
    queue = QueueConfig(max_requests=100, worker_requests_max=2)
    pools = Pools("plain", "plain", queue=queue, waiting=10)
    for worker in pools.workers:
        worker.pace.ended(4.0)
        for _ in range(2):
            pools.tickets.book(worker, pools.now, streamed=False)
    # One of four ends each second: 10 s for those that wait; 2 s for a place on one worker.
    assert pools.wait() == pytest.approx(12.0)
    assert pools.occupancy() == 1.0
    # None has ended for a minute: they are expected to take longer than those before.
    pools.clock.tick(60.0)
    assert pools.wait() == pytest.approx(10 * 60 / 4 + 2.0)


def test_requests_of_pairs_wait_for_the_pool_that_is_full() -> None:
    queue = QueueConfig(max_requests=100, worker_requests_max=1)
    pools = Pools("prefill", "decode", queue=queue, waiting=5)
    pools.tickets.book(pools.workers[1], pools.now, streamed=False)
    pools.workers[1].pace.ended(1.0)
    assert pools.wait("prefill") == 0
    assert pools.wait("decode") >= 5


def test_decode_workers_are_waited_for_by_their_slots_and_memory() -> None:
    pools = Pools("prefill", "decode", ranks=1)
    # A decode worker answers when the prefill worker is done, so that is not its wait.
    pools.tickets.book(pools.workers[1], pools.now)
    pools.clock.tick(30.0)
    assert pools.wait("decode") == 0
    pools.workers[1].pace.ended(20.0)
    pools.report(1, running=10, limit=10, used=500, capacity=1000)
    # One of ten must end, and each takes 20 s.
    assert pools.wait("decode") == pytest.approx(2.0)
    assert pools.occupancy("decode") == 1.0


def test_occupancy_is_the_fuller_of_memory_and_requests_on_average() -> None:
    pools = Pools("prefill", "decode", "decode", ranks=1)
    assert pools.occupancy("decode") is None
    pools.report(1, running=1, limit=10, used=500, capacity=1000)
    assert pools.occupancy("decode") == pytest.approx(0.5)
    pools.report(2, running=3, limit=10, used=100, capacity=1000)
    assert pools.occupancy("decode") == pytest.approx((0.5 + 0.3) / 2)
    assert pools.occupancy("prefill") is None
    pools.clock.tick(10.0)
    assert pools.occupancy("decode") is None, "the reports are old"


@pytest.mark.parametrize("way", ["none", "draining", "broken"])
def test_a_pool_without_usable_workers_shows_demand_alone(way: str) -> None:
    pools = Pools(*(("plain",) if way != "none" else ()))
    if way == "draining":
        pools.registry.set_draining(pools.workers[0], True)
    elif way == "broken":
        pools.workers[0].breaker.failure(pools.now)
    assert (pools.wait(), pools.occupancy()) == (0, 0)
    pools.asked()
    assert (pools.wait(), pools.occupancy()) == (WAIT_MAX_SECONDS, 1)
    pools.clock.tick(119.0)
    assert pools.wait() == WAIT_MAX_SECONDS
    pools.clock.tick(2.0)
    assert (pools.wait(), pools.occupancy()) == (0, 0)


def test_one_empty_pool_of_a_pair_asks_for_workers_and_the_other_does_not() -> None:
    pools = Pools("prefill", ranks=1)
    pools.asked()
    assert pools.wait("prefill") == 0
    assert pools.wait("decode") == WAIT_MAX_SECONDS


def test_roles_are_remembered_until_the_model_is_gone() -> None:
    pools = Pools()
    assert pools.read().keys() == {"plain", "prefill", "decode"}
    pools.registry.upsert(make_worker(role="decode"))
    assert pools.read().keys() == {"prefill", "decode"}
    pools.registry.remove("http://10.0.0.1:8000")
    assert pools.read().keys() == {"prefill", "decode"}
    assert pools.signals.read([]) == []
    assert pools.read().keys() == {"plain", "prefill", "decode"}


def test_only_models_of_the_configuration_have_series() -> None:
    pools, models, prometheus = Pools("plain"), ["m", "n"], CollectorRegistry()
    prometheus.register(PoolCollector(pools.signals, lambda: models))

    def sample(model: str, name: str = "extproc_pool_expected_wait_seconds") -> float | None:
        return prometheus.get_sample_value(name, {"model": model, "role": "plain"})

    assert (sample("m"), sample("n")) == (0, 0)
    assert sample("m", "extproc_pool_occupancy_ratio") is None
    models.remove("n")
    assert (sample("m"), sample("n")) == (0, None)


_COUNTS = st.integers(-2, 50)
_REPORTS = st.fixed_dictionaries(
    {
        "running": _COUNTS,
        "waiting": _COUNTS,
        "used": st.integers(-5, 2000),
        "capacity": st.integers(-5, 2000),
        "limit": st.none() | st.integers(-2, 50),
    }
)
_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["book", "ticket", "start", "end", "report", "busy", "fail", "ask", "drain"]
        ),
        st.integers(0, 3),
        st.sampled_from([0.0, 0.001, 0.5, 7.0, 400.0]),
        _REPORTS,
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    roles=st.sampled_from([("plain",), ("plain", "plain"), ("prefill", "decode"), ("decode",), ()]),
    ranks=st.integers(0, 2),
    queue=st.none()
    | st.builds(
        QueueConfig, max_requests=st.just(9), worker_requests_max=st.none() | st.integers(1, 3)
    ),
    waiting=st.integers(0, 1000),
    events=_EVENTS,
)
def test_signals_stay_within_their_bounds(
    roles: tuple[Role, ...],
    ranks: int,
    queue: QueueConfig | None,
    waiting: int,
    events: list[tuple[str, int, float, dict[str, Any]]],
) -> None:
    pools = Pools(*roles, ranks=ranks, queue=queue, waiting=waiting)
    opened: list[Any] = []
    for kind, number, seconds, figures in events:
        pools.clock.tick(seconds)
        _happen(pools, kind, number, figures, opened)
        for one in pools.signals.read(["m"]):
            assert math.isfinite(one.wait_seconds)
            assert 0 <= one.wait_seconds <= WAIT_MAX_SECONDS
            assert one.occupancy is None or 0 <= one.occupancy <= 1


def _happen(
    pools: Pools, kind: str, number: int, figures: dict[str, Any], opened: list[Any]
) -> None:
    """Something happens to a worker, or to one of the `opened` tickets and bookings."""
    now = pools.now
    if kind == "ask":
        pools.asked()
    elif kind in ("start", "end"):
        if opened:
            one = opened[number % len(opened)]
            if kind == "start":
                one.started(now)
            else:
                opened.remove(one)
                one.release() if hasattr(one, "worker") else one.release(now)
    elif pools.workers:
        worker = pools.workers[number % len(pools.workers)]
        ranks = pools.of(worker)
        if kind == "ticket":
            opened.append(pools.tickets.book(worker, now, streamed=number % 2 == 0))
        elif kind == "book" and ranks:
            tokens = figures["used"]
            opened.append(ranks[0].load.book(tokens, now, streamed=number % 2 == 0))
        elif kind == "report" and ranks:
            ranks[-1].load.report(report(**figures), now)
        elif kind == "busy":
            worker.breaker.busy(now)
        elif kind == "fail":
            worker.breaker.failure(now)
        elif kind == "drain":
            pools.registry.set_draining(worker, not worker.draining)
