"""Records what requests say about workers: on the breaker, in the metrics and in the log."""

import math

import structlog

from extproc.metrics.service import Metrics
from extproc.routing.spare_capacity import SpareCapacity
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.pool_faults import PoolFaults
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Role, Worker

__all__ = ["BUSY_STATUSES", "WorkerOutcomes"]

_log = structlog.get_logger()

# A worker that is full answers with one of them.
BUSY_STATUSES = (429, 503)
# Clients that leave sooner may have changed their mind.
_PATIENCE_SECONDS = 2.0
# Times of the slowest answer of late.
_WHOLE_ANSWERS = 2.0
# Many clients, or one with many requests, may leave in one moment.
_SILENCE_COUNTS_EACH_SECONDS = 0.3


class WorkerOutcomes:
    """Each request that a worker was claimed for ends in one of these.

    `sent_at` is when the worker was claimed for the request.
    """

    __slots__ = ("_faults", "_registry", "_silent_at", "_worker_requests", "spare")

    def __init__(self, metrics: Metrics, registry: WorkerRegistry, spare: SpareCapacity) -> None:
        self._worker_requests = metrics.worker_requests
        self._registry = registry
        self.spare = spare
        self._faults: dict[tuple[str, Role], PoolFaults] = {}
        self._silent_at: dict[str, float] = {}

    def succeeded(
        self, worker: Worker, model: str, now: float, sent_at: float, *, streamed: bool = True
    ) -> None:
        """The worker answered, and not with a 5xx or with 429; `streamed` is the request's flag."""
        breaker = worker.breaker
        before = breaker.state
        breaker.success(now, sent_at)
        if before is not breaker.state and before is not BreakerState.BUSY:
            _log.info("breaker_closed", worker=worker.url, model=model)
        whole_seconds = None if streamed else now - sent_at
        self._faults_of(worker, model).answered(worker.id, now, whole_seconds)
        self._count(worker, model, "success")

    def busy(
        self,
        worker: Worker,
        model: str,
        now: float,
        retry_after: float | None = None,
        sent_at: float = math.inf,
    ) -> None:
        """The worker answered a request for the model with 503 or 429."""
        self.is_full(worker, now, retry_after, sent_at)
        self.count_busy(worker, model)

    def is_full(
        self,
        worker: Worker,
        now: float,
        retry_after: float | None = None,
        sent_at: float = math.inf,
    ) -> None:
        """The worker answered that it is full, for all its models; `retry_after` in seconds."""
        worker.breaker.busy(now, retry_after, sent_at)
        self.spare.was_full(worker, now)
        for model in worker.model_ids:
            self._faults_of(worker, model).heard_from(worker.id, now)

    def count_busy(self, worker: Worker, model: str) -> None:
        """Count an answer that `is_full` has recorded."""
        self._count(worker, model, "busy")

    def server_error(self, worker: Worker, model: str, now: float, sent_at: float) -> None:
        """The worker answered with another 5xx, which may be the fault of the request."""
        breaker = worker.breaker
        breaker.error(now)
        seconds = self._faults_of(worker, model).failed(worker.id, now, breaker.threshold)
        if seconds and len(self._registry.pool_of(model, worker.role)) > 1:
            breaker.avoid(now, seconds)
            _log.warning("worker_suspected", worker=worker.url, model=model, cool_down_secs=seconds)
        self._count(worker, model, "error")

    def failed(self, worker: Worker, model: str, now: float, sent_at: float) -> None:
        """The worker did not answer: it refused, broke off, or was silent for too long."""
        self._fail(worker, model, now, sent_at)
        self._count(worker, model, "error")

    def abandoned(
        self, worker: Worker, model: str, now: float, sent_at: float, *, streamed: bool = True
    ) -> None:
        """The client left before the worker answered.

        That says nothing, unless the client was patient, and the worker has answered no
        request since while others did. An answer that is not streamed begins at its end, so its
        client must have waited for longer than such answers take.
        """
        faults, waited = self._faults_of(worker, model), now - sent_at
        if (
            waited < _PATIENCE_SECONDS
            or worker.breaker.answered_at > sent_at
            or not faults.others_answered_since(worker.id, sent_at)
            or not (streamed or waited > _WHOLE_ANSWERS * faults.slowest_whole_seconds)
        ):
            self.undecided(worker, model)
            return
        if now - self._silent_at.get(worker.id, -math.inf) >= _SILENCE_COUNTS_EACH_SECONDS:
            self._silent_at = {
                one.id: self._silent_at[one.id]
                for one in self._registry
                if one.id in self._silent_at
            }
            self._silent_at[worker.id] = now
            self._fail(worker, model, now, sent_at)
        self._count(worker, model, "silent")

    def undecided(self, worker: Worker, model: str) -> None:
        """The request ended without a sign of the worker's health."""
        self._count(worker, model, "cancelled")

    def _fail(self, worker: Worker, model: str, now: float, sent_at: float) -> None:
        breaker = worker.breaker
        before = breaker.state
        breaker.failure(now, sent_at)
        if breaker.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            _log.warning(
                "breaker_opened",
                worker=worker.url,
                model=model,
                failures=breaker.threshold,
                cool_down_secs=breaker.cool_down_seconds,
            )

    def _faults_of(self, worker: Worker, model: str) -> PoolFaults:
        key = (model, worker.role)
        faults = self._faults.get(key)
        if faults is None:
            faults = self._faults[key] = PoolFaults()
        return faults

    def _count(self, worker: Worker, model: str, outcome: str) -> None:
        self._worker_requests(worker.url, model, worker.role, outcome).inc()
