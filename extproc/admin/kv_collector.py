"""Metrics of KV pages and of tokenization, read at a scrape.

Counters are sums over all ranks. They include ranks that are gone, so that they never fall.
Gauges are per rank and vanish with the rank.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import Metric
from prometheus_client.registry import Collector

from extproc.clock import Clock
from extproc.kv.indexer import KvTotals
from extproc.metrics import kv_table as table
from extproc.metrics.specs import CounterSpec, GaugeSpec
from extproc.routing.ranks import Ranks
from extproc.routing.token_proof.proofs import STATES, TokenProofs
from extproc.tokenization.encoder import PromptEncoder

__all__ = ["EncoderCollector", "KvCollector", "ProofCollector"]

_TIERS: Final = ("device", "host", "below")
_Read = Callable[[KvTotals], int]

_COUNTERS: Final[tuple[tuple[CounterSpec, _Read], ...]] = (
    (table.KV_BATCHES, lambda totals: totals.streams.batches),
    (table.KV_BYTES, lambda totals: totals.streams.bytes),
    (table.KV_GAPS, lambda totals: totals.streams.gaps),
    (table.KV_RESTARTS, lambda totals: totals.streams.restarts),
    (table.KV_CLEARS, lambda totals: totals.streams.clears),
    (table.KV_REPLAYS, lambda totals: totals.streams.replays),
    (table.KV_REPLAY_FAILURES, lambda totals: totals.streams.replay_failures),
    (table.KV_MALFORMED_MESSAGES, lambda totals: totals.streams.malformed),
    (table.KV_DROPPED_BATCHES, lambda totals: totals.streams.dropped),
    (table.KV_APPLY_ERRORS, lambda totals: totals.streams.apply_errors),
    (table.KV_LOAD_REPORTS, lambda totals: totals.streams.load_reports),
    (table.KV_UNREADABLE_LOAD_REPORTS, lambda totals: totals.events.unreadable_loads),
    (table.KV_UNREADABLE_BATCHES, lambda totals: totals.events.unreadable_batches),
    (table.KV_SKIPPED_EVENTS, lambda totals: totals.events.skipped_events),
    (table.KV_ODD_SIZED_EVENTS, lambda totals: totals.events.odd_sized_events),
    (table.KV_UNKNOWN_REMOVALS, lambda totals: totals.index.unknown_removals),
)
_GAUGES: Final[tuple[tuple[GaugeSpec, _Read], ...]] = (
    (table.KV_PAGES, lambda totals: totals.pages),
    (table.KV_INDEX_BYTES, lambda totals: totals.estimated_bytes),
    (table.KV_RANKS, lambda totals: totals.ranks),
    (table.KV_RANKS_CONNECTED, lambda totals: totals.connected_ranks),
    (table.KV_RANKS_UNTRUSTED, lambda totals: totals.ranks - totals.trusted_ranks),
)
_EVENTS: Final[tuple[tuple[str, _Read], ...]] = (
    ("stored", lambda totals: totals.events.stored_events),
    ("removed", lambda totals: totals.events.removed_events),
    ("cleared", lambda totals: totals.events.cleared_events),
)
_KEPT_OUT: Final[tuple[tuple[str, _Read], ...]] = (
    ("unknown_parent", lambda totals: totals.index.orphans),
    ("token_count", lambda totals: totals.index.mismatched),
    ("over_limit", lambda totals: totals.index.over_limit),
    ("other_units", lambda totals: totals.events.foreign_unit_pages),
)


class KvCollector(Collector):
    """KV event streams, events, pages, trust and load of all ranks."""

    def __init__(self, ranks: Ranks, clock: Clock) -> None:
        self._ranks = ranks
        self._clock = clock

    def describe(self) -> Iterator[Metric]:
        """Nothing: the state of ranks is not read before the first scrape."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        totals = self._ranks.indexer.totals()
        for counter, read in _COUNTERS:
            yield counter.family(read(totals))
        for gauge, read in _GAUGES:
            yield gauge.family(read(totals))
        for spec, by_label in ((table.KV_EVENTS, _EVENTS), (table.KV_PAGES_KEPT_OUT, _KEPT_OUT)):
            family = spec.family()
            for value, read in by_label:
                family.add_metric([value], read(totals))
            yield family
        yield self._event_pages(totals)
        yield from self._per_rank()

    def _event_pages(self, totals: KvTotals) -> Metric:
        pages = table.KV_EVENT_PAGES.family()
        events = totals.events
        for kind, counts in (("stored", events.stored_pages), ("removed", events.removed_pages)):
            for tier, count in zip(_TIERS, counts, strict=True):
                pages.add_metric([kind, tier], count)
        return pages

    def _per_rank(self) -> Iterator[Metric]:
        trusted = table.KV_RANK_TRUSTED.family()
        pages = table.KV_RANK_PAGES.family()
        age = table.KV_LAST_EVENT_AGE_SECONDS.family()
        requests = table.RANK_REQUESTS.family()
        ahead = table.RANK_PREFILL_TOKENS_AHEAD.family()
        speed = table.RANK_PREFILL_TOKENS_PER_SECOND.family()
        now = self._clock.monotonic()
        seen: set[tuple[str, str]] = set()
        for rank in self._ranks:
            labels = (rank.worker.url, str(rank.dp_rank))
            if labels in seen:
                continue  # two ids share a URL while a pod is replaced
            seen.add(labels)
            requests.add_metric(labels, rank.load.requests(now))
            ahead.add_metric(labels, rank.load.prefill_tokens_ahead(now))
            speed.add_metric(labels, rank.load.prefill_tokens_per_second)
            state = self._ranks.state(rank)
            if state is None:
                continue
            trusted.add_metric(labels, state.trusted)
            for tier, count in zip(_TIERS, state.pages_by_tier, strict=True):
                pages.add_metric([*labels, tier], count)
            if state.last_event_age_seconds is not None:
                age.add_metric(labels, state.last_event_age_seconds)
        yield from (trusted, pages, age, requests, ahead, speed)


class EncoderCollector(Collector):
    """Tokenization by model; models that share a tokenizer show the same figures."""

    def __init__(self, encoders: Mapping[str, PromptEncoder]) -> None:
        self._encoders = encoders

    def describe(self) -> Iterator[Metric]:
        """Nothing, as for KvCollector."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        encoded = table.TOKENIZATIONS.family()
        busy = table.TOKENIZATION_BUSY_SECONDS.family()
        segments = table.TOKEN_SEGMENTS.family()
        evictions = table.TOKEN_CACHE_EVICTIONS.family()
        size = table.TOKEN_CACHE_BYTES.family()
        enabled = table.TOKEN_CACHE_ENABLED.family()
        for model, encoder in self._encoders.items():
            stats = encoder.stats
            encoded.add_metric([model, "loop"], stats.inline)
            encoded.add_metric([model, "thread"], stats.off_loop)
            busy.add_metric([model], stats.seconds)
            segments.add_metric([model, "hit"], stats.segment_hits)
            segments.add_metric([model, "miss"], stats.segments - stats.segment_hits)
            evictions.add_metric([model], stats.evictions)
            size.add_metric([model], stats.cache_bytes)
            enabled.add_metric([model], stats.cached)
        yield from (encoded, busy, segments, evictions, size, enabled)


class ProofCollector(Collector):
    """What is known of the tokens of workers, by model."""

    def __init__(self, proofs: TokenProofs) -> None:
        self._proofs = proofs

    def describe(self) -> Iterator[Metric]:
        """Nothing, as for KvCollector."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        workers = table.TOKEN_PROOF_WORKERS.family()
        for model, counts in self._proofs.counts().items():
            for state in STATES:
                workers.add_metric([model, state], counts[state])
        yield workers
