"""Gauges of the workers, read at scrape time: a worker that left has no series left behind."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from extproc.workers.registry import WorkerRegistry
from extproc.workers.tickets import Tickets

__all__ = ["WorkerCollector"]


class WorkerCollector(Collector):
    """Load, breaker and number of workers."""

    def __init__(self, registry: WorkerRegistry, active_load: Tickets) -> None:
        self._registry = registry
        self._active_load = active_load

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            "extproc_worker_in_flight", "Requests in flight per worker.", labels=["worker"]
        )
        breaker = GaugeMetricFamily(
            "extproc_worker_breaker_state",
            "Circuit breaker per worker: 0 closed, 1 open, 2 half-open.",
            labels=["worker"],
        )
        workers = GaugeMetricFamily(
            "extproc_workers", "Registered workers by model and role.", labels=["model", "role"]
        )
        counts: Counter[tuple[str, str]] = Counter()
        loads: Counter[str] = Counter()
        states: dict[str, int] = {}
        for worker in self._registry:
            # Two ids can share a URL while a pod is replaced: one series for both.
            loads[worker.url] += worker.in_flight
            states[worker.url] = max(states.get(worker.url, 0), worker.breaker.state)
            for model in worker.model_ids or ("",):
                counts[model, worker.role] += 1
        for url, load in loads.items():
            in_flight.add_metric([url], load)
            breaker.add_metric([url], states[url])
        for (model, role), count in counts.items():
            workers.add_metric([model, role], count)
        yield in_flight
        yield breaker
        yield workers
        yield GaugeMetricFamily(
            "extproc_tickets_open", "Open load tickets.", value=len(self._active_load)
        )
