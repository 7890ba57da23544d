"""Every metric in one table.

The registry is passed in, never global. Children for the labels of the hot path are bound
once and kept; `docs/metrics.md` says what each metric is for and which of sgl-router's it
corresponds to.
"""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from extproc import __version__

__all__ = ["Metrics"]

# Seconds. Decisions take microseconds to milliseconds.
_DECISION_BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0,
)  # fmt: skip
# Seconds; from 0.1 on the engine's own buckets for its time to the first token.
_RESPONSE_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100,
    200, 400,
)  # fmt: skip
_BODY_BUCKETS = (1e3, 4e3, 16e3, 64e3, 256e3, 1e6, 4e6, 16e6, 64e6)


class Metrics:
    """The metrics of one service; methods with arguments return the bound child for labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        Gauge(
            "extproc_build_info", "Version of the service.", ["version"], registry=registry
        ).labels(__version__).set(1)
        self._requests = Counter(
            "extproc_requests_total",
            "Requests by API path and how our part ended: routed, or an error code.",
            ["path", "code"],
            registry=registry,
        )
        self._decisions = Counter(
            "extproc_decisions_total",
            "Routing decisions by model, policy and reason.",
            ["model", "policy", "reason"],
            registry=registry,
        )
        self.decision_seconds = Histogram(
            "extproc_decision_seconds",
            "Time from a complete request body to the decision.",
            buckets=_DECISION_BUCKETS,
            registry=registry,
        )
        self.request_body_bytes = Histogram(
            "extproc_request_body_bytes",
            "Size of request bodies.",
            buckets=_BODY_BUCKETS,
            registry=registry,
        )
        self._response_seconds = Histogram(
            "extproc_response_headers_seconds",
            "Time from the decision to the response headers (for streams: the first token).",
            ["model"],
            buckets=_RESPONSE_BUCKETS,
            registry=registry,
        )
        self._worker_requests = Counter(
            "extproc_worker_requests_total",
            "Outcomes by worker: success, error (5xx, refused, broken off) or cancelled.",
            ["worker", "model", "mode", "outcome"],
            registry=registry,
        )
        self._missed = Counter(
            "extproc_destination_missed_total",
            "Requests that the proxy sent to an endpoint we had not named.",
            ["model"],
            registry=registry,
        )
        self._fallbacks = Counter(
            "extproc_fallback_served_total",
            "Requests served by a later entry of the destination list.",
            ["model"],
            registry=registry,
        )
        self.stale_requests = Counter(
            "extproc_stale_requests_total",
            "Requests ended because they were too old.",
            registry=registry,
        )
        self.streams_open = Gauge(
            "extproc_streams_open", "Open ext_proc streams.", registry=registry
        )
        self._streams = Counter(
            "extproc_streams_total",
            "ext_proc streams by the way they ended: ok, cancelled, error.",
            ["end"],
            registry=registry,
        )
        self._introspections = Counter(
            "extproc_introspections_total",
            "Questions to workers who they are, by result: answered or failed.",
            ["result"],
            registry=registry,
        )
        self.workers_refused = Counter(
            "extproc_workers_refused_total",
            "Workers refused because plain and PD workers of one model do not mix.",
            registry=registry,
        )
        self.event_loop_lag_seconds = Gauge(
            "extproc_event_loop_lag_seconds",
            "How late the last periodic wake-up of the event loop was.",
            registry=registry,
        )
        # Bound once per combination; labels() looks up and locks on every call.
        self.requests = cache(self._requests.labels)
        self.decisions = cache(self._decisions.labels)
        self.response_seconds = cache(self._response_seconds.labels)
        self.missed = cache(self._missed.labels)
        self.fallbacks = cache(self._fallbacks.labels)
        self.streams = cache(self._streams.labels)
        self.introspections = cache(self._introspections.labels)

    def worker_request(self, worker: str, model: str, mode: str, outcome: str) -> None:
        """Count one outcome; not cached, since workers come and go."""
        self._worker_requests.labels(worker, model, mode, outcome).inc()

    def forget_worker(self, worker: str) -> None:
        """Drop the series of a worker that left."""
        self._worker_requests.remove_by_labels({"worker": worker})
