"""How many more requests workers take."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from extproc.config.models import QueueConfig
from extproc.routing.rank import Rank
from extproc.routing.spare_capacity import SpareCapacity
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.rank_load import RankLoad
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker
from tests.builders import make_worker

QUEUE = QueueConfig(max_requests=1)


def report(*, running: int, waiting: int, max_running: int | None = None) -> Any:
    return SimpleNamespace(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_tokens=0,
        max_total_num_tokens=0,
        num_waiting_uncached_tokens=None,
        max_running_requests=max_running,
        total_prefill_uncached_tokens=None,
        total_prefill_busy_us=None,
    )


class Ranks:
    """Each worker has ranks without KV events."""

    def __init__(self, ranks: int = 0) -> None:
        self._count = ranks
        self._ranks: dict[Worker, tuple[Rank, ...]] = {}

    def of(self, worker: Worker) -> Sequence[Rank]:
        if worker not in self._ranks:
            self._ranks[worker] = tuple(
                Rank(worker, number, order=number, load=RankLoad(PrefillSpeed()))
                for number in range(self._count)
            )
        return self._ranks[worker]


def capacities(
    count: int = 2, ranks: int = 0, **worker: Any
) -> tuple[SpareCapacity, list[Worker], Ranks]:
    registry, of_worker = WorkerRegistry(), Ranks(ranks)
    workers = [
        make_worker(f"http://10.0.0.{order}:1", order=order, **worker) for order in range(count)
    ]
    for one in workers:
        registry.upsert(one)
    return SpareCapacity(registry, of_worker), workers, of_worker


def test_nothing_bounds_a_worker_of_which_nothing_is_known() -> None:
    spare, workers, _ = capacities()
    workers[0].in_flight = 1000
    assert spare.of(workers[0], QUEUE, 0.0) == math.inf
    assert spare.of_model("m", QUEUE, 0.0) == math.inf


def test_a_configured_number_bounds_each_worker() -> None:
    spare, workers, _ = capacities()
    queue = QueueConfig(max_requests=1, worker_requests_max=3)
    workers[0].in_flight, workers[1].in_flight = 2, 5
    assert spare.of(workers[0], queue, 0.0) == 1
    assert spare.of_model("m", queue, 0.0) == 1
    workers[0].in_flight = 3
    assert spare.of_model("m", queue, 0.0) == 0


def test_answers_of_a_crowd_tell_what_the_worker_takes() -> None:
    spare, (worker, _), _ = capacities()
    worker.in_flight = 6
    for at in (0.0, 0.01, 0.02, 0.03):
        spare.was_full(worker, at)
    worker.in_flight = 1
    assert spare.of(worker, QUEUE, 0.1) == 1
    # The worker may have got more capacity: one more every 10 s, and any number after a minute.
    assert spare.of(worker, QUEUE, 25.0) == 3
    assert spare.of(worker, QUEUE, 61.0) == math.inf


def test_a_worker_takes_at_least_one_request() -> None:
    spare, (worker, _), _ = capacities()
    spare.was_full(worker, 0.0)
    assert spare.of(worker, QUEUE, 0.0) == 1


def test_a_worker_that_is_avoided_because_it_is_full_has_no_room() -> None:
    spare, workers, _ = capacities()
    for one in workers:
        one.breaker.busy(0.0, 1.0)
    assert spare.of_model("m", QUEUE, 0.5) == 0
    assert spare.of_model("m", QUEUE, 1.5) == math.inf


def test_workers_that_are_out_of_order_are_nothing_to_wait_for() -> None:
    spare, workers, _ = capacities()
    for one in workers:
        for _ in range(one.breaker.threshold):
            one.breaker.failure(0.0)
    assert spare.of_model("m", QUEUE, 0.5) == math.inf
    assert spare.of_model("unknown", QUEUE, 0.5) == math.inf
    queue = QueueConfig(max_requests=1, worker_requests_max=1)
    # One that works, but is full, is worth the wait.
    workers[1].breaker.probe_at_once(1.0)
    workers[1].in_flight = 1
    assert spare.of_model("m", queue, 1.0) == 0


def test_reports_of_all_ranks_count() -> None:
    spare, (worker, _), ranks = capacities(ranks=2)
    first, second = ranks.of(worker)
    first.load.report(report(running=4, waiting=8), 0.0)
    assert spare.of(worker, QUEUE, 0.0) == math.inf
    second.load.report(report(running=4, waiting=5), 0.0)
    assert spare.of(worker, QUEUE, 0.0) == 3
    second.load.book(10, 0.0)
    assert spare.of(worker, QUEUE, 0.0) == 2
    second.load.report(report(running=4, waiting=20), 0.1)
    assert spare.of(worker, QUEUE, 0.1) == 0
    # Old reports say nothing.
    assert spare.of(worker, QUEUE, 10.0) == math.inf


def test_an_engine_that_reports_its_limit_takes_what_runs_at_once_and_what_may_wait() -> None:
    spare, (worker, _), ranks = capacities(ranks=1)
    (rank,) = ranks.of(worker)
    rank.load.report(report(running=10, waiting=0, max_running=16), 0.0)
    assert spare.of(worker, QUEUE, 0.0) == 6 + QUEUE.worker_waiting_max


def test_a_pair_needs_room_in_both_parts() -> None:
    registry, ranks = WorkerRegistry(), Ranks()
    prefill = make_worker("http://10.0.0.1:1", order=1, role="prefill")
    decode = make_worker("http://10.0.0.2:1", order=2, role="decode")
    for one in (prefill, decode):
        registry.upsert(one)
    spare = SpareCapacity(registry, cast(Any, ranks))
    queue = QueueConfig(max_requests=1, worker_requests_max=4)
    prefill.in_flight, decode.in_flight = 1, 3
    assert spare.of_model("m", queue, 0.0) == 1
