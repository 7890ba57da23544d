"""Metrics as plain numbers, and how they become Prometheus samples at a scrape.

Separate from the Prometheus client's own counters because these have no locks: everything runs
on one event loop, and a locked counter costs several times as much per request.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf
from typing import Generic, TypeVar

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from extproc.metrics.specs import CounterSpec, GaugeSpec, HistogramSpec

__all__ = ["Counter", "Family", "Gauge", "Histogram", "Instruments"]


class Counter:
    """One time series that only rises."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        self.value += 1


class Gauge:
    """One time series that rises and falls."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value


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
    def count(self) -> int:
        """Number of observed values."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, in the form that Prometheus expects."""
        total = 0
        found = []
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            shown = floatToGoString(bound)  # type: ignore[no-untyped-call]
            found.append((shown, float(total)))
        return found


ChildT = TypeVar("ChildT")


class Family(Generic[ChildT]):
    """The time series of one metric: called with label values, gives the series for them."""

    def __init__(self, make: Callable[[], ChildT], *, labelled: bool) -> None:
        self._make = make
        self.children: dict[tuple[str, ...], ChildT] = {}
        if not labelled:
            self(*())

    def __call__(self, *values: str) -> ChildT:
        child = self.children.get(values)
        if child is None:
            child = self.children[values] = self._make()
        return child


class Instruments(Collector):
    """Makes families from their specs, and turns them into samples at a scrape."""

    def __init__(self) -> None:
        # By the name of a label: series with other values of it are dropped at each scrape.
        self.kept: dict[str, Callable[[], Collection[str]]] = {}
        self._counters: list[tuple[CounterSpec, Family[Counter]]] = []
        self._gauges: list[tuple[GaugeSpec, Family[Gauge]]] = []
        self._histograms: list[tuple[HistogramSpec, Family[Histogram]]] = []

    def counter(self, spec: CounterSpec) -> Family[Counter]:
        family = Family(Counter, labelled=bool(spec.labels))
        self._counters.append((spec, family))
        return family

    def gauge(self, spec: GaugeSpec) -> Family[Gauge]:
        family = Family(Gauge, labelled=bool(spec.labels))
        self._gauges.append((spec, family))
        return family

    def histogram(self, spec: HistogramSpec) -> Family[Histogram]:
        family = Family(lambda: Histogram(spec.bounds), labelled=bool(spec.labels))
        self._histograms.append((spec, family))
        return family

    def _drop(self) -> None:
        for label, kept in self.kept.items():
            values = kept()
            for counted, counters in self._counters:
                _keep(counters.children, counted.label_names, label, values)
            for measured, gauges in self._gauges:
                _keep(gauges.children, measured.label_names, label, values)
            for observed, histograms in self._histograms:
                _keep(histograms.children, observed.label_names, label, values)

    def collect(self) -> Iterator[Metric]:
        self._drop()
        for counted, counters in self._counters:
            rising = counted.family()
            for values, counter in counters.children.items():
                rising.add_metric(values, counter.value)
            yield rising
        for measured, gauges in self._gauges:
            current = measured.family()
            for values, gauge in gauges.children.items():
                current.add_metric(values, gauge.value)
            yield current
        for observed, histograms in self._histograms:
            shown = observed.family()
            for values, histogram in histograms.children.items():
                shown.add_metric(values, histogram.buckets(), histogram.sum)
            yield shown


def _keep(
    children: dict[tuple[str, ...], ChildT],
    names: Sequence[str],
    label: str,
    values: Collection[str],
) -> None:
    """Keep the series of a family whose label has one of these values, if it has the label."""
    if label in names:
        position = names.index(label)
        for labels in [labels for labels in children if labels[position] not in values]:
            del children[labels]
