"""The metrics of the admission, read at a scrape.

Separate from the admission because sessions, which use that one, know no metrics.
"""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from extproc.metrics import table
from extproc.server.admission import Admission

__all__ = ["AdmissionCollector"]


class AdmissionCollector(Collector):
    """How much is in flight, and what was refused because it was too much."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        admission = self._admission
        yield table.REQUESTS_IN_FLIGHT.family(admission.requests)
        yield table.BUFFERED_BYTES.family(admission.buffered_bytes)
        refusals = table.OVERLOAD_REFUSALS.family()
        refusals.add_metric(["max_requests"], admission.refused_requests)
        refusals.add_metric(["max_buffered_bytes"], admission.refused_bytes)
        yield refusals
