"""Metrics of models whose workers prefill and decode apart."""

from prometheus_client import CollectorRegistry

from extproc.metrics.instruments import TTFT_BUCKETS, Counter, Exposition, Family, Histogram

__all__ = ["PdMetrics"]

# Seconds from a failure to the moment its answer is written.
_FAIL_FAST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class PdMetrics:
    """Families are called with the values of their labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.pairs = Family(
            "extproc_pd_pairs_total",
            "Requests with a prefill and a decode worker by how they ended: ok, prefill_failed, "
            "prefill_refused, decode_failed, cancelled (the client left) or abandoned (a worker "
            "changed its role, or this service stopped).",
            ["model", "outcome"],
            Counter,
        )
        self.prefill_seconds = Family(
            "extproc_pd_prefill_seconds",
            "Time from the decision to the prefill worker's answer, if it was a good one.",
            ["model"],
            lambda: Histogram(TTFT_BUCKETS),
        )
        self.prefill_failures = Family(
            "extproc_pd_prefill_failures_total",
            "Prefill requests that failed: connect (another worker was tried), status_4xx, "
            "status_5xx (or any other that is no success), broken, timeout, silent (the decode "
            "worker gave up first) or no_kv (an answer without a handle to its cache).",
            ["model", "cause"],
            Counter,
        )
        self.fail_fast_seconds = Family(
            "extproc_pd_fail_fast_seconds",
            "Time from the failure of a prefill to the client's answer being written.",
            [],
            lambda: Histogram(_FAIL_FAST_BUCKETS),
        )
        self.decode_choices = Family(
            "extproc_pd_decode_choices_total",
            "Decode workers picked, by reason: same_host, peer_busy or no_peer.",
            ["model", "reason"],
            Counter,
        )
        self.decode_retries = Family(
            "extproc_pd_decode_retries_total",
            "Further attempts at a decode worker after one that could not be reached.",
            ["model"],
            Counter,
        )
        self.decode_alone = Family(
            "extproc_pd_decode_alone_total",
            "Requests sent to a decode worker alone, since it lacked little of the prompt.",
            ["model"],
            Counter,
        )
        self.role_changes = Family(
            "extproc_worker_role_changes_total",
            "Changes of a worker's role while it was registered.",
            ["from", "to"],
            Counter,
        )
        registry.register(
            Exposition(
                [
                    self.pairs,
                    self.prefill_failures,
                    self.decode_choices,
                    self.decode_retries,
                    self.decode_alone,
                    self.role_changes,
                ],
                [self.prefill_seconds, self.fail_fast_seconds],
            )
        )
