"""Estimates how busy the pools of workers are, for autoscalers.

A pool is all workers of one model and role. Everything is computed when it is read, from what
routing knows already; nothing here runs while a request is decided.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from msgspec import Struct

from extproc.clock import Clock
from extproc.config.models import QueueConfig
from extproc.routing.claim import WorkerRanks
from extproc.routing.demand import Demand
from extproc.routing.rank import Rank
from extproc.routing.spare_capacity import SpareCapacity
from extproc.routing.wait_queue import WaitQueue
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.registry import WorkerRegistry
from extproc.workers.tickets import Tickets
from extproc.workers.worker import Role, Worker

__all__ = ["WAIT_MAX_SECONDS", "PoolSignal", "PoolSignals", "PoolSources"]

# No estimate is higher. It also stands for a wanted pool without usable workers.
WAIT_MAX_SECONDS: Final = 300.0
# How long one request is a reason for a first worker: an autoscaler asks once or twice a minute.
_DEMAND_SECONDS: Final = 120.0
# The least wait for a worker that has said that it is full.
_FULL_MIN_SECONDS: Final = 0.25
_USABLE: Final = (BreakerState.CLOSED, BreakerState.BUSY)
_PAIRED: Final[tuple[Role, ...]] = ("prefill", "decode")
_PLAIN: Final[tuple[Role, ...]] = ("plain",)
_ANY: Final = (*_PLAIN, *_PAIRED)


class PoolSignal(Struct, frozen=True):
    """One pool. `occupancy` is from 0 to 1, None if the engines report nothing."""

    model: str
    role: Role
    wait_seconds: float
    occupancy: float | None


class PoolSources(Struct, frozen=True, kw_only=True):
    """Where the figures come from. `queues` gives those of the configuration in use, by model."""

    registry: WorkerRegistry
    ranks: WorkerRanks
    tickets: Tickets
    spare: SpareCapacity
    demand: Demand
    clock: Clock
    queues: Callable[[], Mapping[str, WaitQueue]]


class PoolSignals:
    """The signals of all models."""

    def __init__(self, sources: PoolSources) -> None:
        self._from = sources
        # The roles of the workers that a model had, for the time when all have left.
        self._roles: dict[str, tuple[Role, ...]] = {}

    def read(self, models: Iterable[str]) -> list[PoolSignal]:
        """The signals of the pools of these models, now."""
        models = list(models)
        self._roles = {model: self._roles_of(model) for model in models}
        now = self._from.clock.monotonic()
        return [
            _Pool(self._from, model, role, now).signal()
            for model in models
            for role in self._roles[model]
        ]

    def _roles_of(self, model: str) -> tuple[Role, ...]:
        """Plain, or prefill and decode; all three before its first worker is known."""
        registry = self._from.registry
        if registry.is_disaggregated(model):
            return _PAIRED
        if any(model in worker.model_ids for worker in registry):
            return _PLAIN
        return self._roles.get(model, _ANY)


class _Pool:
    """One pool at one moment."""

    def __init__(self, sources: PoolSources, model: str, role: Role, now: float) -> None:
        self._from = sources
        self._model = model
        self._role: Role = role
        self._now = now
        self._queue = sources.queues().get(model)
        # A worker that is full for the moment is usable. One that has failed is not before it has
        # answered again, or the signal would change with each probe.
        self._usable = [
            worker
            for worker in sources.registry.pool_of(model, role)
            if worker.breaker.state in _USABLE
        ]

    def signal(self) -> PoolSignal:
        if not self._usable:
            wanted = self._is_wanted()
            wait, occupancy = WAIT_MAX_SECONDS if wanted else 0.0, 1.0 if wanted else 0.0
            return PoolSignal(self._model, self._role, wait, occupancy)
        wait = self._queue_seconds() + min(map(self._worker_seconds, self._usable))
        return PoolSignal(self._model, self._role, min(wait, WAIT_MAX_SECONDS), self._occupancy())

    def _is_wanted(self) -> bool:
        waiting = self._queue is not None and self._queue.waiting_requests > 0
        since = self._from.demand.seconds_since(self._model, self._now)
        return waiting or since <= _DEMAND_SECONDS

    # -- wait

    def _queue_seconds(self) -> float:
        """How long the requests take to leave that wait in this service, for want of this pool."""
        queue = self._queue
        if queue is None or not queue.waiting_requests or not self._holds_up(queue.settings):
            return 0.0
        in_flight = sum(worker.in_flight for worker in self._usable)
        # By Little's law: with so many at once, one ends each so many seconds.
        seconds = max(self._request_seconds(), self._age_seconds())
        return queue.waiting_requests * seconds / max(in_flight, len(self._usable))

    def _holds_up(self, queue: QueueConfig) -> bool:
        """False if requests wait for the other part of a pair."""
        spare, model, now = self._from.spare, self._model, self._now
        if self._role == "plain":
            return True
        own = spare.of_pool(model, self._role, queue, now)
        other = spare.of_pool(model, _other(self._role), queue, now)
        return own <= 0 or own <= other

    def _request_seconds(self) -> float:
        """How long a request is on a worker of the pool; 0 before the first has ended."""
        known = [one.pace.request_seconds for one in self._usable if one.pace.request_seconds]
        return sum(known) / len(known) if known else 0.0

    def _age_seconds(self) -> float:
        """For how long the requests have been on the workers, on average; rises if they hang."""
        usable = set(self._usable)
        ages = [self._now - one.booked_at for one in self._from.tickets if one.worker in usable]
        return sum(ages) / len(ages) if ages else 0.0

    def _worker_seconds(self, worker: Worker) -> float:
        """How long a request would wait in this worker before work on it begins."""
        ranks = self._from.ranks.of(worker)
        if ranks:
            seconds = min(map(self._rank_seconds, ranks))
        else:
            # A decode worker answers when the prefill worker is done: that says nothing here.
            seconds = 0.0 if self._role == "decode" else worker.pace.wait_seconds(self._now)
        if self._is_full(worker):
            each = worker.pace.request_seconds / max(1, worker.in_flight)
            seconds = max(seconds, each, _FULL_MIN_SECONDS)
        return seconds

    def _rank_seconds(self, rank: Rank) -> float:
        load, now = rank.load, self._now
        if self._role == "decode":
            return load.slot_wait_seconds(1, now, rank.worker.pace.request_seconds or None)
        return max(load.prefill_seconds_ahead(now), load.slot_wait_seconds(1, now))

    def _is_full(self, worker: Worker) -> bool:
        if not worker.breaker.would_allow(self._now):
            return True
        queue = self._queue
        return queue is not None and self._from.spare.of(worker, queue.settings, self._now) <= 0

    # -- occupancy

    def _occupancy(self) -> float | None:
        """The mean of the workers of which it is known."""
        known = [one for worker in self._usable for one in self._parts(worker)]
        return sum(known) / len(known) if known else None

    def _parts(self, worker: Worker) -> list[float]:
        ranks = self._from.ranks.of(worker)
        found = [rank.load.occupancy(self._now) for rank in ranks]
        known = [one for one in found if one is not None]
        if known or self._queue is None or self._queue.settings.worker_requests_max is None:
            return known
        return [min(1.0, worker.in_flight / self._queue.settings.worker_requests_max)]


def _other(role: Role) -> Role:
    return "decode" if role == "prefill" else "prefill"
