"""Gauges of the workers, read at a scrape, so that a worker that left leaves no series behind.

And what the gateway does with decisions, which changes with time alone.
"""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from extproc.metrics import table
from extproc.routing.gateway_watch import GatewayWatch
from extproc.workers.registry import WorkerRegistry
from extproc.workers.runtime_workers import RuntimeWorkers
from extproc.workers.source_health import SourceHealth
from extproc.workers.tickets import Tickets

__all__ = ["GatewayCollector", "WorkerCollector"]


class WorkerCollector(Collector):
    """Load, breaker and number of workers, and the number of their adapters."""

    def __init__(
        self, registry: WorkerRegistry, active_load: Tickets, sources: SourceHealth
    ) -> None:
        self._registry = registry
        self._sources = sources
        self._active_load = active_load

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        in_flight = table.WORKER_IN_FLIGHT.family()
        breaker = table.WORKER_BREAKER_STATE.family()
        workers = table.WORKERS.family()
        counts: Counter[tuple[str, str]] = Counter()
        loads: Counter[str] = Counter()
        states: dict[str, int] = {}
        unknown = draining = vanished = added = 0
        for worker in self._registry:
            # Two ids can share a URL while a pod is replaced: one series for both.
            loads[worker.url] += worker.in_flight
            draining += worker.draining
            vanished += worker.vanished
            added += RuntimeWorkers.is_added(worker.id)
            unknown += worker.address is not None and not self._registry.gateway_knows(worker)
            states[worker.url] = max(states.get(worker.url, 0), worker.breaker.state)
            for model in worker.model_ids or ("",):
                counts[model, worker.role] += 1
        for url, load in loads.items():
            in_flight.add_metric([url], load)
            breaker.add_metric([url], states[url])
        for labels, count in counts.items():
            workers.add_metric(labels, count)
        yield from (in_flight, breaker, workers)
        yield table.WORKERS_UNKNOWN_TO_GATEWAY.family(unknown)
        yield table.WORKERS_DRAINING.family(draining)
        yield table.RUNTIME_WORKERS.family(added)
        stale = len(self._registry) if self._sources.is_stale else vanished
        yield table.WORKERS_STALE.family(stale)
        adapters = table.ADAPTERS.family()
        for model, count in Counter(one.model for one in self._registry.names.adapters()).items():
            adapters.add_metric([model], count)
        yield adapters
        yield table.TICKETS_OPEN.family(len(self._active_load))


class GatewayCollector(Collector):
    """Whether the gateway follows the decisions, by model."""

    def __init__(self, gateway: GatewayWatch) -> None:
        self._gateway = gateway

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        ignores = table.GATEWAY_IGNORES.family()
        for model, ignored in self._gateway.verdicts().items():
            ignores.add_metric([model], ignored)
        yield ignores
