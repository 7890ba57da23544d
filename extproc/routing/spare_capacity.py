"""Estimates how many more requests workers take now, before they would only wait in the engine.

Three things bound it: a configured number of requests, the waiting requests that the engine
reports, and a worker's own answer that it is full. Such an answer gives no number, so what the
worker had at that moment is taken as its limit. The limit rises slowly while the answer does not
come again.
"""

import math
from typing import Final, NamedTuple

from extproc.config.models import QueueConfig
from extproc.routing.claim import WorkerRanks
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Role, Worker

__all__ = ["SpareCapacity"]

_CROWD_SECONDS: Final = 0.25
_RISES_EACH_SECONDS: Final = 10.0
# Then the worker may have been started again with other limits.
_FORGOTTEN_AFTER_SECONDS: Final = 60.0


class _Full(NamedTuple):
    """A worker has said that it is full, the last time at `at`: it took `takes` requests.

    `answers` is how often it has said so since `began`.
    """

    takes: int
    at: float
    began: float
    answers: int


class SpareCapacity:
    """The spare capacity of all workers, in requests; `math.inf` where nothing bounds it."""

    def __init__(self, registry: WorkerRegistry, ranks: WorkerRanks) -> None:
        self._registry = registry
        self._ranks = ranks
        # By worker id.
        self._full: dict[str, _Full] = {}

    def was_full(self, worker: Worker, now: float) -> None:
        """The worker has answered 503 or 429 to a request.

        In a crowd several such answers come at once, and the requests still count as in flight.
        """
        full = self._full.get(worker.id)
        if full is None:
            known = {one.id for one in self._registry}
            self._full = {key: one for key, one in self._full.items() if key in known}
        began, answers = now, 1
        if full is not None and now - full.began < _CROWD_SECONDS:
            began, answers = full.began, full.answers + 1
        takes = min(worker.in_flight - answers, self._limit(worker, now))
        self._full[worker.id] = _Full(max(1, int(takes)), now, began, answers)

    def of(self, worker: Worker, queue: QueueConfig, now: float) -> float:
        """How many more requests the worker takes; 0 or less if it is full."""
        limit = self._limit(worker, now)
        if queue.worker_requests_max is not None:
            limit = min(limit, queue.worker_requests_max)
        spare = limit - worker.in_flight
        ranks = self._ranks.of(worker)
        if ranks:
            waiting_max = queue.worker_waiting_max
            reported = [rank.load.spare_requests(waiting_max, now) for rank in ranks]
            spare = min(spare, sum([max(0.0, one) for one in reported]))
        return spare

    def of_model(self, model: str, queue: QueueConfig, now: float) -> float:
        """How many more requests the model's workers take; of a pair both parts must have some.

        Infinite if all workers are out of order: waiting would not help.
        """
        if not self._registry.is_disaggregated(model):
            return self.of_pool(model, "plain", queue, now)
        return min(
            self.of_pool(model, "prefill", queue, now), self.of_pool(model, "decode", queue, now)
        )

    def of_pool(self, model: str, role: Role, queue: QueueConfig, now: float) -> float:
        """As `of_model`, for the workers of one role."""
        total, any_full = 0.0, False
        for worker in self._registry.pool_of(model, role):
            breaker = worker.breaker
            if not breaker.would_allow(now):
                any_full = any_full or breaker.state is BreakerState.BUSY
                continue
            spare = self.of(worker, queue, now)
            if spare > 0:
                total += spare
            else:
                any_full = True
        return total if total or any_full else math.inf

    def _limit(self, worker: Worker, now: float) -> float:
        full = self._full.get(worker.id)
        if full is None:
            return math.inf
        passed = now - full.at
        if passed >= _FORGOTTEN_AFTER_SECONDS:
            del self._full[worker.id]
            return math.inf
        return full.takes + int(passed / _RISES_EACH_SECONDS)
