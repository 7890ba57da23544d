"""Finds workers whose front end answers while their engine generates nothing.

Such a worker answers each request with 200 and headers at once, and then sends no token. Only a
request that needs the engine shows it: `/health_generate`, which SGLang has. The check is off
unless the configuration sets an interval.
"""

import asyncio
from typing import Final

import structlog

from extproc.clock import Clock
from extproc.metrics.service import Metrics
from extproc.workers.engine_calls import EngineUnreachableError, IntrospectionClient
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["GeneratingCheck"]

_log = structlog.get_logger()

_PATH: Final = "/health_generate"
# One late answer may be that of a busy engine.
_FAILURES_MIN: Final = 2
_OK: Final = 200
# Engines without the path; they are not asked again.
_UNKNOWN: Final = (404, 405)
# How often a check that is off looks whether it is on.
_OFF_SECONDS: Final = 5.0


class GeneratingCheck:
    """Asks all plain workers; one that fails twice is avoided until it passes.

    Only plain workers are asked: prefill and decode workers need a partner for such a request.

    `seconds` is the interval, and the time that an answer may take; None while the check is off.
    """

    def __init__(
        self, registry: WorkerRegistry, client: IntrospectionClient, clock: Clock, metrics: Metrics
    ) -> None:
        self.seconds: float | None = None
        self._registry = registry
        self._client = client
        self._clock = clock
        self._checks = metrics.generating_checks
        self._failures: dict[str, int] = {}
        self._without: set[str] = set()

    async def run(self) -> None:
        while True:
            await self._clock.sleep(self.seconds or _OFF_SECONDS)
            seconds = self.seconds
            asked = [
                worker
                for worker in self._registry
                if worker.role == "plain" and worker.model_ids and worker.id not in self._without
            ]
            if seconds is None or not asked:
                continue
            ids = {worker.id for worker in self._registry}
            self._failures = {one: n for one, n in self._failures.items() if one in ids}
            self._without &= ids
            await asyncio.gather(*(self._check(worker, seconds) for worker in asked))

    async def _check(self, worker: Worker, seconds: float) -> None:
        try:
            status = (await self._client.get(worker.spec.url, _PATH, seconds)).status
        except EngineUnreachableError:
            status = 0
        if status in _UNKNOWN:
            self._without.add(worker.id)
            return
        now = self._clock.monotonic()
        if status == _OK:
            self._checks("passed").inc()
            if self._failures.pop(worker.id, 0) >= _FAILURES_MIN:
                worker.breaker.acquit(now)
                _log.info("worker_generates_again", worker=worker.url)
            return
        self._checks("failed").inc()
        failures = self._failures.get(worker.id, 0) + 1
        self._failures[worker.id] = failures
        if failures >= _FAILURES_MIN:
            # Until after the next check.
            worker.breaker.avoid(now, 3 * seconds)
        if failures == _FAILURES_MIN:
            _log.warning("worker_does_not_generate", worker=worker.url, status=status)
