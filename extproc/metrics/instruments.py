"""Metrics as plain numbers, and how they become Prometheus samples at a scrape."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Generic, TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

__all__ = ["TTFT_BUCKETS", "Counter", "Exposition", "Family", "Histogram"]

# Seconds; from 0.1 on the engine's own buckets for its time to the first token.
TTFT_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100,
    200, 400,
)  # fmt: skip


class Counter:
    """One time series that rises."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        self.value += 1


class Histogram:
    """One distribution; `bounds` are the upper bounds of the buckets, ascending."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def sum(self) -> float:
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        total = 0
        found = []
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            found.append(("+Inf" if bound == inf else str(float(bound)), float(total)))
        return found


ChildT = TypeVar("ChildT")


class Family(Generic[ChildT]):
    """One metric: a child for each combination of label values, made on first use."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], make: Callable[[], ChildT]
    ) -> None:
        self.name = name
        self.text = text
        self.labels = labels
        self._make = make
        self.children: dict[tuple[str, ...], ChildT] = {}
        if not labels:
            self(*())

    def __call__(self, *values: str) -> ChildT:
        child = self.children.get(values)
        if child is None:
            child = self.children[values] = self._make()
        return child


class Exposition(Collector):
    """Turns the families into samples at scrape time."""

    def __init__(
        self, counters: Iterable[Family[Counter]], histograms: Iterable[Family[Histogram]]
    ) -> None:
        self._counters = tuple(counters)
        self._histograms = tuple(histograms)

    def collect(self) -> Iterator[Metric]:
        for family in self._counters:
            metric = CounterMetricFamily(family.name, family.text, labels=family.labels)
            for values, counter in family.children.items():
                metric.add_metric(values, counter.value)
            yield metric
        for distribution in self._histograms:
            shown = HistogramMetricFamily(
                distribution.name, distribution.text, labels=distribution.labels
            )
            for values, histogram in distribution.children.items():
                shown.add_metric(values, histogram.buckets(), histogram.sum)
            yield shown
