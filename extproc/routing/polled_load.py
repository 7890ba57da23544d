"""Asks vLLM for its load, which it does not publish beside its KV events as SGLang does.

Each worker is asked about once a second, and all together at most twenty times a second: a large
fleet is asked less often. A figure that is older than three seconds counts no more.
"""

import asyncio
import math
from random import Random
from typing import Final

import structlog

from extproc.clock import Clock
from extproc.metrics.service import Metrics
from extproc.routing.ranks import Ranks
from extproc.workers.engine_calls import EngineUnreachableError, IntrospectionClient
from extproc.workers.registry import WorkerRegistry
from extproc.workers.vllm_answers import read_vllm_load
from extproc.workers.worker import Worker

__all__ = ["PolledLoad"]

_log = structlog.get_logger()

_INTERVAL_SECONDS: Final = 1.0
_POLLS_PER_SECOND: Final = 20
_TIMEOUT_SECONDS: Final = 1.0
# Between two looks for workers that can be asked, while there is no such worker.
_IDLE_SECONDS: Final = 1.0
# A worker that gives no figures is asked so much less often.
_WITHOUT_FIGURES: Final = 30


class PolledLoad:
    """Reports the load of all vLLM workers to their ranks."""

    def __init__(
        self,
        registry: WorkerRegistry,
        ranks: Ranks,
        client: IntrospectionClient,
        clock: Clock,
        random: Random,
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._ranks = ranks
        self._client = client
        self._clock = clock
        self._random = random
        self._polls = metrics.load_polls
        self._due: dict[Worker, float] = {}

    async def run(self) -> None:
        """Ask for ever; awaits every question of its own when it is cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                workers = self._workers()
                if not workers:
                    await self._clock.sleep(_IDLE_SECONDS)
                    continue
                now = self._clock.monotonic()
                worker = min(workers, key=lambda one: self._due.get(one, 0.0))
                if self._due.get(worker, 0.0) <= now:
                    # Until its answer has come, it is not asked again.
                    self._due[worker] = math.inf
                    group.create_task(self._ask(worker, len(workers)))
                await self._clock.sleep(1 / _POLLS_PER_SECOND)

    def _workers(self) -> list[Worker]:
        found = [
            worker
            for worker in self._registry
            if worker.engine.load_from_metrics and self._ranks.of(worker)
        ]
        if len(self._due) > len(found):
            self._due = {worker: self._due[worker] for worker in found if worker in self._due}
        return found

    def _interval(self, workers: int) -> float:
        """Replicas and workers that began together do not stay together."""
        return max(_INTERVAL_SECONDS, workers / _POLLS_PER_SECOND) * (
            0.75 + self._random.random() / 2
        )

    async def _ask(self, worker: Worker, workers: int) -> None:
        interval = self._interval(workers)
        try:
            outcome = await self._report(worker)
        except EngineUnreachableError:
            outcome = "failed"
        except Exception:
            # An answer of a worker must not end the questions to the others.
            _log.exception("load_not_read", worker=worker.url)
            outcome = "failed"
        if outcome == "without_figures":
            interval *= _WITHOUT_FIGURES
        self._polls(outcome).inc()
        self._due[worker] = self._clock.monotonic() + interval

    async def _report(self, worker: Worker) -> str:
        """Ask the worker, and report what it says; returns the outcome."""
        answer = await self._client.get(worker.spec.url, "/metrics", _TIMEOUT_SECONDS)
        found = read_vllm_load(answer.body) if answer.status == 200 else {}
        now = self._clock.monotonic()
        # By the engine's number; a server of one rank of several has only its own.
        for rank, (_, report) in zip(self._ranks.of(worker), sorted(found.items()), strict=False):
            rank.load.report(report, now)
        return "answered" if found else "without_figures"
