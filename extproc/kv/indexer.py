"""Tracks which KV pages each data-parallel rank caches, from the engines' KV events.

Joins the parts: the subscriber reads the sockets of all ranks in slices, an EventApplier per rank
puts its events into the one index, and routing reads from the rank's pages whether they are
trusted. The indexer also sweeps out, in slices too, what dropped and restarted ranks leave in the
index.
"""

import asyncio
from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Final, NamedTuple

from msgspec import Struct

from extproc.clock import Clock
from extproc.kv.event_applier import EventApplier
from extproc.kv.events import LoadStat
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher
from extproc.kv.rank_pages import RankPages
from extproc.kv.stats import IndexStats, RankStats, StreamStats, summed
from extproc.kv.subscriptions.subscriber import KvSubscriber
from extproc.kv.subscriptions.subscription import (
    EventEndpoint,
    SubscriberSettings,
    SubscriptionState,
)

__all__ = ["KvIndexer", "KvTotals", "RankSource", "RankState"]

_SEEDS_KEPT: Final = 4096
_SLICE_SECONDS: Final = 0.001
_REST_SECONDS: Final = 0.004
_SCRUB_STEP_PAGES: Final = 128
# What cleared and dropped ranks leave takes memory and nothing else.
_SWEEP_EVERY_SECONDS: Final = 0.05
_TIDY_EVERY_SECONDS: Final = 5.0
# Measured at a million pages, with everything that the index keeps about them.
_PAGE_BYTES: Final = 250


class RankSource(Struct, frozen=True, kw_only=True):
    """A rank to follow: `worker` is the worker's URL, `dp_rank` its data-parallel rank.

    `page_size` (in tokens; bigram: in pairs) and `bigram` are expectations: if the rank's events
    say otherwise, the events win.
    """

    worker: str
    dp_rank: int
    endpoint: EventEndpoint
    page_size: int
    bigram: bool = False


class RankState(Struct, frozen=True, kw_only=True):
    """The state of one rank, now.

    `trusted` and `reason` are those of its pages. `pages_by_tier` counts every page once, on its
    best tier: device, host, below. `stream` and `counts` are live and go on counting.
    """

    connected: bool
    trusted: bool
    reason: str
    partial: bool
    pages: int
    pages_by_tier: tuple[int, int, int]
    last_event_age_seconds: float | None
    stream: SubscriptionState
    counts: RankStats


class KvTotals(Struct, frozen=True, kw_only=True):
    """The sums of all ranks; counts include ranks that have left, so they never fall.

    `retired_pages` belonged to dropped and cleared ranks and still have to be swept out.
    """

    ranks: int
    connected_ranks: int
    trusted_ranks: int
    pages: int
    retired_pages: int
    estimated_bytes: int
    streams: StreamStats
    events: RankStats
    index: IndexStats


class _Followed(NamedTuple):
    applier: EventApplier
    stream: SubscriptionState


class KvIndexer:
    """Follows ranks and indexes their pages; made and used on one running event loop.

    The pages that `follow` gives are the handle of the rank in all other calls.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_pages: int,
        settings: SubscriberSettings,
    ) -> None:
        """`max_pages` bounds the sum of all ranks' pages; a page takes about 250 bytes."""
        hasher = PrefixHasher()
        self.index = PrefixIndex(hasher, max_pages)
        self._clock = clock
        self._subscriber = KvSubscriber(clock, settings)
        self._seed = lru_cache(_SEEDS_KEPT)(hasher.seed)
        self._followed: dict[RankPages, _Followed] = {}
        # Of ranks that have been unfollowed.
        self._past_streams = StreamStats()
        self._past_events = RankStats()

    def follow(
        self,
        source: RankSource,
        report_load: Callable[[LoadStat], None],
        report_break: Callable[[], None],
    ) -> RankPages:
        """Subscribe to a rank's events; gives its pages, the same object until `unfollow`.

        `report_load` takes the newest of the engine's load reports. `report_break` is called when
        the connection breaks, or another engine process uses it. Raises ValueError for a page
        size below 1, and RuntimeError after `close`.
        """
        pages = self.index.add(
            source.worker, source.page_size, dp_rank=source.dp_rank, bigram=source.bigram
        )
        applier = EventApplier(self.index, pages, self._seed, report_load, report_break)
        try:
            stream = self._subscriber.add(source.endpoint, applier)
        except BaseException:
            self.index.drop(pages)
            raise
        self._followed[pages] = _Followed(applier, stream)
        return pages

    async def unfollow(self, pages: RankPages) -> None:
        """End the subscription, then drop the pages; idempotent.

        From the call on, the pages are not trusted.
        """
        followed = self._followed.pop(pages, None)
        if followed is None:
            return
        applier, stream = followed
        pages.trusted, pages.reason = False, "unfollowed"
        try:
            await self._subscriber.remove(applier)
        finally:
            self._past_streams = summed(StreamStats, [self._past_streams, stream])
            self._past_events = summed(RankStats, [self._past_events, applier.counts])
            self.index.drop(pages)

    def seed(self, cache_salt: str | None, lora: str | int | None) -> int:
        """The value at which the prefix hashes of a namespace start."""
        return self._seed(cache_salt, lora)

    async def run(self) -> None:
        """Sweep out what dropped ranks have left in the index, and tidy it, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            group.create_task(self._tidy())

    async def close(self) -> None:
        """End all subscriptions; the pages stay, untrusted."""
        for pages in self._followed:
            pages.trusted, pages.reason = False, "unfollowed"
        await self._subscriber.close()

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(_SWEEP_EVERY_SECONDS)
            while self._scrub_slice():
                await self._clock.sleep(_REST_SECONDS)

    async def _tidy(self) -> None:
        while True:
            await self._clock.sleep(_TIDY_EVERY_SECONDS)
            until = self._clock.monotonic() + _SLICE_SECONDS
            for _ in self.index.tidy():
                if self._clock.monotonic() >= until:
                    await self._clock.sleep(_REST_SECONDS)
                    until = self._clock.monotonic() + _SLICE_SECONDS

    def _scrub_slice(self) -> bool:
        until = self._clock.monotonic() + _SLICE_SECONDS
        while self.index.scrub(_SCRUB_STEP_PAGES):
            if self._clock.monotonic() >= until:
                return True
        return False

    # -- states and sums

    def state(self, pages: RankPages) -> RankState | None:
        """The state of a rank, or None if it is not followed."""
        followed = self._followed.get(pages)
        return None if followed is None else self._state(pages, *followed)

    def states(self) -> dict[RankPages, RankState]:
        """The states of all ranks that are followed."""
        return {pages: self._state(pages, *one) for pages, one in self._followed.items()}

    def totals(self) -> KvTotals:
        """The sums of all ranks, as a copy."""
        followed = self._followed.values()
        pages, retired_pages = self.index.page_count, self.index.retired_pages
        return KvTotals(
            ranks=len(followed),
            connected_ranks=sum(one.stream.connected for one in followed),
            trusted_ranks=sum(pages.trusted for pages in self._followed),
            pages=pages,
            retired_pages=retired_pages,
            estimated_bytes=(pages + retired_pages) * _PAGE_BYTES,
            streams=summed(StreamStats, [self._past_streams, *(one.stream for one in followed)]),
            events=summed(
                RankStats, [self._past_events, *(one.applier.counts for one in followed)]
            ),
            index=copy(self.index.counts),
        )

    def _state(
        self, pages: RankPages, applier: EventApplier, stream: SubscriptionState
    ) -> RankState:
        _, below_device, below_host = pages.pages_below
        last = stream.last_event_at
        return RankState(
            connected=stream.connected,
            trusted=pages.trusted,
            reason=pages.reason,
            partial=stream.partial,
            pages=pages.page_count,
            pages_by_tier=(pages.page_count - below_device, below_device - below_host, below_host),
            last_event_age_seconds=None if last is None else self._clock.monotonic() - last,
            stream=stream,
            counts=applier.counts,
        )
