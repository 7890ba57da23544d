"""Notices adapters that engines load and unload while they run.

An introspection comes too seldom for that. Each worker that may load adapters is asked for its list
of models about every five seconds, and all together at most twenty times a second. A worker that
answers 404 or 400 to a request for an adapter is introspected at once, see `routing/lease.py`.
"""

from random import Random
from typing import Final

from extproc.clock import Clock
from extproc.metrics.service import Metrics
from extproc.workers.adapters import read_model_list
from extproc.workers.engine_calls import EngineUnreachableError, IntrospectionClient
from extproc.workers.keyed_tasks import KeyedTasks
from extproc.workers.membership import Membership
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["AdapterWatch"]

_INTERVAL_SECONDS: Final = 5.0
_QUESTIONS_PER_SECOND: Final = 20
_TIMEOUT_SECONDS: Final = 2.0
# The longest time between two looks for workers that have joined.
_IDLE_SECONDS: Final = 1.0


class AdapterWatch:
    """Asks the registered workers; `tasks` orders the answers among those of introspections."""

    def __init__(
        self,
        registry: WorkerRegistry,
        membership: Membership,
        client: IntrospectionClient,
        tasks: KeyedTasks,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._membership = membership
        self._client = client
        self._tasks = tasks
        self._clock = clock
        self._polls = metrics.adapter_polls
        self._random = Random()  # noqa: S311 (spreads questions over time)
        self._due: dict[Worker, float] = {}

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            workers = [one for one in self._registry if one.spec.lists_adapters and one.model_ids]
            now = self._clock.monotonic()
            some = self._random.random
            # Those that join together are not asked together.
            self._due = {
                one: self._due.get(one, now + some() * self._pause(len(workers))) for one in workers
            }
            first = min(workers, key=self._due.__getitem__, default=None)
            wait = _IDLE_SECONDS
            if first is not None and self._due[first] <= now:
                # Nor are workers of several replicas that began together.
                self._due[first] = now + (0.75 + some() / 2) * self._pause(len(workers))
                if not self._tasks.is_busy(first.id):
                    self._tasks.start(first.id, self._ask(first.id))
            if first is not None:
                wait = min(self._due.values()) - now
            await self._clock.sleep(max(1 / _QUESTIONS_PER_SECOND, min(_IDLE_SECONDS, wait)))

    @staticmethod
    def _pause(workers: int) -> float:
        """Seconds between two questions to the same one of so many workers."""
        return max(_INTERVAL_SECONDS, workers / _QUESTIONS_PER_SECOND)

    async def _ask(self, worker_id: str) -> None:
        worker = self._registry.get(worker_id)
        if worker is None:
            return
        try:
            answer = await self._client.get(worker.spec.url, "/v1/models", _TIMEOUT_SECONDS)
        except EngineUnreachableError:
            listed = None
        else:
            listed = read_model_list(answer.body) if answer.status == 200 else None
        self._polls("failed" if listed is None else "answered").inc()
        if listed is not None:
            await self._membership.adapters_listed(worker_id, listed.adapters)
