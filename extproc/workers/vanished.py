"""Holds workers that discovery names no longer, although nothing has said that they leave.

An API server that returns an empty list by mistake, or a label that was edited by mistake, must not
take away workers that serve. So a vanished worker stays in use for a while, as long as it answers
its introspection. This module keeps the books; the manager asks the workers.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final, Literal

import structlog

from extproc.metrics.service import Metrics
from extproc.worker_url import WorkerUrl
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import WorkerSpec

__all__ = ["VanishedWorkers"]

_log = structlog.get_logger()

# A held worker is asked once in so many rounds.
_TURNS: Final = 5

Outcome = Literal["found", "silent", "expired", "left"]


class VanishedWorkers:
    """The held workers, by id, with what discovery said about them last."""

    def __init__(self, registry: WorkerRegistry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._specs: dict[str, WorkerSpec] = {}
        self._until: dict[str, float] = {}
        self._turn = 0
        self._news: Counter[str] = Counter()

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._specs

    def hold(self, spec: WorkerSpec, until: float) -> None:
        """Hold a worker until that time."""
        self._specs[spec.id] = spec
        self._until[spec.id] = until
        self._news["held"] += 1
        self._mark(spec.id, True)

    def end(self, worker_id: str, outcome: Outcome) -> WorkerSpec | None:
        """End the hold of a worker; returns None if it was not held."""
        spec = self._specs.pop(worker_id, None)
        if spec is not None:
            del self._until[worker_id]
            self._news[outcome] += 1
            self._metrics.workers_vanished(outcome).inc()
            self._mark(worker_id, False)
        return spec

    def at(self, url: WorkerUrl) -> list[str]:
        """The ids of the held workers at a URL."""
        return [worker_id for worker_id, spec in self._specs.items() if spec.url == url]

    def expired(self, now: float) -> list[str]:
        """The ids of the workers that have been held for long enough."""
        return [worker_id for worker_id, until in self._until.items() if until <= now]

    def due(self) -> Iterator[str]:
        """The ids of the held workers that are asked in this round."""
        self._turn = (self._turn + 1) % _TURNS
        for worker_id in list(self._specs):
            worker = self._registry.get(worker_id)
            if worker is None or worker.order % _TURNS == self._turn:
                yield worker_id

    def mark(self, worker_id: str) -> None:
        """A worker of this id was registered."""
        self._mark(worker_id, worker_id in self._specs)

    def tell(self) -> None:
        """Log what has happened since the last call: few lines for many workers."""
        if held := self._news.pop("held", 0):
            _log.warning(
                "workers_vanished",
                workers=held,
                fix="check the selector of the Service and the labels of the pods",
            )
        for outcome, count in sorted(self._news.items()):
            _log.info("vanished_workers_ended", workers=count, outcome=outcome)
        self._news.clear()

    def _mark(self, worker_id: str, held: bool) -> None:
        worker = self._registry.get(worker_id)
        if worker is not None:
            worker.vanished = held
