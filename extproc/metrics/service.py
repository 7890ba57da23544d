"""Every metric in one table.

The registry is passed in, never global. Everything runs on one event loop, so what is counted
per request are plain numbers without locks, turned into Prometheus samples when they are
scraped; the client library's own counters would cost several times as much on the hot path.
`docs/metrics.md` says what each metric is for and which of sgl-router's it corresponds to.
"""

from prometheus_client import CollectorRegistry, Gauge

from extproc import __version__
from extproc.metrics.instruments import TTFT_BUCKETS, Counter, Exposition, Family, Histogram
from extproc.metrics.pd import PdMetrics

__all__ = ["Counter", "Histogram", "Metrics"]

# Seconds. Decisions take microseconds to milliseconds.
_DECISION_BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0,
)  # fmt: skip
_OVERLAP_BUCKETS = (0, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)
_BODY_BUCKETS = (1e3, 4e3, 16e3, 64e3, 256e3, 1e6, 4e6, 16e6, 64e6)


class Metrics:
    """The metrics of one service; those with labels are called with their values."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        build = Gauge(
            "extproc_build_info", "Version of the service.", ["version"], registry=registry
        )
        build.labels(__version__).set(1)
        self.requests = Family(
            "extproc_requests_total",
            "Requests by API path and how our part ended: routed, or an error code.",
            ["path", "code"],
            Counter,
        )
        self.decisions = Family(
            "extproc_decisions_total",
            "Routing decisions by model, policy and reason.",
            ["model", "policy", "reason"],
            Counter,
        )
        self.worker_requests = Family(
            "extproc_worker_requests_total",
            "Outcomes by worker: success, error (5xx, refused, broken off) or cancelled.",
            ["worker", "model", "role", "outcome"],
            Counter,
        )
        self.missed = Family(
            "extproc_destination_missed_total",
            "Requests that the proxy sent to an endpoint we had not named.",
            ["model"],
            Counter,
        )
        self.fallbacks = Family(
            "extproc_fallback_served_total",
            "Requests served by a later entry of the destination list.",
            ["model"],
            Counter,
        )
        self.streams = Family(
            "extproc_streams_total",
            "ext_proc streams by the way they ended: ok, cancelled, error.",
            ["end"],
            Counter,
        )
        self.introspections = Family(
            "extproc_introspections_total",
            "Questions to workers who they are, by result: answered or failed.",
            ["result"],
            Counter,
        )
        self.prompt_tokens = Family(
            "extproc_prompt_tokens_total",
            "Tokens of the prompts whose tokens are known.",
            ["model"],
            Counter,
        )
        self.cached_tokens = Family(
            "extproc_cached_tokens_total",
            "Tokens of these prompts that the chosen rank was known to hold.",
            ["model"],
            Counter,
        )
        self.overlap_tokens = Family(
            "extproc_overlap_tokens",
            "Tokens of a prompt that the chosen rank was known to hold, by decision.",
            ["model"],
            lambda: Histogram(_OVERLAP_BUCKETS),
        )
        self.tokenization_seconds = Family(
            "extproc_tokenization_seconds",
            "Time from a body to the tokens of its prompt, waiting for a thread included.",
            ["model"],
            lambda: Histogram(_DECISION_BUCKETS),
        )
        self.prompts_without_tokens = Family(
            "extproc_prompts_without_tokens_total",
            "Requests whose tokens are not known, by reason.",
            ["model", "why"],
            Counter,
        )
        stale_requests: Family[Counter] = Family(
            "extproc_stale_requests_total", "Requests ended because they were too old.", [], Counter
        )
        workers_refused = Family(
            "extproc_workers_refused_total",
            "Workers refused because plain and PD workers of one model do not mix.",
            [],
            Counter,
        )
        decision_seconds = Family(
            "extproc_decision_seconds",
            "Time from a complete request body to the decision.",
            [],
            lambda: Histogram(_DECISION_BUCKETS),
        )
        request_body_bytes = Family(
            "extproc_request_body_bytes",
            "Size of request bodies.",
            [],
            lambda: Histogram(_BODY_BUCKETS),
        )
        self.response_seconds = Family(
            "extproc_response_headers_seconds",
            "Time from the decision to the response headers (for streams: the first token).",
            ["model"],
            lambda: Histogram(TTFT_BUCKETS),
        )
        self.pd = PdMetrics(registry)
        self.stale_requests = stale_requests()
        self.workers_refused = workers_refused()
        self.decision_seconds = decision_seconds()
        self.request_body_bytes = request_body_bytes()
        self.streams_open = Gauge(
            "extproc_streams_open", "Open ext_proc streams.", registry=registry
        )
        self.event_loop_lag_seconds = Gauge(
            "extproc_event_loop_lag_seconds",
            "How late the last periodic wake-up of the event loop was.",
            registry=registry,
        )
        self.asyncio_tasks = Gauge(
            "extproc_asyncio_tasks_open", "Tasks of the event loop.", registry=registry
        )
        registry.register(
            Exposition(
                [
                    self.requests,
                    self.decisions,
                    self.worker_requests,
                    self.missed,
                    self.fallbacks,
                    self.streams,
                    self.introspections,
                    self.prompt_tokens,
                    self.cached_tokens,
                    self.prompts_without_tokens,
                    stale_requests,
                    workers_refused,
                ],
                [
                    decision_seconds,
                    request_body_bytes,
                    self.response_seconds,
                    self.overlap_tokens,
                    self.tokenization_seconds,
                ],
            )
        )

    def forget_worker(self, worker: str) -> None:
        """Drop the series of a worker that left."""
        children = self.worker_requests.children
        for values in [values for values in children if values[0] == worker]:
            del children[values]
