"""The metrics that are counted while requests are served.

The registry is passed in, never global. Gauges that are read at a scrape are made by the
collectors of `admin/`.
"""

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry

from extproc import __version__
from extproc.metrics import discovery_table, kv_table, table
from extproc.metrics.instruments import Instruments

__all__ = ["DiscoveryMetrics", "Metrics", "PdMetrics", "QueueMetrics"]


class Metrics:
    """The metrics of one service.

    One with labels is called with their values, in the order of the table.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        made = Instruments()
        made.gauge(table.BUILD_INFO)(__version__).set(1)
        self.requests = made.counter(table.REQUESTS)
        self.decisions = made.counter(table.DECISIONS)
        self.decision_seconds = made.histogram(table.DECISION_SECONDS)()
        self.request_body_bytes = made.histogram(table.REQUEST_BODY_BYTES)()
        self.response_seconds = made.histogram(table.RESPONSE_HEADERS_SECONDS)
        self.worker_requests = made.counter(table.WORKER_REQUESTS)
        self.missed = made.counter(table.DESTINATION_MISSED)
        self.last_resort = made.counter(table.LAST_RESORT)
        self.fallbacks = made.counter(table.FALLBACK_SERVED)
        self.stale_requests = made.counter(table.STALE_REQUESTS)()
        self.streams_open = made.gauge(table.STREAMS_OPEN)()
        self.streams = made.counter(table.STREAMS)
        self.introspections = made.counter(table.INTROSPECTIONS)
        self.generating_checks = made.counter(table.GENERATING_CHECKS)
        self.adapter_polls = made.counter(table.ADAPTER_POLLS)
        self.adapter_requests = made.counter(table.ADAPTER_REQUESTS)
        self.load_polls = made.counter(table.LOAD_POLLS)
        self.workers_refused = made.counter(table.WORKERS_REFUSED)()
        self.workers_vanished = made.counter(table.WORKERS_VANISHED)
        self.reloads = made.counter(table.RELOADS)
        self.config_current = made.gauge(table.CONFIG_CURRENT)()
        self.config_current.set(1)
        self.envoy_config_outdated = made.gauge(table.ENVOY_CONFIG_OUTDATED)()
        self.xds_streams = made.gauge(table.XDS_STREAMS)()
        self.xds_rejections = made.counter(table.XDS_REJECTIONS)()
        self.xds_streams_refused = made.counter(table.XDS_STREAMS_REFUSED)()
        self.event_loop_lag_seconds = made.gauge(table.EVENT_LOOP_LAG_SECONDS)()
        self.asyncio_tasks = made.gauge(table.ASYNCIO_TASKS)()
        self.prompt_tokens = made.counter(kv_table.PROMPT_TOKENS)
        self.cached_tokens = made.counter(kv_table.CACHED_TOKENS)
        self.overlap_tokens = made.histogram(kv_table.OVERLAP_TOKENS)
        self.prompts_in_part = made.counter(kv_table.PROMPTS_IN_PART)
        self.prompts_without_tokens = made.counter(kv_table.PROMPTS_WITHOUT_TOKENS)
        self.engine_token_questions = made.counter(kv_table.ENGINE_TOKEN_QUESTIONS)
        self.token_proofs = made.counter(kv_table.TOKEN_PROOFS)
        self.tokenization_seconds = made.histogram(kv_table.TOKENIZATION_SECONDS)
        self.pd = PdMetrics(made)
        self.queue = QueueMetrics(made)
        self.discovery = DiscoveryMetrics(made)
        self._made = made
        registry.register(made)

    def begin(self, model: str) -> None:
        """Make the series of which alerts read the rate: they are needed before the first event."""
        for reason in table.DESTINATION_MISSED.labels[1].values:
            self.missed(model, reason)
        self.fallbacks(model)

    def begin_tokens(self, model: str) -> None:
        """As `begin`, for a model whose policy looks at tokens."""
        self.prompt_tokens(model)
        self.cached_tokens(model)
        self.prompts_in_part(model)

    def keep_only(
        self, *, models: Callable[[], Collection[str]], workers: Callable[[], Collection[str]]
    ) -> None:
        """Drop the series of all others at each scrape.

        Without this, the last requests of a model or worker that is gone would make them again.
        `workers` gives URLs.
        """
        self._made.kept = {"model": models, "worker": workers}

    def forget_worker(self, worker: str) -> None:
        """Drop the series of a worker that left."""
        for family in (self.worker_requests, self.last_resort):
            children = family.children
            for values in [values for values in children if values[0] == worker]:
                del children[values]


class PdMetrics:
    """The metrics of models that have prefill and decode workers."""

    def __init__(self, made: Instruments) -> None:
        self.pairs = made.counter(table.PD_PAIRS)
        self.prefill_seconds = made.histogram(table.PD_PREFILL_SECONDS)
        self.prefill_failures = made.counter(table.PD_PREFILL_FAILURES)
        self.fail_fast_seconds = made.histogram(table.PD_FAIL_FAST_SECONDS)
        self.decode_choices = made.counter(table.PD_DECODE_CHOICES)
        self.decode_retries = made.counter(table.PD_DECODE_RETRIES)
        self.decode_alone = made.counter(table.PD_DECODE_ALONE)
        self.role_changes = made.counter(table.WORKER_ROLE_CHANGES)


class QueueMetrics:
    """The metrics of requests that wait for a worker with room."""

    def __init__(self, made: Instruments) -> None:
        self.waiting = made.gauge(table.QUEUE_WAITING)
        self.outcomes = made.counter(table.QUEUE_OUTCOMES)
        self.seconds = made.histogram(table.QUEUE_SECONDS)


class DiscoveryMetrics:
    """The metrics of workers that a cluster names; empty with a static list."""

    def __init__(self, made: Instruments) -> None:
        self.up = made.gauge(discovery_table.DISCOVERY_UP)
        self.errors = made.counter(discovery_table.DISCOVERY_ERRORS)
