"""Records what requests say about workers: on the breaker, in the metrics and in the log."""

import structlog

from extproc.metrics.service import Metrics
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker

__all__ = ["WorkerOutcomes"]

_log = structlog.get_logger()


class WorkerOutcomes:
    """Each request that a worker was claimed for ends in one of these."""

    __slots__ = ("_worker_requests",)

    def __init__(self, metrics: Metrics) -> None:
        self._worker_requests = metrics.worker_requests

    def succeeded(self, worker: Worker, model: str) -> None:
        """The worker answered, and not with a 5xx."""
        if worker.breaker.state is not BreakerState.CLOSED:
            _log.info("breaker_closed", worker=worker.url, model=model)
        worker.breaker.success()
        self._count(worker, model, "success")

    def failed(self, worker: Worker, model: str, now: float) -> None:
        """The worker answered with a 5xx, or not at all."""
        breaker = worker.breaker
        before = breaker.state
        breaker.failure(now)
        if breaker.state is not before:
            _log.warning(
                "breaker_opened",
                worker=worker.url,
                model=model,
                failures=breaker.threshold,
                cool_down_secs=breaker.cool_down_seconds,
            )
        self._count(worker, model, "error")

    def busy(
        self, worker: Worker, model: str, now: float, retry_after_seconds: float | None = None
    ) -> None:
        """The worker answered 503 or 429 in an attempt, and another one got the request."""
        self._count(worker, model, "busy")

    def undecided(self, worker: Worker, model: str) -> None:
        """The request ended without a sign of the worker's health."""
        self._count(worker, model, "cancelled")

    def _count(self, worker: Worker, model: str, outcome: str) -> None:
        self._worker_requests(worker.url, model, worker.role, outcome).inc()
