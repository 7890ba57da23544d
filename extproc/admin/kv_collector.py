"""What is known of the workers' KV caches, read at scrape time.

Counters are of all ranks together and include ranks that are gone, so that they never go back;
gauges are per rank and vanish with it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from extproc.clock import Clock
from extproc.kv.indexer import KvTotals
from extproc.routing.ranks import Ranks
from extproc.tokenization.encoder import PromptEncoder

__all__ = ["EncoderCollector", "KvCollector"]

_TIERS: Final = ("device", "host", "below")
_COUNTERS: Final[tuple[tuple[str, str, Callable[[KvTotals], int]], ...]] = (
    ("kv_batches", "Batches of KV events that were applied.", lambda all_: all_.streams.batches),
    ("kv_bytes", "Bytes of these batches.", lambda all_: all_.streams.bytes),
    ("kv_gaps", "Gaps in the numbers of batches.", lambda all_: all_.streams.gaps),
    ("kv_restarts", "Engines found to have restarted.", lambda all_: all_.streams.restarts),
    ("kv_replays", "Replays asked for.", lambda all_: all_.streams.replays),
    ("kv_replay_failures", "Replays without an end.", lambda all_: all_.streams.replay_failures),
    ("kv_malformed_messages", "Messages that are none.", lambda all_: all_.streams.malformed),
    (
        "kv_dropped_batches",
        "Batches let go while they waited for a replay.",
        lambda all_: all_.streams.dropped,
    ),
    ("kv_load_reports", "Load reports of engines.", lambda all_: all_.streams.load_reports),
    (
        "kv_unreadable_load_reports",
        "Load reports that could not be read.",
        lambda all_: all_.events.unreadable_loads,
    ),
    (
        "kv_unreadable_batches",
        "Batches that could not be read, or not all that they removed.",
        lambda all_: all_.events.unreadable_batches,
    ),
    (
        "kv_skipped_events",
        "Events of unknown kind, malformed or beyond a limit.",
        lambda all_: all_.events.skipped_events,
    ),
    (
        "kv_odd_sized_events",
        "Events with pages of another size than announced.",
        lambda all_: all_.events.odd_sized_events,
    ),
)
_KEPT_OUT: Final[tuple[tuple[str, Callable[[KvTotals], int]], ...]] = (
    ("unknown_parent", lambda all_: all_.index.orphans),
    ("token_count", lambda all_: all_.index.mismatched),
    ("over_limit", lambda all_: all_.index.over_limit),
    ("other_units", lambda all_: all_.events.foreign_unit_pages),
)


class KvCollector(Collector):
    """Streams, events, pages and trust."""

    def __init__(self, ranks: Ranks, clock: Clock) -> None:
        self._ranks = ranks
        self._clock = clock

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        totals = self._ranks.indexer.totals()
        for name, text, read in _COUNTERS:
            yield CounterMetricFamily(f"extproc_{name}", text, value=read(totals))
        yield from self._events(totals)
        yield from self._index(totals)
        yield from self._per_rank()

    def _events(self, totals: KvTotals) -> Iterator[Metric]:
        events = totals.events
        kinds = CounterMetricFamily("extproc_kv_events", "KV events by kind.", labels=["kind"])
        kinds.add_metric(["stored"], events.stored_events)
        kinds.add_metric(["removed"], events.removed_events)
        kinds.add_metric(["cleared"], events.cleared_events)
        yield kinds
        pages = CounterMetricFamily(
            "extproc_kv_event_pages", "Pages that events named.", labels=["kind", "tier"]
        )
        for kind, counts in (("stored", events.stored_pages), ("removed", events.removed_pages)):
            for tier, count in zip(_TIERS, counts, strict=True):
                pages.add_metric([kind, tier], count)
        yield pages

    def _index(self, totals: KvTotals) -> Iterator[Metric]:
        kept_out = CounterMetricFamily(
            "extproc_kv_pages_kept_out", "Stored pages that were not kept.", labels=["why"]
        )
        for why, read in _KEPT_OUT:
            kept_out.add_metric([why], read(totals))
        yield kept_out
        yield CounterMetricFamily(
            "extproc_kv_unknown_removals",
            "Removed pages that were not known.",
            value=totals.index.unknown_removals,
        )
        for name, text, value in (
            ("kv_pages", "Pages held, summed over ranks.", totals.pages),
            ("kv_index_bytes", "Estimated memory of the index.", totals.estimated_bytes),
            ("kv_ranks", "Ranks that are followed.", totals.ranks),
            ("kv_ranks_untrusted", "Ranks not believed now.", totals.ranks - totals.trusted_ranks),
        ):
            yield GaugeMetricFamily(f"extproc_{name}", text, value=value)

    def _per_rank(self) -> Iterator[Metric]:
        labels = ["worker", "rank"]
        trusted = GaugeMetricFamily(
            "extproc_kv_rank_trusted", "1 if what the rank holds is believed.", labels=labels
        )
        pages = GaugeMetricFamily(
            "extproc_kv_rank_pages",
            "Pages the rank holds, each where it lies best.",
            labels=[*labels, "tier"],
        )
        age = GaugeMetricFamily(
            "extproc_kv_last_event_age_seconds", "Time since the last batch.", labels=labels
        )
        requests = GaugeMetricFamily(
            "extproc_rank_requests", "Requests on the rank, as far as is known.", labels=labels
        )
        ahead = GaugeMetricFamily(
            "extproc_rank_prefill_tokens_ahead", "Tokens it has to prefill first.", labels=labels
        )
        speed = GaugeMetricFamily(
            "extproc_rank_prefill_tokens_per_second", "Prefill speed learnt.", labels=labels
        )
        now = self._clock.monotonic()
        seen: set[tuple[str, str]] = set()
        for rank in self._ranks:
            values = (rank.worker.url, str(rank.dp_rank))
            if values in seen:
                continue  # two ids share a URL while a pod is replaced
            seen.add(values)
            requests.add_metric(values, rank.load.requests(now))
            ahead.add_metric(values, rank.load.prefill_tokens_ahead(now))
            speed.add_metric(values, rank.load.prefill_tokens_per_second)
            state = self._ranks.state(rank)
            if state is None:
                continue
            trusted.add_metric(values, state.trusted)
            for tier, count in zip(_TIERS, state.pages_by_tier, strict=True):
                pages.add_metric([*values, tier], count)
            if state.last_event_age_seconds is not None:
                age.add_metric(values, state.last_event_age_seconds)
        yield from (trusted, pages, age, requests, ahead, speed)


class EncoderCollector(Collector):
    """Text to tokens, by model; models that share a tokenizer show the same figures."""

    def __init__(self, encoders: Mapping[str, PromptEncoder]) -> None:
        self._encoders = encoders

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        encoded = CounterMetricFamily(
            "extproc_tokenizations",
            "Prompts encoded at once on the event loop, or in a thread.",
            labels=["model", "place"],
        )
        busy = CounterMetricFamily(
            "extproc_tokenization_busy_seconds", "Time spent on that.", labels=["model"]
        )
        segments = CounterMetricFamily(
            "extproc_token_segments", "Pieces of text looked up.", labels=["model", "result"]
        )
        evictions = CounterMetricFamily(
            "extproc_token_cache_evictions", "Pieces dropped for want of room.", labels=["model"]
        )
        size = GaugeMetricFamily(
            "extproc_token_cache_bytes", "Memory of the pieces kept.", labels=["model"]
        )
        enabled = GaugeMetricFamily(
            "extproc_token_cache_enabled",
            "0 where pieces of a text can not be encoded one by one.",
            labels=["model"],
        )
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
