"""Gauges of the pools of workers, computed at a scrape: signals for autoscalers."""

from collections.abc import Callable, Collection, Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from extproc.metrics import table
from extproc.routing.pool_signals import PoolSignals

__all__ = ["PoolCollector"]


class PoolCollector(Collector):
    """`models` gives the ids of the configuration in use: others have no series."""

    def __init__(self, signals: PoolSignals, models: Callable[[], Collection[str]]) -> None:
        self._signals = signals
        self._models = models

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        wait = table.POOL_EXPECTED_WAIT_SECONDS.family()
        occupancy = table.POOL_OCCUPANCY_RATIO.family()
        for one in self._signals.read(self._models()):
            wait.add_metric([one.model, one.role], one.wait_seconds)
            if one.occupancy is not None:
                occupancy.add_metric([one.model, one.role], one.occupancy)
        yield from (wait, occupancy)
