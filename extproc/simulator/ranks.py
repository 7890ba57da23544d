"""A rank of an engine: its queue, its prefix cache, its prefill and its running requests."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from extproc.simulator.cache_events import CacheEvent
from extproc.simulator.generation import Generation, Job
from extproc.simulator.holdings import HeldPages
from extproc.simulator.rank_caches import new_cache
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.time_model import TimeModel

__all__ = ["Observer", "OutputIds", "Rank", "RankLoad"]


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's counters at one moment; tokens as the engine's own load report has them."""

    running: int
    waiting: int
    used_tokens: int  # prompts and output of running requests
    waiting_tokens: int  # prompts of waiting requests
    waiting_uncached_tokens: int  # the part of them that was not cached at arrival
    prefilled_tokens: int  # since the start, without cached tokens
    prefill_microseconds: int  # time spent on them


class Observer(Protocol):
    """Receives every change of a rank at once."""

    def cache_changed(self, rank: int, events: list[CacheEvent]) -> None: ...

    def load_changed(self, rank: int) -> None: ...


OutputIds = Callable[[int], Sequence[int]]


class Rank:
    """One scheduler with its waiting, prefilling and running requests."""

    def __init__(
        self,
        number: int,
        settings: SimulatorSettings,
        output_ids: OutputIds,
        observer: Observer | None,
    ) -> None:
        self.tokens_generated = 0
        self.most_running = 0
        self.times = TimeModel(
            prefill_tokens_per_second=settings.prefill_tokens_per_second,
            seconds_per_token=settings.decode_milliseconds_per_token / 1000,
        )
        self.number = number
        self._limit = settings.max_running_requests
        self._output_ids = output_ids
        self._observer = observer
        self._cache = new_cache(settings, record_events=observer is not None)
        self._prefilled_tokens = 0
        self._prefill_seconds = 0.0
        self._waiting: deque[Generation] = deque()
        self._prefilling: Generation | None = None
        self._running: set[Generation] = set()  # the one in prefill included
        self._awaiting_kv: set[Generation] = set()  # wait for KV from another worker
        self._keeping: set[Generation] = set()  # finished; their blocks wait to be fetched

    def __iter__(self) -> Iterator[Generation]:
        yield from self._running
        yield from self._waiting
        yield from self._awaiting_kv

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._awaiting_kv)

    @property
    def is_idle(self) -> bool:
        return not len(self) and not self._keeping

    def load(self) -> RankLoad:
        waiting = [*self._waiting, *self._awaiting_kv]
        return RankLoad(
            running=len(self._running),
            waiting=len(waiting),
            used_tokens=sum(
                item.prompt_tokens + item.produced * item.job.sequences for item in self._running
            ),
            waiting_tokens=sum(item.prompt_tokens for item in waiting),
            waiting_uncached_tokens=sum(item.uncached_tokens for item in waiting),
            prefilled_tokens=self._prefilled_tokens,
            prefill_microseconds=round(self._prefill_seconds * 1e6),
        )

    def cached_tokens(self) -> tuple[int, int]:
        return self._cache.used_tokens, self._cache.host_used_tokens

    def kv_usage(self) -> float:
        return self._cache.usage()

    def holding(self, job: Job) -> HeldPages:
        return self._cache.holding(job)

    def flush_cache(self) -> None:
        self._cache.flush()
        self.report()

    def report(self) -> None:
        """Report the changes to the observer; they are not kept here."""
        if self._observer is None:
            return
        if events := self._cache.take_events():
            self._observer.cache_changed(self.number, events)
        self._observer.load_changed(self.number)

    def is_prefilling(self, generation: Generation) -> bool:
        return self._prefilling is generation

    def enter(self, generation: Generation) -> None:
        if generation.job.transferred:
            generation.uncached_tokens = 0
            self._awaiting_kv.add(generation)
        else:
            generation.uncached_tokens -= generation.holding.tokens_found()
            self._waiting.append(generation)
            self._admit(generation.arrived_at)
        self.report()

    def kv_arrived(self, generation: Generation) -> None:
        self._awaiting_kv.remove(generation)
        self._waiting.append(generation)
        self._admit(generation.arrived_at)
        self.report()

    def prefilled(self, generation: Generation, at: float) -> None:
        if self._prefilling is generation:
            self._prefilling = None
            self._prefilled_tokens += generation.uncached_tokens
            self._prefill_seconds += self.times.prefill_seconds(generation.uncached_tokens)
            generation.holding.insert(at)
            self._admit(at)
            self.report()

    def decoded(self, generation: Generation) -> None:
        if generation.holding.decoded(generation.produced, self._output_ids):
            self.report()

    def leave(self, generation: Generation) -> None:
        now = asyncio.get_running_loop().time()
        if generation.keeps_blocks:
            self._keeping.add(generation)
        else:
            self._release(generation, now)
        self._awaiting_kv.discard(generation)
        if self._prefilling is generation:
            self._prefilling = None
        if generation in self._running:
            self._running.remove(generation)
        elif generation in self._waiting:
            self._waiting.remove(generation)
        self._admit(now)
        self.report()

    def free_blocks(self, generation: Generation) -> None:
        """Release the blocks that `leave` has kept; a second call does nothing."""
        if generation in self._keeping:
            self._keeping.remove(generation)
            self._release(generation, asyncio.get_running_loop().time())
            self.report()

    def _release(self, generation: Generation, now: float) -> None:
        output = self._output_ids(generation.produced) if generation.produced else None
        generation.holding.release(now, output)

    def _admit(self, at: float) -> None:
        """Start the next prefill if the rank is free for it; `at` is when it became free."""
        if self._prefilling is not None or not self._waiting or len(self._running) >= self._limit:
            return
        if not self._waiting[0].holding.fits() and (self._running or self._keeping):
            return
        generation = self._waiting.popleft()
        self._prefilling = generation
        self._running.add(generation)
        self.most_running = max(self.most_running, len(self._running))
        started_at = self.times.prefill_starts_at(generation.arrived_at, at)
        generation.prefill_starts_at = started_at
        generation.holding.acquire(started_at)
        if not generation.job.transferred:
            generation.uncached_tokens = generation.prompt_tokens - generation.cached_tokens
        generation.wake()
