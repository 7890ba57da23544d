"""What is fixed about a metric: its name, type, help text, labels and buckets.

Separate from the instruments because the documentation is written from it, too.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

__all__ = ["CounterSpec", "GaugeSpec", "HistogramSpec", "Label", "Section", "Spec"]


class Label(NamedTuple):
    """One label; `values` gives the meaning of each value where the values are fixed."""

    name: str
    values: Mapping[str, str] = MappingProxyType({})
    note: str = ""


class Spec:
    """One metric; a label of which only the name is known may be given as text."""

    kind = ""

    def __init__(self, name: str, text: str, *labels: Label | str) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(Label(label) if isinstance(label, str) else label for label in labels)
        self.label_names = tuple(label.name for label in self.labels)


class CounterSpec(Spec):
    """A number that only rises; its name ends in `_total`."""

    kind = "counter"

    def family(self, value: float | None = None) -> CounterMetricFamily:
        """Without a value: a family to which samples are added."""
        return CounterMetricFamily(
            self.name, self.text, value=value, labels=self.label_names or None
        )


class GaugeSpec(Spec):
    """A number that rises and falls."""

    kind = "gauge"

    def family(self, value: float | None = None) -> GaugeMetricFamily:
        """Without a value: a family to which samples are added."""
        return GaugeMetricFamily(self.name, self.text, value=value, labels=self.label_names or None)


class HistogramSpec(Spec):
    """A distribution; `bounds` are the upper bounds of its buckets, ascending."""

    kind = "histogram"

    def __init__(self, name: str, text: str, *labels: Label | str, bounds: Sequence[float]) -> None:
        super().__init__(name, text, *labels)
        self.bounds = bounds

    def family(self) -> HistogramMetricFamily:
        """A family to which samples are added."""
        return HistogramMetricFamily(self.name, self.text, labels=self.label_names)


class Section:
    """Metrics under one heading of `docs/metrics.md`; each is added as it is declared."""

    def __init__(self, title: str, text: str = "") -> None:
        self.title = title
        self.text = text
        self.specs: list[Spec] = []

    def counter(self, name: str, text: str, *labels: Label | str) -> CounterSpec:
        spec = CounterSpec(name, text, *labels)
        self.specs.append(spec)
        return spec

    def gauge(self, name: str, text: str, *labels: Label | str) -> GaugeSpec:
        spec = GaugeSpec(name, text, *labels)
        self.specs.append(spec)
        return spec

    def histogram(
        self, name: str, text: str, *labels: Label | str, bounds: Sequence[float]
    ) -> HistogramSpec:
        spec = HistogramSpec(name, text, *labels, bounds=bounds)
        self.specs.append(spec)
        return spec
