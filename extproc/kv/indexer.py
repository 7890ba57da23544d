"""What every rank of every worker holds, kept current from the events they publish.

Ties the room together: the subscriber reads the sockets in slices, a EventApplier for each rank
puts what it brings into the one index, and the holder's trust tells routing whether to
believe it. What dropped and restarted ranks leave behind in the index is swept out here, in
slices too.
"""

import asyncio
from collections.abc import Callable, Hashable
from copy import copy
from functools import lru_cache
from typing import Final

from msgspec import Struct

from extproc.clock import Clock
from extproc.kv.event_applier import EventApplier
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher
from extproc.kv.rank_pages import RankPages
from extproc.kv.stats import IndexStats, RankStats, StreamStats, summed
from extproc.kv.subscriptions.subscriber import (
    EventEndpoint,
    KvSubscriber,
    SubscriberSettings,
    SubscriptionState,
)
from extproc.kv.wire import LoadStat

__all__ = ["KvIndexer", "KvTotals", "RankSource", "RankState"]

_SEEDS_KEPT: Final = 4096
_SLICE_SECONDS: Final = 0.001
_REST_SECONDS: Final = 0.004
_SCRUB_STEP_PAGES: Final = 128
_TIDY_EVERY_SECONDS: Final = 5.0
# Measured at a million pages, with all that the index keeps about them.
_PAGE_BYTES: Final = 250


class RankSource(Struct, frozen=True, kw_only=True):
    """Where a rank publishes and in which pages; `page_size` in tokens (bigram: in pairs).

    Page size and bigram are what is expected: the rank's events have the last word.
    """

    endpoint: EventEndpoint
    page_size: int
    bigram: bool = False


class RankState(Struct, frozen=True, kw_only=True):
    """One rank, as it is now.

    `pages_by_tier` counts every page once, where it lies best: device, host, below. `reason` is
    why it is trusted ("complete", "partial") or not ("connecting", "disconnected", "replaying",
    "verifying", "gap", "behind", "restarted", "unreadable"). `stream` and `counts` go on counting.
    """

    holder: RankPages
    endpoint: EventEndpoint
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
    """All ranks together; the counts include ranks that are gone, so they never go back.

    `retired_pages` are of dropped and cleared ranks and still to be swept out.
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


class _Rank:
    __slots__ = ("endpoint", "sink", "stream")

    def __init__(
        self, sink: EventApplier, endpoint: EventEndpoint, stream: SubscriptionState
    ) -> None:
        self.sink = sink
        self.endpoint = endpoint
        self.stream = stream


def _ignore(*_: object) -> None:
    pass


class KvIndexer:
    """All ranks and the index of what they hold; made and used on one running event loop.

    `on_clear` is called when what a rank held is void, `on_trust` when a rank begins or ceases
    to be trusted; both at once, with the rank's key, and only for ranks that are followed.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_pages: int,
        hasher: PrefixHasher | None = None,
        settings: SubscriberSettings | None = None,
        on_clear: Callable[[Hashable], None] = _ignore,
        on_trust: Callable[[Hashable, bool], None] = _ignore,
    ) -> None:
        """`max_pages` bounds the (page, rank) pairs kept; about 250 bytes each."""
        hasher = hasher or PrefixHasher()
        self.index = PrefixIndex(hasher, max_pages)
        self._clock = clock
        self._subscriber = KvSubscriber(clock, settings)
        self._seed = lru_cache(_SEEDS_KEPT)(hasher.seed)
        self._on_clear = on_clear
        self._on_trust = on_trust
        self._ranks: dict[Hashable, _Rank] = {}
        self._trusted: dict[Hashable, RankPages] = {}
        # Of ranks that are followed no more.
        self._past_streams = StreamStats()
        self._past_events = RankStats()
        self._something_to_scrub = asyncio.Event()

    def follow(
        self, key: Hashable, source: RankSource, on_load: Callable[[LoadStat], None]
    ) -> RankPages:
        """Subscribe to a rank; its holder is the same object until it is unfollowed.

        `on_load` gets the newest of the engine's load reports. Raises ValueError when the rank
        is followed already, and RuntimeError after `close`.
        """
        if key in self._ranks:
            raise ValueError(f"already followed: {key}")
        holder = self.index.add(str(key), source.page_size, bigram=source.bigram)

        def on_clear() -> None:
            self._something_to_scrub.set()
            self._on_clear(key)

        def on_trust(trusted: bool) -> None:
            if trusted:
                self._trusted[key] = holder
            else:
                self._trusted.pop(key, None)
            self._on_trust(key, trusted)

        sink = EventApplier(
            self.index,
            holder,
            self._seed,
            on_clear=on_clear,
            on_trust=on_trust,
            on_load=on_load,
        )
        try:
            stream = self._subscriber.add(key, source.endpoint, sink)
        except BaseException:
            self.index.drop(holder)
            raise
        self._ranks[key] = _Rank(sink, source.endpoint, stream)
        return holder

    async def unfollow(self, key: Hashable) -> None:
        """End the subscription, then forget what was held; idempotent.

        From the call on the rank is neither trusted nor told of, and may be followed anew.
        """
        rank = self._ranks.pop(key, None)
        if rank is None:
            return
        self._trusted.pop(key, None)
        try:
            await self._subscriber.remove(key)
        finally:
            self._past_streams = summed(StreamStats, [self._past_streams, rank.stream])
            self._past_events = summed(RankStats, [self._past_events, rank.sink.counts])
            self.index.drop(rank.sink.holder)
            self._something_to_scrub.set()

    def trusted_holder(self, key: Hashable) -> RankPages | None:
        """The rank's holder while what it holds can be believed."""
        return self._trusted.get(key)

    def seed(self, cache_salt: str | None, lora: str | int | None) -> int:
        """Where the prefix hashes of a namespace start."""
        return self._seed(cache_salt, lora)

    async def run(self) -> None:
        """Sweep what dropped ranks have left out of the index, and tidy it, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            group.create_task(self._tidy())

    async def close(self) -> None:
        """End all subscriptions; what is held stays, untrusted."""
        self._trusted.clear()
        await self._subscriber.close()

    async def _sweep(self) -> None:
        while True:
            await self._something_to_scrub.wait()
            self._something_to_scrub.clear()
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

    # -- what can be seen

    def state(self, key: Hashable) -> RankState | None:
        """How a rank is now, or None if it is not followed."""
        rank = self._ranks.get(key)
        return None if rank is None else self._state(rank)

    def states(self) -> dict[Hashable, RankState]:
        """How all ranks are now, by key."""
        return {key: self._state(rank) for key, rank in self._ranks.items()}

    def totals(self) -> KvTotals:
        """All ranks together, in a value of its own."""
        ranks = self._ranks.values()
        pages, retired_pages = self.index.pages, self.index.retired_pages
        return KvTotals(
            ranks=len(ranks),
            connected_ranks=sum(rank.stream.connected for rank in ranks),
            trusted_ranks=len(self._trusted),
            pages=pages,
            retired_pages=retired_pages,
            estimated_bytes=(pages + retired_pages) * _PAGE_BYTES,
            streams=summed(StreamStats, [self._past_streams, *(rank.stream for rank in ranks)]),
            events=summed(RankStats, [self._past_events, *(rank.sink.counts for rank in ranks)]),
            index=copy(self.index.counts),
        )

    def _state(self, rank: _Rank) -> RankState:
        sink, stream = rank.sink, rank.stream
        holder = sink.holder
        _, below_device, below_host = holder.pages_below
        last = stream.last_event_at
        return RankState(
            holder=holder,
            endpoint=rank.endpoint,
            connected=stream.connected,
            trusted=sink.trusted,
            reason=sink.reason,
            partial=stream.partial,
            pages=holder.pages,
            pages_by_tier=(holder.pages - below_device, below_device - below_host, below_host),
            last_event_age_seconds=None if last is None else self._clock.monotonic() - last,
            stream=stream,
            counts=sink.counts,
        )
