"""The workers that may be tried: registered for the model in that role, breaker closed or due."""

from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Role, Worker

__all__ = ["UsableWorkers"]

_CLOSED = BreakerState.CLOSED


class UsableWorkers:
    """PrefillCall it with a model, a role and the time."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self.registry = registry

    def __call__(self, model: str, role: Role, now: float) -> list[Worker]:
        return [
            worker
            for worker in self.registry.pool_of(model, role)
            if worker.breaker.state is _CLOSED or worker.breaker.would_allow(now)
        ]
